// What kernels of matrix states share: sequences [B, T, heads, columns] in chunks of rows, and rows in the format of the
// sums with zeros behind their columns. A row or state in S is `width` numbers wide, whole vectors.
#pragma once
#include "exp.h"
#include "work.h"

// Lane i of the result is lane PICK(i) of a and b, one behind the other.
template <int (*PICK)(int), class V, int... I>
INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, PICK(I)...);
}

// In every group of four lanes a0 b0 a1 b1, or with UPPER a2 b2 a3 b3.
template <int W, bool UPPER>
constexpr int one_by_one(int i) {
    return i / 4 * 4 + 2 * UPPER + i % 4 / 2 + i % 2 * W;
}
// In every group of four lanes a0 a1 b0 b1, or with UPPER a2 a3 b2 b3.
template <int W, bool UPPER>
constexpr int two_by_two(int i) {
    return i / 4 * 4 + 2 * UPPER + i % 2 + i % 4 / 2 * W;
}

// to[i] = the sum of all lanes of v[i], of four vectors at once.
template <class S>
INLINE void sums_of_four(const Lanes<S>* v, S* to) {
    constexpr int W = kLanes<S>;
    if constexpr (W < 4) {
        for (int i = 0; i < 4; ++i) to[i] = sum(v[i]);
    } else {
        constexpr std::make_integer_sequence<int, W> lane;
        auto ab = shuffle<one_by_one<W, false>>(v[0], v[1], lane) + shuffle<one_by_one<W, true>>(v[0], v[1], lane);
        auto cd = shuffle<one_by_one<W, false>>(v[2], v[3], lane) + shuffle<one_by_one<W, true>>(v[2], v[3], lane);
        auto four = shuffle<two_by_two<W, false>>(ab, cd, lane) + shuffle<two_by_two<W, true>>(ab, cd, lane);
        store(to, fold<4>(four));
    }
}

// ---- Sequences of rows

// [B, T, heads, columns], by its strides in elements; columns lie side by side. Of no tensor data is null.
struct Heads {
    const void* data;
    int64_t batch, row, head;

    template <class T>
    T* at(int64_t b, int64_t t, int64_t h) const {
        return static_cast<T*>(const_cast<void*>(data)) + b * batch + t * row + h * head;
    }
};

// The columns of a tensor in such a format from number `first` on.
inline Heads columns_from(Heads x, int64_t first, int64_t format) {
    if (x.data) x.data = static_cast<const char*>(x.data) + first * (format == 0 ? 8 : format == 1 ? 4 : 2);
    return x;
}

// A contiguous [B, T, heads, columns].
inline Heads contiguous(const void* data, int64_t rows, int64_t heads, int64_t columns) {
    return {data, rows * heads * columns, heads * columns, columns};
}

// Some rows of one sequence and head.
struct Chunk {
    int64_t sequence, head, batch, first, rows;
};

// Sequences cut into chunks of `size` rows; the last of each may be shorter, and an empty one has none.
class Chunks {
    const int64_t* cu_seqlens;
    int64_t rows, size;
    // of each sequence, and behind the last
    std::vector<int64_t> starts;

  public:
    // cu_seqlens: [sequences + 1], of which the batch is 1, or null: `sequences` of `rows` rows each.
    Chunks(const int64_t* cu_seqlens, int64_t sequences, int64_t rows, int64_t size)
        : cu_seqlens(cu_seqlens), rows(rows), size(size), starts(sequences + 1) {
        for (int64_t n = 0; n < sequences; ++n) starts[n + 1] = starts[n] + (whole(n, 0).rows + size - 1) / size;
    }
    int64_t sequences() const { return starts.size() - 1; }
    int64_t total() const { return starts.back(); }
    // Of sequence n: the number of its first chunk among those of all sequences, and how many it has.
    int64_t start(int64_t n) const { return starts[n]; }
    int64_t count(int64_t n) const { return starts[n + 1] - starts[n]; }

    // All rows of a sequence.
    Chunk whole(int64_t n, int64_t head) const {
        if (cu_seqlens == nullptr) return {n, head, n, 0, rows};
        return {n, head, 0, cu_seqlens[n], cu_seqlens[n + 1] - cu_seqlens[n]};
    }
    // Chunk number c of sequence n.
    Chunk chunk(int64_t n, int64_t head, int64_t c) const {
        Chunk found = whole(n, head);
        return {n, head, found.batch, found.first + c * size, std::min(size, found.rows - c * size)};
    }
    // Number i among the chunks of all sequences.
    Chunk among_all(int64_t i, int64_t head) const {
        int64_t n = std::upper_bound(starts.begin(), starts.end(), i) - starts.begin() - 1;
        return chunk(n, head, i - starts[n]);
    }
};

// Calls f with the memory format of sequences: 0 double, 1 float, 2 half, 3 bfloat16.
template <class S, class F>
void with_format(int64_t format, const F& f) {
    if constexpr (std::is_same_v<S, double>) f.template operator()<double>();
    else if (format == 1) f.template operator()<float>();
    else if (format == 2) f.template operator()<Half>();
    else f.template operator()<BFloat16>();
}

// `factor` times a chunk's rows, in S: to [rows, width], zeros behind the columns. No tensor: all zeros. Prefetches the
// rows of the next chunk, or of the next head: where heads take turns chunk by chunk, a page of memory is visited once.
template <class S>
OUTLINE void read_rows(Heads from, int64_t format, const Chunk& c, int64_t columns, S factor, S* to, int64_t width,
                       bool next_head = false) {
    if (from.data == nullptr) return std::memset(to, 0, c.rows * width * sizeof(S)), void();
    with_format<S>(format, [&]<class T>() {
        for (int64_t t = 0; t < c.rows; ++t, to += width) {
            const T* row = from.at<const T>(c.batch, c.first + t, c.head);
            const T* next = row + (next_head ? from.head : c.rows * from.row);
            for (int64_t i = 0; i < width; i += kLanes<S>) {
                __builtin_prefetch(next + i);
                store(to + i, factor * load_some(row + i, columns - i));
            }
        }
    });
}

template <class S>
OUTLINE void write_rows(Heads to, int64_t format, const Chunk& c, int64_t columns, const S* from, int64_t width) {
    if (to.data == nullptr) return;
    with_format<S>(format, [&]<class T>() {
        for (int64_t t = 0; t < c.rows; ++t, from += width) {
            T* row = to.at<T>(c.batch, c.first + t, c.head);
            for (int64_t i = 0; i < columns; i += kLanes<S>)
                store_some(row + i, load<kLanes<S>>(from + i), columns - i);
        }
    });
}

// The decays of a chunk from their logarithms in S: to [rows, width], 1 behind the keys and where no tensor is.
// per_key: log_decay has a column for each of them, else one for all.
template <class S>
OUTLINE void read_decays(Heads log_decay, bool per_key, const Chunk& c, int64_t keys, S* to, int64_t width) {
    if (log_decay.data == nullptr) return std::fill_n(to, c.rows * width, S(1)), void();
    for (int64_t t = 0; t < c.rows; ++t, to += width) {
        const S* row = log_decay.at<const S>(c.batch, c.first + t, c.head);
        auto decay = exponential<kLanes<S>, S>(all(row[0]));
        for (int64_t i = 0; i < width; i += kLanes<S>) {
            if (per_key) decay = exponential<kLanes<S>, S>(load_some(row + i, keys - i));
            store(to + i, decay);
        }
    }
}

// `columns` columns of a state [keys, V] as [rows, width] with zeros behind them, and back. No state: all zeros.
template <class S>
OUTLINE void transpose_in(const S* from, int64_t keys, int64_t columns, int64_t V, S* to, int64_t rows, int64_t width) {
    std::memset(to, 0, rows * width * sizeof(S));
    if (from == nullptr) return;
    for (int64_t v = 0; v < columns; ++v)
        for (int64_t k = 0; k < keys; ++k) to[v * width + k] = from[k * V + v];
}

template <class S>
OUTLINE void transpose_out(const S* from, int64_t width, int64_t keys, int64_t columns, int64_t V, S* to) {
    for (int64_t k = 0; k < keys; ++k)
        for (int64_t v = 0; v < columns; ++v) to[k * V + v] = from[v * width + k];
}
