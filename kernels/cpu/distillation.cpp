// Values, gradients and weights of the equations in distillation.py, sample after sample, in float32.

#include <cmath>

#include "exponential.h"

namespace {

INLINE vec magnitude(vec a) { return a < 0 ? -a : a; }

// Logits of one sample, a - b, divided by the temperature; b may be null.
struct Logits {
    const float *a, *b;
    float temperature = 1;

    INLINE vec operator()(I c, I count) const {
        vec x = load(a + c, count);
        if (b) x -= load(b + c, count);
        return x / temperature;
    }
};

// The softmax of a sample's logits. Both rows have room for whole vectors.
struct Softmax {
    float *shifted, *powers;  // logits less their maximum, -inf beyond the last class; their exponentials
    float total = 0, log_total = 0;

    Softmax(const Logits& logits, I C, float* shifted, float* powers) : shifted(shifted), powers(powers) {
        vec most = vec{} - INFINITY;
        for (I c = 0; c < C; c += LANES) {
            const vec x = padded(logits(c, C - c), C - c, -INFINITY);
            store(shifted + c, x);
            most = x > most ? x : most;
        }
        const float maximum = largest(most);
        vec sums = {};
        for (I c = 0; c < C; c += LANES) {
            const vec x = load(shifted + c) - maximum, e = exponential(x);
            store(shifted + c, x);
            store(powers + c, e);
            sums += e;
        }
        total = sum(sums);
        log_total = std::log(total);
    }
};

struct Problem {
    const float *plus, *minus, *teacher, *teacher_plus, *teacher_minus, *confidence;
    const I* labels;
    const float *weight, *ramp;
    float *total, *terms, *weights, *gradient;
    I B, C;
    float temperature, base_scale, difference_scale, weight_scale;
    I divergence;  // 0 KL, 1 l1, 2 l2
    bool weigh_base, weigh_difference;
};

// scale D(student, teacher) of one sample. put(c, slope, count) gets scale times its gradient in the student's logits.
template <class Put>
float divergence(I kind, const Logits& student, const Logits& teacher, I C, float scale, float* room, Put put) {
    vec value = {};
    if (kind == 0) {
        const I row = lanes_up(C);
        const Softmax q(student, C, room, room + row), p(teacher, C, room + 2 * row, room + 3 * row);
        for (I c = 0; c < C; c += LANES) {
            const vec probability = load(p.powers + c) / p.total;
            const vec ratio = (load(p.shifted + c) - p.log_total) - (load(q.shifted + c) - q.log_total);
            const vec term = probability * ratio;
            value += probability == 0 ? vec{} : term;  // 0 log 0 = 0, and a NaN stays one
            put(c, (load(q.powers + c) / q.total - probability) * scale, std::min<I>(LANES, C - c));
        }
    } else {
        for (I c = 0; c < C; c += LANES) {
            const I count = std::min<I>(LANES, C - c);
            const vec gap = student(c, count) - teacher(c, count);
            value += kind == 1 ? magnitude(gap) : gap * gap;
            const vec one = vec{} + 1.0f;
            const vec sign = (gap > 0 ? one : vec{}) - (gap < 0 ? one : vec{});
            put(c, (kind == 1 ? sign : 2 * gap) * scale, count);
        }
    }
    return scale * sum(value);
}

// The two terms of sample i: base and difference as they enter the total.
void sample(const Problem& p, I i, float* room, float& base, float& difference) {
    const I C = p.C, at = i * C;
    const auto row = [&](const float* x) { return x ? x + at : nullptr; };
    float* const slopes = p.gradient ? p.gradient + at : nullptr;
    float weight = 1;
    if (p.confidence) {
        const Softmax r({p.confidence + at, nullptr}, C, room, room + lanes_up(C));
        weight = r.powers[p.labels[i]] / r.total;
        p.weights[i] = weight * p.weight_scale;
    }
    if (p.weight) weight = p.weight[i];
    base = difference = 0;
    if (p.teacher) {
        const float t = p.temperature, scale = p.base_scale * (p.weigh_base ? weight : 1);
        const auto put = [&](I c, vec slope, I count) {
            if (slopes) store(slopes + c, slope, count);
        };
        base = t * divergence(0, {row(p.plus), nullptr, t}, {row(p.teacher), nullptr, t}, C, scale * t, room, put);
    }
    if (p.minus) {
        const float scale = p.difference_scale * (p.ramp ? *p.ramp : 1) * (p.weigh_difference ? weight : 1);
        const Logits student = {row(p.plus), row(p.minus)}, teacher = {row(p.teacher_plus), row(p.teacher_minus)};
        difference = divergence(p.divergence, student, teacher, C, scale, room, [&](I c, vec slope, I count) {
            if (!slopes) return;
            store(slopes + c, p.teacher ? load(slopes + c, count) + slope : slope, count);
            store(slopes + p.B * C + c, -slope, count);
        });
    }
}

}  // namespace

// total (B,), terms (2, B), weights (B,) and gradient (2, B, C) as Distilled has them before they are summed up.
// What may be null is left out: minus, teacher, confidence, weight, ramp and gradient.
extern "C" void distillation(
    const float* plus,
    const float* minus,
    const float* teacher,
    const float* teacher_plus,
    const float* teacher_minus,
    const float* confidence,
    const int64_t* labels,
    const float* weight,
    const float* ramp,
    float* total,
    float* terms,
    float* weights,
    float* gradient,
    int64_t B,
    int64_t C,
    float temperature,
    float base_scale,
    float difference_scale,
    float weight_scale,
    int64_t divergence,
    int64_t weigh_base,
    int64_t weigh_difference,
    int64_t reduce,
    int threads
) {
    const Problem problem = {
        plus, minus, teacher, teacher_plus, teacher_minus, confidence, labels, weight, ramp, total, terms, weights,
        gradient, B, C, temperature, base_scale, difference_scale, weight_scale, divergence, weigh_base != 0,
        weigh_difference != 0,
    };
    const Scratch kept(reduce ? 2 * B : 0);
    float* const base = reduce ? kept : terms;
    float* const difference = base + B;
    #pragma omp parallel num_threads(threads) if (B * C >= 1 << 14)
    {
        const Scratch room(4 * lanes_up(C));
        #pragma omp for schedule(static)
        for (I i = 0; i < B; i++) sample(problem, i, room, base[i], difference[i]);
    }
    if (!reduce) {
        for (I i = 0; i < B; i++) total[i] = base[i] + difference[i];
        return;
    }
    double sums[2] = {0, 0};  // one after the other, whatever the number of threads
    for (I i = 0; i < B; i++) sums[0] += base[i], sums[1] += difference[i];
    terms[0] = sums[0], terms[1] = sums[1], total[0] = sums[0] + sums[1];
}
