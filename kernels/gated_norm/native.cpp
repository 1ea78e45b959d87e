// The gated norm and its gradient on rows [B, T, H, V]: naive.py has the equations. A thread takes a run of rows and
// goes through it head by head; what it needs of a head several times stays in the L1 cache, in the format of the sums.
#include <algorithm>
#include <cmath>
#include <memory>

#include "../parallel.h"
#include "../sigmoid.h"

namespace {

// How a tensor's rows lie in memory, in elements; the numbers of a row lie side by side.
struct Strides {
    int64_t batch, row;
};

// What both kernels are told. All fields are 8 bytes: native.py packs them as one array.
struct Problem {
    int64_t batch, length, heads, width;
    int64_t center, activation, gate_first, format;
    int64_t threads, run, around_cache;  // run: rows whose gradients of parameters are summed in the format of the sums
    double eps;
    const void* x;
    Strides x_strides;
    const void* gate;  // may be null: 1
    Strides gate_strides;
    const void *weight, *bias;  // [heads, width] in the format of the sums, or null

    int64_t rows() const { return batch * length; }
    int64_t columns() const { return heads * width; }
    int64_t runs() const { return (rows() + run - 1) / run; }
};

struct Forward {
    Problem problem;
    void* y;
};

struct Backward {
    Problem problem;
    const void* dy;
    Strides dy_strides;
    void *dx, *dgate;        // null where not needed
    void *dweight, *dbias;   // likewise, in the format of the sums
    void* partials;          // [runs, 2, heads, width], if one of those two is needed
};

// In the order in which native.py counts them.
enum Activation { kIdentity, kSilu, kSigmoid };

template <class S>
constexpr int kLanes = kVectorBytes / sizeof(S);

// Columns i to i + W of n, zeros where there are no more.
template <int W, class T>
INLINE Vec<StateOf<T>, W> at(const T* row, int64_t i, int64_t n) {
    if (i + W <= n) return load<W>(row + i);
    alignas(kCacheLine) T some[W] = {};
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (W * sizeof(T) == 64 && sizeof(T) == 4) {
        auto raw = _mm512_maskz_loadu_epi32((1u << (n - i)) - 1, row + i);
        std::memcpy(some, &raw, sizeof some);
        return load<W>(some);
    } else if constexpr (W * sizeof(T) == 32 && sizeof(T) == 2) {
        auto raw = _mm256_maskz_loadu_epi16((1u << (n - i)) - 1, row + i);
        std::memcpy(some, &raw, sizeof some);
        return load<W>(some);
    }
#endif
    for (int64_t j = 0; j < n - i; ++j) some[j] = row[i + j];
    return load<W>(some);
}

template <class T, class V>
INLINE void put(T* row, int64_t i, int64_t n, V v) {
    constexpr int W = lanes<V>;
    if (i + W <= n) return store(row + i, v);
    alignas(kCacheLine) T some[W];
    store(some, v);
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (W * sizeof(T) == 64 && sizeof(T) == 4)
        return _mm512_mask_storeu_epi32(row + i, (1u << (n - i)) - 1, load_raw<__m512i>(some));
    else if constexpr (W * sizeof(T) == 32 && sizeof(T) == 2)
        return _mm256_mask_storeu_epi16(row + i, (1u << (n - i)) - 1, load_raw<__m256i>(some));
#endif
    for (int64_t j = 0; j < n - i; ++j) row[i + j] = some[j];
}

template <class V>
INLINE auto sum(V v) {
    auto total = v[0];
    for (int i = 1; i < lanes<V>; ++i) total += v[i];
    return total;
}

// Rows of S that are aligned and as long as whole vectors.
template <class S>
struct Buffers {
    int64_t stride;
    std::unique_ptr<S[]> memory;
    S* first;

    Buffers(int64_t rows, int64_t width) {
        constexpr int64_t line = kCacheLine / sizeof(S);
        stride = (width + line - 1) / line * line;
        memory.reset(new S[rows * stride + line]);
        auto address = reinterpret_cast<uintptr_t>(memory.get());
        first = reinterpret_cast<S*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
    }
    S* operator[](int64_t row) const { return first + row * stride; }
};

// act(gate) and, if there is a place for it, its derivative.
template <class T, class S = StateOf<T>>
OUTLINE void open(const T* gate, int64_t n, int64_t activation, S* opened, S* slope) {
    constexpr int W = kLanes<S>;
    constexpr Vec<S, W> zero = {};
    for (int64_t i = 0; i < n; i += W) {
        Vec<S, W> g = at<W>(gate, i, n), of_g, of_minus_g;
        if (activation == kIdentity) {
            store(opened + i, g);
            if (slope) store(slope + i, zero + 1);
            continue;
        }
        sigmoids<W, S>(g, of_g, of_minus_g);
        store(opened + i, activation == kSilu ? g * of_g : of_g);
        if (slope) store(slope + i, of_g * (activation == kSilu ? 1 + g * of_minus_g : of_minus_g));
    }
}

template <class S>
struct Statistics {
    S mean, inverse;
};

// Widens a head into u, times `opened` if there is that, and takes its mean (0 if not centered) and 1 / deviation.
template <class T, class S = StateOf<T>>
OUTLINE Statistics<S> measure(const T* x, const S* opened, int64_t n, bool center, double eps, S* u) {
    constexpr int W = kLanes<S>;
    Vec<S, W> total = {}, squares = {};
    int64_t i = 0;
    for (; i < n; i += W) {
        Vec<S, W> v = at<W>(x, i, n);
        if (opened) v = v * load<W>(opened + i);
        store(u + i, v);
        total += v, squares += v * v;
    }
    S mean = 0;
    if (center) {
        mean = sum(total) / S(n);
        // what is not there deviates by nothing
        std::fill(u + n, u + i, mean);
        squares = Vec<S, W>{};
        for (i = 0; i < n; i += W) {
            Vec<S, W> d = load<W>(u + i) - mean;
            squares += d * d;
        }
    }
    return {mean, 1 / std::sqrt(sum(squares) / S(n) + S(eps))};
}

// A row of results is computed in its place, or in a buffer if it is to go around the cache.
template <class T>
struct Place {
    bool around_cache;
    int64_t columns;
    Buffers<T> buffer;
    T *row = nullptr, *out = nullptr;

    Place(void* there, int64_t columns, bool around_cache)
        : around_cache(around_cache && there), columns(columns), buffer(this->around_cache, columns) {}

    void begin(void* place, int64_t r) {
        if (place == nullptr) return;
        row = static_cast<T*>(place) + r * columns;
        out = around_cache ? buffer[0] : row;
    }
    T* head(int64_t h, int64_t width) const { return out ? out + h * width : nullptr; }
    void end() {
        if (row && around_cache) copy_around_cache(row, out, columns * sizeof(T));
    }
};

template <class T>
const T* row_of(const void* p, Strides s, const Problem& problem, int64_t r) {
    if (p == nullptr) return nullptr;
    return static_cast<const T*>(p) + r / problem.length * s.batch + r % problem.length * s.row;
}

template <class T, class S>
OUTLINE void forward_head(const S* u, const S* opened, const S* weight, const S* bias, Statistics<S> of, int64_t n, T* y) {
    constexpr int W = kLanes<S>;
    for (int64_t i = 0; i < n; i += W) {
        Vec<S, W> z = (load<W>(u + i) - of.mean) * of.inverse;
        if (weight) z = z * at<W>(weight, i, n);
        if (bias) z += at<W>(bias, i, n);
        if (opened) z = z * load<W>(opened + i);
        put(y, i, n, z);
    }
}

template <class T>
void forward(const Forward& f) {
    using S = StateOf<T>;
    const Problem& p = f.problem;
    const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
    parallel_for(p.runs(), p.threads, [&](int64_t run) {
        Buffers<S> buffers(2, p.width);
        S *u = buffers[0], *opened = p.gate ? buffers[1] : nullptr;
        Place<T> y(f.y, p.columns(), p.around_cache);
        for (int64_t r = run * p.run; r < std::min(p.rows(), (run + 1) * p.run); ++r) {
            const T *x = row_of<T>(p.x, p.x_strides, p, r), *gate = row_of<T>(p.gate, p.gate_strides, p, r);
            y.begin(f.y, r);
            for (int64_t h = 0, c = 0; h < p.heads; ++h, c += p.width) {
                if (gate) open(gate + c, p.width, p.activation, opened, static_cast<S*>(nullptr));
                auto statistics = measure(x + c, p.gate_first ? opened : nullptr, p.width, p.center, p.eps, u);
                forward_head(u, p.gate_first ? nullptr : opened, weight ? weight + c : nullptr,
                             bias ? bias + c : nullptr, statistics, p.width, y.head(h, p.width));
            }
            y.end();
        }
        finish_stores();
    });
}

// One head of the backward pass: rows in memory, and in the cache.
template <class T, class S>
struct Head {
    const T *x, *dy;
    T *dx, *dgate;             // may be null
    const S *weight, *bias;    // may be null
    S *dweight, *dbias;        // sums, or null
    S *u, *dn;                 // u, and n from then on
    const S *opened, *slope;   // null without a gate
    Statistics<S> of;
    int64_t n;
};

template <bool GATE_FIRST, class T, class S>
OUTLINE void backward_head(const Head<T, S>& h, bool center) {
    constexpr int W = kLanes<S>;
    const bool gated = h.opened && !GATE_FIRST;
    Vec<S, W> along = {}, total = {};
    for (int64_t i = 0; i < h.n; i += W) {
        Vec<S, W> dy = at<W>(h.dy, i, h.n), n = (load<W>(h.u + i) - h.of.mean) * h.of.inverse, z = n;
        Vec<S, W> dz = gated ? dy * load<W>(h.opened + i) : dy, dn = dz;
        if (h.weight) {
            Vec<S, W> weight = at<W>(h.weight, i, h.n);
            dn = dz * weight, z = n * weight;
        }
        if (gated && h.dgate) {
            if (h.bias) z += at<W>(h.bias, i, h.n);
            put(h.dgate, i, h.n, dy * z * load<W>(h.slope + i));
        }
        if (h.dweight) {
            store(h.dweight + i, load<W>(h.dweight + i) + dz * n);
            store(h.dbias + i, load<W>(h.dbias + i) + dz);
        }
        along += dn * n, total += dn;
        store(h.u + i, n), store(h.dn + i, dn);
    }
    const S slant = sum(along) / S(h.n), shift = center ? sum(total) / S(h.n) : S(0);
    for (int64_t i = 0; i < h.n; i += W) {
        Vec<S, W> du = (load<W>(h.dn + i) - load<W>(h.u + i) * slant - shift) * h.of.inverse;
        if (GATE_FIRST && h.dgate) put(h.dgate, i, h.n, du * at<W>(h.x, i, h.n) * load<W>(h.slope + i));
        if (h.dx) put(h.dx, i, h.n, GATE_FIRST ? du * load<W>(h.opened + i) : du);
    }
}

// Adds the sums of all runs, in double and in one order, whoever computed them.
template <class S>
void add_partials(const Backward& b) {
    constexpr int64_t chunk = 512;
    const int64_t columns = b.problem.columns(), chunks = (columns + chunk - 1) / chunk;
    parallel_for(2 * chunks, b.problem.threads, [&](int64_t i) {
        S* out = static_cast<S*>(i < chunks ? b.dweight : b.dbias);
        if (out == nullptr) return;
        double total[chunk] = {};
        const int64_t first = i % chunks * chunk, n = std::min(chunk, columns - first);
        for (int64_t run = 0; run < b.problem.runs(); ++run) {
            const S* from = static_cast<const S*>(b.partials) + (2 * run + i / chunks) * columns + first;
            for (int64_t j = 0; j < n; ++j) total[j] += from[j];
        }
        std::copy_n(total, n, out + first);
    });
}

template <class T>
void backward(const Backward& b) {
    using S = StateOf<T>;
    const Problem& p = b.problem;
    const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
    parallel_for(p.runs(), p.threads, [&](int64_t run) {
        Buffers<S> buffers(4, p.width), sums(b.partials ? 2 * p.heads : 0, p.width);
        if (b.partials) std::fill_n(sums[0], 2 * p.heads * sums.stride, S(0));
        S *u = buffers[0], *opened = p.gate ? buffers[2] : nullptr, *slope = p.gate ? buffers[3] : nullptr;
        Place<T> dx(b.dx, p.columns(), p.around_cache), dgate(b.dgate, p.columns(), p.around_cache);
        for (int64_t r = run * p.run; r < std::min(p.rows(), (run + 1) * p.run); ++r) {
            const T *x = row_of<T>(p.x, p.x_strides, p, r), *gate = row_of<T>(p.gate, p.gate_strides, p, r);
            const T* dy = row_of<T>(b.dy, b.dy_strides, p, r);
            dx.begin(b.dx, r), dgate.begin(b.dgate, r);
            for (int64_t h = 0, c = 0; h < p.heads; ++h, c += p.width) {
                if (gate) open(gate + c, p.width, p.activation, opened, b.dgate ? slope : nullptr);
                const bool first = gate && p.gate_first;
                auto of = measure(x + c, first ? opened : nullptr, p.width, p.center, p.eps, u);
                Head<T, S> head{
                    x + c, dy + c, dx.head(h, p.width), dgate.head(h, p.width), weight ? weight + c : nullptr,
                    bias ? bias + c : nullptr, b.partials ? sums[h] : nullptr,
                    b.partials ? sums[p.heads + h] : nullptr, u, buffers[1], opened, slope, of, p.width};
                first ? backward_head<true>(head, p.center) : backward_head<false>(head, p.center);
            }
            dx.end(), dgate.end();
        }
        S* to = static_cast<S*>(b.partials) + 2 * run * p.columns();
        for (int64_t i = 0; b.partials && i < 2 * p.heads; ++i) std::copy_n(sums[i], p.width, to + i * p.width);
        finish_stores();
    });
    if (b.partials) add_partials<S>(b);
}

// Calls f with the format of x. native.py counts them in this order.
template <class F>
void with_format(const Problem& p, const F& f) {
    switch (p.format) {
        case 0: return f.template operator()<double>();
        case 1: return f.template operator()<float>();
        case 2: return f.template operator()<Half>();
        case 3: return f.template operator()<BFloat16>();
    }
}

}  // namespace

static_assert(sizeof(Forward) == 21 * 8 && sizeof(Backward) == 28 * 8, "native.py packs this many fields");

extern "C" {
int vector_bytes() { return kVectorBytes; }
void gated_norm_forward(const Forward* p) {
    with_format(p->problem, [&]<class T>() { forward<T>(*p); });
}
void gated_norm_backward(const Backward* p) {
    with_format(p->problem, [&]<class T>() { backward<T>(*p); });
}
}
