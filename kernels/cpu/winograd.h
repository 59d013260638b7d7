// 3 x 3 convolutions with stride 1 by Winograd's F(4 x 4, 3 x 3). conv2d.py has the equations.

#pragma once

#include "vectors.h"

namespace {

constexpr I TILES = 16, POINTS = 36;  // tiles that are multiplied together; 6 x 6
constexpr I SKEW = 16;                // floats between the points of scratch, so that they fall into different sets

// d[t][k] = sum over c of a[t][c] b[c][k] for `rows` t, with b in panels of J vectors.
template <int J>
void product(const float* a, const float* b, float* d, I rows, I c, I k) {
    constexpr int ROWS = SUMS / J;
    for (I p = 0; p < k; p += J * LANES) {
        for (I t = 0; t < rows; t += ROWS) {
            vec sum[ROWS][J] = {};
            accumulate(sum, a + t * c, c, 1, b + p * c, J * LANES, c);
            for (int r = 0; r < ROWS; r++) {
                for (int j = 0; j < J; j++) store(d + (t + r) * k + p + LANES * j, sum[r][j]);
            }
        }
    }
}

// ---- Winograd's F(4, 3) at the points 0, +-P, +-Q and infinity, in one dimension. ----

constexpr float P = 0.625f, Q = 1.5f, P2 = P * P, Q2 = Q * Q;

// B^T d: the input of four outputs, at each point.
constexpr auto INPUT = [](const vec (&d)[6], vec (&o)[6]) {
    const vec a = d[4] - Q2 * d[2], b = P * (d[3] - Q2 * d[1]);
    const vec e = d[4] - P2 * d[2], f = Q * (d[3] - P2 * d[1]);
    o[0] = d[4] - (P2 + Q2) * d[2] + P2 * Q2 * d[0];
    o[1] = a + b;
    o[2] = a - b;
    o[3] = e + f;
    o[4] = e - f;
    o[5] = d[5] - (P2 + Q2) * d[3] + P2 * Q2 * d[1];
};

// A^T m: four outputs from their values at the points.
constexpr auto OUTPUT = [](const vec (&m)[6], vec (&o)[4]) {
    const vec a = m[1] + m[2], b = m[1] - m[2], e = m[3] + m[4], f = m[3] - m[4];
    o[0] = m[0] + a + e;
    o[1] = P * b + Q * f;
    o[2] = P2 * a + Q2 * e;
    o[3] = m[5] + P2 * P * b + Q2 * Q * f;
};

constexpr float AT_0 = 1 / (P2 * Q2), AT_P = 1 / (2 * P2 * (P2 - Q2)), AT_Q = 1 / (2 * Q2 * (Q2 - P2));

// G w: three taps at each point.
constexpr auto TAPS = [](const vec (&w)[3], vec (&o)[6]) {
    const vec a = AT_P * (w[0] + P2 * w[2]), b = AT_P * P * w[1];
    const vec e = AT_Q * (w[0] + Q2 * w[2]), f = AT_Q * Q * w[1];
    o[0] = AT_0 * w[0];
    o[1] = a + b;
    o[2] = a - b;
    o[3] = e + f;
    o[4] = e - f;
    o[5] = w[2];
};

// A transform `f` of N values to M along both dimensions of a square: put(i, j, value) for M x M of get(i, j) for N x N.
template <int N, int M, typename Get, typename F, typename Put>
INLINE void square(Get get, F f, Put put) {
    vec half[N][M];
    for (int j = 0; j < N; j++) {
        vec column[N];
        for (int i = 0; i < N; i++) column[i] = get(i, j);
        f(column, half[j]);
    }
    for (int i = 0; i < M; i++) {
        vec row[N], done[M];
        for (int j = 0; j < N; j++) row[j] = half[j][i];
        f(row, done);
        for (int j = 0; j < M; j++) put(i, j, done[j]);
    }
}

// Images cut into tiles of 4 x 4 outputs.
struct Tiles {
    I n, h, w, rows = (h + 3) / 4, columns = (w + 3) / 4;

    I count() const { return n * rows * columns; }

    struct Place { I image, top, left; };
    Place operator[](I tile) const {
        const I image = tile / (rows * columns), rest = tile % (rows * columns);
        return {image, rest / columns * 4, rest % columns * 4};
    }

    // Where in x[n][h][w][c] a line of a tile begins.
    INLINE I start(const Place& place, I line, I c) const {
        return ((place.image * h + place.top + line) * w + place.left) * c;
    }
};

// Tiles that are worked on together.
struct Group {
    Tiles::Place places[TILES];
    I count;

    Group(const Tiles& tiles, I first, I end) : count(std::clamp<I>(end - first, 0, TILES)) {
        for (I t = 0; t < count; t++) places[t] = tiles[first + t];
    }
};

// v[point][slot][c] = B^T d B of the 6 x 6 pixels around a tile, zero where `active` is not above zero.
// The tile's own pixels of that are kept in `masked`. Either may be null.
void transform_input(
    const float* x,
    const float* active,
    float* masked,
    const float* zeros,
    const Tiles& tiles,
    const Tiles::Place& place,
    I c,
    float* v,
    I point
) {
    const float *row[6], *active_row[6];
    float* masked_row[6] = {};
    for (I i = 0; i < 6; i++) {
        const I h = place.top + i - 1, start = tiles.start(place, i - 1, c) - c;
        const bool inside = h >= 0 && h < tiles.h;
        row[i] = inside ? x + start : zeros;
        active_row[i] = inside && active ? active + start : zeros;
        if (inside && masked && i > 0 && i < 5) masked_row[i] = masked + start;
    }
    const auto inside = [&](int j) { return place.left + j > 0 && place.left + j <= tiles.w; };
    for (I p = 0; p < c; p += LANES) {
        const auto pixel = [&](int i, int j) { return inside(j) ? load(row[i] + j * c + p) : vec{}; };
        const auto active_pixel = [&](int i, int j) {
            if (!inside(j)) return vec{};
            const I at = j * c + p;
            const vec d = load(active_row[i] + at) <= 0 ? vec{} : load(row[i] + at);
            if (j > 0 && j < 5 && masked_row[i]) store(masked_row[i] + at, d);
            return d;
        };
        const auto put = [&](int i, int j, vec a) { store(v + (6 * i + j) * point + p, a); };
        if (active) {
            square<6, 6>(active_pixel, INPUT, put);
        } else {
            square<6, 6>(pixel, INPUT, put);
        }
    }
}

// y = finish(A^T m A) on the pixels of a tile that the image has.
void transform_output(
    const float* m, I point, const Finish& finish, const Tiles& tiles, const Tiles::Place& place, I k, I padded
) {
    const I corner = tiles.start(place, 0, k);
    const I rows = std::min<I>(4, tiles.h - place.top), columns = std::min<I>(4, tiles.w - place.left);
    for (I p = 0; p < padded; p += LANES) {
        const vec shift = finish.shift(p, k - p);
        square<6, 4>([&](int i, int j) { return load(m + (6 * i + j) * point + p); }, OUTPUT, [&](int i, int j, vec a) {
            if (i < rows && j < columns) finish(corner + (i * tiles.w + j) * k + p, a + shift, k - p);
        });
    }
}

inline I winograd_floats(I c, I k) { return POINTS * c * lanes_up(k); }

// u[point][panel][c][k] = G w G^T
void transform_weight(const Weight& weight, I c, I k, float* u) {
    const I padded = lanes_up(k), wide = panel(padded);
    #pragma omp for collapse(2) schedule(static)
    for (I p = 0; p < padded; p += wide) {
        for (I first = 0; first < c; first += LANES) {
            Block block[9];
            const I count = std::min<I>(LANES, c - first);
            for (I t = 0; t < 9; t++) gather(weight, t, first, count, p, k - p, block[t]);
            for (I i = 0; i < count; i++) {
                for (I j = 0; j < wide; j += LANES) {
                    float* target = u + (p * c + (first + i) * wide) + j;
                    square<3, 6>(
                        [&](int a, int b) { return load(block[3 * a + b][i] + j); },
                        TAPS,
                        [&](int a, int b, vec value) { store(target + (6 * a + b) * c * padded, value); }
                    );
                }
            }
        }
    }
}

// y[n][h][w][k] = finished 3 x 3 convolution of x[n][h][w][c], stride 1, one line of zeros around.
struct Winograd {
    Tiles tiles;
    I c, k, padded = lanes_up(k), v_point = TILES * c + SKEW, m_point = TILES * padded + SKEW;

    I scratch_floats() const { return POINTS * (v_point + m_point) + 6 * c; }

    // For tiles from `first` on, on one thread. Where `active`, laid out as x, is given, x counts where it is positive;
    // `masked` is then that part of x. `scratch` has finite numbers. What is `far` comes from memory.
    void run(
        const float* x,
        const float* active,
        float* masked,
        const float* u,
        const Finish& finish,
        I first,
        I end,
        float* scratch,
        bool far
    ) const {
        float *v = scratch, *m = v + POINTS * v_point, *zeros = m + POINTS * m_point;
        std::fill_n(zeros, 6 * c, 0.0f);
        const auto multiply = panel(padded) == LANES ? product<1> : product<WIDE>;
        for (; first < end; first += TILES) {
            const Group group(tiles, first, end), next(tiles, first + TILES, far ? tiles.count() : 0);
            const I rows = (group.count + SUMS - 1) / SUMS * SUMS;
            // The next tiles' lines come from memory all the while, a quarter of them each in the first and the last part.
            const auto fetch = [&](I from, I to) {
                for (I line = from; line < std::min(to, 4 * next.count); line++) {
                    const auto& place = next.places[line / 4];
                    if (place.top + line % 4 >= tiles.h) continue;
                    const I columns = std::min<I>(4, tiles.w - place.left);
                    const I at = tiles.start(place, line % 4, c), y_at = tiles.start(place, line % 4, k);
                    prefetch<READ>(x + at, columns * c);
                    if (active) prefetch<READ>(active + at, columns * c);
                    if (masked) prefetch<WRITE>(masked + at, columns * c);
                    if (!finish.past_caches) prefetch<WRITE>(finish.y + y_at, columns * k);
                }
            };
            for (I t = 0; t < group.count; t++) {
                fetch(t, t + 1);
                transform_input(x, active, masked, zeros, tiles, group.places[t], c, v + t * c, v_point);
            }
            for (I f = 0; f < POINTS; f++) {
                fetch(TILES + 2 * TILES * f / POINTS, TILES + 2 * TILES * (f + 1) / POINTS);
                multiply(v + f * v_point, u + f * c * padded, m + f * m_point, rows, c, padded);
            }
            for (I t = 0; t < group.count; t++) {
                fetch(3 * TILES + t, 3 * TILES + t + 1);
                transform_output(m + t * padded, m_point, finish, tiles, group.places[t], k, padded);
            }
        }
    }
};

}  // namespace
