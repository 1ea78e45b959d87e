// Vectors of W lanes, and loads and stores that convert between memory formats and the format of the arithmetic.
// Written with the vector extensions that GCC and Clang share, so that one source serves AVX-512, AVX2, SSE and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
// Before loops whose index must be known when compiling: what they index stays in registers.
#define UNROLL _Pragma("GCC unroll 16")
// After a lambda's parameters: for the bodies of inner loops.
#define INLINE_BODY __attribute__((always_inline))
// For what runs once in a row or less: compiled once, not in every kernel.
#define OUTLINE __attribute__((noinline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kCacheLine = 64;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// Several vectors that are computed with side by side.
template <class V, int K>
struct Group {
    V v[K];
};

// Vectors wider than the processor's are groups of those.
template <class S, int W, bool FITS = (W * sizeof(S) <= kVectorBytes)>
struct VecOf {
    typedef S type __attribute__((vector_size(W * sizeof(S))));
};
template <class S, int W>
struct VecOf<S, W, false> {
    static constexpr int lanes = kVectorBytes / sizeof(S);
    using type = Group<typename VecOf<S, lanes>::type, W / lanes>;
};
template <class S, int W>
using Vec = typename VecOf<S, W>::type;

// The lanes of one of the vectors that make up W lanes.
template <class S, int W>
constexpr int kPartLanes = W * sizeof(S) <= kVectorBytes ? W : kVectorBytes / sizeof(S);
template <class S, int W>
constexpr bool kGrouped = kPartLanes<S, W> < W;

// The group of f(0), f(1), ...
template <class V, int K, class F>
INLINE Group<V, K> group_of(const F& f) {
    return [&]<int... I>(std::integer_sequence<int, I...>) INLINE_BODY {
        return Group<V, K>{{f(I)...}};
    }(std::make_integer_sequence<int, K>());
}

// f<P>(k) for each vector k of P lanes that make up W lanes.
template <int W, class S, class F>
INLINE Vec<S, W> for_parts(const F& f) {
    constexpr int P = kPartLanes<S, W>;
    return group_of<Vec<S, P>, W / P>([&](int k) INLINE_BODY { return f.template operator()<P>(k); });
}

template <class V>
using Lane = std::remove_cvref_t<decltype(std::declval<V>()[0])>;

// While it lives, numbers of this thread that are too small to be normal are zero: a state that fades away would cost
// ten or a hundred times as much.
class FlushDenormals {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();

  public:
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#else
  public:
    FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
};

// The number of lanes of a vector.
template <class V>
constexpr int lanes = sizeof(V) / sizeof(std::declval<V>()[0]);
template <class V, int K>
constexpr int lanes<Group<V, K>> = K * lanes<V>;

// Part k of P lanes, which may be all of them.
template <int P, class V>
INLINE auto& lanes_of(V& v, int k) {
    if constexpr (lanes<std::remove_const_t<V>> == P) return v;
    else return v.v[k];
}

// f<P>(k) for each part of P lanes of W: one vector after the other where there are few registers, else all at once.
template <int W, class S, class F>
INLINE void in_registers(const F& f) {
    constexpr int P = kVectorRegisters < 32 ? kPartLanes<S, W> : W;
    [&]<int... I>(std::integer_sequence<int, I...>) INLINE_BODY {
        (f.template operator()<P>(I), ...);
    }(std::make_integer_sequence<int, W / P>());
}

#define OPERATOR_OF_GROUPS(OP)                                                       \
    template <class V, int K>                                                        \
    INLINE Group<V, K> operator OP(const Group<V, K>& a, const Group<V, K>& b) {     \
        return group_of<V, K>([&](int k) INLINE_BODY { return a.v[k] OP b.v[k]; });  \
    }                                                                                \
    template <class V, int K>                                                        \
    INLINE Group<V, K> operator OP(const Group<V, K>& a, Lane<V> b) {                \
        return group_of<V, K>([&](int k) INLINE_BODY { return a.v[k] OP b; });       \
    }                                                                                \
    template <class V, int K>                                                        \
    INLINE Group<V, K> operator OP(Lane<V> a, const Group<V, K>& b) {                \
        return group_of<V, K>([&](int k) INLINE_BODY { return a OP b.v[k]; });       \
    }
OPERATOR_OF_GROUPS(+)
OPERATOR_OF_GROUPS(-)
OPERATOR_OF_GROUPS(*)
OPERATOR_OF_GROUPS(/)
#undef OPERATOR_OF_GROUPS

template <class V, int K>
INLINE Group<V, K> operator-(const Group<V, K>& a) {
    return group_of<V, K>([&](int k) INLINE_BODY { return -a.v[k]; });
}
template <class V, int K, class B>
INLINE void operator+=(Group<V, K>& a, const B& b) {
    a = a + b;
}
template <class V, int K, class B>
INLINE void operator-=(Group<V, K>& a, const B& b) {
    a = a - b;
}
template <class V, int K, class B>
INLINE void operator*=(Group<V, K>& a, const B& b) {
    a = a * b;
}

// The format in which values of T are added and kept as state.
template <class T>
using StateOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f<T>() with the format of that number. kernels/memory.py counts them in this order.
template <class F>
void with_format(int64_t format, const F& f) {
    switch (format) {
        case 0: return f.template operator()<double>();
        case 1: return f.template operator()<float>();
        case 2: return f.template operator()<Half>();
        case 3: return f.template operator()<BFloat16>();
    }
}

template <class To, class From>
INLINE To bits_as(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    std::memcpy(&out, &v, sizeof out);
    return out;
}

template <class V>
INLINE V load_raw(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// GCC splits these two conversions of 16 lanes in halves.
template <int W>
INLINE Vec<uint32_t, W> widen(Vec<uint16_t, W> v) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return bits_as<Vec<uint32_t, W>>(_mm512_cvtepu16_epi32(bits_as<__m256i>(v)));
#endif
    return __builtin_convertvector(v, Vec<uint32_t, W>);
}

template <int W>
INLINE Vec<uint16_t, W> narrow(Vec<uint32_t, W> v) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return bits_as<Vec<uint16_t, W>>(_mm512_cvtepi32_epi16(bits_as<__m512i>(v)));
#endif
    return __builtin_convertvector(v, Vec<uint16_t, W>);
}

template <int W>
INLINE Vec<float, W> from_bfloat16(Vec<uint16_t, W> v) {
    return bits_as<Vec<float, W>>(widen<W>(v) << 16);
}

// The bfloat16 next to each number, ties to even, in its upper half; a NaN stays one if the lower half is 0.
template <class V>
INLINE Vec<uint32_t, lanes<V>> rounded_to_bfloat16(V v) {
    auto u = bits_as<Vec<uint32_t, lanes<V>>>(v);
    return u + 0x7fff + ((u >> 16) & 1);
}

// The same where any NaN stays one.
template <class V>
INLINE Vec<uint32_t, lanes<V>> bfloat16_above(V v) {
    using Bits = Vec<uint32_t, lanes<V>>;
    auto u = bits_as<Bits>(v);
    Bits rounded = rounded_to_bfloat16(v), quiet = u | 0x400000;
    return v == v ? rounded : quiet;
}

template <int W>
INLINE Vec<uint16_t, W> to_bfloat16(Vec<float, W> v) {
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
    if constexpr (W == 16) {
        // the instruction takes denormals for zeros
        __m512 x = bits_as<__m512>(v);
        if (__builtin_expect(_mm512_fpclass_ps_mask(x, 0x20) == 0, 1))
            return bits_as<Vec<uint16_t, W>>(_mm512_cvtneps_pbh(x));
    }
#endif
    return narrow<W>(bfloat16_above(v) >> 16);
}

#if defined(__x86_64__) && defined(__F16C__)
template <int W>
INLINE Vec<float, W> from_half(Vec<uint16_t, W> v) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return (Vec<float, W>)_mm512_cvtph_ps(bits_as<__m256i>(v));
#endif
    if constexpr (W == 8) return (Vec<float, W>)_mm256_cvtph_ps(bits_as<__m128i>(v));
    if constexpr (W <= 4) {
        __m128i padded = _mm_setzero_si128();
        std::memcpy(&padded, &v, sizeof v);
        __m128 wide = _mm_cvtph_ps(padded);
        return load_raw<Vec<float, W>>(&wide);
    }
}

template <int W>
INLINE Vec<uint16_t, W> to_half(Vec<float, W> v) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
    if constexpr (W == 16) return bits_as<Vec<uint16_t, W>>(_mm512_cvtps_ph(bits_as<__m512>(v), nearest));
#endif
    if constexpr (W == 8) return bits_as<Vec<uint16_t, W>>(_mm256_cvtps_ph(bits_as<__m256>(v), nearest));
    if constexpr (W <= 4) {
        __m128 padded = _mm_setzero_ps();
        std::memcpy(&padded, &v, sizeof v);
        __m128i narrow = _mm_cvtps_ph(padded, nearest);
        return load_raw<Vec<uint16_t, W>>(&narrow);
    }
}
#else
#if defined(__ARM_FP16_FORMAT_IEEE)
// GCC 12 has no _Float16 in C++ there
using Float16 = __fp16;
#else
using Float16 = _Float16;
#endif

template <int W>
INLINE Vec<float, W> from_half(Vec<uint16_t, W> v) {
    return __builtin_convertvector(bits_as<Vec<Float16, W>>(v), Vec<float, W>);
}

template <int W>
INLINE Vec<uint16_t, W> to_half(Vec<float, W> v) {
    return bits_as<Vec<uint16_t, W>>(__builtin_convertvector(v, Vec<Float16, W>));
}
#endif

template <int W, class T>
INLINE Vec<StateOf<T>, W> load(const T* p) {
    using S = StateOf<T>;
    if constexpr (kGrouped<S, W>)
        return for_parts<W, S>([&]<int P>(int k) INLINE_BODY { return load<P>(p + k * P); });
    else if constexpr (std::is_same_v<T, BFloat16>) return from_bfloat16<W>(load_raw<Vec<uint16_t, W>>(p));
    else if constexpr (std::is_same_v<T, Half>) return from_half<W>(load_raw<Vec<uint16_t, W>>(p));
    else return load_raw<Vec<T, W>>(p);
}

template <class T, class V>
INLINE void store(T* p, V v) {
    constexpr int W = sizeof(V) / sizeof(StateOf<T>);
    auto write = [p](auto out) { std::memcpy(p, &out, sizeof out); };
    if constexpr (std::is_same_v<T, BFloat16>) write(to_bfloat16<W>(v));
    else if constexpr (std::is_same_v<T, Half>) write(to_half<W>(v));
    else write(v);
}

template <class T, class V, int K>
INLINE void store(T* p, const Group<V, K>& v) {
    for (int k = 0; k < K; ++k) store(p + k * lanes<V>, v.v[k]);
}

// Stores around the cache, like copy_around_cache; p is a whole number of vectors.
template <class T, class V>
INLINE void stream(T* p, V v) {
    static_assert(std::is_same_v<T, StateOf<T>>);
#if defined(__AVX__)
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
    store(p, v);
}

template <class T, class V, int K>
INLINE void stream(T* p, const Group<V, K>& v) {
    for (int k = 0; k < K; ++k) stream(p + k * lanes<V>, v.v[k]);
}

// A group of lanes 0, 2, 4, ... and lanes 1, 3, 5, ... of what lies in memory, and back: many bfloat16 are read and
// written with fewer instructions that way.
template <class V>
INLINE Group<V, 2> apart(const Group<V, 2>& v) {
    return [&]<int... I>(std::integer_sequence<int, I...>) INLINE_BODY {
        return Group<V, 2>{{__builtin_shufflevector(v.v[0], v.v[1], 2 * I...),
                            __builtin_shufflevector(v.v[0], v.v[1], 2 * I + 1 ...)}};
    }(std::make_integer_sequence<int, lanes<V>>());
}
template <class V>
INLINE Group<V, 2> together(const Group<V, 2>& v) {
    constexpr int W = lanes<V>;
    return [&]<int... I>(std::integer_sequence<int, I...>) INLINE_BODY {
        return Group<V, 2>{{__builtin_shufflevector(v.v[0], v.v[1], I / 2 + (I & 1) * W...),
                            __builtin_shufflevector(v.v[0], v.v[1], W / 2 + I / 2 + (I & 1) * W...)}};
    }(std::make_integer_sequence<int, W>());
}

template <int W>
INLINE Group<Vec<float, W / 2>, 2> load_apart(const BFloat16* p) {
    using V = Vec<float, W / 2>;
    auto both = load_raw<Vec<uint32_t, W / 2>>(p);
    return {{bits_as<V>(both << 16), bits_as<V>(both & 0xffff0000)}};
}

// Denormals may become zeros. The lower half of a NaN is 0: so it is where it was a bfloat16's, or an operation made it.
template <class V>
INLINE void store_apart(BFloat16* p, const Group<V, 2>& v) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if constexpr (sizeof(V) == 64) {
        __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.v[1], (__m512)v.v[0]);
        static constexpr uint16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        _mm512_storeu_si512(p, _mm512_permutexvar_epi16(load_raw<__m512i>(order), halves));
        return;
    }
#endif
    auto even = rounded_to_bfloat16(v.v[0]) >> 16, odd = rounded_to_bfloat16(v.v[1]);
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32) {
        auto both = _mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
        std::memcpy(p, &both, sizeof both);
        return;
    }
#endif
    auto both = even | (odd & 0xffff0000);
    std::memcpy(p, &both, sizeof both);
}

// Copies without reading the lines that it overwrites, and without keeping them in the cache.
OUTLINE inline void copy_around_cache(void* to, const void* from, int64_t bytes) {
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
#if defined(__x86_64__)
    int64_t head = -reinterpret_cast<uintptr_t>(out) & (kCacheLine - 1);
    head = head < bytes ? head : bytes;
    if (head > 0) std::memcpy(out, in, head);
    for (out += head, in += head, bytes -= head; bytes >= kCacheLine; bytes -= kCacheLine) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out), load_raw<__m512i>(in));
#else
        for (int i = 0; i < kCacheLine; i += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), load_raw<__m128i>(in + i));
#endif
        out += kCacheLine, in += kCacheLine;
    }
#endif
    if (bytes > 0) std::memcpy(out, in, bytes);
}

// Stores around the cache are not ordered by the barrier that ends a parallel loop.
INLINE void finish_stores() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Lane i of the result is lane PICK(i) of v.
template <int (*PICK)(int), class V, int... I>
INLINE V shuffle(V v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, PICK(I)...);
}

constexpr int real_lane(int i) { return i & ~1; }
constexpr int imaginary_lane(int i) { return i | 1; }
constexpr int other_lane(int i) { return i ^ 1; }

// a * s + x, or conj(a) * s + x, for lanes that hold pairs (re, im). Both sums have one product each: no choice is
// left in what a compiler fuses, so that vectors of every width round alike.
template <bool CONJ, class V>
INLINE V complex_multiply_add(V a, V s, V x) {
    using S = std::remove_cvref_t<decltype(a[0])>;
    constexpr std::make_integer_sequence<int, lanes<V>> all;
    V sign;
    for (int i = 0; i < lanes<V>; ++i) sign[i] = static_cast<S>((i & 1) != CONJ ? 1 : -1);
    V t = shuffle<imaginary_lane>(a, all) * sign * shuffle<other_lane>(s, all) + x;
    return shuffle<real_lane>(a, all) * s + t;
}
