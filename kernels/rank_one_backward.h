// The walk back: see rank_one.h.
#pragma once
#include "rank_one.h"

template <class S>
int64_t scratch_of(const Backward& b, int64_t keys, int64_t values) {
    const int64_t width = b.problem.vectors * kLanes<S>;
    return keys * (values + (kRows + 1) * width + 5 * kRows + 1) +
           kRows * (2 * (values + width) + whole_vectors<S>(1)) + 4 * width;
}

// Walks forward once and keeps the state before every chunk; then takes the chunks from the last to the first, makes the
// states of each again, and goes back through its rows.
template <class S, int N, bool DELTA, bool DECAY>
void run_part(const Backward& b, const Chunks& chunks, const Part<S>& part, S* scratch, int64_t thread) {
    constexpr int W = kLanes<S>;
    const Problem& p = b.problem;
    const int64_t keys = whole_vectors<S>(p.keys), width = part.width, values = part.tiles * width, size = keys * width;
    const int64_t all = keys * values, count = chunks.count(part.sequence);
    const Inputs<S, DELTA> in(p, part, keys, scratch);
    auto take = [&](int64_t numbers) { return std::exchange(scratch, scratch + numbers); };
    S *kept = static_cast<S*>(b.kept) + thread * b.kept_numbers, *G = take(all), *states = take((kRows + 1) * size);
    S *dy = take(kRows * values), *dv = take(kRows * values), *read = take(kRows * width), *u = take(kRows * width);
    S *of_v = take(width), *of_p = take(width), *dp = take(width), *zeros = take(width);
    // sums over tiles
    S *sums = scratch, *dq = take(kRows * keys), *dk = take(kRows * keys), *da = take(kRows * keys);
    S *db = take(kRows * keys), *ddecay = take(kRows * keys), *dbeta = take(kRows * in.beta_width), *unused = take(keys);
    std::fill_n(zeros, width, S(0));

    // A tile's states through a chunk: one behind the other, or each in the place of the one before.
    auto walk = [&](int64_t rows, int64_t tile, S* before, bool keep) INLINE_BODY {
        read_state<S, N>(keys, before, width, in.a, read);
        for (int64_t i = 0; i < rows; ++i) {
            S* after = keep ? before + size : before;
            in.template added<N>(i, tile, read + i * width, u + i * width);
            const bool more = i + 1 < rows;
            step<S, N, DELTA, DECAY, false>(keys, before, after, width, in.row(i),
                                            more ? in.a + (i + 1) * keys : in.nothing, u + i * width,
                                            in.v + i * values + tile * width, nullptr,
                                            more ? read + (i + 1) * width : dp);
            before = after;
        }
    };
    auto chunk = [&](int64_t n) { return chunks.chunk(part.sequence, part.head, n); };
    part.read_state(p, p.initial_state, keys, kept);
    for (int64_t n = 0; n + 1 < count; ++n) {
        S* state = std::copy_n(kept + n * all, all, kept + (n + 1) * all) - all;
        in.read(chunk(n), 1);
        for (int64_t tile = 0; tile < part.tiles; ++tile) walk(kRows, tile, state + tile * size, false);
    }
    part.read_state(p, b.dfinal_state, keys, G);
    for (int64_t n = count - 1; n >= 0; --n) {
        const Chunk c = chunk(n);
        in.read(c, 1);
        read_rows<S>(columns_from(b.dy, part.column, p.format), p.format, c, part.columns, S(p.scale), dy, values);
        std::memset(sums, 0, (unused - sums) * sizeof(S));
        for (int64_t tile = 0; tile < part.tiles; ++tile) {
            S* g = G + tile * size;
            std::copy_n(kept + n * all + tile * size, size, states);
            walk(c.rows, tile, states, true);
            auto of_row = [&](int64_t i) INLINE_BODY {
                const int64_t at = std::max<int64_t>(i, 0) * keys;
                return Gradients<S>{i < 0 ? unused : dq + at, dk + at, da + at, db + at, ddecay + at, of_v, of_p};
            };
            auto row = [&](int64_t i) INLINE_BODY { return i < 0 ? in.no_row() : in.row(i); };
            auto dy_of = [&](int64_t i) INLINE_BODY { return i < 0 ? zeros : dy + i * values + tile * width; };
            int64_t i = c.rows - 1;
            step_back<S, N, DELTA, DECAY, true>(keys, g, states + c.rows * size, in.no_row(), {}, {}, row(i), dy_of(i),
                                                of_row(i));
            for (; i >= 0; --i) {
                const int64_t at = i * values + tile * width;
                Wide<S, N> dvs(of_v), dps;
                if constexpr (DELTA) {
                    // from that of u = β (v − p)
                    Wide<S, N> vs(in.v + at), ps(read + i * width);
                    auto along = load<W>(dbeta + i * in.beta_width);
                    UNROLL
                    for (int n = 0; n < N; ++n) {
                        along += dvs[n] * (vs[n] - ps[n]);
                        dvs[n] *= in.beta[i * in.beta_width];
                        dps[n] = -dvs[n];
                    }
                    store(dbeta + i * in.beta_width, along);
                } else dps = Wide<S, N>(of_p);
                dvs.write(dv + at), dps.write(dp);
                step_back<S, N, DELTA, DECAY, false>(keys, g, states + i * size, in.row(i), {u + i * width, in.v + at, dp},
                                                     of_row(i), row(i - 1), dy_of(i - 1), of_row(i - 1));
            }
        }
        auto write = [&](const Gradient& to, const S* from, int64_t padded, int64_t format, int64_t columns) {
            if (to.sum == nullptr) return;
            S* own = static_cast<S*>(to.parts) + part.group * p.all_rows() * p.heads * columns;
            const bool parts = p.groups > 1;
            const Heads rows = contiguous(parts ? own : to.sum, p.rows, p.heads, columns);
            write_rows<S>(rows, parts ? kStateFormat<S> : format, c, columns, from, padded);
        };
        write_rows<S>(columns_from(contiguous(b.dv, p.rows, p.heads, p.values), part.column, p.format), p.format, c,
                      part.columns, dv, values);
        write(b.dq, dq, keys, p.format, p.keys);
        write(b.dk, dk, keys, p.format, p.keys);
        for (int64_t i = 0; i < c.rows; ++i) {
            if (DELTA) dbeta[i * in.beta_width] = sum(load<W>(dbeta + i * in.beta_width));
            if (p.decays != 1) continue;
            Lanes<S> total = {};
            for (int64_t k = 0; k < keys; k += W) total += load<W>(ddecay + i * keys + k);
            ddecay[i * keys] = sum(total);
        }
        if (p.decays > 0) write(b.dlog_decay, ddecay, keys, kStateFormat<S>, p.decays);
        if (DELTA) write(b.da, dbeta, in.beta_width, p.beta_format, 1);
        else write(b.da, da, keys, p.format, p.keys), write(b.db, db, keys, p.format, p.keys);
    }
    if (b.dinitial_state) part.write_state(p, G, keys, b.dinitial_state);
}

// The sum over groups, in their order, whoever computed them.
template <class S>
void add_groups(const Problem& p, const Gradient& to, int64_t format, int64_t columns) {
    if (to.sum == nullptr || p.groups == 1) return;
    const int64_t row = p.heads * columns, width = whole_vectors<S>(row), all = p.all_rows() * row;
    parallel_with_scratch<S, FlushDenormals>(p.all_rows(), p.threads, width, [&](int64_t i, S* total, int64_t) {
        const S* from = static_cast<const S*>(to.parts) + i * row;
        for (int64_t c = 0; c < row; c += kLanes<S>) {
            Lanes<S> one = {};
            for (int64_t group = 0; group < p.groups; ++group) one += load_some(from + group * all + c, row - c);
            store(total + c, one);
        }
        write_rows<S>(contiguous(to.sum, 0, 1, row), format, {0, 0, 0, i, 1}, row, total, width);
    });
}

template <bool DELTA>
void run_back(const Backward& b) {
    const Problem& p = b.problem;
    run<DELTA>(b);
    auto add = [&]<class S>() {
        add_groups<S>(p, b.dq, p.format, p.keys), add_groups<S>(p, b.dk, p.format, p.keys);
        add_groups<S>(p, b.da, DELTA ? p.beta_format : p.format, DELTA ? 1 : p.keys);
        add_groups<S>(p, b.db, p.format, p.keys);
        add_groups<S>(p, b.dlog_decay, kStateFormat<S>, p.decays);
    };
    p.format == 0 ? add.template operator()<double>() : add.template operator()<float>();
}
