// Small matrices in the format of the sums, in tiles that stay in registers, and running products of decays. All widths
// are whole vectors.
#pragma once
#include "matrix.h"

// Of a tile: its rows, and up to how many vectors of columns.
constexpr int kTile = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// Half a step of a transposition: in lanes with bit H those of the one vector, in the others those of the other.
template <int W, int H, bool UPPER>
constexpr int across(int i) {
    return UPPER ? (i & H ? W + i : i + H) : (i & H ? W + i - H : i);
}

template <class S, int H = kLanes<S> / 2>
INLINE void transpose_lanes(Lanes<S>* v) {
    constexpr int W = kLanes<S>;
    constexpr std::make_integer_sequence<int, W> lane;
    UNROLL
    for (int i = 0; i < W; ++i) {
        if (i & H) continue;
        auto a = v[i], b = v[i + H];
        v[i] = shuffle<across<W, H, false>>(a, b, lane), v[i + H] = shuffle<across<W, H, true>>(a, b, lane);
    }
    if constexpr (H > 1) transpose_lanes<S, H / 2>(v);
}

// Calls f.operator()<N>(i) for blocks of N vectors that cover `columns`, the first of which is column i.
template <class S, class F>
INLINE void for_blocks(int64_t columns, const F& f) {
    constexpr int64_t W = kLanes<S>;
    for (int64_t i = 0, left; (left = (columns - i + W - 1) / W) > 0;) {
        if (left >= kVectors) f.template operator()<kVectors>(i), i += kVectors * W;
        else if (left >= 2) f.template operator()<2>(i), i += 2 * W;
        else f.template operator()<1>(i), i += W;
    }
}

// to [columns, to_width] = from [rows, from_width] transposed; rows and columns are whole vectors.
template <class S>
OUTLINE void transpose(const S* from, int64_t rows, int64_t columns, int64_t from_width, S* to, int64_t to_width) {
    constexpr int W = kLanes<S>;
    for (int64_t r = 0; r < rows; r += W) {
        for (int64_t c = 0; c < columns; c += W) {
            Lanes<S> block[W];
            UNROLL
            for (int i = 0; i < W; ++i) block[i] = load<W>(from + (r + i) * from_width + c);
            transpose_lanes<S>(block);
            UNROLL
            for (int i = 0; i < W; ++i) store(to + (c + i) * to_width + r, block[i]);
        }
    }
}

// to [rows, columns] = a [rows, inner] b [inner, columns], or with `add` that more. rows is a multiple of kTile; they
// lie a_width, b_width and to_width apart.
template <class S>
OUTLINE void product(int64_t rows, int64_t inner, int64_t columns, const S* a, int64_t a_width, const S* b,
                     int64_t b_width, S* to, int64_t to_width, bool add) {
    constexpr int W = kLanes<S>;
    for_blocks<S>(columns, [&]<int N>(int64_t column) {
        for (int64_t row = 0; row < rows; row += kTile) {
            Lanes<S> tile[kTile][N];
            UNROLL
            for (int i = 0; i < kTile; ++i) {
                UNROLL
                for (int n = 0; n < N; ++n)
                    tile[i][n] = add ? load<W>(to + (row + i) * to_width + column + n * W) : Lanes<S>{};
            }
            for (int64_t x = 0; x < inner; ++x) {
                UNROLL
                for (int n = 0; n < N; ++n) {
                    auto right = load<W>(b + x * b_width + column + n * W);
                    UNROLL
                    for (int i = 0; i < kTile; ++i)
                        tile[i][n] = multiply_add(all(a[(row + i) * a_width + x]), right, tile[i][n]);
                }
            }
            UNROLL
            for (int i = 0; i < kTile; ++i) {
                UNROLL
                for (int n = 0; n < N; ++n) store(to + (row + i) * to_width + column + n * W, tile[i][n]);
            }
        }
    });
}

// to = from ∘ scale + aᵀ b for states [rows, columns], rows `columns` apart, and scale [columns]; a [inner, a_width],
// b [inner, columns]. rows is a multiple of kTile; from and to may be the same.
template <class S>
OUTLINE void advance(int64_t inner, int64_t rows, int64_t columns, const S* scale, const S* a, int64_t a_width,
                     const S* b, const S* from, S* to) {
    constexpr int W = kLanes<S>;
    for_blocks<S>(columns, [&]<int N>(int64_t column) {
        for (int64_t row = 0; row < rows; row += kTile) {
            Lanes<S> tile[kTile][N];
            UNROLL
            for (int i = 0; i < kTile; ++i) {
                UNROLL
                for (int n = 0; n < N; ++n)
                    tile[i][n] = load<W>(from + (row + i) * columns + column + n * W) * load<W>(scale + column + n * W);
            }
            for (int64_t x = 0; x < inner; ++x) {
                UNROLL
                for (int n = 0; n < N; ++n) {
                    auto right = load<W>(b + x * columns + column + n * W);
                    UNROLL
                    for (int i = 0; i < kTile; ++i)
                        tile[i][n] = multiply_add(all(a[x * a_width + row + i]), right, tile[i][n]);
                }
            }
            UNROLL
            for (int i = 0; i < kTile; ++i) {
                UNROLL
                for (int n = 0; n < N; ++n) store(to + (row + i) * columns + column + n * W, tile[i][n]);
            }
        }
    });
}

// to[t] = the product of the decays of the rows behind t; total [width]: of all.
template <class S>
void products_after(int64_t rows, const S* decay, int64_t width, S* to, S* total) {
    constexpr int W = kLanes<S>;
    for (int64_t i = 0; i < width; i += W) {
        auto product = all(S(1));
        for (int64_t t = rows - 1; t >= 0; --t) {
            store(to + t * width + i, product);
            product *= load<W>(decay + t * width + i);
        }
        store(total + i, product);
    }
}

// to[t] = the product of the decays of the rows before t, and with `own` its own.
template <class S>
void products_before(int64_t rows, const S* decay, int64_t width, bool own, S* to, S* total) {
    constexpr int W = kLanes<S>;
    for (int64_t i = 0; i < width; i += W) {
        auto product = all(S(1));
        for (int64_t t = 0; t < rows; ++t) {
            auto longer = product * load<W>(decay + t * width + i);
            store(to + t * width + i, own ? longer : product);
            product = longer;
        }
        store(total + i, product);
    }
}

template <class S>
void multiply_by(S* to, const S* factors, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<S>) store(to + i, load<kLanes<S>>(to + i) * load<kLanes<S>>(factors + i));
}
