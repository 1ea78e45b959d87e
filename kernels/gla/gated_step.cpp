// One token of each sequence from its projections to the gated norm: decays, recurrence, norm and gate. A head of a
// sequence at a time; everything between is in S. See gated_step.py.
#include "../gated_norm/native.h"
#include "../matrix.h"

namespace {

// What the decays a are made of: their logarithms, in S; logits, a = σ(decay)^(1 / temperature); or the logits of gates
// that are bounded from below, a = γ + (1 − γ) σ(decay), k = 1 − a, and then q is SiLU of what is given.
enum Decay : int64_t { kLogarithms, kLogits, kGates };

// All fields are 8 bytes: gated_step.py packs them as one array. Tensors are contiguous; null: there is none.
//
//     S' = diag(a) S + k vᵀ,   o = scale · S'ᵀ q, or with a bonus u scale · (S + diag(u) k vᵀ)ᵀ q
//     y = (norm(o) ∘ weight + bias) ∘ act(gate)
struct Step {
    int64_t batch, heads, keys, values;
    int64_t format;      // of everything but the states, and the bound, and logarithms, in S
    int64_t threads;
    int64_t decays, activation;
    int64_t normed;      // numbers of a norm: `values`, or those of all heads
    int64_t parameters;  // numbers of weight and bias: as many, or those of all heads
    int64_t center;
    double scale, temperature, eps;
    double bound;                            // γ of all keys, where there is no lower_bound
    const void *q, *k, *v, *decay, *gate;    // [batch, heads, keys or values]
    const void* state;                       // [batch, heads, keys, values]
    const void *bonus, *lower_bound;         // [heads, keys]
    const void *weight, *bias;
    void *y, *final_state;                   // [batch, heads, values], and as the state
};

static_assert(sizeof(Step) == 27 * 8, "gated_step.py packs this many fields");

// The decays of a token's head, and with gates q and k; scratch for as many numbers.
template <class S>
void decays(const Step& s, const Chunk& token, S* q, S* k, S* to, S* bound) {
    constexpr int W = kLanes<S>;
    const int64_t K = s.keys, width = whole_vectors<S>(K);
    const Heads from = contiguous(s.decay, 1, s.heads, K);
    if (s.decays == kLogarithms) return read_decays<S>(from, true, token, K, to, width);
    read_rows<S>(from, s.format, token, K, 1, to, width);
    if (s.decays == kLogits) {
        for (int64_t i = 0; i < K; ++i) to[i] = log_sigmoid(to[i]) / S(s.temperature);
        for (int64_t i = 0; i < K; i += W) store(to + i, exponential<W, S>(load<W>(to + i)));
        return;
    }
    if (s.lower_bound) std::copy_n(static_cast<const S*>(s.lower_bound) + token.head * K, K, bound);
    else std::fill_n(bound, width, S(s.bound));
    for (int64_t i = 0; i < K; i += W) {
        Lanes<S> open, shut;
        const Lanes<S> lower = load<W>(bound + i), upper = 1 - lower;
        sigmoids<W, S>(load<W>(to + i), open, shut);
        store(to + i, upper * open + lower), store(k + i, upper * shut);
        store(q + i, S(s.scale) * silu<W, S>(load<W>(q + i)));
    }
}

// Of KEYS rows of a state S' = diag(a) S + k vᵀ, and y += S'ᵀ q, or with a bonus (BEFORE) Sᵀ q.
template <class S, int KEYS, bool BEFORE>
OUTLINE void advance(int64_t values, const S* from, S* to, const S* q, const S* k, const S* a, const S* v, S* y) {
    constexpr int W = kLanes<S>;
    for (int64_t j = 0; j < values; j += W) {
        const auto value = load<W>(v + j);
        auto out = load<W>(y + j);
        UNROLL
        for (int i = 0; i < KEYS; ++i) {
            const auto before = load_some(from + i * values + j, values - j);
            const auto after = multiply_add(all(a[i]), before, all(k[i]) * value);
            out = multiply_add(all(q[i]), BEFORE ? before : after, out);
            store_some(to + i * values + j, after, values - j);
        }
        store(y + j, out);
    }
}

// The same for all keys; y and v have zeros behind them, up to whole vectors.
template <class S, bool BEFORE>
void advance_all(int64_t keys, int64_t values, const S* from, S* to, const S* q, const S* k, const S* a, const S* v,
                 S* y) {
    for (int64_t i = 0; i < keys;) {
        const int64_t n = i + 4 <= keys ? 4 : 1;
        const auto go = n == 4 ? &advance<S, 4, BEFORE> : &advance<S, 1, BEFORE>;
        go(values, from + i * values, to + i * values, q + i, k + i, a + i, v, y);
        i += n;
    }
}

// y of norm number `norm` among those of all tokens, and of its numbers o.
template <class S>
void normalise(const Step& s, int64_t norm, const S* o) {
    const int64_t first = norm * s.normed;
    const Statistics<S> of = measure(o, s.normed, s.center, s.eps);
    with_format<S>(s.format, [&]<class T>() {
        auto at = [](const void* x, int64_t n) { return x ? static_cast<const T*>(x) + n : nullptr; };
        const T *gate = at(s.gate, first), *weight = at(s.weight, first % s.parameters);
        const T* bias = at(s.bias, first % s.parameters);
        T* y = static_cast<T*>(s.y) + first;
        for_parts<kLanes<S>>(s.normed, [&](int64_t i, auto part) INLINE_BODY {
            Lanes<S> z = (get(o + i, part) - of.mean) * of.inverse, slope;
            if (weight) z = z * get(weight + i, part);
            if (bias) z += get(bias + i, part);
            if (gate) {
                const Lanes<S> g = get(gate + i, part);
                if (s.activation == kIdentity) z = z * g;
                else z = z * (s.activation == kSilu ? act<kSilu, S>(g, slope) : act<kSigmoid, S>(g, slope));
            }
            put(y + i, z, part);
        });
    });
}

template <class S>
void step(const Step& s) {
    const int64_t K = s.keys, V = s.values, width = whole_vectors<S>(K), stride = whole_vectors<S>(V);
    const int64_t all_heads = s.batch * s.heads, in_norm = s.normed / V;
    Scratch<S> o(all_heads * V);
    std::vector<std::atomic<int64_t>> done(all_heads / in_norm);
    auto one = [&](int64_t at, S* scratch, int64_t) {
        S *q = scratch, *k = q + width, *a = k + width, *other = a + width, *v = other + width, *y = v + stride;
        const Chunk token{at / s.heads, at % s.heads, at / s.heads, 0, 1};
        read_rows<S>(contiguous(s.q, 1, s.heads, K), s.format, token, K, s.decays == kGates ? 1 : S(s.scale), q, width);
        read_rows<S>(contiguous(s.k, 1, s.heads, K), s.format, token, K, 1, k, width);
        read_rows<S>(contiguous(s.v, 1, s.heads, V), s.format, token, V, 1, v, stride);
        decays(s, token, q, k, a, other);
        std::fill_n(y, stride, S(0));
        const S* from = static_cast<const S*>(s.state) + at * K * V;
        S* to = static_cast<S*>(s.final_state) + at * K * V;
        if (s.bonus) {
            read_rows<S>({s.bonus, 0, 0, K}, s.format, token, K, 1, other, width);
            S seen = 0;
            for (int64_t i = 0; i < K; ++i) seen += q[i] * other[i] * k[i];
            for (int64_t j = 0; j < V; ++j) y[j] = seen * v[j];
            advance_all<S, true>(K, V, from, to, q, k, a, v, y);
        } else {
            advance_all<S, false>(K, V, from, to, q, k, a, v, y);
        }
        std::copy_n(y, V, o + at * V);
        // whoever has made the last of its heads
        const int64_t norm = at / in_norm;
        if (done[norm].fetch_add(1, std::memory_order_acq_rel) + 1 == in_norm) normalise<S>(s, norm, o + norm * s.normed);
    };
    parallel_with_scratch<S, FlushDenormals>(all_heads, s.threads, 4 * width + 2 * stride, one);
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
int gla_gated_step(const Step* s) {
    return unless_out_of_memory([&] { s->format == 0 ? step<double>(*s) : step<float>(*s); });
}
}
