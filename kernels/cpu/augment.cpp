// A training batch out of uint8 images; augment.py has the equation. Each number is a quotient, rounded once.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// u / 255 for the integers 0..255, as division rounds it.
inline float quotient(uint8_t u) {
#ifdef __FMA__
    // The product and what it leaves of u, both fused: a fifth of the time of a division.
    const float inverse = 1.0f / 255.0f, q = u * inverse;
    return __builtin_fmaf(__builtin_fmaf(-q, 255.0f, u), inverse, q);
#else
    return u / 255.0f;
#endif
}

template <int64_t SIZE>
void reverse(const uint8_t* from, uint8_t* to, int64_t width, int64_t size) {
    const int64_t bytes = SIZE ? SIZE : size;  // known when compiled: a move instead of a call
    for (int64_t x = 0; x < width; x++) std::memcpy(to + (width - 1 - x) * bytes, from + x * bytes, bytes);
}

// Numbers side by side, out of bytes that lie `apart` from each other.
void scale(const uint8_t* from, int64_t apart, float* to, int64_t count) {
    if (apart == 1) {
        #pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = quotient(from[i]);
    } else {
        for (int64_t i = 0; i < count; i++) to[i] = quotient(from[i * apart]);
    }
}

}  // namespace

// images (N, height, width, channels); rows (batch,) or null; draws (batch, 3) or null; out (batch, height, width,
// channels) in memory, or (batch, channels, height, width) unless `last`.
extern "C" void augment(
    const uint8_t* images,
    const int64_t* rows,
    const int64_t* draws,
    float* out,
    int64_t batch,
    int64_t height,
    int64_t width,
    int64_t channels,
    int64_t padding,
    int flip,
    int last,
    int threads
) {
    const int64_t pitch = width * channels;
    #pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> reversed(pitch);
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; b++) {
            const uint8_t* image = images + (rows ? rows[b] : b) * height * pitch;
            const int64_t* draw = draws ? draws + 3 * b : nullptr;
            const int64_t down = draw && padding ? draw[0] - padding : 0, right = draw && padding ? draw[1] - padding : 0;
            const bool mirrored = draw && flip && draw[2];
            // The columns of the image that the crop holds, and where they fall in it.
            const int64_t begin = right > 0 ? right : 0, end = width + (right < 0 ? right : 0), count = end - begin;
            const int64_t place = mirrored ? width - end + right : begin - right;
            for (int64_t y = 0; y < height; y++) {
                const int64_t line = y + down;
                const bool inside = line >= 0 && line < height && count > 0;
                const uint8_t* pixels = image + line * pitch + begin * channels;
                if (inside && mirrored) {
                    if (channels == 3) reverse<3>(pixels, reversed.data(), count, 3);
                    else reverse<0>(pixels, reversed.data(), count, channels);
                    pixels = reversed.data();
                }
                // One run of numbers, or one for each channel.
                const int64_t runs = last ? 1 : channels, unit = last ? channels : 1;
                for (int64_t c = 0; c < runs; c++) {
                    float* to = out + ((b * runs + c) * height + y) * width * unit;
                    if (!inside) {
                        std::fill_n(to, width * unit, 0.0f);
                        continue;
                    }
                    std::fill_n(to, place * unit, 0.0f);
                    scale(pixels + c, runs, to + place * unit, count * unit);
                    std::fill_n(to + (place + count) * unit, (width - place - count) * unit, 0.0f);
                }
            }
        }
    }
}
