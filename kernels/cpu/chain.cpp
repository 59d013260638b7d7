// Layers one after the other on a few images at a time. chain.py says which, and why.

#include <optional>

#include "strided.h"
#include "winograd.h"

namespace {

enum class Kind : I { WINOGRAD, TAPS, MEAN, SPREAD, SCALE, DEPTHWISE };
constexpr I NOWHERE = -1, GIVEN = -2, WANTED = -3;  // instead of a place

// y = finish(what `kind` makes of x). Places are floats from the start of a thread's memory, for one image.
struct Layer {
    Kind kind;
    Shape shape;
    I x, add, y;
    I signs;  // where those of y are, for one image, in vectors from the first layer's on
    I relu;   // y is its result, and its signs are kept; else y is zero where they are not positive
    const float *weight, *bias;

    I x_floats() const { return shape.h * shape.w * shape.c; }
    I y_floats() const { return shape.y_h * shape.y_w * shape.k; }
    Winograd winograd(I n) const { return {{n, shape.h, shape.w}, shape.c, shape.k}; }
};

// y[n][k] = mean over pixels of x[n][h][w][k], k in whole vectors
void mean(const Shape& s, I n, const float* x, float* y) {
    const I pixels = s.h * s.w;
    for (I image = 0; image < n; image++) {
        for (I p = 0; p < s.k; p += LANES) {
            vec sum = {};
            for (I at = 0; at < pixels; at++) sum += load(x + (image * pixels + at) * s.k + p);
            store(y + image * s.k + p, sum / float(pixels));
        }
    }
}

// The gradient of that: y[n][h][w][k] = finish(x[n][k] / pixels)
void spread(const Shape& s, I n, const float* x, const Finish& finish) {
    const I pixels = s.y_h * s.y_w;
    for (I image = 0; image < n; image++) {
        for (I p = 0; p < s.k; p += LANES) {
            const vec share = load(x + image * s.k + p) / float(pixels);
            for (I at = 0; at < pixels; at++) finish((image * pixels + at) * s.k + p, share, LANES);
        }
    }
}

// y[n][h][w][k] = finish(x[n][h][w][k] * weight[k]), k in whole vectors
void scale(const Shape& s, I n, const float* x, const float* weight, const Finish& finish) {
    for (I at = 0; at < n * s.h * s.w; at++) {
        for (I p = 0; p < s.k; p += LANES) {
            finish(at * s.k + p, load(x + at * s.k + p) * load(weight + p) + finish.shift(p, LANES), LANES);
        }
    }
}

// weight[tap][k], k in whole vectors
void depthwise(const Shape& s, I n, const float* x, const float* weight, const Finish& finish) {
    for (I i = 0; i < s.y_h; i++) {
        for (I j = 0; j < s.y_w; j++) {
            Tap taps[MOST_TAPS];
            const I count = taps_inside(s, i, j, taps);
            for (I image = 0; image < n; image++) {
                const float* from[MOST_TAPS];
                for (I t = 0; t < count; t++) from[t] = x + ((image * s.h + taps[t].h) * s.w + taps[t].w) * s.k;
                const I at = ((image * s.y_h + i) * s.y_w + j) * s.k;
                for (I p = 0; p < s.k; p += LANES) {
                    vec sum = finish.shift(p, LANES);
                    for (I t = 0; t < count; t++) sum += load(from[t] + p) * load(weight + taps[t].index * s.k + p);
                    finish(at + p, sum, LANES);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

// Floats in the weight of a layer of that kind. shape: lines and columns of the kernel, channels in and out, stride,
// padding, whether it is the transpose; in chain_weight also the strides of w, from one channel out, channel in and tap to
// the next.
int chain_weight_size(int64_t kind, const int64_t* shape) {
    const I taps = shape[0] * shape[1], c = shape[2], k = shape[3];
    return Kind(kind) == Kind::WINOGRAD ? winograd_floats(c, k) : taps_floats(taps, c, k);
}

// u = w as the layers of that kind read it.
void chain_weight(int64_t kind, const int64_t* shape, const float* w, float* u, int threads) {
    const I taps = shape[0] * shape[1], c = shape[2], k = shape[3];
    const Weight weight{w, shape[7], shape[8], shape[9]};
    #pragma omp parallel num_threads(threads)
    if (Kind(kind) == Kind::WINOGRAD) {
        transform_weight(weight, c, k, u);
    } else {
        order_taps(weight, taps, c, k, u);
    }
}

// All layers on n images, `together` at a time. `floats`: what a thread's memory holds of one image.
void chain(
    const void* array,
    int64_t count,
    int64_t floats,
    const float* given,
    float* wanted,
    void* all_signs,
    int64_t n,
    int64_t together,
    int threads
) {
    const Layer* layers = static_cast<const Layer*>(array);
    std::vector<std::optional<Strided>> strided(count);
    I scratch_floats = 0, most_channels = 0;
    for (I i = 0; i < count; i++) {
        if (layers[i].kind == Kind::TAPS) strided[i].emplace(Strided{layers[i].shape});
        if (layers[i].kind == Kind::WINOGRAD) scratch_floats = std::max(scratch_floats, layers[i].winograd(1).scratch_floats());
        most_channels = std::max(most_channels, layers[i].shape.c);
    }
    const Scratch zeros(most_channels, true);
    #pragma omp parallel num_threads(threads)
    {
        const Scratch memory(floats * together), scratch(scratch_floats, true);
        #pragma omp for schedule(dynamic)
        for (I first = 0; first < n; first += together) {
            const I now = std::min(together, n - first);
            const auto from = [&](I place, I size) -> const float* {
                if (place == NOWHERE) return nullptr;
                return place == GIVEN ? given + first * size : memory + place * together;
            };
            for (I i = 0; i < count; i++) {
                const Layer& layer = layers[i];
                const I size = layer.y_floats();
                const float *x = from(layer.x, layer.x_floats()), *add = from(layer.add, size);
                float* y = layer.y == WANTED ? wanted + first * size : memory + layer.y * together;
                Finish finish{layer.bias, add, layer.relu != 0, y};
                if (layer.signs != NOWHERE) {
                    Signs* signs = static_cast<Signs*>(all_signs) + layer.signs * n + first * size / LANES;
                    (layer.relu ? finish.keep : finish.clear) = signs;
                }
                switch (layer.kind) {
                    case Kind::WINOGRAD: {
                        const Winograd conv = layer.winograd(now);
                        conv.run(x, nullptr, nullptr, layer.weight, finish, 0, conv.tiles.count(), scratch, false);
                        break;
                    }
                    case Kind::TAPS:
                        strided[i]->run(x, layer.weight, finish, 0, now * strided[i]->bands, zeros, false);
                        break;
                    case Kind::MEAN:
                        mean(layer.shape, now, x, y);
                        break;
                    case Kind::SPREAD:
                        spread(layer.shape, now, x, finish);
                        break;
                    case Kind::SCALE:
                        scale(layer.shape, now, x, layer.weight, finish);
                        break;
                    case Kind::DEPTHWISE:
                        depthwise(layer.shape, now, x, layer.weight, finish);
                }
            }
        }
    }
}
}
