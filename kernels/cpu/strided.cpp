// Convolutions with a stride, and their transposes, as the sum over taps of shifted images times matrices. conv2d.py has
// the equations.

#include <vector>

#include "vectors.h"

namespace {

constexpr I MOST_TAPS = 9, GROUP = 8;  // positions of y whose sums are kept in registers

// y[top + i * y_step][left + j * y_step] = finish(sum over taps of x[i * x_step + dh][j * x_step + dw] w[index]): all of
// a convolution, or, of a transpose, those pixels that see the same taps.
struct Phase {
    struct Tap { I index, dh, dw; };
    I top = 0, left = 0, rows, columns;
    std::vector<Tap> taps;
    std::vector<I> line, column;  // [i][tap], [j][tap]: distances from the image's first number, negative outside it

    void measure(I h, I w, I c, I x_step) {
        for (I i = 0; i < rows; i++) {
            for (const Tap& tap : taps) {
                const I at = i * x_step + tap.dh;
                line.push_back(at >= 0 && at < h ? at * w * c : -1);
            }
        }
        for (I j = 0; j < columns; j++) {
            for (const Tap& tap : taps) {
                const I at = j * x_step + tap.dw;
                column.push_back(at >= 0 && at < w ? at * c : -1);
            }
        }
    }
};

struct Strided {
    I n, h, w, c, y_h, y_w, k, kernel_rows, kernel_columns, stride, padding, transposed;

    std::vector<Phase> phases() const {
        const I steps = transposed ? stride : 1;
        std::vector<Phase> found;
        for (I top = 0; top < steps; top++) {
            for (I left = 0; left < steps; left++) {
                Phase phase{top, left, (y_h - top + steps - 1) / steps, (y_w - left + steps - 1) / steps, {}, {}, {}};
                for (I a = 0; a < kernel_rows; a++) {
                    for (I b = 0; b < kernel_columns; b++) {
                        const I dh = top + padding - a, dw = left + padding - b, index = a * kernel_columns + b;
                        if (!transposed) {
                            phase.taps.push_back({index, -dh, -dw});
                        } else if (dh % stride == 0 && dw % stride == 0) {
                            phase.taps.push_back({index, dh / stride, dw / stride});
                        }
                    }
                }
                phase.measure(h, w, c, transposed ? 1 : stride);
                found.push_back(phase);
            }
        }
        return found;
    }
};

template <int WHAT>
INLINE void prefetch_share(const float* from, I floats, I part, I parts) {
    const I begin = floats * part / parts;
    prefetch<WHAT>(from + begin, floats * (part + 1) / parts - begin);
}

// u[panel][tap][c][k]
void order_weight(const Weight& weight, I taps, I c, I k, I padded, float* u) {
    const I wide = panel(padded);
    #pragma omp for collapse(2) schedule(static)
    for (I p = 0; p < padded; p += wide) {
        for (I first = 0; first < c; first += LANES) {
            const I count = std::min<I>(LANES, c - first);
            for (I t = 0; t < taps; t++) {
                Block block;
                gather(weight, t, first, count, p, k - p, block);
                float* target = u + (p * taps + t * wide) * c + first * wide;
                for (I i = 0; i < count; i++) std::copy_n(block[i], wide, target + i * wide);
            }
        }
    }
}

template <int J>
void add_taps(
    const Strided& s, const Phase& phase, const float* const (&pixels)[GROUP][MOST_TAPS], const I (&out)[GROUP], I count,
    const float* u, const Finish& finish
) {
    const I padded = lanes_up(s.k), all = s.kernel_rows * s.kernel_columns, taps = phase.taps.size();
    for (I p = 0; p < padded; p += J * LANES) {
        vec sum[GROUP][J] = {};
        for (I t = 0; t < taps; t++) {
            const float* left[GROUP];
            for (int r = 0; r < GROUP; r++) left[r] = pixels[r][t];
            const float* b = u + (p * all + phase.taps[t].index * J * LANES) * s.c;
            for (I i = 0; i < s.c; i++) {
                vec right[J];
                for (int j = 0; j < J; j++) right[j] = load(b + (i * J + j) * LANES);
                for (int r = 0; r < GROUP; r++) {
                    for (int j = 0; j < J; j++) sum[r][j] += left[r][i] * right[j];
                }
            }
        }
        for (int j = 0; j < J; j++) {
            const I k = p + LANES * j;
            const vec shift = finish.shift(k, s.k - k);
            for (I r = 0; r < count; r++) finish(out[r] + k, sum[r][j] + shift, s.k - k);
        }
    }
}

}  // namespace

extern "C" {

// y = finished convolution of x with stride, or its transpose: w's taps lie row by row.
void conv2d_strided(
    const float* x, const float* w, const float* bias, const float* add, float* y, const int64_t* shape, int threads
) {
    Strided s;
    std::memcpy(&s, shape, sizeof s);
    const I* more = shape + sizeof s / sizeof(I);
    const Weight weight{w, more[0], more[1], more[2]};
    const Finish finish(bias, add, more[3], y, s.n * s.y_h * s.y_w * s.k, s.k);
    const auto phases = s.phases();
    const I padded = lanes_up(s.k), taps = s.kernel_rows * s.kernel_columns;
    const Scratch u(taps * s.c * padded), zeros(s.c, true);
    const auto compute = panel(padded) == LANES ? add_taps<1> : add_taps<WIDE>;
    const I y_step = s.transposed ? s.stride : 1, x_step = s.transposed ? 1 : s.stride;
    // An image is worked off in bands of some 64 positions of each phase, so that what phases share stays at hand.
    const I lines = phases[0].rows, band = std::max<I>(1, 64 / phases[0].columns), bands = (lines + band - 1) / band;
    const I groups = (band * phases[0].columns + GROUP - 1) / GROUP * phases.size();
    #pragma omp parallel num_threads(threads)
    {
        order_weight(weight, taps, s.c, s.k, padded, u);
        #pragma omp for schedule(static)
        for (I item = 0; item < s.n * bands; item++) {
            const I image = item / bands, top = item % bands * band;
            // Meanwhile this band of y and the next of x come from memory, a share with each group.
            const I next = item + 1, x_from = (next / bands * s.h + next % bands * band * x_step) * s.w * s.c;
            const I x_size = std::min(band * x_step * s.w * s.c, s.n * s.h * s.w * s.c - x_from);
            const I y_from = (image * s.y_h + top * y_step) * s.y_w * s.k;
            const I y_size = std::min(band * y_step * s.y_w * s.k, s.n * s.y_h * s.y_w * s.k - y_from);
            I group = 0;
            for (const Phase& phase : phases) {
                const I own = phase.taps.size(), end = std::min(band, phase.rows - top) * phase.columns;
                I i = top, j = 0;
                for (I first = 0; first < end; first += GROUP, group++) {
                    const I count = std::min(GROUP, end - first);
                    const float* pixels[GROUP][MOST_TAPS];
                    I out[GROUP];
                    for (I r = 0; r < GROUP; r++) {
                        if (r >= count) {
                            std::copy_n(pixels[0], own, pixels[r]);
                            continue;
                        }
                        out[r] = ((image * s.y_h + phase.top + i * y_step) * s.y_w + phase.left + j * y_step) * s.k;
                        const float* start = x + image * s.h * s.w * s.c;
                        for (I t = 0; t < own; t++) {
                            const I line = phase.line[i * own + t], column = phase.column[j * own + t];
                            pixels[r][t] = (line | column) < 0 ? zeros : start + line + column;
                        }
                        if (++j == phase.columns) j = 0, i++;
                    }
                    prefetch_share<READ>(x + x_from, x_size, group, groups);
                    if (!finish.past_caches) prefetch_share<WRITE>(y + y_from, y_size, group, groups);
                    compute(s, phase, pixels, out, count, u, finish);
                }
            }
        }
        finish.done();
    }
}
}
