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
enum Activation : int64_t { kNone, kIdentity, kSilu, kSigmoid };

template <class S>
constexpr int kLanes = kVectorBytes / sizeof(S);

// How much of a vector there is: all of it, or so many lanes at the end of a head.
struct Whole {};
struct Part {
    int64_t lanes;
};

// Calls f(i, Whole or Part) for the vectors of W columns that cover [0, n).
template <int W, class F>
INLINE void for_vectors(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(i, Whole{});
    if (i < n) f(i, Part{n - i});
}

template <int W, class T>
INLINE Vec<StateOf<T>, W> get(const T* from, Whole) {
    return load<W>(from);
}

// Zeros where there is nothing.
template <int W, class T>
INLINE Vec<StateOf<T>, W> get(const T* from, Part part) {
    alignas(kCacheLine) T some[W] = {};
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (W * sizeof(T) == 64 && sizeof(T) == 4) {
        auto raw = _mm512_maskz_loadu_epi32((1u << part.lanes) - 1, from);
        std::memcpy(some, &raw, sizeof some);
        return load<W>(some);
    } else if constexpr (W * sizeof(T) == 32 && sizeof(T) == 2) {
        auto raw = _mm256_maskz_loadu_epi16((1u << part.lanes) - 1, from);
        std::memcpy(some, &raw, sizeof some);
        return load<W>(some);
    }
#endif
    for (int64_t j = 0; j < part.lanes; ++j) some[j] = from[j];
    return load<W>(some);
}

template <class T, class V>
INLINE void put(T* to, V v, Whole) {
    store(to, v);
}

template <class T, class V>
INLINE void put(T* to, V v, Part part) {
    alignas(kCacheLine) T some[lanes<V>];
    store(some, v);
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof some == 64 && sizeof(T) == 4)
        return _mm512_mask_storeu_epi32(to, (1u << part.lanes) - 1, load_raw<__m512i>(some));
    else if constexpr (sizeof some == 32 && sizeof(T) == 2)
        return _mm256_mask_storeu_epi16(to, (1u << part.lanes) - 1, load_raw<__m256i>(some));
#endif
    for (int64_t j = 0; j < part.lanes; ++j) to[j] = some[j];
}

// 1 in the first n lanes, 0 in the others.
template <int W, class S>
INLINE Vec<S, W> ones(int64_t n) {
    constexpr Vec<S, W> zero = {};
    Vec<S, W> lane;
    for (int i = 0; i < W; ++i) lane[i] = S(i);
    return lane < S(n) ? zero + 1 : zero;
}

template <int W>
constexpr int upper_lane(int i) {
    return (i + W / 2) % W;
}

template <class V>
INLINE auto sum(V v) {
    constexpr int W = lanes<V>;
    constexpr std::make_integer_sequence<int, W> all;
    // every lane comes to hold the sum of ever more of them
    if constexpr (W >= 2) v += shuffle<upper_lane<W>>(v, all);
    if constexpr (W >= 4) v += shuffle<upper_lane<W / 2>>(v, all);
    if constexpr (W >= 8) v += shuffle<upper_lane<W / 4>>(v, all);
    if constexpr (W >= 16) v += shuffle<upper_lane<W / 8>>(v, all);
    return v[0];
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

// act(g), and its derivative.
template <Activation ACT, int W, class S>
INLINE Vec<S, W> act(Vec<S, W> g, Vec<S, W>& slope) {
    Vec<S, W> of_g, of_minus_g;
    if constexpr (ACT == kIdentity) {
        slope = Vec<S, W>{} + 1;
        return g;
    }
    sigmoids<W, S>(g, of_g, of_minus_g);
    slope = of_g * (ACT == kSilu ? 1 + g * of_minus_g : of_minus_g);
    return ACT == kSilu ? g * of_g : of_g;
}

// u = x act(gate), and act(gate) and its derivative if there is a place for them.
template <Activation ACT, class T, class S>
OUTLINE void gate_first(const T* x, const T* gate, int64_t n, S* u, S* opened, S* slope) {
    constexpr int W = kLanes<S>;
    for_vectors<W>(n, [&](int64_t i, auto part) INLINE_BODY {
        Vec<S, W> slant, a = act<ACT, W, S>(get<W>(gate + i, part), slant);
        store(u + i, get<W>(x + i, part) * a);
        if (opened) store(opened + i, a), store(slope + i, slant);
    });
}

template <class S>
struct Statistics {
    S mean, inverse;
};

// The mean of a head (0 if not centered) and 1 / its deviation. Every lane takes its numbers less its first one, which
// loses no more digits than there are in their count; then lanes are put together.
template <class E, class S = StateOf<E>>
OUTLINE Statistics<S> measure(const E* u, int64_t n, bool center, double eps) {
    constexpr int W = kLanes<S>;
    constexpr Vec<S, W> zero = {};
    Vec<S, W> squares = zero;
    S mean = 0;
    if (!center) {
        for_vectors<W>(n, [&](int64_t i, auto part) INLINE_BODY {
            Vec<S, W> v = get<W>(u + i, part);
            squares += v * v;
        });
    } else if (n < W) {
        Vec<S, W> v = get<W>(u, Part{n});
        mean = sum(v) / S(n);
        squares = (v - mean) * (v - mean) * ones<W, S>(n);
    } else {
        const Vec<S, W> first = load<W>(u);
        const int64_t rows = n / W, whole = rows * W;
        Vec<S, W> total = zero;
        for (int64_t i = W; i < whole; i += W) {
            Vec<S, W> d = load<W>(u + i) - first;
            total += d, squares += d * d;
        }
        Vec<S, W> count = zero + S(rows);
        if (whole < n) {
            Vec<S, W> there = ones<W, S>(n - whole), d = (get<W>(u + whole, Part{n - whole}) - first) * there;
            total += d, squares += d * d, count += there;
        }
        Vec<S, W> shift = total / count, own = first + shift;
        mean = sum(own * count) / S(n);
        squares = squares - total * shift + count * (own - mean) * (own - mean);
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
    T* head(int64_t column) const { return out ? out + column : nullptr; }
    void end() {
        if (row && around_cache) copy_around_cache(row, out, columns * sizeof(T));
    }
};

template <class T>
const T* row_of(const void* p, Strides s, const Problem& problem, int64_t r) {
    if (p == nullptr) return nullptr;
    return static_cast<const T*>(p) + r / problem.length * s.batch + r % problem.length * s.row;
}

// y of a head u, which is x, or x and its gate in the format of the sums.
template <Activation ACT, class E, class T, class S = StateOf<T>>
OUTLINE void forward_head(const E* u, const T* gate, const S* weight, const S* bias, Statistics<S> of, int64_t n, T* y) {
    constexpr int W = kLanes<S>;
    for_vectors<W>(n, [&](int64_t i, auto part) INLINE_BODY {
        Vec<S, W> z = (get<W>(u + i, part) - of.mean) * of.inverse, slope;
        if (weight) z = z * get<W>(weight + i, part);
        if (bias) z += get<W>(bias + i, part);
        if constexpr (ACT != kNone) z = z * act<ACT, W, S>(get<W>(gate + i, part), slope);
        put(y + i, z, part);
    });
}

template <Activation ACT, class T>
void forward(const Forward& f) {
    using S = StateOf<T>;
    const Problem& p = f.problem;
    const int64_t n = p.width;
    const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
    parallel_for(p.runs(), p.threads, [&](int64_t run) {
        Buffers<S> buffers(p.gate_first, n);
        Place<T> y(f.y, p.columns(), p.around_cache);
        for (int64_t r = run * p.run; r < std::min(p.rows(), (run + 1) * p.run); ++r) {
            const T *x = row_of<T>(p.x, p.x_strides, p, r), *gate = row_of<T>(p.gate, p.gate_strides, p, r);
            y.begin(f.y, r);
            for (int64_t h = 0, c = 0; h < p.heads; ++h, c += n) {
                const S *w = weight ? weight + c : nullptr, *b = bias ? bias + c : nullptr;
                T* out = y.head(c);
                if constexpr (ACT != kNone) {
                    if (p.gate_first) {
                        S *u = buffers[0], *none = nullptr;
                        gate_first<ACT>(x + c, gate + c, n, u, none, none);
                        forward_head<kNone, S, T>(u, nullptr, w, b, measure(u, n, p.center, p.eps), n, out);
                        continue;
                    }
                }
                forward_head<ACT, T, T>(x + c, gate ? gate + c : nullptr, w, b, measure(x + c, n, p.center, p.eps), n, out);
            }
            y.end();
        }
        finish_stores();
    });
}

// One head of the backward pass. Any pointer to a result or a parameter may be null.
template <class T, class S>
struct Head {
    const T *x, *gate, *dy;
    T *dx, *dgate;
    const S *weight, *bias;
    S *dweight, *dbias;                // sums
    S *dn, *u, *opened, *slope;        // in the cache; the last three if the gate comes first
    Statistics<S> of;
    int64_t n;
    bool center;
};

// dn, the gradient of a gate that comes last, and the sums; then du as far as it is the same for all.
template <Activation ACT, class E, class T, class S, class F>
INLINE void backward_head(const Head<T, S>& h, const E* u, const F& write) {
    constexpr int W = kLanes<S>;
    Vec<S, W> along = {}, total = {};
    for_vectors<W>(h.n, [&](int64_t i, auto part) INLINE_BODY {
        Vec<S, W> dz = get<W>(h.dy + i, part), n = (get<W>(u + i, part) - h.of.mean) * h.of.inverse, dn, weight;
        if (h.weight) weight = get<W>(h.weight + i, part);
        if constexpr (ACT != kNone) {
            Vec<S, W> slope, opened = act<ACT, W, S>(get<W>(h.gate + i, part), slope);
            if (h.dgate) {
                Vec<S, W> z = h.weight ? n * weight : n;
                if (h.bias) z += get<W>(h.bias + i, part);
                put(h.dgate + i, dz * z * slope, part);
            }
            dz = dz * opened;
        }
        dn = h.weight ? dz * weight : dz;
        if (h.dweight) store(h.dweight + i, load<W>(h.dweight + i) + dz * n);
        if (h.dbias) store(h.dbias + i, load<W>(h.dbias + i) + dz);
        along += dn * n, total += dn;
        store(h.dn + i, dn);
    });
    const S inverse = h.of.inverse, slant = -inverse * inverse * (sum(along) / S(h.n));
    const S mean = h.center ? sum(total) / S(h.n) : S(0);
    for_vectors<W>(h.n, [&](int64_t i, auto part) INLINE_BODY {
        write(i, part, (load<W>(h.dn + i) - mean) * inverse + (get<W>(u + i, part) - h.of.mean) * slant);
    });
}

template <Activation ACT, class T, class S>
OUTLINE void backward_gate_last(const Head<T, S>& h) {
    backward_head<ACT>(h, h.x, [&](int64_t i, auto part, auto du) INLINE_BODY {
        if (h.dx) put(h.dx + i, du, part);
    });
}

template <class T, class S>
OUTLINE void backward_gate_first(const Head<T, S>& h) {
    constexpr int W = kLanes<S>;
    backward_head<kNone>(h, h.u, [&](int64_t i, auto part, auto du) INLINE_BODY {
        if (h.dgate) put(h.dgate + i, du * get<W>(h.x + i, part) * load<W>(h.slope + i), part);
        if (h.dx) put(h.dx + i, du * load<W>(h.opened + i), part);
    });
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

template <Activation ACT, class T>
void backward(const Backward& b) {
    using S = StateOf<T>;
    const Problem& p = b.problem;
    const int64_t n = p.width;
    const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
    parallel_for(p.runs(), p.threads, [&](int64_t run) {
        Buffers<S> buffers(p.gate_first ? 4 : 1, n), sums(b.partials ? 2 * p.heads : 0, n);
        if (b.partials) std::fill_n(sums[0], 2 * p.heads * sums.stride, S(0));
        Place<T> dx(b.dx, p.columns(), p.around_cache), dgate(b.dgate, p.columns(), p.around_cache);
        for (int64_t r = run * p.run; r < std::min(p.rows(), (run + 1) * p.run); ++r) {
            const T *x = row_of<T>(p.x, p.x_strides, p, r), *gate = row_of<T>(p.gate, p.gate_strides, p, r);
            const T* dy = row_of<T>(b.dy, b.dy_strides, p, r);
            dx.begin(b.dx, r), dgate.begin(b.dgate, r);
            for (int64_t h = 0, c = 0; h < p.heads; ++h, c += n) {
                Head<T, S> head{x + c, gate ? gate + c : nullptr, dy + c, dx.head(c), dgate.head(c),
                                weight ? weight + c : nullptr, bias ? bias + c : nullptr,
                                b.dweight ? sums[h] : nullptr, b.dbias ? sums[p.heads + h] : nullptr, buffers[0]};
                head.n = n, head.center = p.center;
                if constexpr (ACT != kNone) {
                    if (p.gate_first) {
                        head.u = buffers[1], head.opened = buffers[2], head.slope = buffers[3];
                        gate_first<ACT>(head.x, head.gate, n, head.u, head.opened, head.slope);
                        head.of = measure(head.u, n, p.center, p.eps);
                        backward_gate_first(head);
                        continue;
                    }
                }
                head.of = measure(head.x, n, p.center, p.eps);
                backward_gate_last<ACT>(head);
            }
            dx.end(), dgate.end();
        }
        S* to = static_cast<S*>(b.partials) + 2 * run * p.columns();
        for (int64_t i = 0; b.partials && i < 2 * p.heads; ++i) std::copy_n(sums[i], n, to + i * n);
        finish_stores();
    });
    if (b.partials) add_partials<S>(b);
}

// Calls f with the activation and the format of x. native.py counts them in this order.
template <class T, class F>
void with_activation(const Problem& p, const F& f) {
    switch (p.activation) {
        case kNone: return f.template operator()<kNone, T>();
        case kIdentity: return f.template operator()<kIdentity, T>();
        case kSilu: return f.template operator()<kSilu, T>();
        case kSigmoid: return f.template operator()<kSigmoid, T>();
    }
}

template <class F>
void with_types(const Problem& p, const F& f) {
    switch (p.format) {
        case 0: return with_activation<double>(p, f);
        case 1: return with_activation<float>(p, f);
        case 2: return with_activation<Half>(p, f);
        case 3: return with_activation<BFloat16>(p, f);
    }
}

}  // namespace

static_assert(sizeof(Forward) == 21 * 8 && sizeof(Backward) == 28 * 8, "native.py packs this many fields");

extern "C" {
int vector_bytes() { return kVectorBytes; }
void gated_norm_forward(const Forward* p) {
    with_types(p->problem, [&]<Activation ACT, class T>() { forward<ACT, T>(*p); });
}
void gated_norm_backward(const Backward* p) {
    with_types(p->problem, [&]<Activation ACT, class T>() { backward<ACT, T>(*p); });
}
}
