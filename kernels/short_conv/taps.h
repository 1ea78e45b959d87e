// One row of the convolution and one of its gradient, for the columns of a tile.
#pragma once
#include <algorithm>

#include "cut.h"
#include "../sigmoid.h"
#include "../vectors.h"

template <class T>
const T* or_zeros(const T* row, int64_t column) {
    return row ? row + column : reinterpret_cast<const T*>(zeros);
}

// Numbers of S in the room of so many pointers, in whole lines of the cache.
template <class S>
int64_t pointers(int64_t n) {
    return whole_lines<S>(n * (sizeof(void*) / sizeof(S)));
}

// Takes so many pointers from `scratch`, which then begins behind them.
template <class P, class S>
P* take_pointers(int64_t n, S*& scratch) {
    return reinterpret_cast<P*>(std::exchange(scratch, scratch + pointers<S>(n)));
}

// One row of one tile: where its vectors read and write.
template <class T, class S>
struct Row {
    int64_t columns, width, stride;
    const S *taps, *bias;  // taps are `stride` apart
    const T** window;      // x[t - width + 1] to x[t]
    const T* next;         // x[t + 1], to be prefetched
    T* out;                // y[t]

    static int64_t numbers(const Problem& p) { return pointers<S>(p.width); }

    Row(const Problem& p, int64_t column, int64_t columns, S*& scratch)
        : columns(columns), width(p.width), stride(p.columns), taps(static_cast<const S*>(p.taps) + column),
          bias(or_zeros(static_cast<const S*>(p.bias), column)), window(take_pointers<const T*>(width, scratch)) {}

    void look_at(const Cut& cut, const Piece& piece, int64_t t, int64_t column) {
        for (int64_t k = 0; k < width; ++k) window[k] = or_zeros(cut.extended<T>(piece, t + k), column);
        next = t + 1 < piece.length ? cut.extended<T>(piece, t + width) + column : window[0];
    }
};

// Here `out` is the gradient of x[t - width + 1], which is complete.
template <class T, class S>
struct GradientRow : Row<T, S> {
    const T *dy, *next_dy, *dlast;  // dlast: what the final state adds to it
    S **past, **partial;  // dz[t], which is written, to dz[t - width + 1]; the sums of the taps and the bias, or nulls

    static int64_t numbers(const Problem& p) { return 2 * pointers<S>(p.width) + pointers<S>(p.width + 1); }

    GradientRow(const Problem& p, int64_t column, int64_t columns, S*& scratch)
        : Row<T, S>(p, column, columns, scratch), past(take_pointers<S*>(p.width, scratch)),
          partial(take_pointers<S*>(p.width + 1, scratch)) {}
};

// As many pointers as there are taps, in registers if that is a fixed number.
template <int TAPS, class T>
struct Few {
    T* at[TAPS];
    INLINE explicit Few(T* const* rows) { std::copy_n(rows, TAPS, at); }
    INLINE T* operator[](int64_t k) const { return at[k]; }
};
template <class T>
struct Few<0, T> {
    T* const* at;
    INLINE explicit Few(T* const* rows) : at(rows) {}
    INLINE T* operator[](int64_t k) const { return at[k]; }
};

template <int W, int TAPS, bool SILU, class T, class S>
OUTLINE void forward_row(const Row<T, S>& r) {
    const int64_t width = TAPS ? TAPS : r.width, stride = r.stride;
    const Few<TAPS, const T> window(r.window);
    const S *taps = r.taps, *bias = r.bias;
    const T* next = r.next;
    T* y = r.out;
    for_vectors<W>(r.columns, false, [&](int64_t c, int64_t) INLINE_BODY {
        __builtin_prefetch(next + c);
        auto z = load<W>(bias + c);
        for (int64_t k = 0; k < width; ++k) z += load<W>(taps + k * stride + c) * load<W>(window[k] + c);
        if constexpr (SILU) {
            Vec<S, W> of_z, of_minus_z;
            sigmoids<W, S>(z, of_z, of_minus_z);
            z *= of_z;
        }
        store(y + c, z);
    });
}

template <int W, int TAPS, bool SILU, class T, class S>
OUTLINE void backward_row(const GradientRow<T, S>& r) {
    const int64_t width = TAPS ? TAPS : r.width, stride = r.stride;
    const Few<TAPS, const T> window(r.window);
    const Few<TAPS, S> past(r.past), partial(r.partial);
    S* const dbias = r.partial[width];
    const S *taps = r.taps, *bias = r.bias;
    const T *next = r.next, *dy = r.dy, *next_dy = r.next_dy, *dlast = r.dlast;
    T* dx = r.out;
    for_vectors<W>(r.columns, false, [&](int64_t c, int64_t slot) INLINE_BODY {
        __builtin_prefetch(next + c);
        __builtin_prefetch(next_dy + c);
        auto dz = load<W>(dy + c);
        if constexpr (SILU) {
            auto z = load<W>(bias + c);
            for (int64_t k = 0; k < width; ++k) z += load<W>(taps + k * stride + c) * load<W>(window[k] + c);
            Vec<S, W> of_z, of_minus_z;
            sigmoids<W, S>(z, of_z, of_minus_z);
            dz *= of_z * (1 + z * of_minus_z);
        }
        if (dbias) {
            for (int64_t k = 0; k < width; ++k)
                store(partial[k] + slot, load<W>(partial[k] + slot) + dz * load<W>(window[k] + c));
            store(dbias + slot, load<W>(dbias + slot) + dz);
        }
        auto d = load<W>(dlast + c) + load<W>(taps + c) * dz;
        for (int64_t k = 1; k < width; ++k) d += load<W>(taps + k * stride + c) * load<W>(past[k] + slot);
        store(past[0] + slot, dz);
        store(dx + c, d);
    });
}

// f<lanes, taps, silu>() for a problem and a number of columns; 0 taps stand for any number.
template <class S, class F>
auto pick(const Problem& p, int64_t columns, const F& f) {
    constexpr int full = kVectorBytes / sizeof(S);
    auto with_taps = [&]<int W>() {
        if (p.width == 4) return p.silu ? f.template operator()<W, 4, true>() : f.template operator()<W, 4, false>();
        return p.silu ? f.template operator()<W, 0, true>() : f.template operator()<W, 0, false>();
    };
    return columns >= full ? with_taps.template operator()<full>() : with_taps.template operator()<1>();
}
