// The exponential on vectors, to within 1.25 units in the last place; 1 at 0, and 0 and infinity where it is.
#pragma once
#include "simd.h"

// exp(r) = 1 + r + r^2 (c[0] + c[1] r + ...) for |r| <= ln(2) / 2. In float the polynomial with the least relative
// error, 3.1e-9; in double Taylor's, 4e-18.
template <class S>
struct ExpSeries {
    static constexpr int terms = 5;
    static constexpr S c[terms] = {0.49999993f, 0.16666521f, 0.04166839f, 0.00836872f, 0.00138146f};
};
template <>
struct ExpSeries<double> {
    static constexpr int terms = 12;
    static constexpr double c[terms] = {1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
                                        1. / 5040,   1. / 40320,   1. / 362880,   1. / 3628800,   1. / 39916800,
                                        1. / 479001600, 1. / 6227020800.};
};

// Added to a small number, this rounds it to an integer n; the last bits of the sum are then n, and n + the exponent's
// bias times `BIASES`.
template <class S, int BIASES = 0>
constexpr S kRounding = sizeof(S) == 8 ? 6755399441055744. + 1023 * BIASES : 12582912.f + 127 * BIASES;

// 2 to the power of n, a normal number; `biased`, whose last bits are n and the exponent's bias.
template <class V>
INLINE V two_to(V biased) {
    constexpr bool wide = sizeof(Lane<V>) == 8;
    using Bits = Vec<std::conditional_t<wide, int64_t, int32_t>, lanes<V>>;
    return bits_as<V>(bits_as<Bits>(biased) << (wide ? 52 : 23));
}

// p times 2 to the power of n, an integer, rounded once; `shifted` = n + kRounding<S, 2>.
template <int W, class S>
INLINE Vec<S, W> times_power_of_two(Vec<S, W> p, Vec<S, W> n, Vec<S, W> shifted) {
    if constexpr (kGrouped<S, W>)
        return for_parts<W, S>(
            [&]<int P>(int k) INLINE_BODY { return times_power_of_two<P, S>(p.v[k], n.v[k], shifted.v[k]); });
    else
#if defined(__AVX512F__)
    if constexpr (sizeof(p) == 64 && sizeof(S) == 4) return (Vec<S, W>)_mm512_scalef_ps((__m512)p, (__m512)n);
    else if constexpr (sizeof(p) == 64) return (Vec<S, W>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
    else
#endif
    {
        // in two steps, whose powers are both normal numbers
        using Bits = Vec<std::conditional_t<sizeof(S) == 8, int64_t, int32_t>, W>;
        Vec<S, W> half = n * S(0.5) + kRounding<S, 1>;
        auto rest = bits_as<Vec<S, W>>(bits_as<Bits>(shifted) - bits_as<Bits>(half));
        return p * two_to(half) * two_to(rest);
    }
}

// Likewise where 2 to the power of n is a normal number; `shifted` = n + kRounding<S, 1>.
template <int W, class S>
INLINE Vec<S, W> times_normal_power_of_two(Vec<S, W> p, Vec<S, W> n, Vec<S, W> shifted) {
    if constexpr (kGrouped<S, W>)
        return for_parts<W, S>([&]<int P>(int k) INLINE_BODY {
            return times_normal_power_of_two<P, S>(p.v[k], n.v[k], shifted.v[k]);
        });
#if defined(__AVX512F__)
    else if constexpr (sizeof(p) == 64) return times_power_of_two<W, S>(p, n, shifted);
#endif
    else return p * two_to(shifted);
}

// The larger and the smaller of x and a bound; a NaN stays one. One instruction where there is one for it, in place of
// two.
template <int W, class S>
INLINE Vec<S, W> at_least(Vec<S, W> x, S least) {
    using V = Vec<S, W>;
    if constexpr (kGrouped<S, W>)
        return for_parts<W, S>([&]<int P>(int k) INLINE_BODY { return at_least<P, S>(x.v[k], least); });
#if defined(__AVX512F__)
    else if constexpr (sizeof(x) == 64 && sizeof(S) == 4) return (V)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x);
    else if constexpr (sizeof(x) == 64) return (V)_mm512_max_pd(_mm512_set1_pd(least), (__m512d)x);
#endif
#if defined(__AVX__)
    else if constexpr (sizeof(x) == 32 && sizeof(S) == 4) return (V)_mm256_max_ps(_mm256_set1_ps(least), (__m256)x);
    else if constexpr (sizeof(x) == 32) return (V)_mm256_max_pd(_mm256_set1_pd(least), (__m256d)x);
#endif
    else return x < least ? V{} + least : x;
}

template <int W, class S>
INLINE Vec<S, W> at_most(Vec<S, W> x, S most) {
    using V = Vec<S, W>;
    if constexpr (kGrouped<S, W>)
        return for_parts<W, S>([&]<int P>(int k) INLINE_BODY { return at_most<P, S>(x.v[k], most); });
#if defined(__AVX512F__)
    else if constexpr (sizeof(x) == 64 && sizeof(S) == 4) return (V)_mm512_min_ps(_mm512_set1_ps(most), (__m512)x);
    else if constexpr (sizeof(x) == 64) return (V)_mm512_min_pd(_mm512_set1_pd(most), (__m512d)x);
#endif
#if defined(__AVX__)
    else if constexpr (sizeof(x) == 32 && sizeof(S) == 4) return (V)_mm256_min_ps(_mm256_set1_ps(most), (__m256)x);
    else if constexpr (sizeof(x) == 32) return (V)_mm256_min_pd(_mm256_set1_pd(most), (__m256d)x);
#endif
    else return x > most ? V{} + most : x;
}

template <int W, class S>
INLINE Vec<S, W> between(S least, Vec<S, W> x, S most) {
    return at_most<W, S>(at_least<W, S>(x, least), most);
}

// x = n ln 2 + r with an integer n, and exp(r) = 1 + r + r^2 series; `shifted` as times_power_of_two has it.
template <int W, class S>
struct Reduced {
    Vec<S, W> n, shifted, r, series;
};

template <int W, class S>
INLINE Reduced<W, S> reduced(Vec<S, W> x) {
    constexpr bool wide = sizeof(S) == 8;
    constexpr S log2_e = 1.4426950408889634;
    // ln 2 in two parts; n times the first is exact.
    constexpr S ln2_high = wide ? 0.69314718036912381649 : 0.693359375;
    constexpr S ln2_low = wide ? 1.90821492927058770002e-10 : -2.12194440e-4;
    using Series = ExpSeries<S>;
    constexpr Vec<S, W> zero = {};

    constexpr S rounding = kRounding<S, 2>;
    Vec<S, W> shifted = x * log2_e + rounding, n = shifted - rounding;
    Vec<S, W> r = x - n * ln2_high - n * ln2_low;
    Vec<S, W> series = zero + Series::c[Series::terms - 1];
    UNROLL
    for (int i = Series::terms - 2; i >= 0; --i) series = series * r + Series::c[i];
    return {n, shifted, r, series};
}

// Within the bounds below.
template <int W, class S>
INLINE Vec<S, W> exponential_within(Vec<S, W> x) {
    auto [n, shifted, r, series] = reduced<W, S>(x);
    return times_power_of_two<W, S>(series * (r * r) + (r + 1), n, shifted);
}

template <int W, class S>
INLINE Vec<S, W> exponential(Vec<S, W> x) {
    // beyond these it is 0 and infinity
    constexpr bool wide = sizeof(S) == 8;
    constexpr S least = wide ? -746 : -104, most = wide ? 710 : 89;
    return exponential_within<W, S>(between<W, S>(least, x, most));
}

// exp(x) for |x| <= 87 (float; infinity at 89) or 708 (double), in float to within 3 units in the last place: beside 1
// no more is seen.
template <int W, class S>
INLINE Vec<S, W> exponential_beside_one(Vec<S, W> x) {
    if constexpr (std::is_same_v<S, float>) {
        // the polynomial with the least relative error, 1.1e-7
        constexpr float rounding = kRounding<S, 1>, c[] = {0.49999231f, 0.16667114f, 0.041890122f, 0.0083125243f};
        Vec<S, W> shifted = x * 1.44269504f + rounding, n = shifted - rounding, r = x - n * 0.693147181f;
        Vec<S, W> p = r * c[3] + c[2];
        p = p * r + c[1];
        p = p * r + c[0];
        p = p * r + 1;
        return times_normal_power_of_two<W, S>(p * r + 1, n, shifted);
    } else {
        return exponential_within<W, S>(x);
    }
}

// Whether the next is another function, which needs no bounds.
#if defined(__AVX512DQ__)
constexpr bool kShortUnbounded = true;
#else
constexpr bool kShortUnbounded = false;
#endif

// The same for arguments that had 16 bits, to within 2e-7 (1 + |x| / 4) of its size: x log2(e) is rounded. No
// bounds: between 0 and e^-87 it may be either.
template <int W>
INLINE Vec<float, W> exponential_of_short(Vec<float, W> x) {
#if defined(__AVX512DQ__)
    if constexpr (kPartLanes<float, W> == 16) {
        auto fraction = [](Vec<float, 16> t) INLINE_BODY {
            constexpr int from_floor = 9;
            return (Vec<float, 16>)_mm512_reduce_ps((__m512)t, from_floor);
        };
        // 2^r = 1 + r (c[0] + c[1] r + ...) for r in [0, 1), to within 9e-8
        constexpr float c[] = {0.693151295f, 0.240164444f, 0.0557999201f, 0.00901702512f, 0.00186713145f};
        Vec<float, W> t = x * 1.44269504f, r;
        if constexpr (kGrouped<float, W>)
            r = for_parts<W, float>([&]<int P>(int k) INLINE_BODY { return fraction(t.v[k]); });
        else r = fraction(t);
        Vec<float, W> p = r * c[4] + c[3];
        p = p * r + c[2];
        p = p * r + c[1];
        p = p * r + c[0];
        // takes the floor of t
        return times_power_of_two<W, float>(p * r + 1, t, t);
    }
#endif
    return exponential_beside_one<W, float>(between<W, float>(-87, x, 89));
}
