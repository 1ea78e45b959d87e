// Several linear maps of a few rows: y = x Wᵀ + b for each. Threads share the rows of all matrices.
#include <algorithm>

#include "parallel.h"
#include "vectors.h"

namespace {

struct Map {
    const void *x, *weight, *bias;  // [rows, width], [outputs, width], [outputs]; bias may be null: zeros
    void* y;                    // [rows, outputs]
    int64_t outputs;
};

// All fields are 8 bytes: projections.py packs them as one array.
struct Problem {
    int64_t count, rows, width, format, threads;
    Map maps[];
};

// Outputs that are computed side by side, and those that a thread takes at a time.
constexpr int64_t kBlock = 4, kChunk = 64;

int64_t chunks(const Map& map) { return (map.outputs + kChunk - 1) / kChunk; }

// Outputs o to o + N - 1. The products of an output are added in one order, whichever outputs are computed beside it.
template <int64_t N, class T>
void outputs(const Problem& p, const Map& map, int64_t o) {
    using S = StateOf<T>;
    constexpr int W = kLanes<S>;
    const T* weight = static_cast<const T*>(map.weight) + o * p.width;
    const T* bias = static_cast<const T*>(map.bias);
    const int64_t whole = p.width / W * W;
    for (int64_t r = 0; r < p.rows; ++r) {
        const T* x = static_cast<const T*>(map.x) + r * p.width;
        Lanes<S> sums[N] = {};
        for (int64_t i = 0; i < whole; i += W) {
            Lanes<S> v = load<W>(x + i);
            UNROLL
            for (int n = 0; n < N; ++n) sums[n] = multiply_add(load<W>(weight + n * p.width + i), v, sums[n]);
        }
        if (whole < p.width) {
            const int64_t rest = p.width - whole;
            Lanes<S> v = load_some(x + whole, rest);
            UNROLL
            for (int n = 0; n < N; ++n)
                sums[n] = multiply_add(load_some(weight + n * p.width + whole, rest), v, sums[n]);
        }
        T* y = static_cast<T*>(map.y) + r * map.outputs + o;
        for (int n = 0; n < N; ++n) {
            S total = sum(sums[n]);
            if (bias) total += load<1>(bias + o + n)[0];
            store(y + n, Vec<S, 1>{total});
        }
    }
}

template <class T>
void run(const Problem& p) {
    int64_t total = 0;
    for (int64_t m = 0; m < p.count; ++m) total += chunks(p.maps[m]);
    parallel_for(total, p.threads, [&](int64_t chunk) {
        const Map* map = p.maps;
        for (; chunk >= chunks(*map); ++map) chunk -= chunks(*map);
        int64_t o = chunk * kChunk, end = std::min(o + kChunk, map->outputs);
        for (; o + kBlock <= end; o += kBlock) outputs<kBlock, T>(p, *map, o);
        for (; o < end; ++o) outputs<1, T>(p, *map, o);
    });
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
void projections(const Problem* p) {
    switch (p->format) {
        case 0: return run<double>(*p);
        case 1: return run<float>(*p);
        case 2: return run<Half>(*p);
        case 3: return run<BFloat16>(*p);
    }
}
}
