// The layers of chain.cpp in bfloat16, by the matrix unit for tiles (AMX): 16 x 32 numbers times 32 x 16, summed in
// float32. Without one the same is computed a number at a time, which is for tests alone. chain.py says which layers.
//
// Between layers an image is bfloat16 with zeros around: (h + 2) lines of w + 1 pixels, the zero after a line being the
// one before the next. So the pixels that one line of a kernel meets, all their channels, are one run of numbers, and a
// whole line of zeros needs no case of its own: that run times that line's weights is what a tile multiplies.

#include <utility>
#include <vector>

#include "depthwise.h"
#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES_IN_HARDWARE
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

typedef uint16_t Half;                                      // the bits of a bfloat16
typedef float Vector __attribute__((vector_size(64)));      // the numbers of a row of a tile of sums
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr I WIDTH = 16, DEPTH = 32, TILE = WIDTH * DEPTH;   // columns of sums, numbers that are summed, weights in a tile
constexpr I MOST_PIXELS = 16;                               // rows of a tile

enum class Kind : I { IMAGES, TILES, MEAN, SPREAD, SCALE, DEPTHWISE };
constexpr I NOWHERE = -1, GIVEN = -2, WANTED = -3;

// As in chain.cpp; places are halves.
struct Layer {
    Kind kind;
    Shape shape;
    I x, add, y, signs, relu;
    const void* weight;
    const float* bias;
};

inline I up(I number, I step) { return (number + step - 1) / step * step; }

// Of an image with its zeros, in halves. Behind the last there are as many as a run may reach beyond it.
inline I area(I h, I w, I c) { return up(((h + 2) * (w + 1) + 1) * c + DEPTH, DEPTH); }
inline I place(I h, I w, I w_all, I c) { return ((h + 1) * (w_all + 1) + w + 1) * c; }

inline float widen(Half a) {
    const uint32_t bits = uint32_t(a) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// To the nearest, to even between two.
inline Half narrow(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    if (a != a) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE Vector load16(const float* p) {
    Vector a;
    std::memcpy(&a, p, sizeof a);
    return a;
}

#ifdef TILES_IN_HARDWARE
INLINE Vector widen16(const Half* p) {
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
INLINE void narrow16(Half* p, Vector a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)a)); }
// The first `count` alone, where they are fewer than 16.
INLINE void store16(float* p, Vector a, I count) { store(p, a, count); }
INLINE uint16_t positive16(Vector a) { return _mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_NLE_UQ); }
INLINE Vector where16(uint16_t signs, Vector a) { return (Vector)_mm512_maskz_mov_ps(signs, (__m512)a); }
#else
inline Vector widen16(const Half* p) {
    Vector a;
    for (I i = 0; i < WIDTH; i++) a[i] = widen(p[i]);
    return a;
}
inline void narrow16(Half* p, Vector a) {
    for (I i = 0; i < WIDTH; i++) p[i] = narrow(a[i]);
}
inline void store16(float* p, Vector a, I count) { std::memcpy(p, &a, std::min(WIDTH, count) * sizeof(float)); }
inline uint16_t positive16(Vector a) {
    uint16_t signs = 0;
    for (I i = 0; i < WIDTH; i++) signs |= uint16_t(!(a[i] <= 0)) << i;
    return signs;
}
inline Vector where16(uint16_t signs, Vector a) {
    for (I i = 0; i < WIDTH; i++) a[i] = signs >> i & 1 ? a[i] : 0;
    return a;
}
#endif

// Tiles of pixels times tiles of weights, 4 x 1 or 2 x 2. Each product has an object of its own, for a tile is a register.
template <int BLOCKS>
struct Sums {
    static constexpr I TILES = 4 / BLOCKS;
    float of[TILES][BLOCKS][MOST_PIXELS][WIDTH];  // [pixels][weights]

#ifdef TILES_IN_HARDWARE
    static void begin(I pixels) {
        alignas(64) struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {};
        shape.palette = 1;
        for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 64, shape.rows[tile] = tile < 6 ? pixels : 16;
        _tile_loadconfig(&shape);
    }
    static void end() { _tile_release(); }

    // x[TILES]: the first pixel's run. Distances are in halves: from pixel to pixel, and from one line of the kernel to
    // the next.
    INLINE void compute(const Half* const* x, I pixel, I line, I lines, I depth, const Half* weight, I) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (I a = 0; a < lines; a++) {
            for (I i = 0; i < depth; i += DEPTH, weight += BLOCKS * TILE) {
                const I at = a * line + i;
                _tile_loadd(6, weight, 64);
                _tile_loadd(4, x[0] + at, 2 * pixel);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, x[1] + at, 2 * pixel);
                _tile_dpbf16ps(1, 5, 6);
                if (BLOCKS == 2) {
                    _tile_loadd(7, weight + TILE, 64);
                    _tile_dpbf16ps(2, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                } else {
                    _tile_loadd(4, x[TILES - 2] + at, 2 * pixel);
                    _tile_dpbf16ps(2, 4, 6);
                    _tile_loadd(5, x[TILES - 1] + at, 2 * pixel);
                    _tile_dpbf16ps(3, 5, 6);
                }
            }
        }
        float(*to)[MOST_PIXELS][WIDTH] = of[0];
        _tile_stored(0, to[0], 64);
        _tile_stored(1, to[BLOCKS], 64);
        _tile_stored(2, to[BLOCKS == 2 ? 1 : 2], 64);
        _tile_stored(3, to[3], 64);
    }
#else
    static void begin(I) {}
    static void end() {}

    void compute(const Half* const* x, I pixel, I line, I lines, I depth, const Half* weight, I pixels) {
        std::memset(of, 0, sizeof of);
        for (I a = 0; a < lines; a++) {
            for (I i = 0; i < depth; i += DEPTH, weight += BLOCKS * TILE) {
                for (I tile = 0; tile < TILES; tile++) {
                    for (I r = 0; r < pixels; r++) {
                        const Half* run = x[tile] + a * line + i + r * pixel;
                        for (I j = 0; j < DEPTH; j++) {
                            for (I block = 0; block < BLOCKS; block++) {
                                const Half* row = weight + block * TILE + j / 2 * 2 * WIDTH + j % 2;
                                for (I k = 0; k < WIDTH; k++) of[tile][block][r][k] += widen(run[j]) * widen(row[2 * k]);
                            }
                        }
                    }
                }
            }
        }
    }
#endif
};

// Pixels of y that see the same taps, all or, of the transpose of a stride, those of one parity:
// y[top + i * step][left + j * step] of x[i * x_step + dh + a][j * x_step + dw + b] over the taps.
struct Phase {
    I top, left, rows, columns, dh, dw;
    std::vector<I> lines, taps;  // of the kernel, by a and by b

    I depth(I c) const { return up((I)taps.size() * c, DEPTH); }
    I halves(I c, I k) const { return (I)lines.size() * depth(c) * up(k, WIDTH); }
};

std::vector<Phase> phases(const Shape& s) {
    std::vector<Phase> all;
    const I step = s.transposed ? s.stride : 1;
    // Those that `first` sees along one side, in the order of their distances; returns the least of them.
    const auto seen = [&](I first, I size, std::vector<I>& taps) {
        std::vector<std::pair<I, I>> found;
        for (I a = 0; a < size; a++) {
            const I distance = s.transposed ? first + s.padding - a : a - s.padding;
            if (distance % step == 0) found.emplace_back(distance / step, a);
        }
        std::sort(found.begin(), found.end());
        for (const auto& [distance, a] : found) taps.push_back(a);
        return found.empty() ? 0 : found[0].first;
    };
    for (I top = 0; top < step; top++) {
        for (I left = 0; left < step; left++) {
            Phase phase{top, left, (s.y_h - top + step - 1) / step, (s.y_w - left + step - 1) / step, 0, 0, {}, {}};
            phase.dh = seen(top, s.rows, phase.lines);
            phase.dw = seen(left, s.columns, phase.taps);
            if (phase.lines.empty() || phase.taps.empty()) phase.lines.clear(), phase.taps.clear();
            all.push_back(phase);
        }
    }
    return all;
}

// What becomes of sums: as Finish in vectors.h, to an image with zeros around or, where they are `wanted`, to a dense one.
struct Last {
    const float* bias;
    const Half* add;
    Half* y;
    float* wanted;
    uint16_t* signs;
    I k, size;  // channels; halves of an image
    I vectors;  // of 16 numbers in an image without the zeros

    enum After { STORE, KEEP, CLEAR, WANT };
    After after;

    // `number`: of the first channel in an image with zeros around, `vector`: without. `next` pixels on is the next one.
    template <bool ADD, After AFTER, int BLOCKS>
    INLINE void pixels(
        I count, I next, I number, I vector, const Vector* shift, I row, const float (*sums)[MOST_PIXELS][WIDTH]
    ) const {
        const I each = k / WIDTH;
        for (I r = 0; r < count; r++, number += next * k, vector += next * each) {
            for (int b = 0; b < BLOCKS; b++) {
                Vector a = load16(sums[b][row + r]) + shift[b];
                one<ADD, AFTER>(number + b * WIDTH, vector + b, a);
            }
        }
    }

    template <bool ADD, After AFTER>
    INLINE void one(I number, I vector, Vector a) const {
        if (ADD) a += widen16(add + number);
        if (AFTER == KEEP) a = a < 0 ? Vector{} : a, signs[vector] = positive16(a);
        if (AFTER == CLEAR) a = where16(signs[vector], a);
        narrow16(y + number, a);
    }

    INLINE void operator()(I number, I vector, Vector a) const {
        if (add) a += widen16(add + number);
        if (after == KEEP) one<false, KEEP>(number, vector, a);
        if (after == CLEAR) one<false, CLEAR>(number, vector, a);
        if (after == STORE) one<false, STORE>(number, vector, a);
    }

    // For each vector of all pixels, what `a` says of its image, of where it is there, and of its first channel.
    template <class A>
    void each(I n, I h, I w, A a) const {
        for (I image = 0; image < n; image++) {
            for (I at = 0; at < h * w; at++) {
                for (I block = 0; block < k / WIDTH; block++) {
                    const I inside = place(at / w, at % w, w, k) + block * WIDTH;
                    const I vector = image * vectors + at * (k / WIDTH) + block;
                    (*this)(image * size + inside, vector, a(image, inside, block * WIDTH));
                }
            }
        }
    }

    // The same to a dense image of any number of channels.
    INLINE void wanted_pixels(I count, I next, I at, I first, const float (*sums)[WIDTH]) const {
        for (I r = 0; r < count; r++, at += next) {
            store16(wanted + at * k + first, load16(sums[r]), k - first);
        }
    }
};

void zero_around(I n, I h, I w, I c, Half* y) {
    const I size = area(h, w, c), line = (w + 1) * c;
    for (I image = 0; image < n; image++, y += size) {
        std::fill_n(y, line + c, 0);
        for (I i = 1; i <= h; i++) std::fill_n(y + i * line + line, c, 0);
        std::fill(y + place(h, 0, w, c), y + size, 0);
    }
}

// A convolution on one thread.
struct Convolution {
    struct Run { I row, count, i, j; };  // pixels of a tile that are neighbours in y, or as far apart as the phase says
    struct Tile { I x; std::vector<Run> runs; };
    struct Part { Phase phase; I pixels; std::vector<Tile> tiles; };

    Shape s;
    I x_step = s.transposed ? 1 : s.stride, y_step = s.transposed ? s.stride : 1;
    std::vector<Part> parts = made();

    std::vector<Part> made() const {
        std::vector<Part> all;
        for (const Phase& phase : phases(s)) {
            if (phase.rows < 1 || phase.columns < 1) continue;
            // Where tiles do not end with a line, and with a step of one, the whole image is a run of pixels, those beyond
            // a line's end for nothing.
            const bool whole = x_step == 1 && phase.columns % MOST_PIXELS != 0;
            const I pitch = whole ? s.w + 1 : phase.columns, lines = whole ? 1 : phase.rows;
            const I length = whole ? (phase.rows - 1) * pitch + phase.columns : phase.columns;
            const I count = (length + MOST_PIXELS - 1) / MOST_PIXELS, pixels = (length + count - 1) / count;
            Part part{phase, pixels, {}};
            for (I line = 0; line < lines; line++) {
                for (I first = 0; first < length; first += pixels) {
                    I at = line * pitch + first;
                    const I end = line * pitch + std::min(first + pixels, length);
                    Tile tile{place(at / pitch * x_step + phase.dh, at % pitch * x_step + phase.dw, s.w, s.c), {}};
                    for (I row = 0; at < end;) {
                        const I i = at / pitch, j = at % pitch, next = std::min((i + 1) * pitch, end);
                        const I inside = std::min(phase.columns - j, next - at);
                        if (inside > 0) tile.runs.push_back({row, inside, phase.top + i * y_step, phase.left + j * y_step});
                        row += next - at, at = next;
                    }
                    part.tiles.push_back(tile);
                }
            }
            all.push_back(part);
        }
        return all;
    }

    void run(I n, const Half* x, const Half* weight, const Last& last) const {
        for (const Part& part : parts) {
            const I blocks = up(s.k, WIDTH) / WIDTH, own = part.phase.halves(s.c, WIDTH);
            Sums<1>::begin(part.pixels);
            for (I block = 0; block < blocks; block += 2, weight += 2 * own) {
                if (block + 2 <= blocks) {
                    finished<2>(n, part, x, weight, block, last);
                } else {
                    finished<1>(n, part, x, weight, block, last), weight -= own;
                }
            }
            Sums<1>::end();
        }
    }

    template <int BLOCKS>
    void finished(I n, const Part& part, const Half* x, const Half* weight, I block, const Last& last) const {
        const auto with = [&](auto add, auto after) {
            panel<BLOCKS, decltype(add)::value, decltype(after)::value>(n, part, x, weight, block, last);
        };
        const auto after = [&](auto add) {
            switch (last.after) {
                case Last::STORE: return with(add, std::integral_constant<Last::After, Last::STORE>());
                case Last::KEEP: return with(add, std::integral_constant<Last::After, Last::KEEP>());
                case Last::CLEAR: return with(add, std::integral_constant<Last::After, Last::CLEAR>());
                case Last::WANT: return with(add, std::integral_constant<Last::After, Last::WANT>());
            }
        };
        last.add ? after(std::true_type()) : after(std::false_type());
    }

    template <int BLOCKS, bool ADD, Last::After AFTER>
    void panel(I n, const Part& part, const Half* x, const Half* weight, I block, const Last& given) const {
        constexpr I TILES = Sums<BLOCKS>::TILES;
        const I each = part.tiles.size(), size = area(s.h, s.w, s.c), depth = part.phase.depth(s.c), first = block * WIDTH;
        const I pixel = x_step * s.c, line = (s.w + 1) * s.c, lines = part.phase.lines.size(), step = y_step;
        const Last last = given;  // in registers: of `given` the compiler must think that what is stored may change it
        Vector shift[BLOCKS] = {};
        for (int b = 0; b < BLOCKS && last.bias; b++) shift[b] = load16(last.bias + first + b * WIDTH);
        alignas(64) Sums<BLOCKS> sums;
        for (I t = 0; t < n * each; t += TILES) {
            const I count = std::min(TILES, n * each - t);
            const Tile* tiles[TILES];
            const Half* from[TILES];
            I images[TILES];
            for (I i = 0; i < TILES; i++) {
                const I at = t + std::min(i, count - 1);
                images[i] = at / each, tiles[i] = &part.tiles[at % each], from[i] = x + images[i] * size + tiles[i]->x;
            }
            sums.compute(from, pixel, line, lines, depth, weight, part.pixels);
            for (I i = 0; i < count; i++) {
                for (const Run& run : tiles[i]->runs) {
                    const I at = run.i * s.y_w + run.j;
                    if constexpr (AFTER == Last::WANT) {
                        for (int b = 0; b < BLOCKS; b++) {
                            const I pixel_at = images[i] * s.y_h * s.y_w + at;
                            last.wanted_pixels(run.count, step, pixel_at, first + b * WIDTH, sums.of[i][b] + run.row);
                        }
                    } else {
                        const I number = images[i] * last.size + place(run.i, run.j, s.y_w, s.k) + first;
                        const I vector = images[i] * last.vectors + at * (s.k / WIDTH) + block;
                        last.pixels<ADD, AFTER, BLOCKS>(run.count, step, number, vector, shift, run.row, sums.of[i]);
                    }
                }
            }
        }
    }
};

// Images in float32, dense: each number as two, what bfloat16 keeps of it and what it keeps of the rest.
void import(const Shape& s, I n, const float* x, Half* y) {
    const I size = area(s.y_h, s.y_w, s.k), line = s.w * s.c;
    for (I image = 0; image < n; image++) {
        for (I i = 0; i < s.h; i++, x += line) {
            Half* to = y + image * size + place(i, 0, s.y_w, s.k);
            I j = 0;
            for (; j + WIDTH <= line; j += WIDTH) {
                const Vector numbers = load16(x + j);
                Half kept[WIDTH], rest[WIDTH];
                narrow16(kept, numbers);
                narrow16(rest, numbers - widen16(kept));
                Half* pairs = to + 2 * j;
                for (I a = 0; a < WIDTH; a++) pairs[2 * a] = kept[a], pairs[2 * a + 1] = rest[a];
            }
            for (; j < line; j++) to[2 * j] = narrow(x[j]), to[2 * j + 1] = narrow(x[j] - widen(to[2 * j]));
        }
    }
}

// y[n][k] = mean over pixels of x
void mean(const Shape& s, I n, const Half* x, float* y) {
    const I size = area(s.h, s.w, s.c);
    for (I image = 0; image < n; image++, x += size) {
        for (I c = 0; c < s.c; c += WIDTH) {
            Vector sum = {};
            for (I i = 0; i < s.h; i++) {
                for (I j = 0; j < s.w; j++) sum += widen16(x + place(i, j, s.w, s.c) + c);
            }
            sum /= float(s.h * s.w);
            std::memcpy(y + image * s.c + c, &sum, sizeof sum);
        }
    }
}

// Its gradient.
void spread(const Shape& s, I n, const float* x, const Last& last) {
    last.each(n, s.y_h, s.y_w, [&](I image, I, I c) { return load16(x + image * s.k + c) / float(s.y_h * s.y_w); });
}

// y = x times a number for each channel
void scale(const Shape& s, I n, const Half* x, const float* weight, const Last& last) {
    last.each(n, s.h, s.w, [&](I image, I inside, I c) {
        const Vector a = widen16(x + image * last.size + inside) * load16(weight + c);
        return last.bias ? a + load16(last.bias + c) : a;
    });
}

// weight[tap][k]
void depthwise(const Shape& s, I n, const Half* x, const float* weight, const Last& last) {
    const I size = area(s.h, s.w, s.c);
    for (I i = 0; i < s.y_h; i++) {
        for (I j = 0; j < s.y_w; j++) {
            Tap taps[MOST_TAPS];
            const I count = taps_inside(s, i, j, taps), inside = place(i, j, s.y_w, s.k);
            for (I image = 0; image < n; image++) {
                const Half* from[MOST_TAPS];
                for (I t = 0; t < count; t++) from[t] = x + image * size + place(taps[t].h, taps[t].w, s.w, s.c);
                const I number = image * last.size + inside;
                const I vector = image * last.vectors + (i * s.y_w + j) * (s.k / WIDTH);
                for (I c = 0; c < s.k; c += WIDTH) {
                    Vector sum = last.bias ? load16(last.bias + c) : Vector{};
                    for (I t = 0; t < count; t++) sum += widen16(from[t] + c) * load16(weight + taps[t].index * s.k + c);
                    last(number + c, vector + c / WIDTH, sum);
                }
            }
        }
    }
}

Shape convolution(const int64_t* s) { return {1, 0, 0, s[2], 0, 0, s[3], s[0], s[1], s[4], s[5], s[6]}; }

}  // namespace

extern "C" {

// 2: on tiles in hardware, 1: a number at a time, 0: not, as the system does not allow the tiles.
int chain_bf16_runs() {
#ifdef TILES_IN_HARDWARE
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // asm/prctl.h
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0 ? 2 : 0;
#else
    return 1;
#endif
}

// As chain_weight_size; halves.
int chain_bf16_weight_size(int64_t, const int64_t* shape) {
    const Shape s = convolution(shape);
    I size = 0;
    for (const Phase& phase : phases(s)) size += phase.halves(s.c, s.k);
    return size;
}

// As chain_weight, in the order in which they are read. Where images have each number twice, so has c.
void chain_bf16_weight(int64_t twice, const int64_t* shape, const float* w, void* u, int) {
    Shape s = convolution(shape);
    const Weight weight{w, shape[7], shape[8], shape[9]};
    Half* to = static_cast<Half*>(u);
    for (const Phase& phase : phases(s)) {
        for (I first = 0; first < up(s.k, WIDTH); first += 2 * WIDTH) {
            const I end = std::min(first + 2 * WIDTH, up(s.k, WIDTH));
            for (const I a : phase.lines) {
                for (I i = 0; i < phase.depth(s.c); i += DEPTH) {
                    for (I block = first; block < end; block += WIDTH) {
                        for (I j = 0; j < DEPTH; j += 2) {
                            for (I k = block; k < block + WIDTH; k++) {
                                for (I at = i + j; at < i + j + 2; at++) {
                                    const I tap = at / s.c, c = at % s.c / (twice ? 2 : 1);
                                    const bool inside = k < s.k && tap < (I)phase.taps.size();
                                    const I tap_at = inside ? (a * s.columns + phase.taps[tap]) * weight.tap : 0;
                                    *to++ = inside ? narrow(w[k * weight.out + c * weight.in + tap_at]) : 0;
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

// As chain; `halves` of one image.
void chain_bf16(
    const void* array,
    int64_t count,
    int64_t halves,
    const float* given,
    float* wanted,
    void* all_signs,
    int64_t n,
    int64_t together,
    int threads
) {
    const Layer* layers = static_cast<const Layer*>(array);
    std::vector<Convolution> convolutions;
    I beyond = 0;
    for (I i = 0; i < count; i++) {
        const Shape& s = layers[i].shape;
        if (layers[i].kind == Kind::TILES) convolutions.push_back({s});
        beyond = std::max(beyond, (2 * MOST_PIXELS + 4) * s.c + 2 * DEPTH);
    }
    #pragma omp parallel num_threads(threads)
    {
        const Scratch scratch((halves * together + beyond + 1) / 2, true);
        Half* memory = reinterpret_cast<Half*>(static_cast<float*>(scratch));
        #pragma omp for schedule(dynamic)
        for (I first = 0; first < n; first += together) {
            const I now = std::min(together, n - first);
            auto convolution = convolutions.begin();
            for (I i = 0; i < count; i++) {
                const Layer& layer = layers[i];
                const Shape& s = layer.shape;
                const I size = area(s.y_h, s.y_w, s.k), pixels = s.y_h * s.y_w;
                const Half* x = layer.x == GIVEN ? nullptr : memory + layer.x * together;
                const float* from = layer.x == GIVEN ? given + first * s.h * s.w * s.c : nullptr;
                Half* y = layer.y == WANTED ? nullptr : memory + layer.y * together;
                float* to = layer.y == WANTED ? wanted + first * pixels * s.k : nullptr;
                const Half* add = layer.add == NOWHERE ? nullptr : memory + layer.add * together;
                const I vectors = pixels * s.k / WIDTH;
                Last last{layer.bias, add, y, to, nullptr, s.k, size, vectors, to ? Last::WANT : Last::STORE};
                if (layer.signs != NOWHERE) {
                    last.signs = static_cast<uint16_t*>(all_signs) + layer.signs * n + first * vectors;
                    last.after = layer.relu ? Last::KEEP : Last::CLEAR;
                }
                if (y && layer.kind != Kind::MEAN) zero_around(now, s.y_h, s.y_w, s.k, y);
                switch (layer.kind) {
                    case Kind::IMAGES: import(s, now, from, y); break;
                    case Kind::TILES: (convolution++)->run(now, x, static_cast<const Half*>(layer.weight), last); break;
                    case Kind::MEAN: mean(s, now, x, to); break;
                    case Kind::SPREAD: spread(s, now, from, last); break;
                    case Kind::SCALE: scale(s, now, x, static_cast<const float*>(layer.weight), last); break;
                    case Kind::DEPTHWISE: depthwise(s, now, x, static_cast<const float*>(layer.weight), last);
                }
            }
        }
    }
}
}
