// A whole RWKV-7 layer for one token of a few sequences: token shift, projections, recurrence, norm, bonus, gate and
// output, in one team of threads. step.py has the equations.
#include "../gated_norm/native.h"
#include "../linear_map.h"
#include "../rank_one_step.h"
#include "../stages.h"

namespace {

// The inputs that are mixed with the token before, in the order of `mixes`.
enum Input { kR, kW, kK, kV, kA, kG, kInputs };

// All fields are 8 bytes: step.py packs them as one array. Tensors are contiguous, and but for states in one format.
struct Step {
    int64_t batch, dim, heads, decay_rank, rate_rank, gate_rank, format, threads;
    double eps;
    const void *x, *before, *mixes;            // [batch, dim], [kInputs, dim]
    LinearMap first[kInputs];                  // W_r, W_w↓, W_k, W_v, W_a↓, W_g↓
    LinearMap decay, rate, gate, output;       // W_w↑, W_a↑, W_g↑, W_o
    const void *key_scale, *key_rate, *bonus;  // ξ, α, ρ [dim]
    const void *weight, *bias;                 // of the norm, [dim]
    const void* state;                         // in S: [batch, heads, K, K]
    void *y, *final_state;

    int64_t outputs(int input) const {
        return input == kW ? decay_rank : input == kA ? rate_rank : input == kG ? gate_rank : dim;
    }
};

static_assert(sizeof(Step) == 40 * 8, "step.py packs this many fields");

// Outputs that a thread takes at a time.
constexpr int64_t kOutputs = 32;

int64_t chunks(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; }

// What one stage hands over to the next.
template <class S>
struct Between {
    // [batch, dim], its product with the first map [batch, outputs], and what W_o sees [batch, dim]
    S *mixed[kInputs], *made[kInputs], *z;

    static int64_t numbers(const Step& s) {
        int64_t columns = s.dim;
        for (int j = 0; j < kInputs; ++j) columns += s.dim + s.outputs(j);
        return s.batch * columns;
    }
    Between(const Step& s, S* scratch) {
        auto take = [&](int64_t columns) { return std::exchange(scratch, scratch + s.batch * columns); };
        for (int j = 0; j < kInputs; ++j) mixed[j] = take(s.dim), made[j] = take(s.outputs(j));
        z = take(s.dim);
    }
};

// mixed_j = x + (before − x) ⊙ mixes_j
template <class T, class S = StateOf<T>>
void shift(const Step& s, const Between<S>& between) {
    auto in = [&](const void* row, int64_t i) INLINE_BODY {
        return load_some(static_cast<const T*>(row) + i, s.dim - i % s.dim);
    };
    for (int j = 0; j < kInputs; ++j)
        for (int64_t row = 0; row < s.batch * s.dim; row += s.dim)
            for (int64_t i = 0; i < s.dim; i += kLanes<S>) {
                const auto x = in(s.x, row + i), way = in(s.before, row + i) - x;
                store_some(between.mixed[j] + row + i, multiply_add(way, in(s.mixes, j * s.dim + i), x), s.dim - i);
            }
}

// Outputs `first` and behind it, at most kOutputs, of an input's first map, and what stands before its second.
template <class T, class S = StateOf<T>>
void project(const Step& s, const Between<S>& between, int input, int64_t first) {
    const int64_t outputs = s.outputs(input), end = std::min(first + kOutputs, outputs);
    S* made = between.made[input] + first;
    outputs_of<T>(s.first[input], between.mixed[input], s.batch, s.dim, first, end, made, outputs);
    for (int64_t b = 0; b < s.batch; ++b, made += outputs)
        for (int64_t i = 0; i < end - first; ++i) {
            if (input == kW) made[i] = std::tanh(made[i]);
            if (input == kG) made[i] = 1 / (1 + std::exp(-made[i]));
        }
}

// N vectors of a state's columns, of which `columns` are there; keys lie `keys` apart.
//
//     p = Sᵀ a,   S' = diag(d) S + b pᵀ + k vᵀ,   y = S'ᵀ q = (diag(d) S)ᵀ q + (qᵀ b) p + (qᵀ k) v
template <class S, int N, bool WHOLE>
OUTLINE void correct(int64_t keys, const S* from, S* to, int64_t columns, const Row<S>& row, S qb, S qk, const S* v,
                     S* y) {
    constexpr int W = kLanes<S>;
    const S *q = row.q, *k = row.k, *a = row.a, *b = row.b, *d = row.decay;
    auto lanes = [&](int n) INLINE_BODY { return WHOLE ? W : columns - n * W; };
    Wide<S, N> p, ys;
    const Wide<S, N> vs(v);
    for (int64_t i = 0; i < keys; ++i) {
        const S dq = d[i] * q[i];
        UNROLL
        for (int n = 0; n < N; ++n) {
            const auto before = load_some(from + i * keys + n * W, lanes(n));
            p[n] += a[i] * before, ys[n] += dq * before;
        }
    }
    UNROLL
    for (int n = 0; n < N; ++n) ys[n] += qb * p[n] + qk * vs[n];
    ys.write(y);
    for (int64_t i = 0; i < keys; ++i) {
        UNROLL
        for (int n = 0; n < N; ++n) {
            const auto before = load_some(from + i * keys + n * W, lanes(n));
            store_some(to + i * keys + n * W, d[i] * before + b[i] * p[n] + k[i] * vs[n], lanes(n));
        }
    }
}

// A head of a sequence, from the products of the first maps to z.
template <class T, class S = StateOf<T>>
void advance(const Step& s, const Between<S>& between, int64_t part, S* scratch) {
    constexpr int W = kLanes<S>;
    const int64_t K = s.dim / s.heads, width = whole_vectors<S>(K), b = part / s.heads, head = part % s.heads * K;
    auto take = [&] { return std::exchange(scratch, scratch + width); };
    S *q = take(), *k = take(), *a = take(), *added = take(), *d = take(), *v = take(), *y = take();
    S *decay = take(), *rate = take(), *gate = take();
    auto up = [&](const LinearMap& map, Input input, S* to) {
        const int64_t rank = s.outputs(input);
        outputs_of<T>(map, between.made[input] + b * rank, 1, rank, head, head + K, to, K);
    };
    up(s.decay, kW, decay), up(s.rate, kA, rate), up(s.gate, kG, gate);
    // of the head's numbers, with zeros behind them
    auto some = [&](const S* numbers, int64_t i) INLINE_BODY { return load_some(numbers + i, K - i); };
    auto row = [&](Input input, int64_t i) INLINE_BODY { return some(between.made[input] + part * K, i); };
    auto parameter = [&](const void* of, int64_t i) INLINE_BODY {
        return load_some(static_cast<const T*>(of) + head + i, K - i);
    };
    Lanes<S> squares = {}, qk = {}, qb = {}, bonus = {};
    for (int64_t i = 0; i < K; i += W) {
        Lanes<S> open, shut, share, rest;
        sigmoids<W, S>(some(decay, i), open, shut), sigmoids<W, S>(some(rate, i), share, rest);
        const auto r = row(kR, i), u = row(kK, i), key = parameter(s.key_scale, i) * u;
        const auto written = u * (1 - rest * parameter(s.key_rate, i));
        squares += key * key, qk += r * written, bonus += parameter(s.bonus, i) * r * written;
        store(q + i, r), store(k + i, written), store(v + i, row(kV, i)), store(a + i, key), store(added + i, share);
        // e^(−½)
        store(d + i, exponential<W, S>(S(-0.60653065971263342) * open));
    }
    const S inverse = 1 / std::max(std::sqrt(sum(squares)), S(1e-12));
    for (int64_t i = 0; i < K; i += W) {
        const auto key = inverse * load<W>(a + i), rated = load<W>(added + i) * key;
        store(a + i, -key), store(added + i, rated), qb += load<W>(q + i) * rated;
    }
    const int64_t at = part * K * K;
    const S* from = static_cast<const S*>(s.state) + at;
    S* to = static_cast<S*>(s.final_state) + at;
    for (int64_t i = 0; i < K;) {
        const bool whole = K - i >= 4 * W;
        const auto go = whole ? &correct<S, 4, true> : &correct<S, 1, false>;
        go(K, from + i, to + i, K - i, {q, k, a, added, d}, sum(qb), sum(qk), v + i, y + i);
        i += whole ? 4 * W : W;
    }
    const Statistics<S> of = measure(y, K, true, s.eps);
    const S share = sum(bonus);
    for (int64_t i = 0; i < K; i += W) {
        const auto centered = (load<W>(y + i) - of.mean) * of.inverse;
        const auto normed = centered * parameter(s.weight, i) + parameter(s.bias, i);
        store_some(between.z + part * K + i, (normed + share * load<W>(v + i)) * some(gate, i), K - i);
    }
}

template <class T>
void run(const Step& s) {
    using S = StateOf<T>;
    FlushDenormals guard;
    const Scratch<S> memory(Between<S>::numbers(s));
    const Between<S> between(s, memory + 0);
    shift<T>(s, between);
    int64_t firsts = 0;
    for (int j = 0; j < kInputs; ++j) firsts += chunks(s.outputs(j));
    const int64_t parts = s.batch * s.heads, width = whole_vectors<S>(s.dim / s.heads);
    Progress progress;
    // three stages: the first maps, heads, outputs
    auto one = [&](int64_t item, S* scratch, int64_t) {
        if (item < firsts) {
            int input = 0;
            for (; item >= chunks(s.outputs(input)); ++input) item -= chunks(s.outputs(input));
            project<T>(s, between, input, item * kOutputs);
            progress.finish_one();
        } else if (item < firsts + parts) {
            progress.wait_for(firsts);
            advance<T>(s, between, item - firsts, scratch);
            progress.finish_one();
        } else {
            progress.wait_for(firsts + parts);
            const int64_t first = (item - firsts - parts) * kOutputs, end = std::min(first + kOutputs, s.dim);
            for (int64_t b = 0; b < s.batch; ++b) {
                S made[kOutputs];
                outputs_of<T>(s.output, between.z + b * s.dim, 1, s.dim, first, end, made, kOutputs);
                copy_converted(made, end - first, static_cast<T*>(s.y) + b * s.dim + first);
            }
        }
    };
    const int64_t items = firsts + parts + chunks(s.dim);
    parallel_with_scratch<S, FlushDenormals>(items, s.threads, 10 * width, one);
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
int dplr_step(const Step* s) {
    return unless_out_of_memory([&] { with_format(s->format, [&]<class T>() { run<T>(*s); }); });
}
}
