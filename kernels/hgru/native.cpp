// HGRN's gates and scan in one pass, and their gradient in another: threads over sequences and blocks of channels, rows
// streamed in time.
#include "../work.h"
#include "native_backward.h"

namespace {

struct Place {
    int64_t column, slot;
};

// for_vectors, two of them at a time while there are two: f(place, place), f(place).
template <int W, class F>
INLINE void for_two_vectors(int64_t n, bool backwards, const F& f) {
    int64_t count = (n + W - 1) / W, step = backwards ? -W : W;
    int64_t slot = backwards ? (count - 1) * W : 0;
    auto place = [n](int64_t slot) INLINE_BODY { return Place{std::min(slot, n - W), slot}; };
    for (; count > 1; count -= 2, slot += 2 * step) f(place(slot), place(slot + step));
    if (count > 0) f(place(slot));
}

// A row of sequences of 16 bits, whose channels are numbers.
template <int W, class T>
INLINE void row_of_silu(int64_t n, bool backwards, const Rows<T>& i, const Rows<T>& f, const Output<T>& h,
                        const Constants<T, false, W>& constant, State<T, false>& state) {
    auto fetch = [&](Place at) INLINE_BODY {
        prefetch<false, W>(f, at.column), prefetch<false, W>(i, at.column), prefetch<false, W>(h, at.column);
    };
    auto input = [&](Place at) INLINE_BODY { return read_numbers<false, W>(i.row + at.column); };
    auto gate = [&](Place at) INLINE_BODY { return read_numbers<false, W>(f.row + at.column); };
    if constexpr (kVectorRegisters < 32) {
        for_vectors<W>(n, backwards, [&](int64_t column, int64_t slot) INLINE_BODY {
            const Place at{column, slot};
            fetch(at);
            auto in = input(at), open = gate(at), after = in;
            in_registers<W, float>([&]<int P>(int k) INLINE_BODY {
                float* s = state.re.at + slot + k * P;
                auto upper = load<P>(constant.upper.at + slot + k * P);
                auto& h = lanes_of<P>(after, k);
                h = step_by_quotients<P>(load<P>(s), lanes_of<P>(in, k), lanes_of<P>(open, k), upper);
                store(s, h);
            });
            write_numbers<false>(h.row + column, after);
        });
    } else {
        auto before = [&](Place at) INLINE_BODY { return load<W>(state.re.at + at.slot); };
        auto upper = [&](Place at) INLINE_BODY { return load<W>(constant.upper.at + at.slot); };
        auto keep = [&](Place at, const Vec<float, W>& v) INLINE_BODY {
            store(state.re.at + at.slot, v);
            write_numbers<false>(h.row + at.column, v);
        };
        for_two_vectors<W>(n, backwards, [&](auto... at) INLINE_BODY {
            constexpr int all = sizeof...(at) * W;
            (fetch(at), ...);
            auto h = joined(before(at)...), i = joined(input(at)...), f = joined(gate(at)...);
            auto after = step_to_silu<all>(h, i, opened<all>(i, f), joined(upper(at)...));
            if constexpr (all == W) (keep(at, after), ...);
            else [&](Place a, Place b) INLINE_BODY { keep(a, half<0>(after)), keep(b, half<1>(after)); }(at...);
        });
    }
}

template <class T, bool PAIRS, Kind KIND, int W>
void forward_tile(const Forward& p, const Tiling<StateOf<T>>& tiling, const Tile& t, const StateOf<T>* start,
                  StateOf<T>* end) {
    using S = StateOf<T>;
    using V = Vec<S, W>;
    const Given& g = p.given;
    const bool backwards = g.sequences.reverse;
    const int64_t n = walked<S>(t), kind = g.kind;
    const Tile wide = numbers<PAIRS>(t);
    PaddedRows<T, PAIRS> i(g.i, g.i_strides, t, backwards);
    PaddedRows<T, false> f(g.f, g.f_strides, t, backwards);
    Output<T> h(p.h, packed<PAIRS>(tiling.contiguous()), wide, backwards, n > t.columns || tiling.around_cache());
    // A row that is copied around the cache at once waits for memory while nothing is computed.
    constexpr bool may_stream = kVectorBytes == 32 && std::is_same_v<T, S> && !PAIRS;
    const bool streams = may_stream && h.needed && h.around_cache && h.of_lines() && n == t.columns && n % W == 0;
    const Constants<T, PAIRS, W> constant(g, t);
    State<T, PAIRS> state;
    state.template enter<W>(start, t);
    for (int64_t r = 0; r < t.rows; ++r, i.next(), f.next(), h.next(streams ? 0 : wide.columns)) {
        const T *i_row = i.now(), *f_row = f.now();
        if constexpr (kShort<T> && !PAIRS && KIND == SILU) row_of_silu<W>(n, backwards, i, f, h, constant, state);
        else for_vectors<W>(n, backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
            prefetch<false, W>(f, c), prefetch<PAIRS, W>(i, c), prefetch<PAIRS, W>(h, c);
            V gate, rest, upper = load<W>(constant.upper.at + slot);
            open_sigmoids<W, S, kShort<T>>(read_numbers<PAIRS, W>(f_row + c), gate, rest);
            V decay = upper * gate + load<W>(constant.lower.at + slot), share = upper * rest;
            auto x = read<PAIRS, W>(i_row, c);
            auto s = state.template get<W>(slot);
            x.re = activated<KIND, W, S, kShort<T>>(kind, x.re);
            if constexpr (PAIRS) {
                x.im = activated<KIND, W, S, kShort<T>>(kind, x.im);
                V re = decay * load<W>(constant.cos + c), im = decay * load<W>(constant.sin + c);
                x.re = multiply_add(re, s.re, multiply_add(share, x.re, -(im * s.im)));
                x.im = multiply_add(re, s.im, multiply_add(share, x.im, im * s.re));
            } else {
                x.re = multiply_add(share, x.re, decay * s.re);
            }
            state.template set<W>(slot, x);
            if constexpr (may_stream)
                if (streams) return stream(h.rows.row + c, x.re);
            write<PAIRS, W>(h.row, c, x);
        });
    }
    if (end) state.template leave<W>(end, t);
}

// What a tile does to a state: the product of its decays, and its end from zeros: h, or conj(decay[t]) dh against time.
// x: the rows that are added, i or dh.
template <class T, bool PAIRS>
void summarise(const Given& g, bool backward, const void* x, Strides x_strides, const Tile& t, StateOf<T>* product,
               StateOf<T>* end) {
    using S = StateOf<T>;
    constexpr int W = kLanes<S>;
    using V = Vec<S, W>;
    const bool backwards = g.sequences.reverse != backward;
    const int64_t n = walked<S>(t);
    PaddedRows<T, false> f(g.f, g.f_strides, t, backwards);
    PaddedRows<T, PAIRS> added(x, x_strides, t, backwards);
    const Constants<S, PAIRS, W> constant(g, t);
    State<S, PAIRS> products, state;
    state.template enter<W>(nullptr, t);
    for_vectors<W>(n, false, [&](int64_t, int64_t slot) {
        products.template set<W>(slot, {V{} + 1, V{}});
    });
    for (int64_t r = 0; r < t.rows; ++r, f.next(), added.next()) {
        const T *f_row = f.now(), *x_row = added.now();
        for_vectors<W>(n, backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
            prefetch<false, W>(f, c), prefetch<PAIRS, W>(added, c);
            V gate, rest, upper = load<W>(constant.upper.at + slot);
            open_sigmoids<W, S, kShort<T>>(load<W>(f_row + c), gate, rest);
            V decay = upper * gate + load<W>(constant.lower.at + slot), share = upper * rest;
            auto s = state.template get<W>(slot), p = products.template get<W>(slot), x = read<PAIRS, W>(x_row, c);
            if (backward) {
                s.re += x.re, s.im += x.im;
            } else {
                x.re = share * activated<KNOWN_LATER, W, S, kShort<T>>(g.kind, x.re);
                if constexpr (PAIRS) x.im = share * activated<KNOWN_LATER, W, S, kShort<T>>(g.kind, x.im);
            }
            auto times_decay = [&](Channels<S, PAIRS, W> v) INLINE_BODY {
                if constexpr (!PAIRS) return Channels<S, PAIRS, W>{decay * v.re, v.im};
                V re = decay * load<W>(constant.cos + c), im = decay * load<W>(constant.sin + c);
                if (backward) im = -im;
                return Channels<S, PAIRS, W>{re * v.re - im * v.im, re * v.im + im * v.re};
            };
            products.template set<W>(slot, times_decay(p));
            s = times_decay(s);
            if (!backward) s.re += x.re, s.im += x.im;
            state.template set<W>(slot, s);
        });
    }
    products.template leave<W>(product, t);
    state.template leave<W>(end, t);
}

template <class Problem, class T, bool PAIRS>
void run(const Problem& p) {
    using S = StateOf<T>;
    constexpr bool backward = std::is_same_v<Problem, Backward>;
    const Given& g = p.given;
    constexpr int full = kVectorBytes / sizeof(S), twice = sizeof(S) == 4 ? 2 * full : full;
    constexpr int64_t fit = kStateBytes / sizeof(S) / parts<PAIRS>;
    Sequences sequences = g.sequences;
    // rows of pairs must fit where rows of numbers do
    sequences.block = std::min(sequences.block / parts<PAIRS>, fit - twice);
    Tiling<S> tiling(sequences, sizeof(T) * parts<PAIRS>);
    // Fewer columns than fill a group go to the block before them: vectors of another width would round differently.
    if (tiling.blocks > 1 && sequences.columns - (tiling.blocks - 1) * tiling.width < twice) --tiling.blocks;
    auto tile = [&](int64_t number) {
        Tile t = tiling[number];
        if (sequences.columns - t.column - t.columns < twice) t.columns = sequences.columns - t.column;
        return t;
    };
    auto walk = [&](const Tile& t, const S* start, S* end) {
        auto with = [&]<Kind KIND, int W>() {
            if constexpr (backward) backward_tile<T, PAIRS, KIND, W>(p, tiling, t, start, end);
            else forward_tile<T, PAIRS, KIND, W>(p, tiling, t, start, end);
        };
        if (twice == full || t.columns < twice || g.kind != SILU) with.template operator()<KNOWN_LATER, full>();
        // two vectors at once of what a gradient needs have no room in the registers, where numbers have 32 bits
        else if constexpr (twice > full) with.template operator()<SILU, backward && !kShort<T> ? full : twice>();
    };
    const void *x, *first;
    void* last;
    Strides x_strides;
    if constexpr (backward) x = p.dh, x_strides = p.dh_strides, first = p.dfinal_state, last = p.dinitial_state;
    else x = g.i, x_strides = g.i_strides, first = g.initial_state, last = p.final_state;
    auto summary = [&](const Tile& t, S* product, S* end) {
        summarise<T, PAIRS>(g, backward, x, x_strides, t, product, end);
    };
    for_tiles<S>(tiling, sequences.reverse != backward, PAIRS, parts<PAIRS>, first, last, tile, walk, summary);
    if constexpr (backward) {
        auto add_up = [&](const void* partials, void* sums) {
            const Sequences& s = g.sequences;
            add_parts(static_cast<const S*>(partials), s.count * s.split, s.columns, s.columns, static_cast<S*>(sums),
                      s.threads);
        };
        add_up(p.lower_bound_partials, p.dlower_bound);
        add_up(p.theta_partials, PAIRS ? p.dtheta : nullptr);
    }
}

template <class Problem>
void with_types(const Problem& p) {
    const Given& g = p.given;
    with_format(g.format, [&]<class T>() { g.pairs ? run<Problem, T, true>(p) : run<Problem, T, false>(p); });
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
void hgru_forward(const Forward* p) { with_types(*p); }
void hgru_backward(const Backward* p) { with_types(*p); }
}
