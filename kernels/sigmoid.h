// The sigmoid on vectors, to within 4 units in the last place.
#pragma once
#include "simd.h"

// 1, 1, 1/2, 1/6, ...
template <class S, int N>
struct InverseFactorials {
    S at[N];
    constexpr InverseFactorials() : at{} {
        double factorial = 1;
        for (int k = 0; k < N; factorial *= ++k) at[k] = S(1 / factorial);
    }
};

// 1 / x for x in [1, 1e38].
template <int W, class S>
INLINE Vec<S, W> inverse(Vec<S, W> x) {
#if defined(__AVX512F__)
    // To 14 bits and a step of Newton's; a division takes five times as long.
    if constexpr (std::is_same_v<S, float> && W == 16) {
        auto guess = bits_as<Vec<S, W>>(_mm512_rcp14_ps(bits_as<__m512>(x)));
        return guess * (2 - x * guess);
    }
#endif
    return 1 / x;
}

// sigmoid(z) and 1 - sigmoid(z) = sigmoid(-z), neither by a subtraction; 0 where that is no normal number.
template <int W, class S>
INLINE void sigmoids(Vec<S, W> z, Vec<S, W>& of_z, Vec<S, W>& of_minus_z) {
    constexpr bool wide = std::is_same_v<S, double>;
    using Bits = Vec<std::conditional_t<wide, uint64_t, uint32_t>, W>;
    constexpr int mantissa = wide ? 52 : 23, terms = wide ? 14 : 8;
    // Adding this rounds to an integer and leaves it in the last bits.
    constexpr S magic = wide ? 6755399441055744.0 : 12582912.0;
    constexpr S log2_e = 1.4426950408889634;
    // ln 2 in two parts; n times the first is exact.
    constexpr S ln2_high = wide ? 0.69314718036912381649 : 0.693359375;
    constexpr S ln2_low = wide ? 1.90821492927058770002e-10 : -2.12194440e-4;
    constexpr S most = wide ? 708 : 87;
    constexpr InverseFactorials<S, terms> coefficient;
    constexpr Vec<S, W> zero = {};

    // exp(x) = 2^n exp(r), the Taylor series of |r| <= ln(2) / 2
    Vec<S, W> x = z < -most ? zero + most : z > most ? zero - most : -z;
    Vec<S, W> shifted = x * log2_e + magic, n = shifted - magic;
    Vec<S, W> r = x - n * ln2_high - n * ln2_low;
    Vec<S, W> series = zero + coefficient.at[terms - 1];
    for (int k = terms - 2; k >= 0; --k) series = series * r + coefficient.at[k];
    Bits power = (bits_as<Bits>(shifted) << mantissa) + bits_as<Bits>(zero + 1);
    Vec<S, W> e = series * bits_as<Vec<S, W>>(power), s = inverse<W, S>(1 + e);
    of_minus_z = z > most ? zero : e * s;
    of_z = z < -most ? zero : s;
}
