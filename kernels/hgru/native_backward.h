// The gradient of HGRN's gates and scan: a walk against time over a tile.
#pragma once
#include "../sums.h"
#include "native.h"

namespace {

// A sum over rows for each of n channels, one slot for each vector.
template <class T, bool PAIRS, int W>
struct Sum {
    using S = StateOf<T>;
    static constexpr int kLevels = 4;
    const bool needed;
    Cascade<S, kLevels> over_rows;
    alignas(kCacheLine) S at[kLevels * kStateBytes / sizeof(S)];

    Sum(const void* result, int64_t n) : needed(result != nullptr), over_rows(at, needed ? multiple(n, W) : 0) {}
    template <class V>
    INLINE void add(int64_t slot, V v) {
        constexpr int P = lanes<V>;
        store(at + slot, load<P>(at + slot) + v);
    }
    OUTLINE void leave(S* row, const Tile& t) {
        if (!needed) return;
        const S* total = over_rows.total();
        write_padded<false>(row, t, [&](S* row) {
            for_vectors<W>(walked<S>(t), false, [&](int64_t c, int64_t slot) {
                store(row + c, unordered<T, PAIRS>(load<W>(total + slot)));
            });
        });
    }
};

// A walk against time: its rows, what is carried from one to the one before it, and what is added up.
template <class T, bool PAIRS, int W>
struct Gradient {
    using S = StateOf<T>;
    const bool backwards;
    const int64_t kind, columns;
    const Tile wide;
    PaddedRows<T, PAIRS> i, dh, before;
    PaddedRows<T, false> f;
    Output<T> di, df;
    const Constants<T, PAIRS, W> constant;
    // conj(decay[t+1]) dh[t+1], where dh is the whole gradient of a row
    State<T, PAIRS> carry;
    Sum<T, PAIRS, W> dlower_bound, dtheta;

    Gradient(const Backward& p, const Tiling<S>& tiling, const Tile& t, bool around)
        : backwards(!p.given.sequences.reverse), kind(p.given.kind), columns(t.columns), wide(numbers<PAIRS>(t)),
          i(p.given.i, p.given.i_strides, t, backwards), dh(p.dh, p.dh_strides, t, backwards),
          before(p.h, p.h_strides, t, backwards), f(p.given.f, p.given.f_strides, t, backwards),
          di(p.di, packed<PAIRS>(tiling.contiguous()), wide, backwards, around),
          df(p.df, tiling.contiguous(), t, backwards, around), constant(p.given, t),
          dlower_bound(p.dlower_bound, walked<S>(t)), dtheta(PAIRS ? p.dtheta : nullptr, walked<S>(t)) {}
};

// One row. initial_state: h[t-1] of the first in time, else null.
template <Kind KIND, int W, class T, bool PAIRS>
OUTLINE void backward_row(Gradient<T, PAIRS, W>& g, int64_t n, const StateOf<T>* initial_state) {
    using S = StateOf<T>;
    const T *f_row = g.f.now(), *i_row = g.i.now(), *dh_row = g.dh.now();
    const T* h_before = initial_state ? nullptr : g.before.now();
    if constexpr (std::is_same_v<S, T>) h_before = initial_state ? initial_state : h_before;
    for_vectors<W>(n, g.backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
        prefetch<false, W>(g.f, c), prefetch<false, W>(g.df, c), prefetch<PAIRS, W>(g.i, c);
        prefetch<PAIRS, W>(g.dh, c), prefetch<PAIRS, W>(g.before, c), prefetch<PAIRS, W>(g.di, c);
        auto f = read_numbers<PAIRS, W>(f_row + c), df = f;
        auto i = read<PAIRS, W>(i_row, c), dh = read<PAIRS, W>(dh_row, c), before = dh, di = i;
        if constexpr (std::is_same_v<S, T>) before = read<PAIRS, W>(h_before, c);
        else if (h_before) before = read<PAIRS, W>(h_before, c);
        else before = read<PAIRS, W>(initial_state, c), before.re = ordered<T, PAIRS>(before.re);
        in_registers<W, S>([&]<int P>(int k) INLINE_BODY {
            using V = Vec<S, P>;
            const int64_t at = slot + k * P;
            V gate, rest, slope_re, slope_im, upper = load<P>(g.constant.upper.at + at);
            open_sigmoids<P, S, kShort<T>>(lanes_of<P>(f, k), gate, rest);
            V decay = upper * gate + load<P>(g.constant.lower.at + at), share = upper * rest, ddecay;
            auto x = part_of<P>(i, k), d = part_of<P>(dh, k), h = part_of<P>(before, k);
            auto later = g.carry.template get<P>(at);
            x.re = activated<KIND, P, S, kShort<T>>(g.kind, x.re, slope_re);
            d.re += later.re;
            if constexpr (PAIRS) {
                x.im = activated<KIND, P, S, kShort<T>>(g.kind, x.im, slope_im);
                d.im += later.im;
                V cos = load<P>(g.constant.cos + c + k * P), sin = load<P>(g.constant.sin + c + k * P);
                // e^{i theta} h[t-1] and e^{-i theta} dh; one product a statement leaves no choice in what is fused
                V re = cos * h.re, im = cos * h.im;
                re -= sin * h.im;
                im += sin * h.re;
                later.re = cos * d.re;
                later.im = cos * d.im;
                later.re += sin * d.im;
                later.im -= sin * d.re;
                if (g.dtheta.needed) {
                    V turn = re * d.im;
                    turn -= im * d.re;
                    g.dtheta.add(at, decay * turn);
                }
                ddecay = d.re * (re - x.re);
                ddecay += d.im * (im - x.im);
                later.re *= decay;
                later.im *= decay;
                x.im = share * slope_im * d.im;
            } else {
                ddecay = d.re * (h.re - x.re);
                later.re = decay * d.re;
            }
            x.re = share * slope_re * d.re;
            g.carry.template set<P>(at, later);
            if (g.dlower_bound.needed) g.dlower_bound.add(at, ddecay * rest);
            set_part<P>(di, k, x);
            lanes_of<P>(df, k) = ddecay * (share * gate);
        });
        write<PAIRS, W>(g.di.row, c, di);
        write_numbers<PAIRS>(g.df.row + c, df);
    });
    g.di.next(g.wide.columns);
    g.df.next(g.columns);
    g.i.next(), g.f.next(), g.dh.next();
    g.dlower_bound.over_rows.next(), g.dtheta.over_rows.next();
}

template <class T, bool PAIRS, Kind KIND, int W>
void backward_tile(const Backward& p, const Tiling<StateOf<T>>& tiling, const Tile& t, const StateOf<T>* start,
                   StateOf<T>* end) {
    using S = StateOf<T>;
    const Sequences& s = p.given.sequences;
    const int64_t n = walked<S>(t);
    Gradient<T, PAIRS, W> g(p, tiling, t, n > t.columns || tiling.around_cache());
    g.carry.template enter<W>(start, t);
    for (int64_t r = t.continues ? 0 : 1; r < t.rows; ++r) {
        g.before.next();
        backward_row<KIND, W>(g, n, nullptr);
    }
    const S* initial_state = part<S>(p.given.initial_state, t.sequence, parts<PAIRS>, t, s);
    Padded<S> padded(t, parts<PAIRS>);
    initial_state = initial_state == nullptr ? reinterpret_cast<const S*>(zeros) : padded(initial_state);
    if (t.rows > 0 && !t.continues) backward_row<KIND, W>(g, n, initial_state);
    if (end) g.carry.template leave<W>(end, t);
    g.dlower_bound.leave(part<S>(p.lower_bound_partials, t.number, 1, t, s), t);
    g.dtheta.leave(part<S>(p.theta_partials, t.number, 1, t, s), t);
}

}  // namespace
