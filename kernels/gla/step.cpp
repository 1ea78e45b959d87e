// One token of layers that are made of gla, with all that stands around the recurrence.
#include <cmath>
#include <limits>

#include "../sigmoid.h"
#include "native.h"

namespace {

// All fields of these are 8 bytes: step.py packs them as one array.

// Linear attention divided by the sum of its keys,
//
//     S' = f S + i k [v, 1]ᵀ,   [h, n] = S'ᵀ q,   y = h / (max(|n|, floor) + eps)
//
// where f = i = 1 and floor = 0, or they are an mLSTM's gates; q and k may be the Taylor features of what is given.
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

// Slots that forget, and a softmax over them,
//
//     K' = diag(α) K + (1 − α) kᵀ,   V' = diag(α) V + (1 − α) vᵀ,   y = V'ᵀ softmax(K' q)
//
// where log α = log σ(f) / temperature, and q, k and v are SiLU of what is given.
struct SlotStep {
    int64_t batch, heads, slots, width, format, threads;
    double temperature;
    Heads q, k, v, f;      // [batch, 1, heads, width], f [batch, 1, heads, slots]
    const void *keys, *values;  // in S: [batch, heads, slots, width]
    void *y, *final_keys, *final_values;
};

// RetNet's retention: q and k rotated by position times `frequency`, and in head h
//
//     S' = (1 − 2^(−5 − h)) S + k vᵀ,   y = scale · S'ᵀ q
struct RetentionStep {
    int64_t batch, heads, keys, values, format, threads;
    double scale;
    Heads q, k, v;            // [batch, 1, heads, keys or values]
    const int64_t* position;  // [batch]
    const void* frequency;    // in S: [keys / 2]
    const void* state;        // in S: [batch, heads, keys, values]
    void *y, *final_state;
};

// Mamba-2's state space, k and q of which are shared by the heads of a group,
//
//     Δ = softplus(dt + bias),   S' = exp(−Δ e^A) S + Δ k vᵀ,   y = S'ᵀ q + D v
struct SpaceStep {
    int64_t batch, heads, groups, keys, values, format, threads;
    Heads q, k, v, dt;           // [batch, 1, groups, keys], v [batch, 1, heads, values], dt [batch, 1, heads, 1]
    const void *bias, *A, *D;    // in S: [heads]
    const void* state;           // in S: [batch, heads, keys, values]
    void *y, *final_state;
};

// RWKV-6's shares of the token before, and its decays,
//
//     δ = before − x,   s = tanh((x + δ ∘ μ) A),   mixed_j = x + δ ∘ (μ_j + s_j B_j)
//     log_decay = −exp(min(ω + tanh(mixed_0 C) D, most))
//
// All tensors but log_decay are contiguous and in one dtype.
struct ShiftStep {
    int64_t batch, dim, inputs, rank, decay_rank, format, threads;
    double most;
    const void *x, *before;                  // [batch, dim]
    const void *mu, *down, *up, *mu_inputs;  // μ [dim], A [dim, inputs · rank], B [inputs, rank, dim], [inputs, dim]
    const void *decay, *decay_down, *decay_up;  // ω [dim], C [dim, decay_rank], D
    void *mixed, *log_decay;                 // [inputs, batch, dim], in S: [batch, dim]
};

static_assert(sizeof(Step) == 29 * 8 && sizeof(SlotStep) == 28 * 8 && sizeof(ShiftStep) == 19 * 8 &&
                  sizeof(RetentionStep) == 24 * 8 && sizeof(SpaceStep) == 29 * 8,
              "step.py packs this many fields");

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
    const S carried = log_sigmoid(f) + number(s.m);
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

// Calls f(number among all heads, its token, scratch) for each, on torch's threads; `numbers` of scratch.
template <class S, class STEP, class F>
void for_heads(const STEP& s, int64_t numbers, const F& f) {
    const int64_t all_heads = s.batch * s.heads;
    parallel_with_scratch<S, FlushDenormals>(all_heads, s.threads, numbers, [&](int64_t at, S* scratch, int64_t) {
        f(at, Chunk{at / s.heads, at % s.heads, at / s.heads, 0, 1}, scratch);
    });
}

// S' = diag(decay) S + k vᵀ and y = S'ᵀ q for S [K, V]; all others have zeros behind them, up to whole vectors.
template <class S>
void advance_alone(int64_t K, int64_t V, const S* q, const S* k, const S* decay, const S* v, S* y, const S* from,
                   S* to) {
    const int64_t width = whole_vectors<S>(K), stride = whole_vectors<S>(V);
    std::fill_n(y, stride, S(0));
    for (int64_t i = 0; i < K; i += kTile) {
        for_blocks<S>(V, [&]<int N>(int64_t j) {
            forward_tile<S, N, false>(1, q + i, k + i, decay + i, width, v + j, y + j, stride, from + i * V + j,
                                      to + i * V + j, V, K - i, V - j);
        });
    }
}

template <class S>
void step(const Step& s) {
    const int64_t K = s.keys, V = s.values + 1, width = whole_vectors<S>(K), stride = whole_vectors<S>(V);
    for_heads<S>(s, 4 * width + 2 * stride, [&](int64_t at, const Chunk& token, S* scratch) {
        S *q = scratch, *k = q + width, *decay = k + width, *x = decay + width, *v = x + width, *y = v + stride;
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
        advance_alone(K, V, q, k, decay, v, y, static_cast<const S*>(s.state) + at * K * V,
                      static_cast<S*>(s.final_state) + at * K * V);
        const S divisor = std::max(std::abs(y[s.values]), g.floor) + S(s.eps);
        for (int64_t j = 0; j < s.values; ++j) y[j] /= divisor;
        write_rows<S>(contiguous(s.y, 1, s.heads, s.values), s.format, token, s.values, y, stride);
    });
}

template <class S>
void retention_step(const RetentionStep& s) {
    const int64_t K = s.keys, V = s.values, width = whole_vectors<S>(K), stride = whole_vectors<S>(V), half = K / 2;
    for_heads<S>(s, 3 * width + 2 * stride, [&](int64_t at, const Chunk& token, S* scratch) {
        S *q = scratch, *k = q + width, *decay = k + width, *v = decay + width, *y = v + stride;
        const int64_t head = token.head;
        read_rows<S>(s.q, s.format, token, K, S(s.scale), q, width);
        read_rows<S>(s.k, s.format, token, K, 1, k, width);
        read_rows<S>(s.v, s.format, token, V, 1, v, stride);
        for (int64_t i = 0; i < half; ++i) {
            const S angle = S(s.position[token.batch]) * static_cast<const S*>(s.frequency)[i];
            const S c = std::cos(angle), d = std::sin(angle);
            for (S* x : {q, k}) {
                const S a = x[i], b = x[half + i];
                x[i] = a * c - b * d, x[half + i] = a * d + b * c;
            }
        }
        std::fill_n(decay, width, S(1) - std::exp2(S(-5 - head)));
        advance_alone(K, V, q, k, decay, v, y, static_cast<const S*>(s.state) + at * K * V,
                      static_cast<S*>(s.final_state) + at * K * V);
        write_rows<S>(contiguous(s.y, 1, s.heads, V), s.format, token, V, y, stride);
    });
}

template <class S>
void space_step(const SpaceStep& s) {
    constexpr int W = kLanes<S>;
    const int64_t K = s.keys, V = s.values, width = whole_vectors<S>(K), stride = whole_vectors<S>(V);
    for_heads<S>(s, 3 * width + 3 * stride + W, [&](int64_t at, const Chunk& token, S* scratch) {
        S *q = scratch, *k = q + width, *decay = k + width, *v = decay + width, *written = v + stride;
        S *y = written + stride, *dt = y + stride;
        const int64_t head = token.head;
        const Chunk shared{token.sequence, head / (s.heads / s.groups), token.batch, 0, 1};
        auto number = [&](const void* from) { return static_cast<const S*>(from)[head]; };
        read_rows<S>(s.q, s.format, shared, K, 1, q, width);
        read_rows<S>(s.k, s.format, shared, K, 1, k, width);
        read_rows<S>(s.v, s.format, token, V, 1, v, stride);
        read_rows<S>(s.dt, s.format, token, 1, 1, dt, W);
        const S delta = -log_sigmoid(-(dt[0] + number(s.bias)));
        std::fill_n(decay, width, std::exp(-delta * std::exp(number(s.A))));
        for (int64_t j = 0; j < stride; ++j) written[j] = delta * v[j];
        advance_alone(K, V, q, k, decay, written, y, static_cast<const S*>(s.state) + at * K * V,
                      static_cast<S*>(s.final_state) + at * K * V);
        for (int64_t j = 0; j < V; ++j) y[j] += number(s.D) * v[j];
        write_rows<S>(contiguous(s.y, 1, s.heads, V), s.format, token, V, y, stride);
    });
}

template <class S>
void slot_step(const SlotStep& s) {
    constexpr int W = kLanes<S>;
    const int64_t M = s.slots, D = s.width, stride = whole_vectors<S>(D), slots = whole_vectors<S>(M);
    for_heads<S>(s, 4 * stride + 3 * slots, [&](int64_t at, const Chunk& token, S* scratch) {
        S *q = scratch, *k = q + stride, *v = k + stride, *y = v + stride;
        S *decay = y + stride, *written = decay + slots, *share = written + slots;
        auto read = [&](Heads from, S* to) {
            read_rows<S>(from, s.format, token, D, 1, to, stride);
            for (int64_t i = 0; i < D; i += W) {
                store(to + i, silu<W, S>(load<W>(to + i)));
            }
        };
        read(s.q, q), read(s.k, k), read(s.v, v);
        read_rows<S>(s.f, s.format, token, M, 1, decay, slots);
        for (int64_t m = 0; m < M; ++m) {
            const S log_decay = log_sigmoid(decay[m]) / S(s.temperature);
            decay[m] = std::exp(log_decay), written[m] = -std::expm1(log_decay);
        }
        // slot m: calls f with each vector that is written to it
        auto write = [&](const void* from, void* to, int64_t m, const S* x, auto f) {
            const int64_t row = (at * M + m) * D;
            for (int64_t i = 0; i < D; i += W) {
                auto before = load_some(static_cast<const S*>(from) + row + i, D - i);
                auto after = multiply_add(all(decay[m]), before, all(written[m]) * load<W>(x + i));
                store_some(static_cast<S*>(to) + row + i, after, D - i);
                f(i, after);
            }
        };
        S most = -std::numeric_limits<S>::infinity(), total = 0;
        for (int64_t m = 0; m < M; ++m) {
            Lanes<S> seen = {};
            write(s.keys, s.final_keys, m, k, [&](int64_t i, auto K) { seen = multiply_add(K, load<W>(q + i), seen); });
            share[m] = sum(seen);
            most = std::max(most, share[m]);
        }
        for (int64_t m = 0; m < M; ++m) total += share[m] = std::exp(share[m] - most);
        std::fill_n(y, stride, S(0));
        for (int64_t m = 0; m < M; ++m) {
            const auto part = all(share[m] / total);
            write(s.values, s.final_values, m, v, [&](int64_t i, auto V) {
                store(y + i, multiply_add(part, V, load<W>(y + i)));
            });
        }
        write_rows<S>(contiguous(s.y, 1, s.heads, D), s.format, token, D, y, stride);
    });
}

// to [columns, in whole vectors] += xᵀ matrix, x [rows]; the matrix's rows lie `apart`.
template <class S, class T>
void add_product(const S* x, int64_t rows, const T* matrix, int64_t apart, int64_t columns, S* to) {
    constexpr int W = kLanes<S>;
    for (int64_t i = 0; i < rows; ++i, matrix += apart)
        for (int64_t j = 0; j < columns; j += W)
            store(to + j, multiply_add(all(x[i]), load_some(matrix + j, columns - j), load<W>(to + j)));
}

template <class T>
void shift_step(const ShiftStep& s) {
    using S = StateOf<T>;
    constexpr int W = kLanes<S>;
    const int64_t dim = s.dim, width = whole_vectors<S>(dim), small = whole_vectors<S>(std::max(s.rank, s.decay_rank));
    auto in = [](const void* from) { return static_cast<const T*>(from); };
    // to = tanh(xᵀ matrix)
    auto squashed = [&](const S* x, const T* matrix, int64_t apart, int64_t columns, S* to) {
        std::fill_n(to, small, S(0));
        add_product(x, dim, matrix, apart, columns, to);
        for (int64_t j = 0; j < columns; ++j) to[j] = std::tanh(to[j]);
    };
    // the first input, which has the decays to make, is begun before the others
    auto make = [&](int64_t at, S* scratch, int64_t) {
        const int64_t j = at / s.batch, b = at % s.batch;
        S *x = scratch, *delta = x + width, *row = delta + width, *decay = row + width, *low = decay + width;
        // calls f(i, how many are left) for each vector of a row
        auto each = [&](auto f) { for (int64_t i = 0; i < dim; i += W) f(i, dim - i); };
        auto mix = [&](int64_t i) { return multiply_add(load<W>(delta + i), load<W>(row + i), load<W>(x + i)); };
        auto read = [&](const void* from, S* to) {
            each([&](int64_t i, int64_t n) { store(to + i, load_some(in(from) + i, n)); });
        };
        read(in(s.x) + b * dim, x), read(in(s.before) + b * dim, delta), read(s.mu, row), read(s.decay, decay);
        each([&](int64_t i, int64_t) { store(delta + i, load<W>(delta + i) - load<W>(x + i)); });
        each([&](int64_t i, int64_t) { store(row + i, mix(i)); });
        squashed(row, in(s.down) + j * s.rank, s.inputs * s.rank, s.rank, low);
        read(in(s.mu_inputs) + j * dim, row);
        add_product(low, s.rank, in(s.up) + j * s.rank * dim, dim, dim, row);
        T* to = static_cast<T*>(s.mixed) + at * dim;
        each([&](int64_t i, int64_t n) { store(row + i, mix(i)), store_some(to + i, load<W>(row + i), n); });
        if (j > 0) return;
        squashed(row, in(s.decay_down), s.decay_rank, s.decay_rank, low);
        add_product(low, s.decay_rank, in(s.decay_up), dim, dim, decay);
        S* log_decay = static_cast<S*>(s.log_decay) + b * dim;
        for (int64_t i = 0; i < dim; ++i) log_decay[i] = -std::exp(std::min(decay[i], S(s.most)));
    };
    parallel_with_scratch<S, FlushDenormals>(s.inputs * s.batch, s.threads, 4 * width + small, make);
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
int gla_step(const Step* s) {
    return unless_out_of_memory([&] { s->format == 0 ? step<double>(*s) : step<float>(*s); });
}
int gla_slot_step(const SlotStep* s) {
    return unless_out_of_memory([&] { s->format == 0 ? slot_step<double>(*s) : slot_step<float>(*s); });
}
int gla_retention_step(const RetentionStep* s) {
    return unless_out_of_memory([&] { s->format == 0 ? retention_step<double>(*s) : retention_step<float>(*s); });
}
int gla_space_step(const SpaceStep* s) {
    return unless_out_of_memory([&] { s->format == 0 ? space_step<double>(*s) : space_step<float>(*s); });
}
int gla_shift_step(const ShiftStep* s) {
    return unless_out_of_memory([&] { with_format(s->format, [&]<class T>() { shift_step<T>(*s); }); });
}
}
