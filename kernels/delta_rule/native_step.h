// One token of each sequence from its projections to the gated norm: short convolution, SiLU, q and k of length 1, rates
// and decays, the delta rule, norm and gate. A head of a sequence at a time; everything between is in S. See step.py.
#pragma once
#include <cmath>

#include "../rank_one.h"
#include "../sigmoid.h"

namespace {

// All fields are 8 bytes: step.py packs them as one array. Tensors are contiguous; null: there is none.
struct Step {
    int64_t batch, query_heads, heads, keys, values;
    int64_t taps;        // of the convolution, or 0
    int64_t decays;      // of a head: 0, 1 or `keys`
    int64_t format;      // of everything but the states in S
    int64_t sigmoid;     // the gate's activation is that, else SiLU
    int64_t threads;
    double scale, largest_beta, eps;
    const void* qkv;                         // [batch, channels]: all queries, then all keys, then all values
    const void *beta, *decay, *gate;         // logits [batch, heads], [batch, heads, decays], [batch, heads, values]
    const void *state, *conv_state;          // [batch, heads, keys, values], [batch, taps - 1, channels]
    const void *conv_weight, *conv_bias;     // [channels, taps], [channels]
    const void *A_log, *dt_bias, *norm_weight;  // [heads], [heads, decays], [values]
    void *y, *final_state, *final_conv;      // [batch, heads, values], and as the states
};

static_assert(sizeof(Step) == 27 * 8, "step.py packs this many fields");

// Numbers `first` to `first + n` of a tensor, in S, with zeros behind them.
template <class S>
void read(const void* from, int64_t format, int64_t first, int64_t n, S* to) {
    const int64_t width = whole_vectors<S>(n);
    read_rows<S>(columns_from({from, 0, 0, 0}, first, format), format, {0, 0, 0, 0, 1}, n, S(1), to, width);
}

// Channels `first` to `first + n` of a sequence's token, convolved, and SiLU of that. KEEP: writes their next state.
template <class S>
void convolve(const Step& s, int64_t sequence, int64_t first, int64_t n, bool keep, S* row, S* to) {
    constexpr int W = kLanes<S>;
    const int64_t channels = 2 * s.query_heads * s.keys + s.heads * s.values, before = s.taps - 1;
    const int64_t token = sequence * channels + first;
    if (s.taps == 0) read<S>(s.qkv, s.format, token, n, to);
    else read<S>(s.conv_bias, s.format, first, n, to);
    for (int64_t t = 0; t < s.taps; ++t) {
        const int64_t at = (sequence * before + t) * channels + first;
        if (t < before) read<S>(s.conv_state, s.format, at, n, row);
        else read<S>(s.qkv, s.format, token, n, row);
        with_format<S>(s.format, [&]<class T>() {
            const T* weight = static_cast<const T*>(s.conv_weight) + first * s.taps + t;
            for (int64_t i = 0; i < n; ++i) to[i] += row[i] * load<1>(weight + i * s.taps)[0];
            if (!keep || t == 0) return;
            T* kept = static_cast<T*>(s.final_conv) + at - channels;
            for (int64_t i = 0; i < n; i += W) store_some(kept + i, load<W>(row + i), n - i);
        });
    }
    for (int64_t i = 0; i < n; i += W) store(to + i, silu<W, S>(load<W>(to + i)));
}

// factor · x / √(|x|² + 10^-6)
template <class S>
void to_length(S factor, int64_t width, S* x) {
    constexpr int W = kLanes<S>;
    Lanes<S> squares = {};
    for (int64_t i = 0; i < width; i += W) squares += load<W>(x + i) * load<W>(x + i);
    factor /= std::sqrt(sum(squares) + S(1e-6));
    for (int64_t i = 0; i < width; i += W) store(x + i, factor * load<W>(x + i));
}

// exp(−exp(A_log) softplus(decay + dt_bias)) of each key.
template <class S>
void decays(const Step& s, int64_t sequence, int64_t head, S* other, S* to) {
    if (s.decays == 0) return std::fill_n(to, s.keys, S(1)), void();
    const int64_t n = s.decays;
    read<S>(s.A_log, s.format, head, 1, other);
    const S A = std::exp(other[0]);
    read<S>(s.decay, s.format, (sequence * s.heads + head) * n, n, to);
    read<S>(s.dt_bias, s.format, head * n, n, other);
    for (int64_t i = 0; i < n; ++i) to[i] = std::exp(A * log_sigmoid(-(to[i] + other[i])));
    if (n == 1) std::fill_n(to, s.keys, S(to[0]));
}

// N vectors of a state's columns, of which `columns` are there; keys lie `apart`. With R = diag(d) S:
//     u = β (v − Rᵀ k),   S' = R + k uᵀ,   y = S'ᵀ q = Rᵀ q + (qᵀ k) u
template <class S, int N, bool WHOLE>
OUTLINE void correct(int64_t keys, const S* from, S* to, int64_t apart, int64_t columns, const S* q, const S* k,
                     const S* d, S beta, S qk, const S* v, S* y) {
    constexpr int W = kLanes<S>;
    auto lanes = [&](int n) INLINE_BODY { return WHOLE ? W : columns - n * W; };
    Wide<S, N> of_k, of_q, u(v);
    for (int64_t i = 0; i < keys; ++i) {
        UNROLL
        for (int n = 0; n < N; ++n) {
            const auto R = d[i] * load_some(from + i * apart + n * W, lanes(n));
            of_k[n] += k[i] * R, of_q[n] += q[i] * R;
        }
    }
    UNROLL
    for (int n = 0; n < N; ++n) u[n] = beta * (u[n] - of_k[n]), of_q[n] += qk * u[n];
    of_q.write(y);
    for (int64_t i = 0; i < keys; ++i) {
        UNROLL
        for (int n = 0; n < N; ++n) {
            const auto R = d[i] * load_some(from + i * apart + n * W, lanes(n));
            store_some(to + i * apart + n * W, R + k[i] * u[n], lanes(n));
        }
    }
}

// y / rms(y) · weight · act(gate)
template <class S>
void normalise(const Step& s, int64_t row, S* other, S* y) {
    constexpr int W = kLanes<S>;
    const int64_t n = s.values, width = whole_vectors<S>(n);
    Lanes<S> squares = {};
    for (int64_t i = 0; i < width; i += W) squares += load<W>(y + i) * load<W>(y + i);
    const S factor = 1 / std::sqrt(sum(squares) / S(n) + S(s.eps));
    if (s.norm_weight) read<S>(s.norm_weight, s.format, 0, n, other);
    else std::fill_n(other, width, S(1));
    for (int64_t i = 0; i < width; i += W) store(y + i, factor * load<W>(y + i) * load<W>(other + i));
    if (s.gate == nullptr) return;
    read<S>(s.gate, s.format, row * n, n, other);
    for (int64_t i = 0; i < width; i += W) {
        const Lanes<S> g = load<W>(other + i);
        Lanes<S> open, shut;
        sigmoids<W, S>(g, open, shut);
        store(y + i, load<W>(y + i) * (s.sigmoid ? open : silu<W, S>(g)));
    }
}

template <class S>
void step(const Step& s) {
    constexpr int W = kLanes<S>;
    const int64_t keys = whole_vectors<S>(s.keys), values = whole_vectors<S>(s.values), longer = std::max(keys, values);
    const int64_t times = s.heads / s.query_heads, queries = s.query_heads * s.keys;
    auto one = [&](int64_t part, S* scratch, int64_t) {
        const int64_t sequence = part / s.heads, head = part % s.heads, served = head / times * s.keys;
        const bool first = head % times == 0;
        S *q = scratch, *k = q + keys, *d = k + keys, *v = d + keys, *y = v + values, *other = y + values;
        convolve(s, sequence, served, s.keys, first, other, q);
        convolve(s, sequence, queries + served, s.keys, first, other, k);
        convolve(s, sequence, 2 * queries + head * s.values, s.values, true, other, v);
        to_length(S(s.scale), keys, q), to_length(S(1), keys, k);
        decays(s, sequence, head, other, d);
        Lanes<S> open, shut, qk = {};
        read<S>(s.beta, s.format, part, 1, other);
        sigmoids<W, S>(load<W>(other), open, shut);
        for (int64_t i = 0; i < keys; i += W) qk += load<W>(q + i) * load<W>(k + i);
        const S beta = S(s.largest_beta) * open[0], product = sum(qk);
        const int64_t at = part * s.keys * s.values;
        const S* from = static_cast<const S*>(s.state) + at;
        S* to = static_cast<S*>(s.final_state) + at;
        std::fill_n(y, values, S(0));
        for (int64_t i = 0; i < s.values;) {
            const bool whole = s.values - i >= 4 * W;
            const auto go = whole ? &correct<S, 4, true> : &correct<S, 1, false>;
            go(s.keys, from + i, to + i, s.values, s.values - i, q, k, d, beta, product, v + i, y + i);
            i += whole ? 4 * W : W;
        }
        normalise(s, part, other, y);
        write_rows<S>(contiguous(s.y, 1, s.heads, s.values), s.format, {sequence, head, sequence, 0, 1}, s.values, y,
                      values);
    };
    parallel_with_scratch<S, FlushDenormals>(s.batch * s.heads, s.threads, 3 * keys + 2 * values + longer, one);
}

}  // namespace
