// The rows that draws.py draws, for anchors of which it has worked out where each begins.

#include <cstdint>
#include <vector>

namespace {

struct Anchor {
    int64_t key_1, key_2;   // 32 bits each
    int64_t end, n, others; // of its own class; rows of other classes, at least 1; the same, maybe none
    int64_t every, strata;  // how often each row comes; strata of those that come once more
    int64_t turn;           // of the ranks
    int64_t place;          // where the first stratum's row goes
};

// Of the strata that give one row each: ranks.
void ranks(const Anchor& a, int32_t* rank) {
    const uint32_t key_1 = a.key_1, key_2 = a.key_2;
    const double n = a.n, strata = a.strata;
    // In float64 as in draws.py. A bound is below 2**25, so it may be cut to an integer of 32 bits, which vectors can.
    #pragma omp simd
    for (int32_t s = 0; s < static_cast<int32_t>(a.strata); s++) {
        uint32_t x = s + key_1;
        x = (x ^ x >> 16) * 0x21F0AAADu;
        x = x ^ key_2;
        x = (x ^ x >> 15) * 0xD35A2D97u;
        x = x ^ x >> 15;
        const double low = static_cast<int32_t>(s * n / strata), high = static_cast<int32_t>((s + 1) * n / strata);
        const double part = static_cast<int32_t>(x >> 3) * (1.0 / (1 << 29));
        rank[s] = static_cast<int32_t>(low) + static_cast<int32_t>(part * (high - low));
    }
}

}  // namespace

// order (rows,): the bank's rows by class; out (count, k). From one stratum to the next the place moves on by `stride`,
// going round.
extern "C" void draws(
    const int32_t* order,
    int64_t rows,
    const Anchor* anchors,
    int64_t count,
    int64_t k,
    int64_t stride,
    int64_t* out,
    int threads
) {
    #pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> rank(k + 1);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            const Anchor& a = anchors[i];
            const int64_t whole = a.every * a.n;
            for (int64_t j = 0; j < whole; j++) rank[j] = j % a.n;
            ranks(a, rank.data() + whole);
            int64_t* own = out + i * k;
            int64_t place = a.place;
            for (int64_t j = 0; j < k; j++) {
                int64_t at = rank[j] - a.turn;
                at += a.end + (at < 0 ? a.n : 0);
                own[place] = a.others ? order[at < rows ? at : at - rows] : -1;
                place += stride;
                place -= place < k ? 0 : k;
            }
        }
    }
}
