// The gradient of HGRN's gates and scan: a walk against time over a tile.
#pragma once
#include "native.h"

namespace {

// A sum over rows for each channel: of runs of rows first, so that little is lost where there are many.
template <class T, bool PAIRS>
struct Sum {
    using S = StateOf<T>;
    static constexpr int64_t kRun = 128;
    Slots<S> run, total;
    bool needed;

    template <int W>
    OUTLINE void start(const void* result, int64_t n) {
        if ((needed = result != nullptr)) run.template read<W>(nullptr, n), total.template read<W>(nullptr, n);
    }
    template <class V>
    INLINE void add(int64_t slot, V v) {
        store(run.at + slot, load<lanes<V>>(run.at + slot) + v);
    }
    template <int W>
    OUTLINE void end_run(int64_t n) {
        if (!needed) return;
        for_vectors<W>(n, false, [&](int64_t, int64_t slot) {
            store(total.at + slot, load<W>(total.at + slot) + load<W>(run.at + slot));
        });
        run.template read<W>(nullptr, n);
    }
    template <int W>
    OUTLINE void leave(S* row, const Tile& t) const {
        if (!needed) return;
        write_padded<false>(row, t, [&](S* row) {
            for_vectors<W>(walked<S>(t), false, [&](int64_t c, int64_t slot) {
                store(row + c, unordered<T, PAIRS>(load<W>(total.at + slot)));
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
    Sum<T, PAIRS> dlower_bound, dtheta;

    Gradient(const Backward& p, const Tiling<S>& tiling, const Tile& t, bool around)
        : backwards(!p.given.sequences.reverse), kind(p.given.kind), columns(t.columns), wide(numbers<PAIRS>(t)),
          i(p.given.i, p.given.i_strides, t, backwards), dh(p.dh, p.dh_strides, t, backwards),
          before(p.h, p.h_strides, t, backwards), f(p.given.f, p.given.f_strides, t, backwards),
          di(p.di, packed<PAIRS>(tiling.contiguous()), wide, backwards, around),
          df(p.df, tiling.contiguous(), t, backwards, around), constant(p.given, t) {}
};

// One row. initial_state: h[t-1] of the first in time, else null.
template <Kind KIND, int W, class T, bool PAIRS>
OUTLINE void backward_row(Gradient<T, PAIRS, W>& g, int64_t n, const StateOf<T>* initial_state) {
    using S = StateOf<T>;
    using V = Vec<S, W>;
    const T *f_row = g.f.now(), *i_row = g.i.now(), *dh_row = g.dh.now();
    const T* h_before = initial_state ? nullptr : g.before.now();
    if constexpr (std::is_same_v<S, T>) h_before = initial_state ? initial_state : h_before;
    for_vectors<W>(n, g.backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
        prefetch<false, W>(g.f, c), prefetch<false, W>(g.df, c), prefetch<PAIRS, W>(g.i, c);
        prefetch<PAIRS, W>(g.dh, c), prefetch<PAIRS, W>(g.before, c), prefetch<PAIRS, W>(g.di, c);
        V gate, rest, slope_re, slope_im, upper = load<W>(g.constant.upper.at + slot);
        open_sigmoids<W, S, kShort<T>>(read_numbers<PAIRS, W>(f_row + c), gate, rest);
        V decay = upper * gate + load<W>(g.constant.lower.at + slot), share = upper * rest, ddecay;
        auto x = read<PAIRS, W>(i_row, c), d = read<PAIRS, W>(dh_row, c), h = d;
        if constexpr (std::is_same_v<S, T>) h = read<PAIRS, W>(h_before, c);
        else if (h_before) h = read<PAIRS, W>(h_before, c);
        else h = read<PAIRS, W>(initial_state, c), h.re = ordered<T, PAIRS>(h.re);
        auto later = g.carry.template get<W>(slot);
        x.re = activated<KIND, W, S, kShort<T>>(g.kind, x.re, slope_re);
        d.re += later.re;
        if constexpr (PAIRS) {
            x.im = activated<KIND, W, S, kShort<T>>(g.kind, x.im, slope_im);
            d.im += later.im;
            V cos = load<W>(g.constant.cos + c), sin = load<W>(g.constant.sin + c);
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
                g.dtheta.add(slot, decay * turn);
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
        g.carry.template set<W>(slot, later);
        write<PAIRS, W>(g.di.row, c, x);
        write_numbers<PAIRS>(g.df.row + c, ddecay * (share * gate));
        if (g.dlower_bound.needed) g.dlower_bound.add(slot, ddecay * rest);
    });
    g.di.next(g.wide.columns);
    g.df.next(g.columns);
    g.i.next(), g.f.next(), g.dh.next();
}

template <class T, bool PAIRS, Kind KIND, int W>
void backward_tile(const Backward& p, const Tiling<StateOf<T>>& tiling, const Tile& t, const StateOf<T>* start,
                   StateOf<T>* end) {
    using S = StateOf<T>;
    const Sequences& s = p.given.sequences;
    const int64_t n = walked<S>(t);
    Gradient<T, PAIRS, W> g(p, tiling, t, n > t.columns || tiling.around_cache());
    g.carry.template enter<W>(start, t);
    g.dlower_bound.template start<W>(p.dlower_bound, n);
    g.dtheta.template start<W>(PAIRS ? p.dtheta : nullptr, n);
    for (int64_t r = t.continues ? 0 : 1; r < t.rows; ++r) {
        g.before.next();
        backward_row<KIND, W>(g, n, nullptr);
        if (r % Sum<T, PAIRS>::kRun == 0) g.dlower_bound.template end_run<W>(n), g.dtheta.template end_run<W>(n);
    }
    const S* initial_state = part<S>(p.given.initial_state, t.sequence, parts<PAIRS>, t, s);
    Padded<S> padded(t, parts<PAIRS>);
    initial_state = initial_state == nullptr ? reinterpret_cast<const S*>(zeros) : padded(initial_state);
    if (t.rows > 0 && !t.continues) backward_row<KIND, W>(g, n, initial_state);
    g.dlower_bound.template end_run<W>(n), g.dtheta.template end_run<W>(n);
    if (end) g.carry.template leave<W>(end, t);
    g.dlower_bound.template leave<W>(part<S>(p.lower_bound_partials, t.number, 1, t, s), t);
    g.dtheta.template leave<W>(part<S>(p.theta_partials, t.number, 1, t, s), t);
}

}  // namespace
