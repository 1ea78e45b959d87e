// The sigmoid on vectors, to within 4 units in the last place.
#pragma once
#include <cmath>

#include "exp.h"

// log σ(x); that of −x is −softplus(x).
template <class S>
S log_sigmoid(S x) {
    return (x < 0 ? x : S(0)) - std::log1p(std::exp(-std::abs(x)));
}

// 1 / x for x in [1, 1e38].
template <int W, class S>
INLINE Vec<S, W> inverse(Vec<S, W> x) {
    if constexpr (kGrouped<S, W>)
        return for_parts<W, S>([&]<int P>(int k) INLINE_BODY { return inverse<P, S>(x.v[k]); });
    else
#if defined(__AVX512F__)
    // To 14 bits and a step of Newton's; a division takes five times as long.
    if constexpr (std::is_same_v<S, float> && W == 16) {
        auto guess = bits_as<Vec<S, W>>(_mm512_rcp14_ps(bits_as<__m512>(x)));
        return guess * (2 - x * guess);
    } else
#endif
        return 1 / x;
}

// Beyond this in size sigmoids are as good as 0 and 1.
template <class S>
constexpr S kSaturated = sizeof(S) == 8 ? 708 : 87;

// sigmoid(z) and 1 - sigmoid(z) = sigmoid(-z), neither by a subtraction; never less than at kSaturated.
// SHORT: z had 16 bits, and then what would be less may be 0.
template <int W, class S, bool SHORT = false>
INLINE void open_sigmoids(Vec<S, W> z, Vec<S, W>& of_z, Vec<S, W>& of_minus_z) {
    Vec<S, W> e;
    if constexpr (SHORT && kShortUnbounded) e = exponential_of_short<W>(-at_least<W, S>(z, -kSaturated<S>));
    else e = exponential_beside_one<W, S>(-between<W, S>(-kSaturated<S>, z, kSaturated<S>));
    of_z = inverse<W, S>(1 + e);
    of_minus_z = e * of_z;
}

// The same; 0 where that is no normal number.
template <int W, class S>
INLINE void sigmoids(Vec<S, W> z, Vec<S, W>& of_z, Vec<S, W>& of_minus_z) {
    constexpr S most = kSaturated<S>;
    constexpr Vec<S, W> zero = {};
    open_sigmoids<W, S>(z, of_z, of_minus_z);
    of_minus_z = z > most ? zero : of_minus_z;
    of_z = z < -most ? zero : of_z;
}

// x sigmoid(x). SHORT: x had 16 bits.
template <int W, class S, bool SHORT = false>
INLINE Vec<S, W> silu(Vec<S, W> x) {
    // beyond these exp is infinity, and x is divided by it, and next to nothing
    constexpr S least = sizeof(S) == 8 ? -746 : -89, most = kSaturated<S>;
    if constexpr (SHORT) return x / (1 + exponential_of_short<W>(-x));
    else return x / (1 + exponential_beside_one<W, S>(-between<W, S>(least, x, most)));
}
