// The gradient of the selective scan.
#pragma once
#include "native.h"

namespace {

// Numbers of scratch for a block: A, carry, states and decays for each of its states, and for each of those and of its
// channels the gradients of A and D, of a chunk and in double of all.
template <class S>
int64_t backward_numbers(int64_t states) {
    constexpr int64_t with_sums = 1 + sizeof(double) / sizeof(S);
    return ((2 + kChunk + 1 + kChunk) * states + with_sums * (states + 1)) * kBlock<S>;
}

// Walks forward once and keeps the state before every chunk; then takes the chunks from the last to the first, makes the
// states of each again, and goes back through its rows.
template <class E, class T, int N, class S>
void backward_block(const Backward& b, const Block& t, S* scratch, S* before) {
    constexpr int W = kLanes<S>, width = N * W;
    const Problem& p = b.problem;
    const int64_t K = p.states, n = t.channels, size = K * width, chunks = (t.rows + kChunk - 1) / kChunk;
    const int64_t sums = size + width;
    double* total = reinterpret_cast<double*>(scratch);
    scratch += sums * sizeof(double) / sizeof(S);
    // the gradient of D lies behind that of A
    S *A = scratch, *carry = A + size, *dA = carry + size, *states = dA + sums, *decays = states + (kChunk + 1) * size;
    std::fill_n(total, sums, 0.0);

    const int64_t state = (t.sequence * p.channels + t.channel) * K;
    const S* initial = static_cast<const S*>(p.initial_state);
    const S* dfinal = static_cast<const S*>(b.dfinal_state);
    transpose_in(static_cast<const S*>(p.A) + t.channel * K, n, K, width, A);
    transpose_in(initial ? initial + state : nullptr, n, K, width, before);
    transpose_in(dfinal ? dfinal + state : nullptr, n, K, width, carry);
    Row<S, N> D, dD, x, delta, input, dy;
    D.read(p.D ? static_cast<const S*>(p.D) + t.channel : nullptr, n);
    const Walk<S, T> xs(p.x, p.x_strides, t), dys(b.dy, b.dy_strides, t);
    const Walk<S, E> deltas(p.delta, p.delta_strides, t);
    const int64_t first = t.batch * p.rows + t.first_row, all = p.cu_seqlens ? p.rows : p.sequences * p.rows;
    const S *B = static_cast<const S*>(p.B) + first * K, *C = static_cast<const S*>(p.C) + first * K;
    S* dB = static_cast<S*>(b.dB_parts) + (t.number * all + first) * K;
    S* dC = static_cast<S*>(b.dC_parts) + (t.number * all + first) * K;
    T* dx = b.dx ? static_cast<T*>(b.dx) + first * p.channels + t.channel : nullptr;
    E* ddelta = b.ddelta ? static_cast<E*>(b.ddelta) + first * p.channels + t.channel : nullptr;

    auto read = [&](int64_t r) INLINE_BODY {
        x.read(xs(r), n), delta.read(deltas(r), n);
        UNROLL
        for (int v = 0; v < N; ++v) input[v] = delta[v] * x[v];
    };
    for (int64_t c = 0; c + 1 < chunks; ++c) {
        S* h = before + (c + 1) * size;
        std::copy_n(h - size, size, h);
        for (int64_t r = c * kChunk; r < (c + 1) * kChunk; ++r) {
            xs.prefetch(r + kAhead), deltas.prefetch(r + kAhead);
            read(r);
            step<S, N>(A, B + r * K, delta, input, K, h, [&](int64_t k, int v, auto, auto after) INLINE_BODY {
                store(h + k * width + v * W, after);
            });
        }
    }
    for (int64_t c = chunks - 1; c >= 0; --c) {
        const int64_t begin = c * kChunk, rows = std::min(kChunk, t.rows - begin);
        std::copy_n(before + c * size, size, states);
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t r = begin + i;
            read(r);
            dy.read(dys(r), n);
            const S* h = states + i * size;
            Vec<S, W> along;
            step<S, N>(A, B + r * K, delta, input, K, h, [&](int64_t k, int v, auto decay, auto after) INLINE_BODY {
                const int64_t at = i * size + k * width + v * W;
                store(decays + at, decay);
                store(states + at + size, after);
                along = v == 0 ? after * dy[v] : along + after * dy[v];
                if (v == N - 1) dC[r * K + k] = sum(along);
            });
        }
        std::fill_n(dA, size, S(0));
        dD.read(static_cast<const S*>(nullptr), n);
        for (int64_t i = rows - 1; i >= 0; --i) {
            const int64_t r = begin + i;
            read(r);
            dy.read(dys(r), n);
            // of Δ x, and of Δ by way of the decays
            Row<S, N> dinput, dstep;
            UNROLL
            for (int v = 0; v < N; ++v) dinput[v] = dstep[v] = Vec<S, W>{};
            for (int64_t k = 0; k < K; ++k) {
                const S of_B = B[r * K + k], of_C = C[r * K + k];
                Vec<S, W> along = {};
                UNROLL
                for (int v = 0; v < N; ++v) {
                    const int64_t at = k * width + v * W;
                    auto g = load<W>(carry + at) + dy[v] * of_C;
                    along += g * input[v];
                    dinput[v] += g * of_B;
                    auto earlier = g * load<W>(decays + i * size + at);
                    store(carry + at, earlier);
                    auto dexponent = earlier * load<W>(states + i * size + at);
                    dstep[v] += dexponent * load<W>(A + at);
                    store(dA + at, load<W>(dA + at) + dexponent * delta[v]);
                }
                dB[r * K + k] = sum(along);
            }
            UNROLL
            for (int v = 0; v < N; ++v) {
                dD[v] += x[v] * dy[v];
                dstep[v] += x[v] * dinput[v];
                dinput[v] = delta[v] * dinput[v] + D[v] * dy[v];
            }
            if (dx) dinput.write(dx + r * p.channels, n);
            if (ddelta) dstep.write(ddelta + r * p.channels, n);
        }
        dD.write(dA + size, width);
        for (int64_t i = 0; i < sums; ++i) total[i] += dA[i];
    }
    if (b.dinitial_state) transpose_out(carry, n, K, width, static_cast<S*>(b.dinitial_state) + state);
    std::copy_n(total, sums, dA);
    if (b.dA) transpose_out(dA, n, K, width, static_cast<S*>(b.dA_parts) + state);
    if (b.dD) std::copy_n(dA + size, n, static_cast<S*>(b.dD_parts) + t.sequence * p.channels + t.channel);
}

template <class E, class T>
void backward(const Backward& b) {
    using S = StateOf<T>;
    const Problem& p = b.problem;
    S* kept = static_cast<S*>(b.kept);
    for_blocks<S>(p, backward_numbers<S>(p.states), [&]<int N>(const Block& t, S* own, int64_t thread) {
        backward_block<E, T, N>(b, t, own, kept + thread * b.kept_numbers);
    });
    const int64_t rows = p.cu_seqlens ? p.rows : p.sequences * p.rows;
    auto add = [&](const void* parts, int64_t count, int64_t numbers, auto* to) {
        add_parts(static_cast<const S*>(parts), count, numbers, numbers, to, p.threads);
    };
    add(b.dA_parts, p.sequences, p.channels * p.states, static_cast<S*>(b.dA));
    add(b.dD_parts, p.sequences, p.channels, static_cast<S*>(b.dD));
    add(b.dB_parts, blocks_of<S>(p), rows * p.states, static_cast<T*>(b.dB));
    add(b.dC_parts, blocks_of<S>(p), rows * p.states, static_cast<T*>(b.dC));
}

}  // namespace
