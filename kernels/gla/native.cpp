// Gated linear attention and its gradient, row by row with tiles of the state in registers: nothing is divided or
// subtracted, so every decay is safe.
//
// Columns of the state are independent forward. Backward, S and dS at the borders of chunks are made first, in the same
// way, then every chunk by itself. Which thread does what changes no bit of any result.
#include "native.h"

namespace {

// Rows that a tile of the state stays in registers for.
constexpr int64_t kForwardRows = 16;

template <class S, bool EXCLUSIVE>
void forward_share(const Forward& f, const Chunks& chunks, const Share& share, S* scratch) {
    const Problem& p = f.problem;
    const int64_t K = p.keys, V = p.values, n = share.sequence, columns = share.columns;
    const int64_t width = whole_vectors<S>(K), stride = whole_vectors<S>(columns);
    S *q = scratch, *k = q + kForwardRows * width, *decay = k + kForwardRows * width;
    S *v = decay + kForwardRows * width, *y = v + kForwardRows * stride;
    const Heads values = columns_from(p.v, share.column, p.format);
    const Heads out = columns_from(contiguous(f.y, p.rows, p.heads, V), share.column, p.format);
    for (int64_t c = 0; c < chunks.count(n); ++c) {
        for (int64_t head = share.head; head < share.head + share.heads; ++head) {
            const Chunk chunk = chunks.chunk(n, head, c);
            read_rows<S>(p.q, p.format, chunk, K, p.scale, q, width, true);
            read_rows<S>(p.k, p.format, chunk, K, 1, k, width, true);
            read_rows<S>(values, p.format, chunk, columns, 1, v, stride, true);
            read_decays<S>(p.log_decay, p.decays > 1, chunk, K, decay, width);
            for (int64_t t = 0; t < chunk.rows; ++t) {
                S own = 0;
                if constexpr (EXCLUSIVE)
                    own = dot_of_three(q + t * width, static_cast<const S*>(p.bonus) + head * K, k + t * width, K);
                for (int64_t i = t * stride; i < (t + 1) * stride; i += kLanes<S>)
                    store(y + i, all(own) * load<kLanes<S>>(v + i));
            }
            S* to = state_of<S>(f.final_state, p, share, head);
            const S* from = c > 0 ? to : state_of<S>(p.initial_state, p, share, head);
            for (int64_t i = 0; i < K; i += kTile) {
                for_blocks<S>(columns, [&]<int N>(int64_t j) {
                    const int64_t at = i * V + j;
                    forward_tile<S, N, EXCLUSIVE>(chunk.rows, q + i, k + i, decay + i, width, v + j, y + j, stride,
                                                  from ? from + at : nullptr, to + at, V, K - i, columns - j);
                });
            }
            write_rows<S>(out, p.format, chunk, columns, y, stride);
        }
    }
    if (chunks.count(n) > 0) return;
    for (int64_t head = share.head; head < share.head + share.heads; ++head) {
        S* to = state_of<S>(f.final_state, p, share, head);
        const S* from = state_of<S>(p.initial_state, p, share, head);
        for (int64_t i = 0; i < K * V; i += V)
            for (int64_t j = 0; j < columns; ++j) to[i + j] = from ? from[i + j] : S(0);
    }
}

template <class S>
void forward(const Forward& f) {
    const Problem& p = f.problem;
    const Chunks chunks(p.cu_seqlens, p.sequences, p.rows, kForwardRows);
    const Shares shares(p, kLanes<S>, p.threads);
    const int64_t numbers = kForwardRows * (3 * whole_vectors<S>(p.keys) + 2 * whole_vectors<S>(shares.widest()));
    parallel_with_scratch<S, FlushDenormals>(shares.count, p.threads, numbers, [&](int64_t i, S* scratch, int64_t) {
        if (p.bonus) forward_share<S, true>(f, chunks, shares[i], scratch);
        else forward_share<S, false>(f, chunks, shares[i], scratch);
    });
}

}  // namespace

#include "native_backward.h"

extern "C" {
int vector_bytes() { return kVectorBytes; }
int gla_forward(const Forward* f) {
    return unless_out_of_memory([&] { f->problem.format == 0 ? forward<double>(*f) : forward<float>(*f); });
}
int gla_backward(const Backward* b) {
    return unless_out_of_memory([&] { b->problem.format == 0 ? backward<double>(*b) : backward<float>(*b); });
}
}
