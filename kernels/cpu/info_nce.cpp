// What info_nce_torch.py does beside its matrix products, in float32, row after row.

#include <cmath>

#include "exponential.h"

// 1 / max(|x|, min_norm) of rows of x, which begin every `stride` numbers.
extern "C" void inverse_norms(
    const float* x, int64_t rows, int64_t depth, int64_t stride, float min_norm, float* out, int threads
) {
    #pragma omp parallel for num_threads(threads) if (rows * depth >= 1 << 16) schedule(static)
    for (I i = 0; i < rows; i++) {
        vec squares = {};
        for (I d = 0; d < depth; d += LANES) {
            const vec a = load(x + i * stride + d, depth - d);
            squares += a * a;
        }
        const float norm = std::sqrt(sum(squares));
        out[i] = 1 / (norm < min_norm ? min_norm : norm);
    }
}

// Of scores (rows, M), before they are divided by the temperature: losses (rows,), and each score's part of the gradient
// in its place, without factor (rows,), by which it has yet to be multiplied. Labels may be null.
extern "C" void info_nce_shares(
    float* scores,
    int64_t rows,
    int64_t M,
    const int64_t* positives,
    const int32_t* labels,
    const int32_t* candidate_labels,
    const float* weight,
    float temperature,
    float* losses,
    float* factor,
    int threads
) {
    #pragma omp parallel for num_threads(threads) if (rows * M >= 1 << 14) schedule(static)
    for (I i = 0; i < rows; i++) {
        float* const row = scores + i * M;
        float& own = row[positives[i]];
        const float positive = own / temperature;
        if (!labels) own = -INFINITY;
        vec sums = {};
        for (I j = 0; j < M; j += LANES) {
            const I count = std::min<I>(LANES, M - j);
            vec e = exponential(padded(load(row + j, count) / temperature, count, -INFINITY));
            if (labels) {
                ints theirs = {};
                std::memcpy(&theirs, candidate_labels + j, count * sizeof(int32_t));
                e = theirs == labels[i] ? vec{} : e;
            }
            store(row + j, e, count);
            sums += e;
        }
        const float rest = std::log(sum(sums)), gap = rest - positive;
        float loss = gap, total = rest;
        if (!labels || labels[i] == candidate_labels[positives[i]]) {  // the positive is not among the others
            const float soft = std::log1p(std::exp(-std::abs(gap)));
            loss = (gap < 0 ? 0 : gap) + soft;
            total = std::max(rest, positive) + soft;
        }
        total = std::exp(total);
        own = std::expm1(-loss) * total;
        losses[i] = loss;
        factor[i] = weight[i] / (temperature * total);
    }
}

// Gradients in normalised rows, each times its factor if there are any, become those in the rows x; norm: the inverse ones.
extern "C" void project(
    float* gradient,
    const float* factor,
    const float* x,
    int64_t stride,
    const float* norm,
    int64_t rows,
    int64_t depth,
    float min_norm,
    int threads
) {
    #pragma omp parallel for num_threads(threads) if (rows * depth >= 1 << 16) schedule(static)
    for (I i = 0; i < rows; i++) {
        float* const g = gradient + i * depth;
        const float* const from = x + i * stride;
        const float scale = norm[i] * min_norm < 1 ? norm[i] : 0;  // no direction, no gradient
        const float weight = factor ? factor[i] : 1;
        vec products = {};
        for (I d = 0; d < depth; d += LANES) products += load(g + d, depth - d) * load(from + d, depth - d);
        const float along = sum(products) * norm[i];
        for (I d = 0; d < depth; d += LANES) {
            const vec rest = load(g + d, depth - d) - along * (load(from + d, depth - d) * norm[i]);
            store(g + d, rest * (weight * scale), depth - d);
        }
    }
}
