// The sigmoid on vectors, to within 4 units in the last place.
#pragma once
#include "exp.h"

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

// sigmoid(z) and 1 - sigmoid(z) = sigmoid(-z), neither by a subtraction.
template <int W, class S>
INLINE void sigmoids(Vec<S, W> z, Vec<S, W>& of_z, Vec<S, W>& of_minus_z) {
    Vec<S, W> e = exponential<W, S>(z < 0 ? z : -z), larger = inverse<W, S>(1 + e), smaller = e * larger;
    of_z = z < 0 ? smaller : larger;
    of_minus_z = z < 0 ? larger : smaller;
}
