// Products of a few rows with matrices that lie as the weights of linear maps: [outputs, width].
#pragma once
#include "vectors.h"

// A linear map's parameters. All fields are 8 bytes.
struct LinearMap {
    const void *weight, *bias;  // [outputs, width], [outputs] or null: zeros
};

// Outputs that are computed side by side, and rows for which weights are read once.
constexpr int kSideBySide = 4, kRows = 2;

// y[r, n] = x[r] · w[n] + bias[n] for n < N, in the format of the sums; rows of y lie `apart`. The products of an output
// are added in one order, whichever outputs are computed beside it.
template <int N, class X, class T, class S = StateOf<T>>
INLINE void few_outputs(const X* x, int64_t rows, int64_t width, const T* w, const T* bias, S* y, int64_t apart) {
    constexpr int W = kLanes<S>;
    const int64_t whole = width / W * W;
    for (int64_t r = 0; r < rows; ++r, x += width, y += apart) {
        Lanes<S> sums[N] = {};
        for (int64_t i = 0; i < whole; i += W) {
            Lanes<S> v = load<W>(x + i);
            UNROLL
            for (int n = 0; n < N; ++n) sums[n] = multiply_add(load<W>(w + n * width + i), v, sums[n]);
        }
        if (whole < width) {
            const int64_t rest = width - whole;
            Lanes<S> v = load_some(x + whole, rest);
            UNROLL
            for (int n = 0; n < N; ++n) sums[n] = multiply_add(load_some(w + n * width + whole, rest), v, sums[n]);
        }
        for (int n = 0; n < N; ++n) {
            y[n] = sum(sums[n]);
            if (bias) y[n] += load<1>(bias + n)[0];
        }
    }
}

// y = x Wᵀ + b for outputs `first` to `end` - 1, the first of which is y[r, 0]; x [rows, width] is in T or its sums'
// format.
template <class T, class X, class S = StateOf<T>>
OUTLINE void outputs_of(const LinearMap& map, const X* x, int64_t rows, int64_t width, int64_t first, int64_t end, S* y,
                        int64_t apart) {
    const T *weight = static_cast<const T*>(map.weight), *bias = static_cast<const T*>(map.bias);
    auto some = [&]<int N>() INLINE_BODY {
        few_outputs<N>(x, rows, width, weight + first * width, bias ? bias + first : nullptr, y, apart);
        first += N, y += N;
    };
    while (first + kSideBySide <= end) some.template operator()<kSideBySide>();
    while (first < end) some.template operator()<1>();
}

// Numbers in the format of sums, to T.
template <class T, class S = StateOf<T>>
INLINE void copy_converted(const S* from, int64_t n, T* to) {
    for (int64_t j = 0; j < n; j += kLanes<S>) store_some(to + j, load_some(from + j, n - j), n - j);
}
