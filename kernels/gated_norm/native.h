// What the gated norm forward and backward share: the problem as native.py packs it, heads in whole vectors and a part
// of one, activations and means. naive.py has the equations.
#pragma once
#include <cmath>

#include "../rows.h"
#include "../sigmoid.h"
#include "../work.h"

// [heads, width] in the format of the sums, a head so many numbers behind the one before; null where there is none.
struct Parameter {
    const void* data;
    int64_t head;

    template <class S>
    const S* of(int64_t h) const {
        return data ? static_cast<const S*>(data) + h * head : nullptr;
    }
};

// What both kernels are told. All fields are 8 bytes: native.py packs them as one array.
struct Problem {
    int64_t batch, length, heads, width;
    int64_t center, activation, gate_first, format;
    int64_t threads, run, around_cache;  // run: rows whose gradients of parameters are summed in the format of the sums
    double eps;
    const void* x;  // [batch, length, heads · width], the numbers of a row side by side
    Strides x_strides;
    const void* gate;  // may be null: 1
    Strides gate_strides;
    Parameter weight, bias;

    int64_t rows() const { return batch * length; }
    int64_t columns() const { return heads * width; }
    int64_t runs() const { return (rows() + run - 1) / run; }

    template <class T>
    const T* row(const void* tensor, Strides s, int64_t r) const {
        return tensor ? static_cast<const T*>(tensor) + r / length * s.batch + r % length * s.row : nullptr;
    }
};

struct Forward {
    Problem problem;
    void* y;
};

struct Backward {
    Problem problem;
    const void* dy;
    Strides dy_strides;
    void *dx, *dgate;       // null where not needed
    void *dweight, *dbias;  // likewise, contiguous in the format of the sums
    void* partials;         // [runs, 2, heads, width], if one of those two is needed and there is more than one run
};

static_assert(sizeof(Forward) == 23 * 8 && sizeof(Backward) == 30 * 8, "native.py packs this many fields");

// In the order in which native.py counts them.
enum Activation : int64_t { kNone, kIdentity, kSilu, kSigmoid };

// How much of a vector there is: all of it, or so many lanes at the end of a head.
struct Whole {};
struct Part {
    int64_t lanes;
};

// Calls f(i, Whole or Part) for the vectors of W columns that cover [0, n).
template <int W, class F>
INLINE void for_parts(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(i, Whole{});
    if (i < n) f(i, Part{n - i});
}

template <class T>
INLINE Lanes<StateOf<T>> get(const T* from, Whole) {
    return load<kLanes<StateOf<T>>>(from);
}
template <class T>
INLINE Lanes<StateOf<T>> get(const T* from, Part part) {
    return load_some(from, part.lanes);
}

template <class T>
INLINE void put(T* to, Lanes<StateOf<T>> v, Whole) {
    store(to, v);
}
template <class T>
INLINE void put(T* to, Lanes<StateOf<T>> v, Part part) {
    store_some(to, v, part.lanes);
}

// 1 in the first n lanes, 0 in the others.
template <class S>
INLINE Lanes<S> ones(int64_t n) {
    constexpr Lanes<S> zero = {};
    Lanes<S> lane;
    for (int i = 0; i < kLanes<S>; ++i) lane[i] = S(i);
    return lane < S(n) ? zero + 1 : zero;
}

// act(g), and its derivative.
template <Activation ACT, class S>
INLINE Lanes<S> act(Lanes<S> g, Lanes<S>& slope) {
    Lanes<S> of_g, of_minus_g;
    if constexpr (ACT == kIdentity) {
        slope = Lanes<S>{} + 1;
        return g;
    }
    sigmoids<kLanes<S>, S>(g, of_g, of_minus_g);
    slope = of_g * (ACT == kSilu ? 1 + g * of_minus_g : of_minus_g);
    return ACT == kSilu ? g * of_g : of_g;
}

// u = x act(gate), and act(gate) and its derivative if there is a place for them.
template <Activation ACT, class T, class S>
OUTLINE void gate_first(const T* x, const T* gate, int64_t n, S* u, S* opened, S* slope) {
    for_parts<kLanes<S>>(n, [&](int64_t i, auto part) INLINE_BODY {
        Lanes<S> slant, a = act<ACT, S>(get(gate + i, part), slant);
        store(u + i, get(x + i, part) * a);
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
    constexpr Lanes<S> zero = {};
    Lanes<S> squares = zero;
    S mean = 0;
    if (!center) {
        for_parts<W>(n, [&](int64_t i, auto part) INLINE_BODY {
            Lanes<S> v = get(u + i, part);
            squares += v * v;
        });
    } else if (n < W) {
        Lanes<S> v = get(u, Part{n});
        mean = sum(v) / S(n);
        squares = (v - mean) * (v - mean) * ones<S>(n);
    } else {
        const Lanes<S> first = load<W>(u);
        const int64_t rows = n / W, whole = rows * W;
        Lanes<S> total = zero;
        for (int64_t i = W; i < whole; i += W) {
            Lanes<S> d = load<W>(u + i) - first;
            total += d, squares += d * d;
        }
        Lanes<S> count = zero + S(rows);
        if (whole < n) {
            Lanes<S> there = ones<S>(n - whole), d = (get(u + whole, Part{n - whole}) - first) * there;
            total += d, squares += d * d, count += there;
        }
        Lanes<S> shift = total / count, own = first + shift;
        mean = sum(own * count) / S(n);
        squares = squares - total * shift + count * (own - mean) * (own - mean);
    }
    return {mean, 1 / std::sqrt(sum(squares) / S(n) + S(eps))};
}

// A row of results is computed in its place, or in a buffer if it is to go around the cache.
template <class T>
struct Place {
    T* tensor;
    int64_t columns;
    T *buffer, *row = nullptr, *out = nullptr;

    // Takes its buffer from `scratch`, which then begins behind it.
    template <class S>
    Place(void* tensor, const Problem& p, S*& scratch) : tensor(static_cast<T*>(tensor)), columns(p.columns()) {
        buffer = tensor && p.around_cache ? reinterpret_cast<T*>(scratch) : nullptr;
        if (buffer) scratch += whole_lines<S>(columns);
    }
    void begin(int64_t r) {
        if (tensor == nullptr) return;
        row = tensor + r * columns;
        out = buffer ? buffer : row;
    }
    T* head(int64_t column) const { return out ? out + column : nullptr; }
    void end() {
        if (row && buffer) copy_around_cache(row, buffer, columns * sizeof(T));
    }
};

// Calls f(row) for the rows of a run.
template <class F>
void for_rows(const Problem& p, int64_t run, const F& f) {
    for (int64_t r = run * p.run; r < std::min(p.rows(), (run + 1) * p.run); ++r) f(r);
}
