// What hgru makes of its inputs, on vectors: act(x) and its derivative.
#pragma once
#include "../sigmoid.h"

// In the order of gates.py. KNOWN_LATER: the kind is looked up for every vector.
enum Kind : int64_t { SILU, IDENTITY, TANH, SIGMOID, POSITIVE, KNOWN_LATER };

// One group, or two as one, and its halves.
template <class V, int K>
INLINE Group<V, K> joined(const Group<V, K>& v) {
    return v;
}
template <class V, int K>
INLINE Group<V, 2 * K> joined(const Group<V, K>& a, const Group<V, K>& b) {
    return group_of<V, 2 * K>([&](int k) INLINE_BODY { return k < K ? a.v[k] : b.v[k - K]; });
}
template <int N, class V, int K>
INLINE Group<V, K / 2> half(const Group<V, K>& v) {
    return group_of<V, K / 2>([&](int k) INLINE_BODY { return v.v[N * (K / 2) + k]; });
}

// tanh(x) = (1 - e) / (1 + e) with e = exp(-2 |x|), and 4 e / (1 + e)^2; 1 - e is computed without a cancellation.
template <int W, class S>
INLINE Vec<S, W> hyperbolic_tangent(Vec<S, W> x, Vec<S, W>& derivative) {
    // beyond this e is no normal number
    constexpr S most = sizeof(S) == 8 ? 350 : 43;
    constexpr Vec<S, W> zero = {}, one = zero + 1;
    auto [n, shifted, r, series] = reduced<W, S>(-2 * between<W, S>(0, x < 0 ? -x : x, most));
    // e = 2^n (1 + rest)
    Vec<S, W> rest = series * (r * r) + r, power = times_power_of_two<W, S>(one, n, shifted);
    Vec<S, W> e = rest * power + power, s = inverse<W, S>(1 + e);
    Vec<S, W> t = ((one - power) - rest * power) * s;
    derivative = 4 * e * s * s;
    return x < 0 ? -t : t;
}

// x sigmoid(x) and its derivative. SHORT: x had 16 bits.
template <int W, class S, bool SHORT>
INLINE Vec<S, W> silu_with_slope(Vec<S, W> x, Vec<S, W>& derivative) {
    Vec<S, W> p, q;
    // x p and x q go to 0 although p and q do not
    x = at_least<W, S>(x, -kSaturated<S>);
    open_sigmoids<W, S, SHORT>(x, p, q);
    derivative = p * (1 + at_most<W, S>(x, kSaturated<S>) * q);
    return x * p;
}

template <int W, class S, bool SHORT>
INLINE Vec<S, W> known_later(int64_t kind, Vec<S, W> x, Vec<S, W>& derivative) {
    constexpr Vec<S, W> zero = {};
    Vec<S, W> p, q;
    switch (kind) {
        case SILU:
            return silu_with_slope<W, S, SHORT>(x, derivative);
        case TANH:
            return hyperbolic_tangent<W, S>(x, derivative);
        case SIGMOID:
            open_sigmoids<W, S>(x, p, q);
            derivative = p * q;
            return p;
        case POSITIVE:
            open_sigmoids<W, S>(x, p, q);
            derivative = x >= 0 ? zero + 1 : p * q;
            return x >= 0 ? x + S(0.5) : p;
        default:
            derivative = zero + 1;
            return x;
    }
}

template <Kind KIND, int W, class S, bool SHORT>
INLINE Vec<S, W> activated(int64_t kind, Vec<S, W> x, Vec<S, W>& derivative) {
    if constexpr (KIND == SILU) return silu_with_slope<W, S, SHORT>(x, derivative);
    else if constexpr (kGrouped<S, W>)
        return for_parts<W, S>(
            [&]<int P>(int k) INLINE_BODY { return known_later<P, S, SHORT>(kind, x.v[k], derivative.v[k]); });
    else return known_later<W, S, SHORT>(kind, x, derivative);
}

template <Kind KIND, int W, class S, bool SHORT>
INLINE Vec<S, W> activated(int64_t kind, Vec<S, W> x) {
    Vec<S, W> unused;
    if constexpr (KIND == SILU) return silu<W, S, SHORT>(x);
    else return activated<KIND, W, S, SHORT>(kind, x, unused);
}

// What a step to silu(i) takes of an input's and a gate's exponentials: exp(f) and 1 + exp(-i).
template <int W>
struct Opened {
    Vec<float, W> e, rest;
};

// Beyond this SiLU is next to nothing.
constexpr float kLeastSilu = -64;

template <int W>
INLINE Opened<W> opened(Vec<float, W> i, Vec<float, W> f) {
    constexpr float most = kSaturated<float>;
    i = at_least<W, float>(i, kLeastSilu);
    // together: a processor finds more to do that waits for nothing else
    Vec<float, 2 * W> both;
    if constexpr (kShortUnbounded) both = exponential_of_short<2 * W>(joined(f, -i));
    else
        both = exponential_beside_one<2 * W, float>(
            joined(between<W, float>(-most, f, most), -at_most<W, float>(i, most)));
    return {half<0>(both), 1 + half<1>(both)};
}

// sigmoid(-x), or of MINUS sigmoid(x), of an x that had 16 bits, as part / whole: with x log2(e) = n + r, n an integer,
// exp(x) = 2^n a / part and whole = part + 2^n a. Where a division follows a quotient takes fewer instructions than a
// polynomial as exact. To within 5e-7 of its size; beyond 85 it may be 0 or 1.
template <bool MINUS, int W>
INLINE void quotient_of_short(Vec<float, W> x, Vec<float, W>& part, Vec<float, W>& whole) {
    // 2^r = (c + b r + r^2) / (c - b r + r^2) with the least relative error, 4.4e-7
    constexpr float rounding = kRounding<float, 1>, log2_e = 1.44269504f, b = 8.67783884f, c = 25.0391067f;
    // where 2^n is 0, and infinity when it is multiplied
    x = between<W, float>(-88, x, 88);
    if constexpr (MINUS) x = -x;
    Vec<float, W> shifted = x * log2_e + rounding, n = shifted - rounding, r = x * log2_e - n;
    Vec<float, W> even = r * r + c, a = r * b + even;
    part = even - r * b;
    whole = times_normal_power_of_two<W, float>(a, n, shifted) + part;
}

// h + share (silu(i) - h) with share = upper sigmoid(-f), where f and i had 16 bits: one division for each sigmoid.
template <int W>
INLINE Vec<float, W> step_by_quotients(Vec<float, W> h, Vec<float, W> i, Vec<float, W> f, Vec<float, W> upper) {
    Vec<float, W> part, whole, share;
    quotient_of_short<false, W>(f, part, whole);
    share = part / whole * upper;
    quotient_of_short<true, W>(i, part, whole);
    return share * (part / whole * i - h) + h;
}

// h + share (silu(i) - h) with share = upper sigmoid(-f), where f and i had 16 bits: one reciprocal for both sigmoids.
template <int W>
INLINE Vec<float, W> step_to_silu(Vec<float, W> h, Vec<float, W> i, const Opened<W>& o, Vec<float, W> upper) {
    i = at_least<W, float>(i, kLeastSilu);
    auto product = o.e * o.rest + o.rest;
    Vec<float, W> s;
    // where it reaches this the share is as good as 0; a division makes that of infinity, Newton's step does not
    if constexpr (kShortUnbounded) s = upper * inverse<W, float>(at_most<W, float>(product, 1e38));
    else s = upper / product;
    return s * i + (h - s * o.rest * h);
}
