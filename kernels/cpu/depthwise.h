// Which numbers a convolution or its transpose adds up. conv2d.py has the equations.

#pragma once

#include "vectors.h"

namespace {

constexpr I MOST_TAPS = 9;

// Of x[n][h][w][c] and y[n][y_h][y_w][k], and the kernel between them.
struct Shape { I n, h, w, c, y_h, y_w, k, rows, columns, stride, padding, transposed; };

struct Tap { I index, h, w; };  // and the pixel of x that it meets

// The taps that meet a pixel of x for pixel (i, j) of y; returns how many.
inline I taps_inside(const Shape& s, I i, I j, Tap* taps) {
    const I step = s.transposed ? s.stride : 1;
    I count = 0;
    for (I a = 0; a < s.rows; a++) {
        const I dh = s.transposed ? i + s.padding - a : i * s.stride + a - s.padding;
        if (dh < 0 || dh % step || dh / step >= s.h) continue;
        for (I b = 0; b < s.columns; b++) {
            const I dw = s.transposed ? j + s.padding - b : j * s.stride + b - s.padding;
            if (dw < 0 || dw % step || dw / step >= s.w) continue;
            taps[count++] = {a * s.columns + b, dh / step, dw / step};
        }
    }
    return count;
}

}  // namespace
