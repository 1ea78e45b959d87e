// What the convolution is told, and how its work is shared out: steps, counted through all sequences, become runs.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../rows.h"

// What both directions share. All fields are 8 bytes: Python packs them as one array.
struct Problem {
    const int64_t* cu_seqlens;  // [sequences + 1] with batch 1, or null: `sequences` sequences of `rows` rows
    int64_t sequences, rows, columns, width;
    int64_t reverse, silu, format, threads;
    int64_t run, working_set, around_cache;
    const void* x;  // [B, T, columns]
    Strides x_strides;
    const void *taps, *bias;    // [width, columns] and [columns] in the format of the sums; bias may be null: zeros
    const void* initial_state;  // [N, width - 1, columns], or null: zeros

    int64_t before() const { return width - 1; }
    Strides contiguous() const { return {rows * columns, columns}; }
};

// One sequence, and the share that a run has in it: its steps `begin` to `end`, in the order of time.
struct Piece {
    int64_t sequence, first_row, length, begin, end;
};

// Cuts steps into runs, and columns into blocks for which everything that is used again stays in the L1 cache.
struct Cut {
    const Problem& p;
    int64_t all_steps, runs, blocks, block;

    Cut(const Problem& p, int64_t bytes_per_column, int64_t bytes_of_sums) : p(p) {
        all_steps = p.cu_seqlens ? p.rows : p.sequences * p.rows;
        runs = (all_steps + p.run - 1) / p.run;
        // columns that do not share a line with others, in the narrowest format
        int64_t unit = 2 * kCacheLine / bytes_of_sums;
        int64_t widest = std::min(std::max(p.working_set / bytes_per_column, unit), kStateBytes / bytes_of_sums);
        // every thread gets several tiles, unless that would make them narrow
        int64_t wanted = p.threads == 1 ? 1 : std::min((4 * p.threads + runs - 1) / runs, p.columns / (4 * unit));
        wanted = std::max({wanted, (p.columns + widest - 1) / widest, int64_t(1)});
        block = ((p.columns + wanted - 1) / wanted + unit - 1) / unit * unit;
        blocks = (p.columns + block - 1) / block;
    }

    int64_t tiles() const { return runs * blocks; }
    int64_t run(int64_t tile) const { return tile / blocks; }
    int64_t column(int64_t tile) const { return tile % blocks * block; }
    int64_t columns(int64_t tile) const { return std::min(block, p.columns - column(tile)); }

    Piece whole(int64_t n) const {
        if (p.cu_seqlens == nullptr) return {n, n * p.rows, p.rows, 0, p.rows};
        int64_t length = p.cu_seqlens[n + 1] - p.cu_seqlens[n];
        return {n, p.cu_seqlens[n], length, 0, length};
    }

    // Calls f(piece) for every sequence that has steps in the run.
    template <class F>
    void for_pieces(int64_t run, const F& f) const {
        int64_t step = run * p.run, stop = std::min(step + p.run, all_steps), n = step / p.rows;
        if (p.cu_seqlens) n = std::upper_bound(p.cu_seqlens, p.cu_seqlens + p.sequences + 1, step) - p.cu_seqlens - 1;
        for (; step < stop; ++n) {
            Piece piece = whole(n);
            piece.begin = step - piece.first_row;
            piece.end = std::min(stop - piece.first_row, piece.length);
            if (piece.begin >= piece.end) continue;
            f(piece);
            step = piece.first_row + piece.end;
        }
    }

    // The row of a tensor [B, T, columns] at step t of a sequence.
    template <class T>
    T* row(const void* tensor, Strides s, const Piece& piece, int64_t t) const {
        int64_t row = p.reverse ? piece.length - 1 - t : t;
        int64_t offset = p.cu_seqlens ? (piece.first_row + row) * s.row : piece.sequence * s.batch + row * s.row;
        return static_cast<T*>(const_cast<void*>(tensor)) + offset;
    }

    // The row of states [N, width - 1, columns].
    template <class T>
    T* state(const void* states, int64_t sequence, int64_t row) const {
        return static_cast<T*>(const_cast<void*>(states)) + (sequence * p.before() + row) * p.columns;
    }

    // Row i of x with the initial state in front; null stands for zeros.
    template <class T>
    const T* extended(const Piece& piece, int64_t i) const {
        if (i >= p.before()) return row<T>(p.x, p.x_strides, piece, i - p.before());
        return p.initial_state ? state<T>(p.initial_state, piece.sequence, i) : nullptr;
    }
};
