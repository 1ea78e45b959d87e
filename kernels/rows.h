// Walking through sequences [B, T, columns] row by row: what a kernel reads and writes, and who does which part.
#pragma once
#include <algorithm>
#include <functional>

#include "parallel.h"
#include "simd.h"

// A tile's state is held in the L1 cache, which it shares with the rows that pass by.
constexpr int64_t kStateBytes = 16384;
alignas(kCacheLine) static const char zeros[kStateBytes] = {};

// What every kernel over sequences is told. All fields are 8 bytes: Python packs them as one array.
struct Sequences {
    const int64_t* cu_seqlens;  // [count + 1] with batch 1, or null: `count` sequences of `rows` rows
    int64_t count, rows, columns;
    int64_t reverse, threads;
    int64_t block, around_cache;
    // into how many chunks the rows of every sequence are split, each a tile's, and if into more than one what is known
    // of chunks: [3, count, split, columns] numbers of states
    int64_t split;
    void* chunks;
};

// How a tensor's rows lie in memory, in elements; columns lie side by side.
struct Strides {
    int64_t batch, row;
};

// A part of one sequence: rows x columns.
struct Tile {
    int64_t sequence, batch, first_row, rows, column, columns;
    // among the chunks of all sequences
    int64_t number;
    // of the sequence, there are rows before these in time
    bool continues = false;
};

// What hardware fetches ahead of a row ends with its page: cut into longer parts, rows cost nothing.
constexpr int64_t kPageBytes = 4096;

// Cuts sequences into blocks of columns: whole rows where there are sequences enough for all threads. A thread that has
// shorter parts of rows than a page also fetches what lies between them, which is another thread's.
template <class S>
struct Tiling {
    // whole lines in the narrowest format, and so whole pairs and vectors
    static constexpr int64_t kUnit = 2 * kCacheLine / sizeof(S);
    const Sequences& sequences;
    int64_t blocks, width;

    // column_bytes: of a tensor's row.
    Tiling(const Sequences& s, int64_t column_bytes) : sequences(s) {
        const int64_t threads = s.split > 1 ? 1 : s.threads;
        int64_t wanted = even_blocks(threads);
        if (s.cu_seqlens) {
            int64_t longest = 0;
            for (int64_t n = 0; n < s.count; ++n) longest = std::max(longest, s.cu_seqlens[n + 1] - s.cu_seqlens[n]);
            auto blocks_for = [&](int64_t tiles) { return (threads * tiles * longest + s.rows - 1) / s.rows; };
            wanted = std::max(blocks_for(1), std::min(blocks_for(4), s.columns / (8 * kUnit)));
        } else {
            // as many for each thread as cost nothing: threads may be fast and slow ones
            const int64_t several = (4 * threads + s.count - 1) / s.count;
            wanted = std::max(wanted, std::min(several, s.columns * column_bytes / kPageBytes));
        }
        cut(wanted);
    }

    // Into so many blocks, or more, if a block's state would not fit; fewer, if there are not so many columns.
    void cut(int64_t wanted) {
        const int64_t columns = sequences.columns;
        const int64_t widest = std::clamp<int64_t>(sequences.block, kUnit, kStateBytes / sizeof(S)) / kUnit * kUnit;
        width = (columns + wanted - 1) / wanted;
        width = std::min((width + kUnit - 1) / kUnit * kUnit, widest);
        blocks = (columns + width - 1) / width;
    }

    int64_t tiles() const { return sequences.count * blocks; }

    Tile operator[](int64_t i) const {
        int64_t n = i / blocks, column = i % blocks * width;
        Tile t{n, n, 0, sequences.rows, column, std::min(width, sequences.columns - column), n};
        if (const int64_t* first = sequences.cu_seqlens) {
            t.batch = 0;
            t.first_row = first[n];
            t.rows = first[n + 1] - first[n];
        }
        return t;
    }

    // The least with which sequences of one length leave threads no more than a fifth of the time without work.
    int64_t even_blocks(int64_t threads) const {
        int64_t blocks = (threads + sequences.count - 1) / sequences.count;
        auto rounds = [&] { return (sequences.count * blocks + threads - 1) / threads; };
        while (4 * rounds() * threads > 5 * sequences.count * blocks) ++blocks;
        return blocks;
    }

    // The strides of a contiguous tensor.
    Strides contiguous() const { return {sequences.rows * sequences.columns, sequences.columns}; }
    // Short rows would mostly be parts of lines.
    bool around_cache() const { return sequences.around_cache && width * sizeof(S) >= 1024; }
    // Whether a tile's rows are parts of the tensor's.
    bool cuts_rows() const { return width < sequences.columns; }
};

// The rows of one tensor in a tile, in the order of a walk.
template <class T>
struct Rows {
    static constexpr int64_t kLine = kCacheLine / sizeof(T);
    T* row;
    // from one row to the next, and to the one that is to be prefetched
    int64_t step, ahead;

    // backwards: from the last row to the first. Null: the same row of zeros again and again.
    OUTLINE Rows(const void* p, Strides s, const Tile& t, bool backwards) {
        if (p == nullptr) {
            row = reinterpret_cast<T*>(const_cast<char*>(zeros));
            step = ahead = 0;
            return;
        }
        row = static_cast<T*>(const_cast<void*>(p)) + t.batch * s.batch + t.first_row * s.row + t.column;
        if (backwards) row += (t.rows - 1) * s.row;
        step = backwards ? -s.row : s.row;
        // as far as the hardware sees by itself, but also across the gap between the rows of a narrow tile
        constexpr int64_t distance = 2048 / sizeof(T);
        ahead = (distance + t.columns - 1) / t.columns * step;
    }
    INLINE void next(int64_t rows = 1) { row += rows * step; }
    INLINE void prefetch(int64_t c) const { __builtin_prefetch(row + ahead + c); }
};

// Rows of results. They are computed in place, or in a buffer if they are to go around the cache or nobody needs them.
template <class T>
struct Output {
    static constexpr int64_t kLine = Rows<T>::kLine;
    Rows<T> rows;
    bool needed, around_cache;
    // the row to write, and the row to be written that is to be prefetched
    T *row, *ahead;
    alignas(kCacheLine) char buffer[kStateBytes];

    OUTLINE Output(void* p, Strides s, const Tile& t, bool backwards, bool around_cache)
        : rows(p, s, t, backwards), needed(p != nullptr), around_cache(around_cache) {
        bool in_place = needed && !around_cache;
        row = in_place ? rows.row : reinterpret_cast<T*>(buffer);
        ahead = in_place ? row + rows.ahead : row;
        if (!in_place) rows.ahead = 0;
    }
    // Whether its rows begin with a line, so that vectors can go around the cache without the buffer.
    bool of_lines() const {
        return reinterpret_cast<uintptr_t>(rows.row) % kCacheLine == 0 && rows.step * sizeof(T) % kCacheLine == 0;
    }
    INLINE void prefetch(int64_t c) const { __builtin_prefetch(ahead + c, 1); }
    // count: more than one only where rows do not go around the cache.
    INLINE void next(int64_t n, int64_t count = 1) {
        if (!needed) return;
        if (around_cache) copy_around_cache(rows.row, buffer, n * sizeof(T));
        else row += count * rows.step, ahead += count * rows.step;
        rows.next(count);
    }
};

// Calls f(column, slot) for vectors of W columns that cover [0, n), n >= W. Where n is no multiple of W the last two
// overlap: both compute the same values there. Slots never do, so that no load waits for two stores.
// A walk backwards goes down in the row as well: the hardware prefetches in one direction.
template <int W, class F>
INLINE void for_vectors(int64_t n, bool backwards, const F& f) {
    int64_t count = (n + W - 1) / W, step = backwards ? -W : W;
    int64_t slot = backwards ? (count - 1) * W : 0;
    for (; count > 0; --count, slot += step) f(std::min(slot, n - W), slot);
}

// One slot for each vector of a tile's state.
template <class S>
struct Slots {
    alignas(kCacheLine) S at[kStateBytes / sizeof(S)];

    // Null: zeros.
    template <int W>
    OUTLINE void read(const S* columns, int64_t n) {
        if (columns == nullptr) std::memset(at, 0, (n + W - 1) / W * W * sizeof(S));
        else for_vectors<W>(n, false, [&](int64_t c, int64_t slot) { store(at + slot, load<W>(columns + c)); });
    }
    template <int W>
    OUTLINE void write(S* columns, int64_t n) const {
        for_vectors<W>(n, false, [&](int64_t c, int64_t slot) { store(columns + c, load<W>(at + slot)); });
    }
};

// Calls f with the widest vector that the columns fill.
template <class S, bool PAIRS, class F>
void with_width(int64_t columns, const F& f) {
    constexpr int full = kVectorBytes / sizeof(S), least = PAIRS ? 2 : 1;
    if (columns >= full) return f.template operator()<full>();
    if constexpr (full > 4)
        if (columns >= 4) return f.template operator()<4>();
    f.template operator()<least>();
}

// out = P s + E, of n numbers, or of n / 2 pairs.
template <class S>
void next_start(const S* P, const S* E, const S* s, S* out, int64_t n, bool pairs) {
    for (int64_t c = 0; c < n; c += pairs ? 2 : 1) {
        out[c] = P[c] * s[c] + E[c];
        if (!pairs) continue;
        out[c] -= P[c + 1] * s[c + 1];
        out[c + 1] = P[c] * s[c + 1] + P[c + 1] * s[c] + E[c + 1];
    }
}

// Walks through every tile, forwards in time or backwards: walk(tile, start, end) with the tile's part of `first` or
// null, and of `last` or null, [count, columns]; a channel has `parts` columns, and tiling counts channels.
//
// Where time is split, a chunk takes the state s before it to P s + E. Each sequence's first chunk is walked through at
// once, of the others but the last summarise(tile, P, E) finds out these, numbers or pairs; with the states between chunks
// all but the first are walked through. Functions are no template parameters, so that this is compiled once.
template <class S>
void for_tiles(const Tiling<S>& tiling, bool backwards, bool pairs, int64_t parts, const void* first, void* last,
               const std::function<Tile(int64_t)>& tile,
               const std::function<void(const Tile&, const S* start, S* end)>& walk,
               const std::function<void(const Tile&, S* product, S* end)>& summarise) {
    const Sequences& s = tiling.sequences;
    const int64_t split = s.split, width = s.columns * parts, later = split - 1;
    S* const product = static_cast<S*>(s.chunks);
    S* const end = product + s.count * split * width;
    S* const start = end + s.count * split * width;
    auto of = [&](const void* states, const Tile& t) {
        return states ? static_cast<S*>(const_cast<void*>(states)) + t.sequence * width + t.column * parts : nullptr;
    };
    auto at = [&](S* known, const Tile& t, int64_t chunk) {
        return known + (t.sequence * split + chunk) * width + t.column * parts;
    };
    auto in_parallel = [&](int64_t n, const auto& f) {
        parallel_for(n, s.threads, [&](int64_t i) {
            FlushDenormals flush;
            f(i);
            finish_stores();
        });
    };
    // the chunk that is walked through as the n-th
    auto cut = [&](Tile t, int64_t n) {
        const int64_t chunk = backwards ? later - n : n;
        const int64_t from = t.rows * chunk / split, to = t.rows * (chunk + 1) / split;
        t.continues = s.reverse ? to < t.rows : from > 0;
        t.first_row += from, t.rows = to - from, t.number = t.sequence * split + n;
        return t;
    };
    if (split == 1) {
        in_parallel(tiling.tiles(), [&](int64_t i) {
            const Tile t = tile(i);
            walk(t, of(first, t), of(last, t));
        });
        return;
    }
    in_parallel(tiling.tiles() * later, [&](int64_t i) {
        const int64_t n = i % later;
        const Tile t = cut(tile(i / later), n);
        if (n == 0) walk(t, of(first, t), at(end, t, 0));
        else summarise(t, at(product, t, n), at(end, t, n));
    });
    in_parallel(tiling.tiles(), [&](int64_t i) {
        const Tile t = tile(i);
        std::copy_n(at(end, t, 0), t.columns * parts, at(start, t, 1));
        for (int64_t n = 1; n < later; ++n)
            next_start(at(product, t, n), at(end, t, n), at(start, t, n), at(start, t, n + 1), t.columns * parts,
                       pairs);
    });
    in_parallel(tiling.tiles() * later, [&](int64_t i) {
        const int64_t n = i % later + 1;
        const Tile t = cut(tile(i / later), n);
        walk(t, at(start, t, n), n == later ? of(last, t) : nullptr);
    });
}
