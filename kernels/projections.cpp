// Several linear maps of a few rows: y = x Wᵀ + b for each. Threads share the rows of all matrices.
#include <algorithm>

#include "linear_map.h"
#include "parallel.h"

namespace {

struct Map {
    const void* x;  // [rows, width]
    LinearMap map;
    void* y;  // [rows, outputs]
    int64_t width, outputs;
};

// All fields are 8 bytes: projections.py packs them as one array.
struct Problem {
    int64_t count, rows, format, threads;
    Map maps[];
};

// Outputs that a thread takes at a time.
constexpr int64_t kChunk = 64;

int64_t chunks(const Map& map) { return (map.outputs + kChunk - 1) / kChunk; }

template <class T>
void run(const Problem& p) {
    using S = StateOf<T>;
    int64_t total = 0;
    for (int64_t m = 0; m < p.count; ++m) total += chunks(p.maps[m]);
    parallel_for(total, p.threads, [&](int64_t chunk) {
        const Map* map = p.maps;
        for (; chunk >= chunks(*map); ++map) chunk -= chunks(*map);
        const int64_t first = chunk * kChunk, end = std::min(first + kChunk, map->outputs);
        S made[kRows * kChunk];
        for (int64_t r = 0; r < p.rows; r += kRows) {
            const int64_t rows = std::min<int64_t>(kRows, p.rows - r);
            const T* x = static_cast<const T*>(map->x) + r * map->width;
            outputs_of<T>(map->map, x, rows, map->width, first, end, made, kChunk);
            for (int64_t k = 0; k < rows; ++k)
                copy_converted(made + k * kChunk, end - first, static_cast<T*>(map->y) + (r + k) * map->outputs + first);
        }
    });
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
void projections(const Problem* p) {
    with_format(p->format, [&]<class T>() { run<T>(*p); });
}
}
