// One step of projected gradient ascent on float32 pixels; pgd_step.py has the equation. `out` may be `x_adv`.

#include <cstdint>

extern "C" void pgd_step(
    const float* x_adv,
    const float* gradient,
    const float* x,
    float* out,
    int64_t size,
    float step_size,
    float epsilon,
    float low,
    float high,
    int threads
) {
    // As in torch, a NaN has no sign, and in x or x_adv it stays one.
    #pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < size; i++) {
        const float g = gradient[i], lowest = x[i] - epsilon, highest = x[i] + epsilon;
        float a = x_adv[i] + (g > 0 ? step_size : g < 0 ? -step_size : 0.0f);
        a = a < lowest ? lowest : a;
        a = a > highest ? highest : a;
        a = a < low ? low : a;
        a = a > high ? high : a;
        out[i] = x[i] == x[i] ? a : x[i];
    }
}
