// The gradient of gated linear attention: S and dS at the borders of chunks, then the chunks, each by itself.
#pragma once
#include "native_chunk.h"

namespace {

// States at the borders of all sequences' chunks, [chunks, heads, values, width]: S before each, dS after each.
template <class S>
struct Borders {
    int64_t heads, values, width;
    S *states, *dstates;

    Borders(const Backward& b, int64_t chunks)
        : heads(b.problem.heads), values(whole_vectors<S>(b.problem.values)), width(whole_vectors<S>(b.problem.keys)) {
        states = static_cast<S*>(b.states);
        dstates = states + chunks * heads * values * width;
    }
    S* state(int64_t chunk, int64_t head) const { return states + (chunk * heads + head) * values * width; }
    S* dstate(int64_t chunk, int64_t head) const { return dstates + (chunk * heads + head) * values * width; }
};

// Numbers of scratch for a sweep over chunks: rows of keys and of values, their decays and products, a state.
template <class S>
int64_t sweep_numbers(int64_t rows, int64_t width, int64_t stride) {
    return rows * (3 * width + stride) + width + stride * width;
}

// S before every chunk of a share's sequence.
template <class S>
void sweep_forward(const Backward& b, const Chunks& chunks, const Borders<S>& borders, const Share& share,
                   S* scratch) {
    const Problem& p = b.problem;
    const int64_t K = p.keys, V = p.values, n = share.sequence, last = share.head + share.heads;
    const int64_t width = borders.width, stride = whole_vectors<S>(share.columns), tile = share.column * width;
    const int64_t start = chunks.start(n), count = chunks.count(n);
    S *k = scratch, *decay = k + b.chunk * width, *after = decay + b.chunk * width, *v = after + b.chunk * width;
    S* total = v + b.chunk * stride;
    const Heads values = columns_from(p.v, share.column, p.format);
    for (int64_t head = share.head; count > 0 && head < last; ++head) {
        const S* initial = state_of<S>(p.initial_state, p, share, head);
        transpose_in(initial, K, share.columns, V, borders.state(start, head) + tile, stride, width);
    }
    for (int64_t c = 0; c + 1 < count; ++c) {
        for (int64_t head = share.head; head < last; ++head) {
            const Chunk chunk = chunks.chunk(n, head, c);
            read_rows<S>(p.k, p.format, chunk, K, 1, k, width, true);
            read_rows<S>(values, p.format, chunk, share.columns, 1, v, stride, true);
            read_decays<S>(p.log_decay, p.decays > 1, chunk, K, decay, width);
            products_after<S>(chunk.rows, decay, width, after, total);
            multiply_by(k, after, chunk.rows * width);
            advance<S>(chunk.rows, stride, width, total, v, stride, k, borders.state(start + c, head) + tile,
                       borders.state(start + c + 1, head) + tile);
        }
    }
}

// dS after every chunk, and dinitial_state.
template <class S>
void sweep_backward(const Backward& b, const Chunks& chunks, const Borders<S>& borders, const Share& share,
                    S* scratch) {
    const Problem& p = b.problem;
    const int64_t K = p.keys, V = p.values, n = share.sequence, last = share.head + share.heads;
    const int64_t width = borders.width, stride = whole_vectors<S>(share.columns), tile = share.column * width;
    const int64_t start = chunks.start(n), count = chunks.count(n);
    S *q = scratch, *decay = q + b.chunk * width, *before = decay + b.chunk * width, *dy = before + b.chunk * width;
    S *total = dy + b.chunk * stride, *dinitial = total + width;
    const Heads values = columns_from(b.dy, share.column, p.format);
    for (int64_t head = share.head; head < last; ++head) {
        S* to = count > 0 ? borders.dstate(start + count - 1, head) + tile : dinitial;
        const S* dfinal = state_of<S>(b.dfinal_state, p, share, head);
        transpose_in(dfinal, K, share.columns, V, to, stride, width);
        if (count == 0 && b.dinitial_state)
            transpose_out(dinitial, width, K, share.columns, V, state_of<S>(b.dinitial_state, p, share, head));
    }
    for (int64_t c = count - 1; c >= (b.dinitial_state ? 0 : 1); --c) {
        for (int64_t head = share.head; head < last; ++head) {
            const Chunk chunk = chunks.chunk(n, head, c);
            read_rows<S>(p.q, p.format, chunk, K, 1, q, width, true);
            read_rows<S>(values, p.format, chunk, share.columns, p.scale, dy, stride, true);
            read_decays<S>(p.log_decay, p.decays > 1, chunk, K, decay, width);
            products_before<S>(chunk.rows, decay, width, p.bonus == nullptr, before, total);
            multiply_by(q, before, chunk.rows * width);
            S* to = c > 0 ? borders.dstate(start + c - 1, head) + tile : dinitial;
            advance<S>(chunk.rows, stride, width, total, dy, stride, q, borders.dstate(start + c, head) + tile, to);
            if (c > 0) continue;
            transpose_out(dinitial, width, K, share.columns, V, state_of<S>(b.dinitial_state, p, share, head));
        }
    }
}

template <class S>
void backward(const Backward& b) {
    const Problem& p = b.problem;
    const Chunks chunks(p.cu_seqlens, p.sequences, p.rows, b.chunk);
    const Borders<S> borders(b, chunks.total());
    // either sweep is shared among all threads
    const Shares shares(p, whole_vectors<S>(1), (p.threads + 1) / 2);
    const int64_t numbers = sweep_numbers<S>(b.chunk, borders.width, whole_vectors<S>(shares.widest()));
    parallel_with_scratch<S, FlushDenormals>(2 * shares.count, p.threads, numbers, [&](int64_t i, S* scratch, int64_t) {
        if (i % 2) sweep_backward(b, chunks, borders, shares[i / 2], scratch);
        else sweep_forward(b, chunks, borders, shares[i / 2], scratch);
    });
    const int64_t own = ChunkScratch<S>(nullptr, b.chunk, p.keys, p.values).numbers;
    parallel_with_scratch<S, FlushDenormals>(chunks.total() * p.heads, p.threads, own, [&](int64_t i, S* scratch, int64_t) {
        const int64_t at = i / p.heads, head = i % p.heads;
        const S *state = borders.state(at, head), *dstate = borders.dstate(at, head);
        S* parts = b.dbonus ? static_cast<S*>(b.dbonus_parts) + i * p.keys : nullptr;
        const ChunkScratch<S> c(scratch, b.chunk, p.keys, p.values);
        if (p.bonus) chunk_gradients<S, true>(b, chunks.among_all(at, head), state, dstate, parts, c);
        else chunk_gradients<S, false>(b, chunks.among_all(at, head), state, dstate, parts, c);
    });
    const int64_t numbers_of_bonus = p.heads * p.keys;
    add_parts(static_cast<const S*>(b.dbonus_parts), chunks.total(), numbers_of_bonus, numbers_of_bonus,
              static_cast<S*>(b.dbonus), p.threads);
}

}  // namespace
