// What the selective scan's kernels share: the problem as native.py packs it, blocks of channels, and a step of a block.
#pragma once
#include "../exp.h"
#include "../rows.h"
#include "../work.h"

// All fields are 8 bytes: native.py packs them as one array. S is the state dtype; its tensors are contiguous.
struct Problem {
    const int64_t* cu_seqlens;  // [sequences + 1] with batch 1, or null: `sequences` of `rows` rows
    int64_t sequences, rows, channels, states, format, threads;
    const void *x, *delta;  // [rows of all sequences, channels]
    Strides x_strides, delta_strides;
    const void *A, *B, *C, *D;  // in S: [channels, states], twice [rows of all sequences, states], [channels] or null
    const void* initial_state;  // [sequences, channels, states], or null: zeros
};

struct Forward {
    Problem problem;
    void *y, *final_state;
};

struct Backward {
    Problem problem;
    const void* dy;  // may be null: zeros
    Strides dy_strides;
    const void* dfinal_state;   // may be null: zeros
    void *dx, *ddelta, *dinitial_state;  // null where not needed
    void *dA, *dB, *dC, *dD;             // null where not needed
    void *dA_parts, *dD_parts;           // in S: [sequences, channels, states], [sequences, channels]
    void *dB_parts, *dC_parts;           // in S: [blocks, rows of all sequences, states]
    void* kept;                          // in S: `kept_numbers` for each thread
    int64_t kept_numbers;
};

static_assert(sizeof(Forward) == 20 * 8 && sizeof(Backward) == 35 * 8, "native.py packs this many fields");

// A block of channels is so many vectors wide (native.py knows it too).
constexpr int kBlockVectors = 4;
// Rows whose states are kept at once on the way back, in the L2 cache (native.py knows it too).
constexpr int64_t kChunk = 32;
// The row that is to be prefetched.
constexpr int64_t kAhead = 4;

template <class S>
constexpr int kBlock = kBlockVectors * kLanes<S>;

// A block of channels of one sequence.
struct Block {
    int64_t sequence, batch, first_row, rows, number, channel, channels;
};

template <class S>
int64_t blocks_of(const Problem& p) {
    return (p.channels + kBlock<S> - 1) / kBlock<S>;
}

template <class S>
Block block_of(const Problem& p, int64_t i) {
    const int64_t blocks = blocks_of<S>(p), n = i / blocks, number = i % blocks, channel = number * kBlock<S>;
    const int64_t channels = std::min<int64_t>(kBlock<S>, p.channels - channel);
    if (const int64_t* first = p.cu_seqlens)
        return {n, 0, first[n], first[n + 1] - first[n], number, channel, channels};
    return {n, n, 0, p.rows, number, channel, channels};
}

namespace {

// Lane 0, 1, ... of a and of b in turn; HIGH: of their upper halves.
template <bool HIGH, class V, int... I>
INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int W = sizeof...(I), first = HIGH ? W / 2 : 0;
    return __builtin_shufflevector(a, b, first + I / 2 + I % 2 * W...);
}

// Of W rows of W lanes the columns. Rows i and i + W / 2 interleaved are rows 2 i and 2 i + 1 of the next stage: each
// stage moves a bit of the row's number to the lane's, and the other way round.
template <class S, int W = kLanes<S>>
INLINE void transpose(Lanes<S> (&rows)[W]) {
    constexpr std::make_integer_sequence<int, W> all;
    UNROLL
    for (int stage = 1; stage < W; stage *= 2) {
        Lanes<S> next[W];
        UNROLL
        for (int i = 0; i < W / 2; ++i) {
            next[2 * i] = interleave<false>(rows[i], rows[i + W / 2], all);
            next[2 * i + 1] = interleave<true>(rows[i], rows[i + W / 2], all);
        }
        UNROLL
        for (int i = 0; i < W; ++i) rows[i] = next[i];
    }
}

// [channels, states] as [states, width], with zeros for channels that there are not; and back.
template <class S>
OUTLINE void transpose_in(const S* from, int64_t channels, int64_t states, int64_t width, S* to) {
    constexpr int W = kLanes<S>;
    if (from == nullptr) return void(std::fill_n(to, states * width, S(0)));
    for (int64_t d = 0; d < width; d += W)
        for (int64_t k = 0; k < states; k += W) {
            Lanes<S> rows[W];
            UNROLL
            for (int i = 0; i < W; ++i)
                rows[i] = load_some(from + (d + i) * states + k, d + i < channels ? states - k : 0);
            transpose<S>(rows);
            UNROLL
            for (int i = 0; i < W; ++i)
                if (k + i < states) store(to + (k + i) * width + d, rows[i]);
        }
}

template <class S>
OUTLINE void transpose_out(const S* from, int64_t channels, int64_t states, int64_t width, S* to) {
    constexpr int W = kLanes<S>;
    for (int64_t d = 0; d < channels; d += W)
        for (int64_t k = 0; k < states; k += W) {
            Lanes<S> rows[W];
            UNROLL
            for (int i = 0; i < W; ++i)
                rows[i] = load_some(from + (k + i) * width + d, k + i < states ? W : 0);
            transpose<S>(rows);
            UNROLL
            for (int i = 0; i < W; ++i)
                if (d + i < channels) store_some(to + (d + i) * states + k, rows[i], states - k);
        }
}

// One row's numbers of a block, a vector of channels each.
template <class S, int N>
struct Row {
    static constexpr int W = kLanes<S>;
    Lanes<S> at[N];

    template <class T>
    INLINE void read(const T* from, int64_t channels) {
        UNROLL
        for (int v = 0; v < N; ++v) at[v] = from ? load_some(from + v * W, channels - v * W) : Lanes<S>{};
    }
    template <class T>
    INLINE void write(T* to, int64_t channels) const {
        UNROLL
        for (int v = 0; v < N; ++v) store_some(to + v * W, at[v], channels - v * W);
    }
    INLINE Lanes<S>& operator[](int v) { return at[v]; }
};

// h' = exp(Δ A) h + Δ x B for a row of a block; calls f(k, v, decay, h') for each vector.
template <class S, int N, class F>
INLINE void step(const S* A, const S* B, Row<S, N>& delta, Row<S, N>& input, int64_t states, const S* h, const F& f) {
    constexpr int W = kLanes<S>, width = N * W;
    for (int64_t k = 0; k < states; ++k) {
        UNROLL
        for (int v = 0; v < N; ++v) {
            const int64_t at = k * width + v * W;
            auto decay = exponential<W, S>(delta[v] * load<W>(A + at));
            f(k, v, decay, decay * load<W>(h + at) + input[v] * B[k]);
        }
    }
}

// The rows of a tensor that a block reads; of none null.
template <class S, class T>
struct Walk {
    const T* row;
    int64_t step;
    Walk(const void* tensor, Strides s, const Block& b) : row(static_cast<const T*>(tensor)), step(s.row) {
        if (row) row += b.batch * s.batch + b.first_row * s.row + b.channel;
    }
    INLINE const T* operator()(int64_t t) const { return row ? row + t * step : nullptr; }
    INLINE void prefetch(int64_t t) const {
        if (row == nullptr) return;
        const char* line = reinterpret_cast<const char*>(row + t * step);
        for (int i = 0; i < kBlock<S> * int(sizeof(T)); i += kCacheLine) __builtin_prefetch(line + i);
    }
};

// Calls f with the formats of delta and of x. kernels/memory.py counts them in this order.
template <class F>
int with_format(const Problem& p, const F& f) {
    return unless_out_of_memory([&] {
        switch (p.format) {
            case 0: return f.template operator()<double, double>();
            case 1: return f.template operator()<float, float>();
            case 2: return f.template operator()<Half, Half>();
            case 3: return f.template operator()<float, Half>();
            case 4: return f.template operator()<BFloat16, BFloat16>();
            case 5: return f.template operator()<float, BFloat16>();
        }
    });
}

// Calls f.operator()<vectors>(block, scratch, thread) for each block.
template <class S, class F>
void for_blocks(const Problem& p, int64_t numbers, const F& f) {
    parallel_with_scratch<S>(p.sequences * blocks_of<S>(p), p.threads, numbers, [&](int64_t i, S* own, int64_t thread) {
        const Block b = block_of<S>(p, i);
        if (b.channels <= kLanes<S>) f.template operator()<1>(b, own, thread);
        else f.template operator()<kBlockVectors>(b, own, thread);
    });
}

}  // namespace
