// One row of a matrix state that changes by a diagonal and by one or two columns times rows, and the gradient of a row.
//
//     p = Sᵀ a,   S' = D S + b uᵀ + k vᵀ,   y = S'ᵀ q
//
// The delta rule is a = D k and b = k with u = β (v − p), and has no third term; dplr has u = p. A state is [keys, N
// vectors]: keys and columns that there are not are zeros. A row of the walk writes the state and reads it for y and for
// the next row's p at once: every number of the state is loaded and stored once a row.
#pragma once
#include "matrix.h"

// N vectors side by side.
template <class S, int N>
struct Wide {
    static constexpr int W = kLanes<S>;
    Vec<S, W> at[N];

    INLINE Wide() {
        UNROLL
        for (int n = 0; n < N; ++n) at[n] = Vec<S, W>{};
    }
    INLINE explicit Wide(const S* from) {
        UNROLL
        for (int n = 0; n < N; ++n) at[n] = load<W>(from + n * W);
    }
    INLINE void write(S* to) const {
        UNROLL
        for (int n = 0; n < N; ++n) store(to + n * W, at[n]);
    }
    INLINE Vec<S, W>& operator[](int n) { return at[n]; }
    INLINE const Vec<S, W>& operator[](int n) const { return at[n]; }
};

// Sums of neighbours: of a's in the first half of the lanes, of b's in the second.
template <class V, int... I>
INLINE V pair_sums(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// Of ROWS vectors, each one's lanes added up: with W rows, lane i is the sum of row i.
template <int ROWS, class V>
INLINE V row_sums(const V* rows) {
    if constexpr (ROWS == 1) return rows[0];
    else
        return pair_sums(row_sums<ROWS / 2>(rows), row_sums<ROWS / 2>(rows + ROWS / 2),
                         std::make_integer_sequence<int, lanes<V>>());
}

// p = Sᵀ a, where no row came before that could have made it on its way. The state's keys lie `stride` apart.
template <class S, int N>
OUTLINE void read_state(int64_t keys, const S* state, int64_t stride, const S* a, S* p) {
    constexpr int W = kLanes<S>;
    Wide<S, N> total;
    for (int64_t k = 0; k < keys; ++k) {
        UNROLL
        for (int n = 0; n < N; ++n) total[n] += load<W>(state + k * stride + n * W) * a[k];
    }
    total.write(p);
}

// What a row is made of, a number for each key.
template <class S>
struct Row {
    const S *q, *k, *a, *b, *decay;
};

// From the state before a row to the one after it, which may lie in its place; y (unless null) and the next row's p.
// The keys of both states lie `apart` if they are APART, else one vector behind the other, which is faster.
template <class S, int N, bool DELTA, bool DECAY, bool OUT, bool APART = false>
OUTLINE void step(int64_t keys, const S* before, S* after, int64_t apart, const Row<S>& row, const S* next_a,
                  const S* u, const S* v, S* y, S* next_p) {
    // sums that wait for one another are as many as an addition takes cycles
    constexpr int W = kLanes<S>, U = 4 / N;
    const int64_t stride = APART ? apart : N * W;
    const Wide<S, N> us(u), vs(DELTA ? u : v);
    Wide<S, N> ys[U], ps[U];
    const S *q = row.q, *of_k = row.k, *b = row.b, *decay = row.decay;
    for (int64_t k = 0; k < keys; k += U) {
        UNROLL
        for (int i = 0; i < U; ++i) {
            const auto d = all(DECAY ? decay[k + i] : S(1)), of_b = all(b[k + i]);
            const auto of_v = all(DELTA ? S(0) : of_k[k + i]);
            const auto of_q = all(OUT ? q[k + i] : S(0)), of_a = all(next_a[k + i]);
            UNROLL
            for (int n = 0; n < N; ++n) {
                auto state = load<W>(before + (k + i) * stride + n * W);
                if constexpr (DECAY) state *= d;
                state += us[n] * of_b;
                if constexpr (!DELTA) state += vs[n] * of_v;
                store(after + (k + i) * stride + n * W, state);
                if constexpr (OUT) ys[i][n] += state * of_q;
                ps[i][n] += state * of_a;
            }
        }
    }
    UNROLL
    for (int i = 1; i < U; ++i) {
        UNROLL
        for (int n = 0; n < N; ++n) ys[0][n] += ys[i][n], ps[0][n] += ps[i][n];
    }
    if constexpr (OUT) ys[0].write(y);
    ps[0].write(next_p);
}

// The gradients of a row: those for each key are added to what is there, over tiles of columns.
template <class S>
struct Gradients {
    S *q, *k, *a, *b, *decay;  // the delta rule has no a and b
    S *v, *p;                  // of u for the delta rule, which has no p
};

// What step_back is told of a row's columns.
template <class S>
struct Columns {
    const S *u, *v, *dp;
};

// G is the gradient of the state after `row`, through its y too; `state` is the one before it. Makes the gradients of
// this row, G of the row before it, which is `earlier`, and what can be said of that row's gradients: of its q, v and p.
// ENTER: there is no row yet; G is the gradient of the last state, which is `state`, but for y's part in it.
template <class S, int N, bool DELTA, bool DECAY, bool ENTER>
OUTLINE void step_back(int64_t keys, S* G, const S* state, const Row<S>& row, const Columns<S>& columns,
                       const Gradients<S>& into, const Row<S>& earlier, const S* dy, const Gradients<S>& before) {
    constexpr int W = kLanes<S>;
    using V = Vec<S, W>;
    const Wide<S, N> nothing;
    Wide<S, N> u = ENTER ? nothing : Wide<S, N>(DELTA ? columns.u : columns.v);
    Wide<S, N> p = ENTER || DELTA ? nothing : Wide<S, N>(columns.u), dp = ENTER ? nothing : Wide<S, N>(columns.dp);
    Wide<S, N> dys(dy), dv, dp_before;
    const S *a = row.a, *decay = row.decay, *q = earlier.q, *k_before = earlier.k, *b = earlier.b;
    for (int64_t first = 0; first < keys; first += W) {
        V of_q[W], of_k[W], of_a[W], of_b[W], of_decay[W];
        for (int i = 0; i < W; ++i) {
            const int64_t k = first + i;
            const V d = all(DECAY && !ENTER ? decay[k] : S(1)), at_a = all(ENTER ? S(0) : a[k]);
            const V at_q = all(q[k]), at_k = all(k_before[k]), at_b = all(DELTA ? S(0) : b[k]);
            V dq = {}, dk = {}, da = {}, db = {}, dd = {};
            UNROLL
            for (int n = 0; n < N; ++n) {
                V g = load<W>(G + (k * N + n) * W), s = load<W>(state + (k * N + n) * W);
                if constexpr (!ENTER) {
                    dk += g * u[n];
                    if constexpr (!DELTA) db += g * p[n];
                    da += s * dp[n];
                    if constexpr (DECAY) g *= d;
                    if constexpr (DECAY && !DELTA) dd += g * s;
                    g += dp[n] * at_a;
                    // a is D k here, and the decay's gradient runs through both
                    if constexpr (DECAY && DELTA) dd += g * s;
                }
                dq += s * dys[n];
                g += dys[n] * at_q;
                dv[n] += g * at_k;
                if constexpr (!DELTA) dp_before[n] += g * at_b;
                store(G + (k * N + n) * W, g);
            }
            of_q[i] = dq, of_k[i] = DELTA ? dk + da * d : dk, of_a[i] = da, of_b[i] = db, of_decay[i] = dd;
        }
        auto add = [&](S* to, const V* rows) INLINE_BODY {
            store(to + first, load<W>(to + first) + row_sums<W>(rows));
        };
        add(before.q, of_q);
        if constexpr (!ENTER) {
            add(into.k, of_k);
            if constexpr (!DELTA) add(into.a, of_a), add(into.b, of_b);
            if constexpr (DECAY) add(into.decay, of_decay);
        }
    }
    dv.write(before.v);
    if constexpr (!DELTA) dp_before.write(before.p);
}
