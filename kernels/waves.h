// Threads that share the rows of few sequences: each has whole rows, a chunk of them, and goes through their parts from
// left to right, each as soon as the thread that has the chunk before is done with it. What memory sends for a page is
// then one thread's, which for blocks of columns that are shorter than a page it is not.
#pragma once
#include "rows.h"

constexpr int64_t kWaveRows = 64;
// The memory that waves have for states, and for how far parts are
constexpr int64_t kCarriedBytes = 65536, kMostParts = 256;

template <class S>
struct Waves {
    Tiling<S> tiling;
    int64_t chunks;

    // part: columns that are worth a walk of their own. Nothing is cut where waves are not worth it.
    Waves(const Sequences& s, int64_t column_bytes, int64_t part) : tiling(s, column_bytes), chunks(1) {
        const int64_t sharing = (s.threads + s.count - 1) / s.count;
        // twice as many as threads leave room for a thread that is late
        const int64_t parts = std::min(2 * sharing, s.columns / part);
        const bool cuts_pages = tiling.cuts_rows() && tiling.width * column_bytes < kPageBytes;
        if (!cuts_pages || s.cu_seqlens || s.split > 1 || s.around_cache || parts < std::max<int64_t>(sharing, 2)) return;
        // the first chunk makes the others wait: for an eighth of the time at most
        if (s.rows < 8 * kWaveRows * sharing / parts * sharing) return;
        if (s.count * parts > kMostParts || s.count * s.columns * int64_t(sizeof(S)) > kCarriedBytes) return;
        tiling.cut(parts);
        chunks = (s.rows + kWaveRows - 1) / kWaveRows;
    }

    // Walks like for_tiles. A chunk is begun after the one before it, so that whoever waits for that one does not wait
    // for ever, even if all threads are one.
    void walk(bool backwards, const void* first, void* last,
              const std::function<void(const Tile&, const S* start, S* end)>& walk) const {
        struct alignas(kCacheLine) Part {
            std::atomic<int64_t> chunks = 0;
        };
        const Sequences& s = tiling.sequences;
        const int64_t across = std::min(s.threads, s.count);
        Part parts[kMostParts];
        alignas(kCacheLine) S memory[kCarriedBytes / sizeof(S)];
        S* const carried = last ? static_cast<S*>(last) : memory;
        parallel_for(s.count * chunks, s.threads, [&](int64_t i) {
            // as many sequences at once as threads, chunk by chunk
            const int64_t group = i / (across * chunks), members = std::min(across, s.count - group * across);
            const int64_t number = i % (across * chunks), n = group * across + number % members, chunk = number / members;
            FlushDenormals flush;
            for (int64_t block = 0; block < tiling.blocks; ++block) {
                Tile t = tiling[n * tiling.blocks + block];
                const int64_t from = (backwards ? chunks - 1 - chunk : chunk) * kWaveRows;
                const int64_t to = std::min(t.rows, from + kWaveRows), place = t.sequence * s.columns + t.column;
                t.continues = s.reverse ? to < t.rows : from > 0;
                t.first_row = from, t.rows = to - from;
                const S* start = chunk > 0 ? carried : static_cast<const S*>(first);
                S* end = chunk + 1 < chunks || last ? carried + place : nullptr;
                std::atomic<int64_t>& done = parts[t.sequence * tiling.blocks + block].chunks;
                wait_for(done, chunk);
                walk(t, start ? start + place : nullptr, end);
                done.store(chunk + 1, std::memory_order_release);
            }
        });
    }
};
