// What the convolutions of this folder are made of: vectors, memory, matrix products, and how a result is stored.
//
// An image is x[n][h][w][c], all dense. A weight is read as w[out * w_out + in * w_in + tap * w_tap], so that one
// function serves a convolution and its transpose. Sums run in one order whatever the number of threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef int64_t I;

#ifdef __AVX512F__
constexpr int LANES = 16, SUMS = 16;  // floats in a vector; vectors that a matrix product adds up in registers
#else
constexpr int LANES = 8, SUMS = 8;
#endif
constexpr int WIDE = 2;        // vectors of output channels in a panel, where they come out even
constexpr I STREAM = 1 << 20;  // floats that do not stay in the caches until they are read

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // the same in memory
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

#define INLINE inline __attribute__((always_inline))

INLINE vec load(const float* p) { return *reinterpret_cast<const anywhere*>(p); }
INLINE void store(float* p, vec a) { *reinterpret_cast<anywhere*>(p) = a; }

// The same of the first `count` numbers alone.
#ifdef __AVX512F__
INLINE __mmask16 leading(I count) { return count >= LANES ? 0xffff : (1u << count) - 1; }
INLINE vec load(const float* p, I count) { return (vec)_mm512_maskz_loadu_ps(leading(count), p); }
INLINE void store(float* p, vec a, I count) { _mm512_mask_storeu_ps(p, leading(count), (__m512)a); }
#else
INLINE vec load(const float* p, I count) {
    if (count >= LANES) return load(p);
    vec a = {};
    std::memcpy(&a, p, count * sizeof(float));
    return a;
}
INLINE void store(float* p, vec a, I count) {
    if (count >= LANES) {
        store(p, a);
    } else {
        std::memcpy(p, &a, count * sizeof(float));
    }
}
#endif

// a[0] + a[1], a[2] + a[3], ..., b[0] + b[1], ...
#ifdef __AVX512F__
INLINE vec neighbours(vec a, vec b) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const auto from = [&](__m512i places) { return (vec)_mm512_permutex2var_ps((__m512)a, places, (__m512)b); };
    return from(even) + from(_mm512_add_epi32(even, _mm512_set1_epi32(1)));
}
#else
INLINE vec neighbours(vec a, vec b) {
    vec sums;
    for (int i = 0; i < LANES / 2; i++) sums[i] = a[2 * i] + a[2 * i + 1], sums[LANES / 2 + i] = b[2 * i] + b[2 * i + 1];
    return sums;
}
#endif

// The sum of each of N vectors, N a power of two: the first N numbers of the result.
template <int N>
INLINE vec lane_sums(const vec (&vectors)[N]) {
    vec a[N];
    #pragma GCC unroll 16
    for (int i = 0; i < N; i++) a[i] = vectors[i];
    int n = N;
    #pragma GCC unroll 16
    for (int left = LANES; left > 1; left /= 2, n = (n + 1) / 2) {
        #pragma GCC unroll 16
        for (int i = 0; i < (n + 1) / 2; i++) a[i] = neighbours(a[2 * i], a[n > 1 ? 2 * i + 1 : 0]);
    }
    return a[0];
}

// Signs of a vector, a bit for each lane. A NaN counts as positive.
#ifdef __AVX512F__
typedef uint16_t Signs;
INLINE Signs positive(vec a) { return _mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_NLE_UQ); }
INLINE vec where(Signs signs, vec a) { return (vec)_mm512_maskz_mov_ps(signs, (__m512)a); }
#else
typedef uint8_t Signs;
constexpr ints BIT = {1, 2, 4, 8, 16, 32, 64, 128};
INLINE Signs positive(vec a) {
    const ints bits = ~(a <= 0) & BIT;
    Signs signs = 0;
    for (int i = 0; i < LANES; i++) signs |= bits[i];
    return signs;
}
INLINE vec where(Signs signs, vec a) { return (vec)((ints)a & ((signs & BIT) != 0)); }
#endif

class Scratch {
public:
    explicit Scratch(I floats, bool zeros = false)
        : memory(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {
        if (zeros) std::fill_n(memory, floats, 0.0f);
    }
    ~Scratch() { std::free(memory); }
    Scratch(const Scratch&) = delete;
    operator float*() const { return memory; }

private:
    float* memory;
};

inline I lanes_up(I channels) { return (channels + LANES - 1) / LANES * LANES; }
inline I panel(I padded) { return padded % (WIDE * LANES) == 0 ? WIDE * LANES : LANES; }

// A matrix product in registers: sum[r][j] += a[r * row + i * step] * b[i * b_step + LANES * j] over i.
template <int ROWS, int J>
INLINE void accumulate(vec (&sum)[ROWS][J], const float* a, I row, I step, const float* b, I b_step, I n) {
    for (I i = 0; i < n; i++) {
        vec right[J];
        for (int j = 0; j < J; j++) right[j] = load(b + i * b_step + LANES * j);
        for (int r = 0; r < ROWS; r++) {
            for (int j = 0; j < J; j++) sum[r][j] += a[r * row + i * step] * right[j];
        }
    }
}

struct Weight {
    const float* w;
    I out, in, tap;
};

// A block of a weight with its output channels next to each other, zero beyond the last: block[c][k] of one tap.
typedef float Block[LANES][WIDE * LANES];

inline void gather(const Weight& weight, I tap, I first_c, I c, I first_k, I k, Block& block) {
    for (I j = 0; j < WIDE * LANES; j++) {
        const float* from = weight.w + (first_k + j) * weight.out + first_c * weight.in + tap * weight.tap;
        for (I i = 0; i < c; i++) block[i][j] = j < k ? from[i * weight.in] : 0;
    }
}

// Whether y, `floats` in all and k of them at each place, leaves the caches before it is read, so that it is best written
// past them.
#ifdef __AVX512F__
inline bool outgrows_caches(const float* y, I floats, I k) {
    return floats >= STREAM && k % LANES == 0 && reinterpret_cast<uintptr_t>(y) % sizeof(vec) == 0;
}
#else
inline bool outgrows_caches(const float*, I, I) { return false; }
#endif

// What becomes of an output before it is stored: + bias[k] + add[place][k], then max(0, .) and its signs are kept, or
// zero where signs are not positive. All pointers but y may be null; where there are signs k is in whole vectors.
struct Finish {
    const float *bias, *add;
    bool relu;
    float* y;
    Signs *keep = nullptr, *clear = nullptr;
    bool past_caches = false;  // is y written, and need not be fetched

    INLINE vec shift(I k, I count) const { return bias ? load(bias + k, count) : vec{}; }

    INLINE void operator()(I at, vec a, I count) const {
        if (add) a += load(add + at, count);
        if (relu) a = a < 0 ? vec{} : a;  // so that a NaN stays one
        if (keep) keep[at / LANES] = positive(a);
        if (clear) a = where(clear[at / LANES], a);
#ifdef __AVX512F__
        if (past_caches) return _mm512_stream_ps(y + at, (__m512)a);
#endif
        store(y + at, a, count);
    }

    // A single number, of output channel k, where there are no signs.
    INLINE void number(I at, I k, float a) const {
        if (bias) a += bias[k];
        if (add) a += add[at];
        y[at] = relu && a < 0 ? 0 : a;
    }

    // To be called by every thread that stored something.
    void done() const {
#ifdef __AVX512F__
        if (past_caches) _mm_sfence();
#endif
    }
};

enum { READ, WRITE };

// Have memory come while there is arithmetic to do.
template <int WHAT>
INLINE void prefetch(const float* from, I floats) {
    for (I i = 0; i < floats; i += 16) __builtin_prefetch(from + i, WHAT);
}

}  // namespace
