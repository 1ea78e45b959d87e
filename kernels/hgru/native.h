// What hgru forward and backward share: the problem as native.py packs it; channels, states and constants of a tile.
// Complex channels are held apart in real and imaginary parts while they are computed with.
#pragma once
#include "../rows.h"
#include "../vectors.h"
#include "activation.h"

struct Given {
    Sequences sequences;  // columns: channels
    int64_t format, pairs, kind;
    const void *i, *f;  // [B, T, channels], i with as many parts as a channel has
    Strides i_strides, f_strides;
    const void *lower_bound, *cos, *sin;  // [channels] in the format of states; lower_bound may be null: zeros
    const void* initial_state;            // [N, channels], or null: zeros
};

struct Forward {
    Given given;
    void *h, *final_state;
};

struct Backward {
    Given given;
    const void *h, *dh;  // dh may be null: zeros
    Strides h_strides, dh_strides;
    const void* dfinal_state;
    void *di, *df, *dinitial_state;                // null where not needed
    void *dlower_bound, *dtheta;                   // [channels], null where not needed
    void *lower_bound_partials, *theta_partials;   // [N * split, channels]
};

static_assert(sizeof(Forward) == 25 * 8 && sizeof(Backward) == 37 * 8, "native.py packs this many fields");

namespace {

// W channels: their numbers, or real and imaginary parts.
template <class S, bool PAIRS, int W>
struct Channels {
    Vec<S, W> re, im;
};

// Part k of P channels.
template <int P, class S, bool PAIRS, int W>
INLINE Channels<S, PAIRS, P> part_of(const Channels<S, PAIRS, W>& v, int k) {
    return {lanes_of<P>(v.re, k), lanes_of<P>(v.im, k)};
}
template <int P, class S, bool PAIRS, int W>
INLINE void set_part(Channels<S, PAIRS, W>& v, int k, const Channels<S, PAIRS, P>& to) {
    lanes_of<P>(v.re, k) = to.re;
    if constexpr (PAIRS) lanes_of<P>(v.im, k) = to.im;
}

// Whether the lanes of a group hold its channels apart: even ones, then odd ones.
template <class T, bool PAIRS, int W>
constexpr bool kApart = std::is_same_v<T, BFloat16> && !PAIRS && kPartLanes<float, W> * 2 == W;

// Where the rows of the sequences are T: lanes in the order of channels as a tile has them, with NaNs that a bfloat16
// could hold, and back.
template <class T, bool PAIRS, class V>
INLINE V ordered(const V& v) {
    if constexpr (kApart<T, PAIRS, lanes<V>>) {
        V out = apart(v);
        for (auto& some : out.v) some = some == some ? some : decltype(some + 0){} + __builtin_nanf("");
        return out;
    }
    else return v;
}
template <class T, bool PAIRS, class V>
INLINE V unordered(const V& v) {
    if constexpr (kApart<T, PAIRS, lanes<V>>) return together(v);
    else return v;
}

// One number for each channel, of a tile's or of any sequence's row.
template <bool PAIRS, int W, class T>
INLINE Vec<StateOf<T>, W> read_numbers(const T* row) {
    if constexpr (kApart<T, PAIRS, W>) return load_apart<W>(row);
    else return load<W>(row);
}
template <bool PAIRS, class T, class V>
INLINE void write_numbers(T* row, const V& v) {
    if constexpr (kApart<T, PAIRS, lanes<V>>) store_apart(row, v);
    else store(row, v);
}

constexpr int even_lane(int i) { return 2 * i; }
constexpr int odd_lane(int i) { return 2 * i + 1; }

template <bool PAIRS, int W, class T>
INLINE Channels<StateOf<T>, PAIRS, W> read(const T* row, int64_t c) {
    using S = StateOf<T>;
    constexpr int P = kPartLanes<S, W>;
    if constexpr (!PAIRS) return {read_numbers<PAIRS, W>(row + c), Vec<S, W>{}};
    else if constexpr (P < W) {
        Channels<S, PAIRS, W> all;
        for (int k = 0; k < W / P; ++k) {
            auto some = read<PAIRS, P>(row, c + k * P);
            all.re.v[k] = some.re, all.im.v[k] = some.im;
        }
        return all;
    }
    else if constexpr (W == 1) return {load<1>(row + 2 * c), load<1>(row + 2 * c + 1)};
    else if constexpr (std::is_same_v<T, BFloat16>) {
        // a pair is the high half of two floats
        auto both = load_raw<Vec<uint32_t, W>>(row + 2 * c);
        return {bits_as<Vec<float, W>>(both << 16), bits_as<Vec<float, W>>(both & 0xffff0000)};
    } else {
        Vec<S, W> low = load<W>(row + 2 * c), high = load<W>(row + 2 * c + W);
        return [&]<int... I>(std::integer_sequence<int, I...>) INLINE_BODY {
            return Channels<S, PAIRS, W>{__builtin_shufflevector(low, high, even_lane(I)...),
                                         __builtin_shufflevector(low, high, odd_lane(I)...)};
        }(std::make_integer_sequence<int, W>());
    }
}

template <bool PAIRS, int W, class T, class S>
INLINE void write(T* row, int64_t c, const Channels<S, PAIRS, W>& v) {
    constexpr int P = kPartLanes<S, W>;
    if constexpr (!PAIRS) write_numbers<PAIRS>(row + c, v.re);
    else if constexpr (P < W)
        for (int k = 0; k < W / P; ++k) write<PAIRS, P>(row, c + k * P, Channels<S, PAIRS, P>{v.re.v[k], v.im.v[k]});
    else if constexpr (W == 1) store(row + 2 * c, v.re), store(row + 2 * c + 1, v.im);
    else {
        [&]<int... I>(std::integer_sequence<int, I...>) INLINE_BODY {
            store(row + 2 * c, Vec<S, W>(__builtin_shufflevector(v.re, v.im, I / 2 + (I & 1) * W...)));
            store(row + 2 * c + W, Vec<S, W>(__builtin_shufflevector(v.re, v.im, W / 2 + I / 2 + (I & 1) * W...)));
        }(std::make_integer_sequence<int, W>());
    }
}

template <bool PAIRS>
constexpr int64_t parts = PAIRS ? 2 : 1;

// The same tile of a tensor whose channels have two parts.
template <bool PAIRS>
Tile numbers(Tile t) {
    t.column *= parts<PAIRS>, t.columns *= parts<PAIRS>;
    return t;
}

// The channels that are walked through: a vector at least. Those beyond the tile are zeros, and nobody sees what comes
// of them.
template <class S>
int64_t walked(const Tile& t) {
    return std::max<int64_t>(t.columns, kLanes<S>);
}

// A row of a tile, or if it is narrower than a vector a copy of it with zeros behind.
template <class T>
struct Padded {
    static constexpr int64_t kWhole = kLanes<StateOf<T>>;
    // numbers to copy
    int64_t few;
    alignas(kCacheLine) T copy[2 * kWhole];

    Padded(const Tile& t, int64_t parts) : few(t.columns < kWhole ? t.columns * parts : 0) {}
    INLINE const T* operator()(const T* row) { return few == 0 ? row : copied(row); }
    OUTLINE const T* copied(const T* row) {
        std::memset(copy, 0, sizeof copy);
        std::memcpy(copy, row, few * sizeof(T));
        return copy;
    }
};

// The rows of channels, or of numbers of channels, in the order of a walk.
template <class T, bool PAIRS>
struct PaddedRows : Rows<T> {
    Padded<T> padded;
    PaddedRows(const void* p, Strides s, const Tile& t, bool backwards)
        : Rows<T>(p, s, numbers<PAIRS>(t), backwards), padded(t, parts<PAIRS>) {}
    INLINE const T* now() { return padded(this->row); }
};

// write(row), where a row that is narrower than a vector gets the first of what is written.
template <bool PAIRS, class S, class F>
INLINE void write_padded(S* row, const Tile& t, const F& write) {
    Padded<S> padded(t, parts<PAIRS>);
    write(padded.few == 0 ? row : padded.copy);
    std::memcpy(row, padded.copy, padded.few * sizeof(S));
}

// The state of a tile's channels, one slot for each of its vectors, whose lanes are ordered like those of rows of T.
template <class T, bool PAIRS>
struct State {
    using S = StateOf<T>;
    Slots<S> re;
    Slots<S> im;

    template <int W>
    INLINE Channels<S, PAIRS, W> get(int64_t slot) const {
        if constexpr (PAIRS) return {load<W>(re.at + slot), load<W>(im.at + slot)};
        else return {load<W>(re.at + slot), Vec<S, W>{}};
    }
    template <int W>
    INLINE void set(int64_t slot, const Channels<S, PAIRS, W>& v) {
        store(re.at + slot, v.re);
        if constexpr (PAIRS) store(im.at + slot, v.im);
    }
    // Null: zeros.
    template <int W>
    OUTLINE void enter(const S* row, const Tile& t) {
        Padded<S> padded(t, parts<PAIRS>);
        row = row == nullptr ? reinterpret_cast<const S*>(zeros) : padded(row);
        for_vectors<W>(walked<S>(t), false, [&](int64_t c, int64_t slot) {
            auto v = read<PAIRS, W>(row, c);
            v.re = ordered<T, PAIRS>(v.re);
            set<W>(slot, v);
        });
    }
    template <int W>
    OUTLINE void leave(S* row, const Tile& t) const {
        write_padded<PAIRS>(row, t, [&](S* row) {
            for_vectors<W>(walked<S>(t), false, [&](int64_t c, int64_t slot) {
                auto v = get<W>(slot);
                v.re = unordered<T, PAIRS>(v.re);
                write<PAIRS, W>(row, c, v);
            });
        });
    }
};

// The part of a tensor [.., channels] that belongs to a tile, in row n.
template <class S>
S* part(const void* p, int64_t n, int64_t parts, const Tile& t, const Sequences& s) {
    return p ? static_cast<S*>(const_cast<void*>(p)) + (n * s.columns + t.column) * parts : nullptr;
}

// Likewise of [channels].
template <class S>
const S* of_channels(const void* p, const Tile& t) {
    return p ? static_cast<const S*>(p) + t.column : reinterpret_cast<const S*>(zeros);
}

// What is the same in every row of a tile: the bound and what it leaves to the gate, by slots, and the rotation.
template <class T, bool PAIRS, int W>
struct Constants {
    using S = StateOf<T>;
    Slots<S> lower, upper;
    Padded<S> padded_cos, padded_sin;
    const S *cos, *sin;

    OUTLINE Constants(const Given& g, const Tile& t)
        : padded_cos(t, 1), padded_sin(t, 1), cos(padded_cos(of_channels<S>(g.cos, t))),
          sin(padded_sin(of_channels<S>(g.sin, t))) {
        Padded<S> padded(t, 1);
        const S* bound = padded(of_channels<S>(g.lower_bound, t));
        for_vectors<W>(walked<S>(t), false, [&](int64_t c, int64_t slot) {
            auto v = ordered<T, PAIRS>(load<W>(bound + c));
            store(lower.at + slot, v), store(upper.at + slot, 1 - v);
        });
    }
};

template <class T>
constexpr bool kShort = sizeof(T) == 2;

template <bool PAIRS>
Strides packed(Strides s) {
    return {s.batch * parts<PAIRS>, s.row * parts<PAIRS>};
}

// Fetches what is read or written next to a vector's W channels, some rows ahead.
template <bool PAIRS, int W, class R>
INLINE void prefetch(const R& rows, int64_t c) {
    for (int64_t n = 0; n < W * parts<PAIRS>; n += R::kLine) rows.prefetch(c * parts<PAIRS> + n);
}

}  // namespace
