// A whole HGRN layer for one token of a few sequences: projections, gates, recurrence, norm and output, in one team of
// threads.
//
//     i, f, g = x W_iᵀ + b_i, ...      λ = γ + (1 − γ) σ(f)      h' = λ e^{iθ} h + (1 − λ) silu(i)
//     y = z W_oᵀ + b_o      z = norm(h') ⊙ silu(g), or norm(h' ⊙ silu(g))
#include <algorithm>

#include "../gated_norm/native.h"
#include "../linear_map.h"
#include "../stages.h"

namespace {

// All fields are 8 bytes: step.py packs them as one array.
struct Step {
    int64_t batch, dim, width, pairs, center, gate_first, format, threads;
    double eps, bound;               // γ of all channels, where there is no lower_bound
    const void* x;                   // [batch, dim]
    LinearMap i, f, g, o;            // i and g with as many outputs as a state has numbers
    const void *weight, *bias;       // of the norm, [numbers], may be null: ones and zeros
    const void* theta;               // [width], read beside pairs
    const void *state, *lower_bound; // in S: [batch, width], or pairs [batch, width, 2]; [width], or null
    void *y, *final_state;
};

static_assert(sizeof(Step) == 26 * 8, "step.py packs this many fields");

// Channels and outputs that a thread takes at a time.
constexpr int64_t kChannels = 16, kOutputs = 16;

// So many numbers of each of a few rows, real and imaginary parts one behind the other.
template <class S>
struct Few {
    alignas(kCacheLine) S numbers[kRows][2 * kChannels] = {};

    S* operator[](int64_t r) { return numbers[r]; }
};

// [Re h | Im h] and silu(g) of channels c to c + n - 1 in `rows` rows from row `first`, n <= kChannels, rows <= kRows.
template <class T, class S = StateOf<T>>
OUTLINE void advance(const Step& s, int64_t first, int64_t rows, int64_t c, int64_t n, S* h, S* gate) {
    constexpr int W = kLanes<S>;
    constexpr int64_t apart = 2 * kChannels;
    const int64_t parts = s.pairs ? 2 : 1;
    const T* x = static_cast<const T*>(s.x) + first * s.dim;
    Few<S> pairs, i, f, g, v;
    // a pair's parts are rows 2 j and 2 j + 1 of W_i, but j and width + j of W_g
    outputs_of<T>(s.i, x, rows, s.dim, c * parts, (c + n) * parts, pairs[0], apart);
    outputs_of<T>(s.f, x, rows, s.dim, c, c + n, f[0], apart);
    for (int64_t part = 0, o = c; part < parts; ++part, o += s.width)
        outputs_of<T>(s.g, x, rows, s.dim, o, o + n, g[0] + part * kChannels, apart);
    Few<S> constant;
    S *lower = constant[0], *cos = constant[1], *sin = cos + kChannels;
    for (int64_t j = 0; j < n; ++j) {
        lower[j] = s.lower_bound ? static_cast<const S*>(s.lower_bound)[c + j] : S(s.bound);
        if (!s.pairs) continue;
        const S angle = load<1>(static_cast<const T*>(s.theta) + c + j)[0];
        cos[j] = std::cos(angle), sin[j] = std::sin(angle);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (first + r) * s.width * parts;
        const S* before = static_cast<const S*>(s.state) + at + c * parts;
        S* after = static_cast<S*>(s.final_state) + at + c * parts;
        for (int64_t j = 0; j < n; ++j)
            for (int64_t part = 0; part < parts; ++part) {
                i[r][part * kChannels + j] = pairs[r][j * parts + part];
                v[r][part * kChannels + j] = before[j * parts + part];
            }
        for (int64_t j = 0; j < n; j += W) {
            auto in = [&](Few<S>& of, int64_t part) INLINE_BODY { return load<W>(of[r] + part * kChannels + j); };
            Lanes<S> open, rest, bound = load<W>(lower + j), upper = 1 - bound;
            open_sigmoids<W, S>(in(f, 0), open, rest);
            const Lanes<S> decay = upper * open + bound, share = upper * rest;
            Lanes<S> re = in(v, 0), x = share * silu<W, S>(in(i, 0)), y = {};
            if (s.pairs) {
                const Lanes<S> im = in(v, 1), a = decay * load<W>(cos + j), b = decay * load<W>(sin + j);
                x = a * re + (x - b * im), y = a * im + (share * silu<W, S>(in(i, 1)) + b * re);
            } else {
                x = decay * re + x;
            }
            for (int64_t part = 0; part < parts; ++part, x = y) {
                const Lanes<S> opened = silu<W, S>(in(g, part));
                const int64_t to = at + part * s.width + c + j;
                store(v[r] + part * kChannels + j, x);
                store_some(h + to, s.gate_first ? x * opened : x, n - j), store_some(gate + to, opened, n - j);
            }
        }
        for (int64_t j = 0; j < n; ++j)
            for (int64_t part = 0; part < parts; ++part) after[j * parts + part] = v[r][part * kChannels + j];
    }
}

// A row of h becomes z.
template <class T, class S = StateOf<T>>
void normalise(const Step& s, int64_t numbers, S* h, const S* gate) {
    const T *weight = static_cast<const T*>(s.weight), *bias = static_cast<const T*>(s.bias);
    const Statistics<S> of = measure(h, numbers, s.center, s.eps);
    for_parts<kLanes<S>>(numbers, [&](int64_t j, auto part) INLINE_BODY {
        Lanes<S> z = (get(h + j, part) - of.mean) * of.inverse;
        if (weight) z = z * get(weight + j, part);
        if (bias) z += get(bias + j, part);
        put(h + j, s.gate_first ? z : z * get(gate + j, part), part);
    });
}

// Three kinds of work that follow one another: channels, one norm, outputs.
template <class T>
void run(const Step& s) {
    using S = StateOf<T>;
    const int64_t numbers = s.width * (s.pairs ? 2 : 1), all = s.batch * numbers;
    const int64_t channels = (s.width + kChannels - 1) / kChannels, outputs = (s.dim + kOutputs - 1) / kOutputs;
    Scratch<S> scratch(2 * all);
    S *h = scratch + 0, *gate = scratch + all;
    Progress progress;
    // calls f(first row, how many)
    auto for_few = [&](auto f) {
        for (int64_t r = 0; r < s.batch; r += kRows) f(r, std::min<int64_t>(kRows, s.batch - r));
    };
    parallel_for(channels + 1 + outputs, s.threads, [&](int64_t item) {
        if (item < channels) {
            const int64_t c = item * kChannels, n = std::min(kChannels, s.width - c);
            for_few([&](int64_t r, int64_t rows) { advance<T>(s, r, rows, c, n, h, gate); });
            progress.finish_one();
        } else if (item == channels) {
            progress.wait_for(channels);
            for (int64_t r = 0; r < all; r += numbers) normalise<T>(s, numbers, h + r, gate + r);
            progress.finish_one();
        } else {
            progress.wait_for(channels + 1);
            const int64_t o = (item - channels - 1) * kOutputs, n = std::min(kOutputs, s.dim - o);
            for_few([&](int64_t r, int64_t rows) {
                S made[kRows * kOutputs];
                outputs_of<T, S>(s.o, h + r * numbers, rows, numbers, o, o + n, made, kOutputs);
                for (int64_t k = 0; k < rows; ++k)
                    copy_converted(made + k * kOutputs, n, static_cast<T*>(s.y) + (r + k) * s.dim + o);
            });
        }
    });
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
int hgru_step(const Step* s) {
    return unless_out_of_memory([&] { with_format(s->format, [&]<class T>() { run<T>(*s); }); });
}
}
