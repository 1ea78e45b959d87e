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

// p times 2 to the power of n, an integer, rounded once; `shifted` has n in its last bits.
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
        constexpr bool wide = sizeof(S) == 8;
        using Bits = Vec<std::conditional_t<wide, int64_t, int32_t>, W>;
        constexpr int mantissa = wide ? 52 : 23, bias = wide ? 1023 : 127;
        Bits power = bits_as<Bits>(shifted) << (wide ? 12 : 9) >> (wide ? 12 : 9), half = power >> 1;
        auto two_to = [](Bits k) INLINE_BODY { return bits_as<Vec<S, W>>((k + bias) << mantissa); };
        return p * two_to(half) * two_to(power - half);
    }
}

// x or a bound; a NaN stays one. One instruction where there is one for it, in place of two.
template <int W, class S>
INLINE Vec<S, W> at_least(Vec<S, W> x, S least) {
    if constexpr (kGrouped<S, W>)
        return for_parts<W, S>([&]<int P>(int k) INLINE_BODY { return at_least<P, S>(x.v[k], least); });
#if defined(__AVX512F__)
    else if constexpr (sizeof(x) == 64 && sizeof(S) == 4)
        return (Vec<S, W>)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x);
    else if constexpr (sizeof(x) == 64)
        return (Vec<S, W>)_mm512_max_pd(_mm512_set1_pd(least), (__m512d)x);
#endif
    else return x < least ? Vec<S, W>{} + least : x;
}

template <int W, class S>
INLINE Vec<S, W> at_most(Vec<S, W> x, S most) {
    if constexpr (kGrouped<S, W>)
        return for_parts<W, S>([&]<int P>(int k) INLINE_BODY { return at_most<P, S>(x.v[k], most); });
#if defined(__AVX512F__)
    else if constexpr (sizeof(x) == 64 && sizeof(S) == 4)
        return (Vec<S, W>)_mm512_min_ps(_mm512_set1_ps(most), (__m512)x);
    else if constexpr (sizeof(x) == 64)
        return (Vec<S, W>)_mm512_min_pd(_mm512_set1_pd(most), (__m512d)x);
#endif
    else return x > most ? Vec<S, W>{} + most : x;
}

template <int W, class S>
INLINE Vec<S, W> between(S least, Vec<S, W> x, S most) {
    return at_most<W, S>(at_least<W, S>(x, least), most);
}

// x = n ln 2 + r with an integer n, and exp(r) = 1 + r + r^2 series; `shifted` has n in its last bits.
template <int W, class S>
struct Reduced {
    Vec<S, W> n, shifted, r, series;
};

template <int W, class S>
INLINE Reduced<W, S> reduced(Vec<S, W> x) {
    constexpr bool wide = sizeof(S) == 8;
    // Adding this rounds to an integer and leaves it in the last bits.
    constexpr S magic = wide ? 6755399441055744.0 : 12582912.0;
    constexpr S log2_e = 1.4426950408889634;
    // ln 2 in two parts; n times the first is exact.
    constexpr S ln2_high = wide ? 0.69314718036912381649 : 0.693359375;
    constexpr S ln2_low = wide ? 1.90821492927058770002e-10 : -2.12194440e-4;
    using Series = ExpSeries<S>;
    constexpr Vec<S, W> zero = {};

    Vec<S, W> shifted = x * log2_e + magic, n = shifted - magic;
    Vec<S, W> r = x - n * ln2_high - n * ln2_low;
    Vec<S, W> series = zero + Series::c[Series::terms - 1];
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

// The same for arguments that had 16 bits, to within 2e-7 (1 + |x| / 4) of its size: x log2(e) is rounded. No bounds.
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
    return exponential<W, float>(x);
}
