// Convolutions as the sum over taps of shifted images times matrices, for strides, and their transposes. conv2d.py has the
// equations.

#pragma once

#include <vector>

#include "depthwise.h"

namespace {

constexpr I GROUP = 8;  // positions of y whose sums are kept in registers
constexpr I FEW = 3;                   // output channels that leave most of a vector of them empty

// y[top + i * y_step][left + j * y_step] = finish(sum over taps of x[i * x_step + dh][j * x_step + dw] w[index]): all of
// a convolution, or, of a transpose, those pixels that see the same taps.
struct Phase {
    struct Tap { I index, dh, dw; };
    I top, left, rows, columns;
    std::vector<Tap> taps;
    std::vector<I> line, column;  // [i][tap], [j][tap]: distances from the image's first number, negative outside it
    std::vector<char> line_inside, column_inside;  // [i], [j]: for all taps

    bool inside(I i, I j, I count) const { return line_inside[i] && column_inside[j] && column_inside[j + count - 1]; }

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
        const auto inside = [&](const std::vector<I>& distances, I at) {
            const auto first = distances.begin() + at * taps.size();
            return std::all_of(first, first + taps.size(), [](I distance) { return distance >= 0; });
        };
        for (I i = 0; i < rows; i++) line_inside.push_back(inside(line, i));
        for (I j = 0; j < columns; j++) column_inside.push_back(inside(column, j));
    }
};

template <int WHAT>
INLINE void prefetch_share(const float* from, I floats, I part, I parts) {
    const I begin = floats * part / parts;
    prefetch<WHAT>(from + begin, floats * (part + 1) / parts - begin);
}

// Whether vectors are of input channels, since the output's would be nearly empty.
inline bool few(I c, I k) { return k <= FEW && c % LANES == 0; }

inline I taps_floats(I taps, I c, I k) { return taps * c * (few(c, k) ? FEW : lanes_up(k)); }

// u[panel][tap][c][k]; for few k u[tap][c][k][lane of c], zero beyond the last.
void order_taps(const Weight& weight, I taps, I c, I k, float* u) {
    if (few(c, k)) {
        #pragma omp for schedule(static)
        for (I t = 0; t < taps; t++) {
            for (I i = 0; i < c; i++) {
                float* target = u + (t * c + i / LANES * LANES) * FEW + i % LANES;
                for (I j = 0; j < FEW; j++) {
                    target[j * LANES] = j < k ? weight.w[j * weight.out + i * weight.in + t * weight.tap] : 0;
                }
            }
        }
        return;
    }
    const I padded = lanes_up(k), wide = panel(padded);
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

struct Strided {
    Shape s;
    I padded = lanes_up(s.k), taps = s.rows * s.columns, y_step = s.transposed ? s.stride : 1, x_step = s.transposed ? 1 : s.stride;
    std::vector<Phase> phases = made();
    // An image is worked off in bands of some 64 positions of each phase, so that what phases share stays at hand.
    I band = std::max<I>(1, 64 / phases[0].columns), bands = (phases[0].rows + band - 1) / band;

    I count() const { return s.n * bands; }

    std::vector<Phase> made() const {
        std::vector<Phase> found;
        for (I top = 0; top < y_step; top++) {
            for (I left = 0; left < y_step; left++) {
                Phase phase;
                phase.top = top, phase.left = left;
                phase.rows = (s.y_h - top + y_step - 1) / y_step, phase.columns = (s.y_w - left + y_step - 1) / y_step;
                for (I a = 0; a < s.rows; a++) {
                    for (I b = 0; b < s.columns; b++) {
                        const I dh = top + s.padding - a, dw = left + s.padding - b, index = a * s.columns + b;
                        if (!s.transposed) {
                            phase.taps.push_back({index, -dh, -dw});
                        } else if (dh % s.stride == 0 && dw % s.stride == 0) {
                            phase.taps.push_back({index, dh / s.stride, dw / s.stride});
                        }
                    }
                }
                phase.measure(s.h, s.w, s.c, x_step);
                found.push_back(phase);
            }
        }
        return found;
    }

    // For bands from `first` on, on one thread. `zeros`: c of them. What is `far` comes from memory.
    void run(const float* x, const float* u, const Finish& finish, I first, I end, const float* zeros, bool far) const {
        const auto compute = few(s.c, s.k) ? &Strided::add_few : panel(padded) == LANES ? &Strided::add_taps<1> : &Strided::add_taps<WIDE>;
        const I groups = (band * phases[0].columns + GROUP - 1) / GROUP * phases.size();
        for (; first < end; first++) {
            const I image = first / bands, top = first % bands * band;
            // Meanwhile this band of y and the next of x come from memory, a share with each group.
            const I next = first + 1, x_from = (next / bands * s.h + next % bands * band * x_step) * s.w * s.c;
            const I x_size = std::min(band * x_step * s.w * s.c, s.n * s.h * s.w * s.c - x_from);
            const I y_from = (image * s.y_h + top * y_step) * s.y_w * s.k;
            const I y_size = std::min(band * y_step * s.y_w * s.k, s.n * s.y_h * s.y_w * s.k - y_from);
            I group = 0;
            for (const Phase& phase : phases) {
                const I own = phase.taps.size(), all = std::min(band, phase.rows - top) * phase.columns;
                I i = top, j = 0;
                for (I at = 0; at < all; at += GROUP, group++) {
                    const I count = std::min(GROUP, all - at);
                    const float* pixels[MOST_TAPS][GROUP];
                    I out[GROUP];
                    const float* start = x + image * s.h * s.w * s.c;
                    const I out_start = ((image * s.y_h + phase.top) * s.y_w + phase.left) * s.k;
                    const auto where = [&](I i, I j) { return out_start + (i * s.y_w + j) * y_step * s.k; };
                    if (count == GROUP && j + GROUP <= phase.columns && phase.inside(i, j, GROUP)) {
                        for (I t = 0; t < own; t++) {
                            const float* first = start + phase.line[i * own + t] + phase.column[j * own + t];
                            for (I r = 0; r < GROUP; r++) pixels[t][r] = first + r * x_step * s.c;
                        }
                        for (I r = 0; r < GROUP; r++) out[r] = where(i, j + r);
                        j += GROUP;
                        if (j == phase.columns) j = 0, i++;
                    } else {
                        for (I r = 0; r < GROUP; r++) {
                            if (r >= count) {
                                for (I t = 0; t < own; t++) pixels[t][r] = pixels[t][0];
                                continue;
                            }
                            out[r] = where(i, j);
                            for (I t = 0; t < own; t++) {
                                const I line = phase.line[i * own + t], column = phase.column[j * own + t];
                                pixels[t][r] = (line | column) < 0 ? zeros : start + line + column;
                            }
                            if (++j == phase.columns) j = 0, i++;
                        }
                    }
                    if (far) {
                        prefetch_share<READ>(x + x_from, x_size, group, groups);
                        if (!finish.past_caches) prefetch_share<WRITE>(finish.y + y_from, y_size, group, groups);
                    }
                    (this->*compute)(phase, pixels, out, count, u, finish);
                }
            }
        }
    }

    void add_few(
        const Phase& phase, const float* const (&pixels)[MOST_TAPS][GROUP], const I (&out)[GROUP], I count, const float* u,
        const Finish& finish
    ) const {
        vec sum[FEW][GROUP] = {};
        for (I t = 0; t < (I)phase.taps.size(); t++) {
            const float* b = u + phase.taps[t].index * s.c * FEW;
            for (I i = 0; i < s.c; i += LANES) {
                vec left[GROUP];
                #pragma GCC unroll 8
                for (int r = 0; r < GROUP; r++) left[r] = load(pixels[t][r] + i);
                #pragma GCC unroll 8
                for (int k = 0; k < FEW; k++) {
                    const vec right = load(b + i * FEW + k * LANES);
                    #pragma GCC unroll 8
                    for (int r = 0; r < GROUP; r++) sum[k][r] += left[r] * right;
                }
            }
        }
        float totals[FEW][LANES];
        #pragma GCC unroll 8
        for (int k = 0; k < FEW; k++) store(totals[k], lane_sums(sum[k]));
        for (I r = 0; r < count; r++) {
            for (I k = 0; k < s.k; k++) finish.number(out[r] + k, k, totals[k][r]);
        }
    }

    template <int J>
    void add_taps(
        const Phase& phase, const float* const (&pixels)[MOST_TAPS][GROUP], const I (&out)[GROUP], I count, const float* u,
        const Finish& finish
    ) const {
        for (I p = 0; p < padded; p += J * LANES) {
            vec sum[GROUP][J] = {};
            for (I t = 0; t < (I)phase.taps.size(); t++) {
                const float* left[GROUP];
                for (int r = 0; r < GROUP; r++) left[r] = pixels[t][r];
                const float* b = u + (p * taps + phase.taps[t].index * J * LANES) * s.c;
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
};

}  // namespace
