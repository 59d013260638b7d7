// What a softmax is made of: exponentials, and the sum and the largest of a vector.

#pragma once

#include "vectors.h"

namespace {

constexpr float LOWEST = -87.3f;  // below it the exponential is no normal number

// The exponential of numbers up to 88, after Cephes' expf: within two units of the last place, 0 below LOWEST.
INLINE vec exponential(vec a) {
    const vec rounds = vec{} + 0x1.8p23f;  // added to a number it leaves the nearest integer in the lowest bits
    const vec shifted = a * 1.44269504f + rounds;
    const vec n = shifted - rounds;
    const vec r = (a - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vec power = (vec)(((ints)shifted << 23) + 0x3f800000);
    return a < LOWEST ? vec{} : p * power;
}

#ifdef __AVX512F__
INLINE float sum(vec a) { return _mm512_reduce_add_ps((__m512)a); }
INLINE float largest(vec a) { return _mm512_reduce_max_ps((__m512)a); }
INLINE vec padded(vec a, I count, float with) {
    return (vec)_mm512_mask_mov_ps(_mm512_set1_ps(with), leading(count), (__m512)a);
}
#else
INLINE float sum(vec a) {
    const vec lanes[1] = {a};
    return lane_sums(lanes)[0];
}
INLINE float largest(vec a) {
    float most = a[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, a[i]);
    return most;
}
INLINE vec padded(vec a, I count, float with) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return lane < (int)count ? a : vec{} + with;
}
#endif

}  // namespace
