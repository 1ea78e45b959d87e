// Vectors of numbers in which states, decays and sums are kept, as long as the processor's: whole ones and parts of one,
// and arithmetic that rounds alike in every kernel.
//
// S is the format of states, decays and sums: double for double, else float.
#pragma once
#include "simd.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

template <class S>
constexpr int kLanes = kVectorBytes / sizeof(S);

// n rounded up.
inline int64_t multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// The columns and those behind them that fill the last vector, and four of any format.
template <class S>
int64_t whole_vectors(int64_t columns) {
    return multiple(columns, kLanes<S> > 4 ? kLanes<S> : 4);
}

// So many numbers in whole lines of the cache.
template <class S>
int64_t whole_lines(int64_t n) {
    return multiple(n, kCacheLine / sizeof(S));
}

template <class S>
using Lanes = Vec<S, kLanes<S>>;

template <class S>
INLINE Lanes<S> all(S s) {
    return s - Lanes<S>{};
}

// a * b + c, rounded once where the processor can. By name: of two products a compiler may fuse one here and the other
// there, and then two kernels differ in their last bits.
template <class V>
INLINE V multiply_add(V a, V b, V c) {
    constexpr bool wide = sizeof(a[0]) == 8;
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && wide) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
    else if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else
#endif
#if defined(__AVX2__) && defined(__FMA__)
    if constexpr (sizeof(V) == 32 && wide) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
    else if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else
#endif
#if defined(__aarch64__)
    if constexpr (sizeof(V) == 16 && wide) return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
    else if constexpr (sizeof(V) == 16) return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    else
#endif
        return a * b + c;
}
template <class V, int K>
INLINE Group<V, K> multiply_add(const Group<V, K>& a, const Group<V, K>& b, const Group<V, K>& c) {
    return group_of<V, K>([&](int k) INLINE_BODY { return multiply_add(a.v[k], b.v[k], c.v[k]); });
}

// The first n of a vector's numbers, and zeros behind them.
template <class T>
INLINE Lanes<StateOf<T>> load_some(const T* from, int64_t n) {
    constexpr int W = kLanes<StateOf<T>>;
    if (n >= W) return load<W>(from);
    alignas(kCacheLine) T part[W] = {};
    if (n <= 0) return load<W>(part);
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 4) {
        auto some = _mm512_maskz_loadu_epi32((1u << n) - 1, from);
        std::memcpy(part, &some, sizeof part);
        return load<W>(part);
    } else if constexpr (sizeof(T) == 2) {
        auto some = _mm256_maskz_loadu_epi16((1u << n) - 1, from);
        std::memcpy(part, &some, sizeof part);
        return load<W>(part);
    }
#endif
    std::memcpy(part, from, n * sizeof(T));
    return load<W>(part);
}

template <class T>
INLINE void store_some(T* to, Lanes<StateOf<T>> v, int64_t n) {
    constexpr int W = kLanes<StateOf<T>>;
    if (n >= W) return store(to, v);
    if (n <= 0) return;
    alignas(kCacheLine) T part[W];
    store(part, v);
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_epi32(to, (1u << n) - 1, load_raw<__m512i>(part));
    else if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(to, (1u << n) - 1, load_raw<__m256i>(part));
#endif
    std::memcpy(to, part, n * sizeof(T));
}

// By halves, the sums of lanes i, i + W, i + 2 W, ...
template <int W, class V>
INLINE auto fold(V v) {
    using S = std::remove_cvref_t<decltype(v[0])>;
    if constexpr (lanes<V> == W) return v;
    else {
        Vec<S, lanes<V> / 2> half[2];
        std::memcpy(half, &v, sizeof v);
        return fold<W>(half[0] + half[1]);
    }
}

// The sum of all lanes.
template <class V>
INLINE auto sum(V v) {
    return fold<1>(v)[0];
}
