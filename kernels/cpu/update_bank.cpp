// A bank's rows after a step, in float32: nce_bank.py's update.

#include <cmath>
#include <cstdint>
#include <unordered_set>

// bank[rows[i]] <- unit(momentum bank[rows[i]] + (1 - momentum) values[i]), i the last one of its row; a row of the bank
// every `stride` numbers.
extern "C" void update_bank(
    float* bank,
    const int64_t* rows,
    const float* values,
    int64_t count,
    int64_t depth,
    int64_t stride,
    float momentum,
    float min_norm,
    int
) {
    std::unordered_set<int64_t> seen;
    seen.reserve(count);
    for (int64_t i = count - 1; i >= 0; i--) {
        if (!seen.insert(rows[i]).second) continue;
        const float* value = values + i * depth;
        float *row = bank + rows[i] * stride, squares = 0;
        #pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < depth; d++) {
            row[d] = momentum * row[d] + (1 - momentum) * value[d];
            squares += row[d] * row[d];
        }
        float norm = std::sqrt(squares);
        norm = norm < min_norm ? min_norm : norm;  // a NaN stays one
        for (int64_t d = 0; d < depth; d++) row[d] /= norm;
    }
}
