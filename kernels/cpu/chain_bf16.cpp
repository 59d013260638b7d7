// The layers of chain.cpp in bfloat16, by the matrix unit for tiles (AMX): 16 x 32 numbers times 32 x 16, summed in
// float32. Without one the same is computed a number at a time, which is for tests alone. chain.py says which layers.
//
// Between layers an image is bfloat16 with zeros around: (h + 2) lines of w + 1 pixels, the zero after a line being the
// one before the next. So the pixels that one line of a kernel meets, all their channels, are one run of numbers, and a
// whole line of zeros needs no case of its own: that run times that line's weights is what a tile multiplies.
//
// A tile whose rows do not cross lines of the cache (64 bytes) is loaded in 8 cycles, else in 20 to 50. So where channels
// are no multiple of 32, lines have an even number of pixels, if need be with one zero more; and where they are 8 or 16, a
// row of a tile is two neighbours in y: all that both see, times the weights of each with zeros for what it does not see.

#include <array>
#include <type_traits>
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

// Of an image with its zeros: pixels of a line, and halves. Behind the last there are as many as a run may reach beyond it.
inline I pitch(I w, I c) { return c % DEPTH ? up(w + 1, 2) : w + 1; }
inline I area(I h, I w, I c) { return up(((h + 2) * pitch(w, c) + 1) * c + DEPTH, DEPTH); }
inline I place(I h, I w, I w_all, I c) { return ((h + 1) * pitch(w_all, c) + w + 1) * c; }

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
INLINE Vector relu16(Vector a) { return (Vector)_mm512_max_ps(_mm512_setzero_ps(), (__m512)a); }  // NaN of NaN
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
inline Vector relu16(Vector a) { return a < 0 ? Vector{} : a; }
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

// What neighbours in y see along one side: for each of them the tap of the kernel that meets a place of x, or NONE, from
// x = `first` on.
constexpr I NONE = -1;
struct Seen {
    I first;
    std::vector<I> taps[2];

    I places() const { return taps[0].size(); }
};

// Of `together` neighbours from `y` on.
Seen seen(const Shape& s, I y, I together, I size) {
    const I step = s.transposed ? s.stride : 1;
    std::vector<std::array<I, 3>> found;
    for (I i = 0; i < together; i++) {
        for (I tap = 0; tap < size; tap++) {
            const I x = s.transposed ? y + i + s.padding - tap : (y + i) * s.stride + tap - s.padding;
            if (x % step == 0) found.push_back({x / step, i, tap});
        }
    }
    if (found.empty()) return {};
    const auto [first, last] = std::minmax_element(found.begin(), found.end());
    Seen all{(*first)[0], {}};
    for (I i = 0; i < together; i++) all.taps[i].assign((*last)[0] - all.first + 1, NONE);
    for (const auto& [x, i, tap] : found) all.taps[i][x - all.first] = tap;
    return all;
}

// Pixels of y that see the same taps: all or, of the transpose of a stride, those of one parity. A row of a tile is that of
// `together` neighbours, y[top + i * step][left + j * span] and the one beside it.
struct Phase {
    I top, left, together, step, span, rows, columns;
    Seen lines, across;

    I depth(I c) const { return up(across.places() * c, DEPTH); }
    I blocks(I k) const { return up(k, WIDTH) / WIDTH * together; }  // the neighbours' of the same channels in turn
    I halves(I c) const { return lines.places() * depth(c) * WIDTH; }  // weights of a block
};

std::vector<Phase> phases(const Shape& s) {
    std::vector<Phase> all;
    const I step = s.transposed ? s.stride : 1;
    const I together = (s.stride == 1 && s.c <= WIDTH) || (step == 2 && s.k <= WIDTH) ? 2 : 1;
    const I span = std::max(step, together);
    for (I top = 0; top < step; top++) {
        for (I left = 0; left < step; left += together) {
            const I rows = up(s.y_h - top, step) / step, columns = up(s.y_w - left, span) / span;
            Phase phase{top, left, together, step, span, rows, columns, {}, {}};
            phase.lines = seen(s, top, 1, s.rows);
            phase.across = seen(s, left, together, s.columns);
            if (phase.lines.places() * phase.across.places() == 0) phase.lines = phase.across = {};
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

    // A row of a tile of each block. `number`: of the first channel in an image with zeros around, `vector`: without;
    // `across` vectors on is the next block.
    template <bool ADD, After AFTER, int BLOCKS>
    INLINE void row(I number, I vector, I across, const Vector* shift, const float (*sums)[MOST_PIXELS][WIDTH], I r) const {
#ifdef TILES_IN_HARDWARE
        if constexpr (BLOCKS == 2) {
            const Vector a = load16(sums[0][r]) + shift[0], b = load16(sums[1][r]) + shift[1];
            if (across == 1) return two<ADD, AFTER>(number, vector, a, b);
        }
#endif
        for (int b = 0; b < BLOCKS; b++) {
            one<ADD, AFTER>(number + b * across * WIDTH, vector + b * across, load16(sums[b][r]) + shift[b]);
        }
    }

#ifdef TILES_IN_HARDWARE
    // The same as `one` of each.
    template <bool ADD, After AFTER>
    INLINE void two(I number, I vector, Vector a, Vector b) const {
        if (ADD) a += widen16(add + number), b += widen16(add + number + WIDTH);
        if (AFTER == KEEP) a = relu16(a), b = relu16(b);
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        __mmask32 positive;
        if (AFTER == KEEP) {
            positive = _mm512_test_epi16_mask(both, _mm512_set1_epi16(0x7fff));  // or not a number
            std::memcpy(signs + vector, &positive, sizeof positive);
        }
        if (AFTER == CLEAR) {
            std::memcpy(&positive, signs + vector, sizeof positive);
            both = _mm512_maskz_mov_epi16(positive, both);
        }
        _mm512_storeu_si512(y + number, both);
    }
#endif

    template <bool ADD, After AFTER>
    INLINE void one(I number, I vector, Vector a) const {
        if (ADD) a += widen16(add + number);
        if (AFTER == KEEP) a = relu16(a), signs[vector] = positive16(a);
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
            I vector = image * vectors;
            for (I i = 0; i < h; i++) {
                for (I j = 0; j < w; j++) {
                    const I inside = place(i, j, w, k);
                    for (I c = 0; c < k; c += WIDTH) (*this)(image * size + inside + c, vector++, a(image, inside + c, c));
                }
            }
        }
    }
};

void zero_around(I n, I h, I w, I c, Half* y) {
    const I size = area(h, w, c), line = pitch(w, c) * c, after = line - w * c;
    for (I image = 0; image < n; image++, y += size) {
        std::fill_n(y, line + c, 0);
        for (I i = 1; i <= h; i++) std::fill_n(y + i * line + c + w * c, after, 0);
        std::fill(y + place(h, 0, w, c), y + size, 0);
    }
}

// A convolution on one thread.
struct Convolution {
    // `pixel`: of y, or NONE beyond the end of a line; `place`: its first number there; `alone`: its neighbour is not in y.
    struct Row { I pixel, place; bool alone; };
    struct Tile { I x; std::vector<Row> rows; };
    struct Part { Phase phase; I rows; std::vector<Tile> tiles; };

    Shape s;
    I x_step = s.transposed ? 1 : s.stride;
    std::vector<Part> parts = made();

    // From one row of a tile to the next.
    I x_pixels(const Phase& phase) const { return x_step * phase.span / phase.step; }

    std::vector<Part> made() const {
        std::vector<Part> all;
        for (const Phase& phase : phases(s)) {
            if (phase.rows < 1 || phase.columns < 1) continue;
            // Where tiles do not end with a line, and none of x is skipped, the whole image is a run of rows, those beyond
            // a line's end for nothing.
            const I x_span = x_pixels(phase), columns = phase.columns, x_line = pitch(s.w, s.c);
            const bool whole = x_step == 1 && columns % MOST_PIXELS != 0;
            const I y_line = whole ? x_line / x_span : columns, lines = whole ? 1 : phase.rows;
            const I length = whole ? (phase.rows - 1) * y_line + columns : columns;
            const I count = (length + MOST_PIXELS - 1) / MOST_PIXELS, rows = (length + count - 1) / count;
            Part part{phase, rows, {}};
            for (I line = 0; line < lines; line++) {
                for (I first = 0; first < length; first += rows) {
                    I at = line * y_line + first;
                    const I end = line * y_line + std::min(first + rows, length);
                    const I x_i = at / y_line * x_step + phase.lines.first, x_j = at % y_line * x_span + phase.across.first;
                    Tile tile{place(x_i, x_j, s.w, s.c), {}};
                    for (; at < end; at++) {
                        const I i = phase.top + at / y_line * phase.step, j = phase.left + at % y_line * phase.span;
                        const bool inside = at % y_line < columns, alone = j + phase.together > s.y_w;
                        tile.rows.push_back({inside ? i * s.y_w + j : NONE, place(i, j, s.y_w, s.k), alone});
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
            const I blocks = part.phase.blocks(s.k), own = part.phase.halves(s.c);
            Sums<1>::begin(part.rows);
            for (I block = 0; block < blocks; block += 2) {
                const bool two = block + 2 <= blocks;
                two ? finished<2>(n, part, x, weight, block, last) : finished<1>(n, part, x, weight, block, last);
                weight += (two ? 2 : 1) * own;
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
        const I each = part.tiles.size(), size = area(s.h, s.w, s.c), depth = part.phase.depth(s.c);
        const I pixel = x_pixels(part.phase) * s.c, line = pitch(s.w, s.c) * s.c, lines = part.phase.lines.places();
        const I together = part.phase.together, channel = block / together * WIDTH, vectors = s.k / WIDTH;
        // From one block to the next: channels, vectors in y, numbers in a dense y.
        const bool single = together == 1;
        const I apart = single ? WIDTH : 0, across = single ? 1 : vectors, beside = single ? WIDTH : s.k;
        const Last last = given;  // in registers: of `given` the compiler must think that what is stored may change it
        Vector shift[BLOCKS] = {};
        for (int b = 0; b < BLOCKS && last.bias; b++) shift[b] = load16(last.bias + channel + b * apart);
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
            sums.compute(from, pixel, line, lines, depth, weight, part.rows);
            for (I i = 0; i < count; i++) {
                const float(*of)[MOST_PIXELS][WIDTH] = sums.of[i];
                const I number = images[i] * last.size + channel, vector = images[i] * last.vectors + channel / WIDTH;
                const I dense = images[i] * s.y_h * s.y_w * s.k + channel;
                for (const Row& row : tiles[i]->rows) {
                    if (row.pixel == NONE) continue;
                    const I r = &row - tiles[i]->rows.data();
                    const I at = number + row.place, vector_at = vector + row.pixel * vectors;
                    if constexpr (AFTER == Last::WANT) {
                        float* to = last.wanted + dense + row.pixel * s.k;
                        store16(to, load16(of[0][r]), s.k - channel);
                        if (BLOCKS == 2 && !row.alone) store16(to + beside, load16(of[1][r]), s.k - channel - apart);
                    } else if (row.alone) {
                        last.row<ADD, AFTER, 1>(at, vector_at, across, shift, of, r);
                    } else {
                        last.row<ADD, AFTER, BLOCKS>(at, vector_at, across, shift, of, r);
                    }
                }
            }
        }
    }
};

// Images in float32, dense: each number as two, what bfloat16 keeps of it and what it keeps of the rest; then zeros.
void import(const Shape& s, I n, const float* x, Half* y) {
    const I size = area(s.y_h, s.y_w, s.k);
    for (I image = 0; image < n; image++) {
        for (I i = 0; i < s.h; i++) {
            Half* to = y + image * size + place(i, 0, s.y_w, s.k);
            I j = 0;
#ifdef TILES_IN_HARDWARE
            // Four pixels of up to four channels: a vector of pairs.
            const __mmask16 pixel = (I(1) << std::min<I>(s.c, 4)) - 1, spread = pixel * 0x1111, read = (1 << 4 * s.c) - 1;
            for (; s.k == 8 && j + 4 <= s.w; j += 4, x += 4 * s.c, to += 4 * s.k) {
                const __m512 numbers = _mm512_maskz_loadu_ps(read, x);
                const __m512i kept = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers));
                const __m512 rest = _mm512_sub_ps(numbers, (__m512)_mm512_slli_epi32(kept, 16));
                const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest));
                const __m512i pairs = _mm512_or_si512(kept, _mm512_slli_epi32(bits, 16));
                _mm512_storeu_si512(to, _mm512_maskz_expand_epi32(spread, pairs));
            }
#endif
            for (; j < s.w; j++, x += s.c, to += s.k) {
                for (I c = 0; c < s.c; c++) to[2 * c] = narrow(x[c]), to[2 * c + 1] = narrow(x[c] - widen(to[2 * c]));
                std::fill(to + 2 * s.c, to + s.k, 0);
            }
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
    for (const Phase& phase : phases(s)) size += phase.halves(s.c) * phase.blocks(s.k);
    return size;
}

// As chain_weight, in the order in which they are read. Where images have each number twice, so has c.
void chain_bf16_weight(int64_t twice, const int64_t* shape, const float* w, void* u, int) {
    Shape s = convolution(shape);
    const Weight weight{w, shape[7], shape[8], shape[9]};
    Half* to = static_cast<Half*>(u);
    for (const Phase& phase : phases(s)) {
        const I blocks = phase.blocks(s.k), together = phase.together, places = phase.across.places();
        for (I first = 0; first < blocks; first += 2) {
            for (const I a : phase.lines.taps[0]) {
                for (I i = 0; i < phase.depth(s.c); i += DEPTH) {
                    for (I block = first; block < std::min(first + 2, blocks); block++) {
                        for (I j = 0; j < DEPTH; j += 2) {
                            for (I k = block / together * WIDTH; k < (block / together + 1) * WIDTH; k++) {
                                for (I at = i + j; at < i + j + 2; at++) {
                                    const I c = at % s.c / (twice ? 2 : 1);
                                    const I b = at / s.c < places ? phase.across.taps[block % together][at / s.c] : NONE;
                                    const I from = k * weight.out + c * weight.in + (a * s.columns + b) * weight.tap;
                                    *to++ = k < s.k && b != NONE ? narrow(w[from]) : 0;
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
