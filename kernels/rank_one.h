// Walks through sequences with the state of rank_one_step.h: threads over sequences, heads and, where these are few,
// groups of tiles of columns. A rule's kernel says whether it is the delta rule:
//
//     void forward(const Forward* f) { run<true>(*f); }
#pragma once
#include "rank_one_step.h"

// All fields are 8 bytes: Python packs them as one array. S is the format of states, log decays and sums.
struct Problem {
    const int64_t* cu_seqlens;  // [sequences + 1] with batch 1, or null: `sequences` of `rows` rows
    int64_t sequences, rows, heads, keys, values;
    int64_t decays;          // of a row and head: 0, 1 or `keys`
    int64_t format;          // of everything but log decays, states and beta
    int64_t beta_format;
    int64_t threads;
    int64_t vectors, groups;  // vectors in a tile of columns; groups of tiles
    double scale;
    Heads q, k, v, log_decay;
    Heads a, b;                 // the delta rule: beta, a column wide, and nothing
    const void* initial_state;  // [sequences, heads, keys, values] in S, or null: zeros

    int64_t all_rows() const { return cu_seqlens ? rows : sequences * rows; }
};

struct Forward {
    Problem problem;
    void *y, *final_state;
};

// Contiguous, in the format of what it is the gradient of; null where it is not needed. If there are several groups, each
// has its own part in S, [groups, rows of all sequences, heads, columns].
struct Gradient {
    void *sum, *parts;
};

struct Backward {
    Problem problem;
    Heads dy;
    const void* dfinal_state;  // may be null: zeros
    Gradient dq, dk, da, db, dlog_decay;
    void *dv, *dinitial_state;
    void* kept;  // in S, for each thread: states before every chunk of a part
    int64_t kept_numbers;
};

static_assert(sizeof(Problem) == 38 * 8 && sizeof(Forward) == 40 * 8 && sizeof(Backward) == 57 * 8,
              "Python packs this many fields");

// Rows that are made ready at a time, and whose states are kept at once on the way back, in the L2 cache.
constexpr int64_t kRows = 16;

template <class S>
constexpr int64_t kStateFormat = sizeof(S) == 8 ? 0 : 1;

// Nothing decays by a factor of 1 where no time is to be won, but time to compile.
template <class S>
constexpr bool kAlwaysDecay = sizeof(S) == 8;

// A head of a sequence, and tiles of its columns that are worked on together: one after the other, `width` columns each.
template <class S>
struct Part {
    int64_t sequence, head, group, width, tiles, column, columns;

    Part(const Problem& p, int64_t i)
        : sequence(i / p.groups / p.heads), head(i / p.groups % p.heads), group(i % p.groups),
          width(p.vectors * kLanes<S>) {
        const int64_t all = (p.values + width - 1) / width, first = all * group / p.groups;
        tiles = all * (group + 1) / p.groups - first, column = first * width;
        columns = std::min(tiles * width, p.values - column);
    }
    // The most tiles that a part has.
    static int64_t most(const Problem& p) {
        const int64_t width = p.vectors * kLanes<S>, all = (p.values + width - 1) / width;
        return (all + p.groups - 1) / p.groups;
    }
    // A state [keys, values] among those of all sequences, from this part's first column on.
    const S* state(const Problem& p, const void* states) const {
        if (states == nullptr) return nullptr;
        return static_cast<const S*>(states) + (sequence * p.heads + head) * p.keys * p.values + column;
    }

    // Tile after tile, zeros behind keys and columns; and back. No state: all zeros.
    void read_state(const Problem& p, const void* states, int64_t keys, S* to) const {
        const S* from = state(p, states);
        for_vectors(p, keys, [&](int64_t key, int64_t c, int64_t at) {
            const int64_t there = from && key < p.keys ? columns - c : 0;
            store(to + at, load_some(there > 0 ? from + key * p.values + c : to, there));
        });
    }
    void write_state(const Problem& p, const S* from, int64_t keys, void* states) const {
        S* to = const_cast<S*>(state(p, states));
        for_vectors(p, keys, [&](int64_t key, int64_t c, int64_t at) {
            if (key < p.keys && c < columns)
                store_some(to + key * p.values + c, load<kLanes<S>>(from + at), columns - c);
        });
    }

  private:
    template <class F>
    void for_vectors(const Problem& p, int64_t keys, const F& f) const {
        int64_t at = 0;
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int64_t key = 0; key < keys; ++key)
                for (int64_t c = 0; c < width; c += kLanes<S>, at += kLanes<S>) f(key, tile * width + c, at);
    }
};

// A chunk of rows of a part, in S: [kRows, keys], or [kRows, values] for those of a column each.
template <class S, bool DELTA>
struct Inputs {
    static constexpr int W = kLanes<S>;
    const Problem& p;
    const Part<S>& part;
    const int64_t keys, values, beta_width = whole_vectors<S>(1);
    S *q, *k, *a, *b, *decay, *beta, *v, *nothing;

    static int64_t numbers(int64_t keys, int64_t values) {
        return kRows * (5 * keys + values + whole_vectors<S>(1)) + keys;
    }
    // Takes its numbers from `scratch`, which then begins behind them.
    Inputs(const Problem& p, const Part<S>& part, int64_t keys, S*& scratch)
        : p(p), part(part), keys(keys), values(part.tiles * part.width) {
        auto take = [&](int64_t columns) { return std::exchange(scratch, scratch + kRows * columns); };
        q = take(keys), k = take(keys), a = take(keys), decay = take(keys), v = take(values), beta = take(beta_width);
        b = DELTA ? k : take(keys);
        nothing = std::exchange(scratch, scratch + keys);
        std::fill_n(nothing, keys, S(0));
    }

    void read(const Chunk& c, S scale) const {
        read_rows<S>(p.q, p.format, c, p.keys, scale, q, keys);
        read_rows<S>(p.k, p.format, c, p.keys, 1, k, keys);
        read_rows<S>(columns_from(p.v, part.column, p.format), p.format, c, part.columns, 1, v, values);
        if (p.decays > 0 || kAlwaysDecay<S>) read_decays<S>(p.log_decay, p.decays > 1, c, p.keys, decay, keys);
        if constexpr (DELTA) {
            read_rows<S>(p.a, p.beta_format, c, 1, 1, beta, beta_width);
            for (int64_t i = 0; i < c.rows * keys; i += W)
                store(a + i, p.decays > 0 ? load<W>(decay + i) * load<W>(k + i) : load<W>(k + i));
        } else {
            read_rows<S>(p.a, p.format, c, p.keys, 1, a, keys);
            read_rows<S>(p.b, p.format, c, p.keys, 1, b, keys);
        }
    }

    Row<S> row(int64_t i) const { return {q + i * keys, k + i * keys, a + i * keys, b + i * keys, decay + i * keys}; }
    Row<S> no_row() const { return {nothing, nothing, nothing, nothing, nothing}; }

    // What row i adds in each column of a tile, times b: u = β (v − p), or p itself.
    template <int N>
    INLINE void added(int64_t i, int64_t tile, const S* p, S* u) const {
        Wide<S, N> us(p);
        if constexpr (DELTA) {
            Wide<S, N> vs(v + i * values + tile * part.width);
            UNROLL
            for (int n = 0; n < N; ++n) us[n] = beta[i * beta_width] * (vs[n] - us[n]);
        }
        us.write(u);
    }
};

template <class S, int N, bool DELTA, bool DECAY>
void run_part(const Forward& f, const Chunks& chunks, const Part<S>& part, S* scratch, int64_t) {
    const Problem& p = f.problem;
    const int64_t keys = whole_vectors<S>(p.keys), width = part.width, values = part.tiles * width, size = keys * width;
    const Inputs<S, DELTA> in(p, part, keys, scratch);
    S *states = scratch, *y = states + part.tiles * size, *read = y + kRows * values, *u = read + width;
    const Heads out = columns_from(contiguous(f.y, p.rows, p.heads, p.values), part.column, p.format);
    // a row alone takes its state from tensor to tensor, where whole vectors do not reach beyond it
    const bool alone = p.rows == 1 && !p.cu_seqlens && p.initial_state && p.keys == keys && p.values % width == 0;
    const int64_t stride = alone ? p.values : width, apart = alone ? width : size;
    S* after = alone ? const_cast<S*>(part.state(p, f.final_state)) : states;
    const S* before = alone ? part.state(p, p.initial_state) : states;
    const auto go = alone ? &step<S, N, DELTA, DECAY, true, true> : &step<S, N, DELTA, DECAY, true, false>;
    if (!alone) part.read_state(p, p.initial_state, keys, states);
    for (int64_t n = 0; n < chunks.count(part.sequence); ++n) {
        const Chunk c = chunks.chunk(part.sequence, part.head, n);
        in.read(c, S(p.scale));
        for (int64_t tile = 0; tile < part.tiles; ++tile) {
            const int64_t start = tile * apart;
            read_state<S, N>(keys, before + start, stride, in.a, read);
            for (int64_t i = 0; i < c.rows; ++i) {
                const int64_t at = i * values + tile * width;
                in.template added<N>(i, tile, read, u);
                const S* next_a = i + 1 < c.rows ? in.a + (i + 1) * keys : in.nothing;
                go(keys, before + start, after + start, stride, in.row(i), next_a, u, in.v + at, y + at, read);
            }
        }
        write_rows<S>(out, p.format, c, part.columns, y, values);
    }
    if (!alone) part.write_state(p, states, keys, f.final_state);
}

template <class S>
int64_t scratch_of(const Forward&, int64_t keys, int64_t values) {
    return values * (keys + kRows + 2);
}

// Runs all parts of a call, each in the format, and with the vectors and decays, that it has.
template <bool DELTA, class Call>
void run(const Call& call) {
    const Problem& p = call.problem;
    const Chunks chunks(p.cu_seqlens, p.sequences, p.rows, kRows);
    auto all = [&]<class S, int N, bool DECAY>() {
        const int64_t keys = whole_vectors<S>(p.keys), values = Part<S>::most(p) * N * kLanes<S>;
        const int64_t numbers = Inputs<S, DELTA>::numbers(keys, values) + scratch_of<S>(call, keys, values);
        const int64_t parts = p.sequences * p.heads * p.groups;
        auto one = [&](int64_t i, S* scratch, int64_t thread) {
            run_part<S, N, DELTA, DECAY>(call, chunks, Part<S>(p, i), scratch, thread);
        };
        parallel_with_scratch<S, FlushDenormals>(parts, p.threads, numbers, one);
    };
    auto with_decay = [&]<class S, int N>() {
        if constexpr (kAlwaysDecay<S>) all.template operator()<S, N, true>();
        else p.decays > 0 ? all.template operator()<S, N, true>() : all.template operator()<S, N, false>();
    };
    auto with_vectors = [&]<class S>() {
        if (p.vectors == 1) with_decay.template operator()<S, 1>();
        else if (p.vectors == 2) with_decay.template operator()<S, 2>();
        else with_decay.template operator()<S, 4>();
    };
    p.format == 0 ? with_vectors.template operator()<double>() : with_vectors.template operator()<float>();
}
