// One token of linear attention that is divided by the sum of its keys, with all that stands around the recurrence:
//
//     S' = f S + i k [v, 1]ᵀ,   [h, n] = S'ᵀ q,   y = h / (max(|n|, floor) + eps)
//
// where f = i = 1 and floor = 0, or they are an mLSTM's gates; q and k may be the Taylor features of what is given.
#pragma once
#include <cmath>
#include <limits>

#include "native.h"

namespace {

// All fields are 8 bytes: step.py packs them as one array.
struct Step {
    int64_t batch, heads, keys, values, format, threads;
    int64_t given;  // numbers of q and k: `keys`, or fewer, of which features are made
    double scale, eps;
    double cap;               // of the gates' logits; 0: none
    Heads q, k, v;            // [batch, 1, heads, given or values]
    const void* state;        // in S: [batch, heads, keys, values + 1]
    const void *i, *f, *m;    // in S: [batch, heads], the gates' logits and the maximum so far; or null: no gates
    void *y, *final_state, *final_m;
};

static_assert(sizeof(Step) == 29 * 8, "step.py packs this many fields");

template <class S>
struct Gates {
    S decay = 1, input = 1, floor = 0;
};

// The gates of head number `at` of all; writes its new maximum.
template <class S>
Gates<S> gates(const Step& s, int64_t at) {
    if (s.m == nullptr) return {};
    auto number = [&](const void* from) { return static_cast<const S*>(from)[at]; };
    auto capped = [&](S z) { return s.cap > 0 ? S(s.cap) * std::tanh(z / S(s.cap)) : z; };
    const S i = capped(number(s.i)), f = capped(number(s.f));
    // log σ(f) + m
    const S carried = std::min(f, S(0)) - std::log1p(std::exp(-std::abs(f))) + number(s.m);
    const S m = std::max(carried, i);
    static_cast<S*>(s.final_m)[at] = m;
    // e^{-m}, short of infinity
    const S floor = std::exp(-std::max(m, std::log(std::numeric_limits<S>::min())));
    return {std::exp(carried - m), std::exp(i - m), floor};
}

// `factor` times 1, x / d^¼ and the upper half of x xᵀ / √d, its diagonal over √2.
template <class S>
void taylor(const S* x, int64_t d, S factor, S* to) {
    const S one = S(1 / std::pow(double(d), 0.25)), diagonal = S(std::sqrt(0.5));
    *to++ = factor;
    for (int64_t i = 0; i < d; ++i) *to++ = factor * (one * x[i]);
    for (int64_t i = 0; i < d; ++i)
        for (int64_t j = i; j < d; ++j) *to++ = factor * (one * x[i] * (one * x[j])) * (i == j ? diagonal : S(1));
}

template <class S>
void step(const Step& s) {
    const int64_t K = s.keys, V = s.values + 1, width = whole_vectors<S>(K), stride = whole_vectors<S>(V);
    parallel_with_scratch<S, FlushDenormals>(s.batch * s.heads, s.threads, 4 * width + 2 * stride, [&](int64_t at, S* scratch, int64_t) {
        S *q = scratch, *k = q + width, *decay = k + width, *x = decay + width, *v = x + width, *y = v + stride;
        const Chunk token{at / s.heads, at % s.heads, at / s.heads, 0, 1};
        const Gates<S> g = gates<S>(s, at);
        auto read = [&](Heads from, S factor, S* to) {
            if (s.given == K) return read_rows<S>(from, s.format, token, K, factor, to, width);
            read_rows<S>(from, s.format, token, s.given, 1, x, whole_vectors<S>(s.given));
            std::fill_n(to, width, S(0));
            taylor(x, s.given, factor, to);
        };
        read(s.q, S(s.scale), q);
        read(s.k, g.input, k);
        read_rows<S>(s.v, s.format, token, s.values, 1, v, stride);
        v[s.values] = 1;
        std::fill_n(decay, width, g.decay);
        std::fill_n(y, stride, S(0));
        const S* from = static_cast<const S*>(s.state) + at * K * V;
        S* to = static_cast<S*>(s.final_state) + at * K * V;
        for (int64_t i = 0; i < K; i += kTile) {
            for_blocks<S>(V, [&]<int N>(int64_t j) {
                forward_tile<S, N, false>(1, q + i, k + i, decay + i, width, v + j, y + j, stride, from + i * V + j,
                                          to + i * V + j, V, K - i, V - j);
            });
        }
        const S divisor = std::max(std::abs(y[s.values]), g.floor) + S(s.eps);
        for (int64_t j = 0; j < s.values; ++j) y[j] /= divisor;
        write_rows<S>(contiguous(s.y, 1, s.heads, s.values), s.format, token, s.values, y, stride);
    });
}

}  // namespace
