// The doors to winograd.h, and the gradient of the weight.

#include "winograd.h"

namespace {

// s[k][c] += sum over t of z[t][k] v[t][c].
template <int J>
void outer(const float* z, const float* v, float* s, I tiles, I k, I c) {
    constexpr int ROWS = SUMS / J;
    for (I row = 0; row < k; row += ROWS) {
        for (I p = 0; p < c; p += J * LANES) {
            vec sum[ROWS][J];
            float* target = s + row * c + p;
            for (int r = 0; r < ROWS; r++) {
                for (int j = 0; j < J; j++) sum[r][j] = load(target + r * c + LANES * j);
            }
            accumulate(sum, z + row, 1, k, v + p, c, tiles);
            for (int r = 0; r < ROWS; r++) {
                for (int j = 0; j < J; j++) store(target + r * c + LANES * j, sum[r][j]);
            }
        }
    }
}

// A g: the transpose of OUTPUT.
constexpr auto UPSTREAM = [](const vec (&g)[4], vec (&o)[6]) {
    const vec a = g[0] + P2 * g[2], b = P * (g[1] + P2 * g[3]);
    const vec e = g[0] + Q2 * g[2], f = Q * (g[1] + Q2 * g[3]);
    o[0] = g[0];
    o[1] = a + b;
    o[2] = a - b;
    o[3] = e + f;
    o[4] = e - f;
    o[5] = g[3];
};

// G^T s: the transpose of TAPS.
constexpr auto TAPS_GRADIENT = [](const vec (&s)[6], vec (&o)[3]) {
    const vec a = AT_P * (s[1] + s[2]), b = AT_P * P * (s[1] - s[2]);
    const vec e = AT_Q * (s[3] + s[4]), f = AT_Q * Q * (s[3] - s[4]);
    o[0] = AT_0 * s[0] + a + e;
    o[1] = b + f;
    o[2] = P2 * a + Q2 * e + s[5];
};

// z[point][slot][k] = A g A^T of the 4 x 4 pixels of a tile.
void transform_upstream(const float* g, const Tiles& tiles, const Tiles::Place& place, I k, float* z, I point) {
    const float* corner = g + tiles.start(place, 0, k);
    for (I p = 0; p < k; p += LANES) {
        const auto pixel = [&](int i, int j) {
            const bool inside = place.top + i < tiles.h && place.left + j < tiles.w;
            return inside ? load(corner + (i * tiles.w + j) * k + p) : vec{};
        };
        square<4, 6>(pixel, UPSTREAM, [&](int i, int j, vec a) { store(z + (6 * i + j) * point + p, a); });
    }
}

}  // namespace

extern "C" {

// Winograd::run on whole images. c in whole vectors.
void conv2d_winograd(
    const float* x,
    const float* active,
    const float* w,
    const float* bias,
    const float* add,
    float* y,
    float* masked,
    const int64_t* shape,
    int threads
) {
    const Winograd conv{{shape[0], shape[1], shape[2]}, shape[3], shape[4]};
    const Weight weight{w, shape[5], shape[6], shape[7]};
    Finish finish{bias, add, shape[8] != 0, y};
    finish.past_caches = outgrows_caches(y, conv.tiles.n * conv.tiles.h * conv.tiles.w * conv.k, conv.k);
    const Scratch u(winograd_floats(conv.c, conv.k));
    #pragma omp parallel num_threads(threads)
    {
        transform_weight(weight, conv.c, conv.k, u);
        const Scratch scratch(conv.scratch_floats(), true);
        #pragma omp for schedule(static)
        for (I part = 0; part < threads; part++) {
            const I all = conv.tiles.count(), share = (all + threads * TILES - 1) / (threads * TILES) * TILES;
            conv.run(x, active, masked, u, finish, part * share, std::min(all, (part + 1) * share), scratch, true);
        }
        finish.done();
    }
}

// dw[k][tap][c] = gradient of the weight of conv2d_winograd for g[n][h][w][k]. c and k in whole vectors.
void conv2d_winograd_weight(const float* x, const float* g, float* dw, const int64_t* shape, int threads) {
    const I c = shape[3], k = shape[4];
    const Tiles tiles{shape[0], shape[1], shape[2]};
    const Scratch zeros(6 * c, true), sums(threads * POINTS * k * c, true);
    const I together = std::max<I>(TILES, 2048 / std::max(c, k));
    const I v_point = together * c + SKEW, z_point = together * k + SKEW;
    const auto multiply = panel(c) == LANES ? outer<1> : outer<WIDE>;
    #pragma omp parallel num_threads(threads)
    {
        const Scratch v(POINTS * v_point), z(POINTS * z_point);
        #pragma omp for schedule(static)
        for (I part = 0; part < threads; part++) {
            float* sum = sums + part * POINTS * k * c;
            const I end = tiles.count() * (part + 1) / threads;
            for (I first = tiles.count() * part / threads; first < end; first += together) {
                const I count = std::min(together, end - first);
                for (I t = 0; t < count; t++) {
                    const auto place = tiles[first + t];
                    transform_input(x, nullptr, nullptr, zeros, tiles, place, c, v + t * c, v_point);
                    transform_upstream(g, tiles, place, k, z + t * k, z_point);
                }
                for (I f = 0; f < POINTS; f++) {
                    multiply(z + f * z_point, v + f * v_point, sum + f * k * c, count, k, c);
                }
            }
        }
        #pragma omp for schedule(static)
        for (I row = 0; row < k; row++) {
            for (I p = 0; p < c; p += LANES) {
                const auto sum = [&](int i, int j) {
                    vec a = {};
                    for (I part = 0; part < threads; part++) a += load(sums + ((part * POINTS + 6 * i + j) * k + row) * c + p);
                    return a;
                };
                square<6, 3>(sum, TAPS_GRADIENT, [&](int i, int j, vec a) { store(dw + (row * 9 + 3 * i + j) * c + p, a); });
            }
        }
    }
}
}
