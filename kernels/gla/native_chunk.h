// The gradients of a chunk's rows from S before and dS after it, kRows rows at a time, in products of small matrices:
//
//     dq = before ∘ (S dy) + Σ_j dA D ∘ k      dv = dSᵀ (after ∘ k) + Σ_i A dy       A[i, j] = Σ_keys q[i] D k[j]
//     dk = after ∘ (dS v) + Σ_i dA D ∘ q       dA[i, j] = dy[i] v[j]
//
// where before, after and D[i, j] are products of the decays up to a row, after it, and between two rows j < i. Nothing
// is divided or subtracted: the gradient of a log decay is the sum over all that goes through its row.
// States are [values, keys] here, and dy has the scale in it.
#pragma once
#include "native.h"

namespace {

// Rows of a step: their pairs are taken one by one.
constexpr int64_t kRows = 16;

// Where a chunk's rows lie in S, and what is made of them. Keys are `width` wide, values `stride`.
template <class S>
struct ChunkScratch {
    int64_t width, stride;
    S *q, *k, *decay, *after, *k_after;                    // [rows, width], filled up to whole steps
    S *v, *dy;                                             // [rows, stride]
    S* states;                                             // before each step but the first: [stride, width]
    S *dstate, *dstate_transposed;                         // after a step
    S *before, *q_before, *dq, *dk, *dlog_decay, *between;  // of a step: [kRows, width]
    S *dv, *v_transposed;                                  // of a step
    S *dA, *A_transposed, *along;                          // [kRows, kRows] twice, a vector for each row
    S *total, *through;                                    // [width]

    int64_t numbers = 0;                                   // of all of these

    // scratch: so many numbers; null where only their count is wanted.
    ChunkScratch(S* scratch, int64_t rows, int64_t keys, int64_t values)
        : width(whole_vectors<S>(keys)), stride(whole_vectors<S>(values)) {
        auto take = [&](int64_t n, auto&... parts) {
            ((parts = scratch ? scratch + numbers : nullptr, numbers += n), ...);
        };
        rows = multiple(rows, kRows);
        take(rows * width, q, k, decay, after, k_after);
        take(rows * stride, v, dy);
        take(rows / kRows * stride * width, states);
        take(stride * width, dstate, dstate_transposed);
        take(kRows * width, before, q_before, dq, dk, dlog_decay, between);
        take(kRows * stride, dv, v_transposed);
        take(kRows * kRows, dA, A_transposed);
        take(kRows * kLanes<S>, along);
        take(width, total, through);
    }
    // From row `first` of the chunk on.
    ChunkScratch step(int64_t first) const {
        ChunkScratch c = *this;
        for (S** rows : {&c.q, &c.k, &c.decay, &c.after, &c.k_after}) *rows += first * width;
        for (S** rows : {&c.v, &c.dy}) *rows += first * stride;
        return c;
    }
};

// What goes through the state: makes dq of S dy, dk of dS v, and dlog_decay from nothing.
template <class S, bool EXCLUSIVE>
void state_terms(const ChunkScratch<S>& c, int64_t rows, const S* state, const S* dstate, int64_t values) {
    constexpr int W = kLanes<S>;
    for (int64_t i = 0; i < c.width; i += W) {
        Lanes<S> sums[2] = {};
        for (int64_t v = 0; v < values; ++v) {
            const int64_t at = v * c.width + i;
            sums[v % 2] = multiply_add(load<W>(state + at), load<W>(dstate + at), sums[v % 2]);
        }
        // from S to the rows from t on, or with a bonus behind it
        Lanes<S> onward = {};
        for (int64_t t = rows - 1; t >= 0; --t) {
            const int64_t at = t * c.width + i;
            auto dq = load<W>(c.before + at) * load<W>(c.dq + at);
            auto seen = multiply_add(load<W>(c.q + at), dq, onward);
            store(c.dlog_decay + at, EXCLUSIVE ? onward : seen);
            store(c.dq + at, dq);
            onward = seen;
        }
        // from S and the rows before t to dS
        auto through = load<W>(c.total + i) * (sums[0] + sums[1]);
        for (int64_t t = 0; t < rows; ++t) {
            const int64_t at = t * c.width + i;
            auto dk = load<W>(c.after + at) * load<W>(c.dk + at);
            store(c.dlog_decay + at, load<W>(c.dlog_decay + at) + through);
            store(c.dk + at, dk);
            through = multiply_add(load<W>(c.k + at), dk, through);
        }
    }
}

// What a row sees of those before it and of itself, for N vectors of keys; adds up A.
template <class S, int N, bool EXCLUSIVE>
void pair_terms(const ChunkScratch<S>& c, int64_t rows, int64_t key, const S* bonus, int64_t keys, S* dbonus) {
    constexpr int W = kLanes<S>;
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i * c.width + key;
        Lanes<S> q[N], decay[N], dq[N], through[N] = {};
        UNROLL
        for (int n = 0; n < N; ++n) {
            q[n] = load<W>(c.q + at + n * W), decay[n] = load<W>(c.decay + at + n * W);
            dq[n] = load<W>(c.dq + at + n * W);
            store(c.between + at + n * W, all(S(1)));
        }
        for (int64_t j = 0; j < i; ++j) {
            const int64_t other = j * c.width + key;
            const auto dA = all(c.dA[i * kRows + j]);
            Lanes<S> along = {};
            UNROLL
            for (int n = 0; n < N; ++n) {
                auto D = load<W>(c.between + other + n * W);
                if constexpr (EXCLUSIVE) store(c.between + other + n * W, D * decay[n]);
                else store(c.between + other + n * W, D *= decay[n]);
                auto k = D * load<W>(c.k + other + n * W), pair = q[n] * k;
                along += pair;
                dq[n] = multiply_add(dA, k, dq[n]);
                store(c.dk + other + n * W, multiply_add(dA, D * q[n], load<W>(c.dk + other + n * W)));
                // pairs with this row of all rows up to j go through row j + 1
                through[n] = multiply_add(dA, pair, through[n]);
                S* to = c.dlog_decay + other + c.width + n * W;
                if (!EXCLUSIVE || j + 1 < i) store(to, load<W>(to) + through[n]);
            }
            store(c.along + j * W, along);
        }
        const auto dA = all(c.dA[i * kRows + i]);
        Lanes<S> along = {};
        UNROLL
        for (int n = 0; n < N; ++n) {
            auto k = load<W>(c.k + at + n * W), seen = q[n];
            if constexpr (EXCLUSIVE) {
                const int64_t left = keys - key - n * W;
                auto u = load_some(bonus + key + n * W, left);
                if (dbonus && left > 0) {
                    S* to = dbonus + key + n * W;
                    store_some(to, multiply_add(dA, q[n] * k, load_some(to, left)), left);
                }
                k *= u, seen *= u;
            }
            along = multiply_add(q[n], k, along);
            store(c.dq + at + n * W, multiply_add(dA, k, dq[n]));
            store(c.dk + at + n * W, multiply_add(dA, seen, load<W>(c.dk + at + n * W)));
        }
        store(c.along + i * W, along);
        for (int64_t j = i + 1; j % 4; ++j) store(c.along + j * W, Lanes<S>{});
        for (int64_t j = 0; j <= i; j += 4) {
            Lanes<S> four[4];
            S sums[4];
            UNROLL
            for (int x = 0; x < 4; ++x) four[x] = load<W>(c.along + (j + x) * W);
            sums_of_four<S>(four, sums);
            for (int x = 0; x < 4; ++x) c.A_transposed[(j + x) * kRows + i] += sums[x];
        }
    }
}

template <class S, bool EXCLUSIVE>
void step_gradients(const Backward& b, const Chunk& chunk, const ChunkScratch<S>& c, const S* state, const S* dstate,
                    S* dbonus) {
    const Problem& p = b.problem;
    const int64_t K = p.keys, V = p.values, width = c.width, stride = c.stride;
    // what there are, in whole tiles: a row alone is a quarter of a step or less
    const int64_t rows = multiple(chunk.rows, kTile);
    transpose<S>(c.v, kRows, stride, stride, c.v_transposed, kRows);
    product<S>(rows, V, kRows, c.dy, stride, c.v_transposed, kRows, c.dA, kRows, false);
    product<S>(rows, V, width, c.dy, stride, state, width, c.dq, width, false);
    product<S>(rows, V, width, c.v, stride, dstate, width, c.dk, width, false);
    state_terms<S, EXCLUSIVE>(c, chunk.rows, state, dstate, V);
    std::fill_n(c.A_transposed, kRows * kRows, S(0));
    const S* bonus = p.bonus ? static_cast<const S*>(p.bonus) + chunk.head * K : nullptr;
    for_blocks<S>(width, [&]<int N>(int64_t key) {
        pair_terms<S, N, EXCLUSIVE>(c, chunk.rows, key, bonus, K, dbonus);
    });
    transpose<S>(dstate, stride, width, width, c.dstate_transposed, stride);
    product<S>(rows, K, stride, c.k_after, width, c.dstate_transposed, stride, c.dv, stride, false);
    product<S>(rows, kRows, stride, c.A_transposed, kRows, c.dy, stride, c.dv, stride, true);
    write_rows<S>(contiguous(b.dq, p.rows, p.heads, K), p.format, chunk, K, c.dq, width);
    write_rows<S>(contiguous(b.dk, p.rows, p.heads, K), p.format, chunk, K, c.dk, width);
    write_rows<S>(contiguous(b.dv, p.rows, p.heads, V), p.format, chunk, V, c.dv, stride);
    if (b.dlog_decay == nullptr) return;
    for (int64_t t = 0; p.decays == 1 && t < chunk.rows; ++t) {
        S* row = c.dlog_decay + t * width;
        Lanes<S> total = {};
        for (int64_t i = 0; i < width; i += kLanes<S>) total += load<kLanes<S>>(row + i);
        row[0] = sum(total);
    }
    constexpr int64_t format = std::is_same_v<S, double> ? 0 : 1;
    write_rows<S>(contiguous(b.dlog_decay, p.rows, p.heads, p.decays), format, chunk, p.decays, c.dlog_decay, width);
}

template <class S, bool EXCLUSIVE>
void chunk_gradients(const Backward& b, const Chunk& chunk, const S* state, const S* dstate, S* dbonus,
                     const ChunkScratch<S>& c) {
    const Problem& p = b.problem;
    const int64_t K = p.keys, V = p.values, width = c.width, stride = c.stride, size = stride * width;
    const int64_t rows = chunk.rows, steps = (rows + kRows - 1) / kRows, missing = steps * kRows - rows;
    read_rows<S>(p.q, p.format, chunk, K, 1, c.q, width, true);
    read_rows<S>(p.k, p.format, chunk, K, 1, c.k, width, true);
    read_rows<S>(p.v, p.format, chunk, V, 1, c.v, stride, true);
    read_rows<S>(b.dy, p.format, chunk, V, p.scale, c.dy, stride, true);
    read_decays<S>(p.log_decay, p.decays > 1, chunk, K, c.decay, width);
    for (S* x : {c.q, c.k}) std::fill_n(x + rows * width, missing * width, S(0));
    for (S* x : {c.v, c.dy}) std::fill_n(x + rows * stride, missing * stride, S(0));
    std::fill_n(c.decay + rows * width, missing * width, S(1));
    if (dbonus) std::fill_n(dbonus, K, S(0));

    auto before = [&](int64_t s) { return s == 0 ? state : c.states + (s - 1) * size; };
    for (int64_t s = 0; s < steps; ++s) {
        const ChunkScratch<S> step = c.step(s * kRows);
        products_after<S>(kRows, step.decay, width, step.after, c.total);
        std::copy_n(step.k, kRows * width, step.k_after);
        multiply_by(step.k_after, step.after, kRows * width);
        if (s + 1 == steps) break;
        advance<S>(kRows, stride, width, c.total, step.v, stride, step.k_after, before(s), c.states + s * size);
    }
    for (int64_t s = steps - 1; s >= 0; --s) {
        const ChunkScratch<S> step = c.step(s * kRows);
        const int64_t first = s * kRows;
        products_before<S>(kRows, step.decay, width, !EXCLUSIVE, c.before, c.total);
        const Chunk part{chunk.sequence, chunk.head, chunk.batch, chunk.first + first, std::min(kRows, rows - first)};
        step_gradients<S, EXCLUSIVE>(b, part, step, before(s), dstate, dbonus);
        if (s == 0) break;
        std::copy_n(step.q, kRows * width, c.q_before);
        multiply_by(c.q_before, c.before, kRows * width);
        advance<S>(kRows, stride, width, c.total, step.dy, stride, c.q_before, dstate, c.dstate);
        dstate = c.dstate;
    }
}

}  // namespace
