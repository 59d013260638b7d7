// The door to strided.h.

#include "strided.h"

extern "C" {

// y = finished convolution of x with stride, or its transpose: w's taps lie row by row.
void conv2d_strided(
    const float* x, const float* w, const float* bias, const float* add, float* y, const int64_t* shape, int threads
) {
    Shape s;
    std::memcpy(&s, shape, sizeof s);
    const I* more = shape + sizeof s / sizeof(I);
    const Weight weight{w, more[0], more[1], more[2]};
    const Strided conv{s};
    Finish finish{bias, add, more[3] != 0, y};
    finish.past_caches = outgrows_caches(y, s.n * s.y_h * s.y_w * s.k, s.k);
    const Scratch u(taps_floats(conv.taps, s.c, s.k)), zeros(s.c, true);
    #pragma omp parallel num_threads(threads)
    {
        order_taps(weight, conv.taps, s.c, s.k, u);
        #pragma omp for schedule(static)
        for (I part = 0; part < threads; part++) {
            conv.run(x, u, finish, conv.count() * part / threads, conv.count() * (part + 1) / threads, zeros, true);
        }
        finish.done();
    }
}
}
