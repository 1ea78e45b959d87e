// HGRN's gates and scan in one pass, and their gradient in another: threads over sequences and blocks of channels, rows
// streamed in time. Complex channels are held apart in real and imaginary parts while they are computed with.
#include "../rows.h"
#include "activation.h"

namespace {

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

// W channels: their numbers, or real and imaginary parts.
template <class S, bool PAIRS, int W>
struct Channels {
    Vec<S, W> re, im;
};

// Whether the lanes of a group hold its channels apart: even ones, then odd ones.
template <class T, bool PAIRS, int W>
constexpr bool kApart = std::is_same_v<T, BFloat16> && !PAIRS && kPartLanes<float, W> * 2 == W;

// Where the rows of the sequences are T: lanes in the order of channels as a tile has them, and back.
template <class T, bool PAIRS, class V>
INLINE V ordered(const V& v) {
    if constexpr (kApart<T, PAIRS, lanes<V>>) return apart(v);
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
    OUTLINE void enter(const S* row, int64_t n) {
        if (row == nullptr) row = reinterpret_cast<const S*>(zeros);
        for_vectors<W>(n, false, [&](int64_t c, int64_t slot) {
            auto v = read<PAIRS, W>(row, c);
            v.re = ordered<T, PAIRS>(v.re);
            set<W>(slot, v);
        });
    }
    template <int W>
    OUTLINE void leave(S* row, int64_t n) const {
        for_vectors<W>(n, false, [&](int64_t c, int64_t slot) {
            auto v = get<W>(slot);
            v.re = unordered<T, PAIRS>(v.re);
            write<PAIRS, W>(row, c, v);
        });
    }
};

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
    OUTLINE void leave(S* row, int64_t n) const {
        if (!needed) return;
        for_vectors<W>(n, false, [&](int64_t c, int64_t slot) {
            store(row + c, unordered<T, PAIRS>(load<W>(total.at + slot)));
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

// The same tile of a tensor whose channels have two parts.
template <bool PAIRS>
Tile numbers(Tile t) {
    if (PAIRS) t.column *= 2, t.columns *= 2;
    return t;
}

// What is the same in every row of a tile: the bound and what it leaves to the gate, by slots, and the rotation.
template <class T, bool PAIRS, int W>
struct Constants {
    using S = StateOf<T>;
    Slots<S> lower, upper;
    const S *cos, *sin;

    OUTLINE Constants(const Given& g, const Tile& t) : cos(of_channels<S>(g.cos, t)), sin(of_channels<S>(g.sin, t)) {
        const S* bound = of_channels<S>(g.lower_bound, t);
        for_vectors<W>(t.columns, false, [&](int64_t c, int64_t slot) {
            auto v = ordered<T, PAIRS>(load<W>(bound + c));
            store(lower.at + slot, v), store(upper.at + slot, 1 - v);
        });
    }
};

template <bool PAIRS>
constexpr int64_t parts = PAIRS ? 2 : 1;

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

template <class T, bool PAIRS, Kind KIND, int W>
void forward_tile(const Forward& p, const Tiling<StateOf<T>>& tiling, const Tile& t, const StateOf<T>* start,
                  StateOf<T>* end) {
    using S = StateOf<T>;
    using V = Vec<S, W>;
    const Given& g = p.given;
    const bool backwards = g.sequences.reverse;
    const int64_t n = t.columns, kind = g.kind;
    const Tile wide = numbers<PAIRS>(t);
    Rows<T> i(g.i, g.i_strides, wide, backwards), f(g.f, g.f_strides, t, backwards);
    Output<T> h(p.h, packed<PAIRS>(tiling.contiguous()), wide, backwards, tiling.around_cache());
    const Constants<T, PAIRS, W> constant(g, t);
    State<T, PAIRS> state;
    state.template enter<W>(start, n);
    for (int64_t r = 0; r < t.rows; ++r, i.next(), f.next(), h.next(wide.columns)) {
        for_vectors<W>(n, backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
            prefetch<false, W>(f, c), prefetch<PAIRS, W>(i, c), prefetch<PAIRS, W>(h, c);
            V gate, rest, upper = load<W>(constant.upper.at + slot);
            open_sigmoids<W, S, kShort<T>>(read_numbers<PAIRS, W>(f.row + c), gate, rest);
            V decay = upper * gate + load<W>(constant.lower.at + slot), share = upper * rest;
            auto x = read<PAIRS, W>(i.row, c);
            auto s = state.template get<W>(slot);
            x.re = share * activated<KIND, W, S, kShort<T>>(kind, x.re);
            if constexpr (PAIRS) {
                x.im = share * activated<KIND, W, S, kShort<T>>(kind, x.im);
                V re = decay * load<W>(constant.cos + c), im = decay * load<W>(constant.sin + c);
                x.re = re * s.re + (x.re - im * s.im);
                x.im = re * s.im + (x.im + im * s.re);
            } else {
                x.re = decay * s.re + x.re;
            }
            state.template set<W>(slot, x);
            write<PAIRS, W>(h.row, c, x);
        });
    }
    if (end) state.template leave<W>(end, n);
}

// A walk against time: its rows, what is carried from one to the one before it, and what is added up.
template <class T, bool PAIRS, int W>
struct Gradient {
    using S = StateOf<T>;
    const bool backwards;
    const int64_t kind;
    const Tile wide;
    Rows<T> i, f, dh, before;
    Output<T> di, df;
    const Constants<T, PAIRS, W> constant;
    // conj(decay[t+1]) dh[t+1], where dh is the whole gradient of a row
    State<T, PAIRS> carry;
    Sum<T, PAIRS> dlower_bound, dtheta;

    Gradient(const Backward& p, const Tiling<S>& tiling, const Tile& t, bool around)
        : backwards(!p.given.sequences.reverse), kind(p.given.kind), wide(numbers<PAIRS>(t)),
          i(p.given.i, p.given.i_strides, wide, backwards), f(p.given.f, p.given.f_strides, t, backwards),
          dh(p.dh, p.dh_strides, wide, backwards), before(p.h, p.h_strides, wide, backwards),
          di(p.di, packed<PAIRS>(tiling.contiguous()), wide, backwards, around),
          df(p.df, tiling.contiguous(), t, backwards, around), constant(p.given, t) {}
};

// One row, with h[t-1] in its own format or in that of states.
template <Kind KIND, int W, class T, bool PAIRS, class H>
OUTLINE void backward_row(Gradient<T, PAIRS, W>& g, int64_t n, const H* h_before) {
    using S = StateOf<T>;
    using V = Vec<S, W>;
    for_vectors<W>(n, g.backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
        prefetch<false, W>(g.f, c), prefetch<false, W>(g.df, c), prefetch<PAIRS, W>(g.i, c);
        prefetch<PAIRS, W>(g.dh, c), prefetch<PAIRS, W>(g.before, c), prefetch<PAIRS, W>(g.di, c);
        V gate, rest, slope_re, slope_im, upper = load<W>(g.constant.upper.at + slot);
        open_sigmoids<W, S, kShort<T>>(read_numbers<PAIRS, W>(g.f.row + c), gate, rest);
        V decay = upper * gate + load<W>(g.constant.lower.at + slot), share = upper * rest, ddecay;
        auto x = read<PAIRS, W>(g.i.row, c), d = read<PAIRS, W>(g.dh.row, c), h = read<PAIRS, W>(h_before, c);
        if constexpr (!std::is_same_v<H, T>) h.re = ordered<T, PAIRS>(h.re);
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
    g.df.next(n);
    g.i.next(), g.f.next(), g.dh.next();
}

template <class T, bool PAIRS, Kind KIND, int W>
void backward_tile(const Backward& p, const Tiling<StateOf<T>>& tiling, const Tile& t, const StateOf<T>* start,
                   StateOf<T>* end) {
    using S = StateOf<T>;
    const Sequences& s = p.given.sequences;
    const int64_t n = t.columns;
    Gradient<T, PAIRS, W> g(p, tiling, t, tiling.around_cache());
    g.carry.template enter<W>(start, n);
    g.dlower_bound.template start<W>(p.dlower_bound, n);
    g.dtheta.template start<W>(PAIRS ? p.dtheta : nullptr, n);
    for (int64_t r = t.continues ? 0 : 1; r < t.rows; ++r) {
        g.before.next();
        backward_row<KIND, W>(g, n, g.before.row);
        if (r % Sum<T, PAIRS>::kRun == 0) g.dlower_bound.template end_run<W>(n), g.dtheta.template end_run<W>(n);
    }
    const S* initial_state = part<S>(p.given.initial_state, t.sequence, parts<PAIRS>, t, s);
    if (initial_state == nullptr) initial_state = reinterpret_cast<const S*>(zeros);
    if (t.rows > 0 && !t.continues) backward_row<KNOWN_LATER, W>(g, n, initial_state);
    g.dlower_bound.template end_run<W>(n), g.dtheta.template end_run<W>(n);
    if (end) g.carry.template leave<W>(end, n);
    g.dlower_bound.template leave<W>(part<S>(p.lower_bound_partials, t.number, 1, t, s), n);
    g.dtheta.template leave<W>(part<S>(p.theta_partials, t.number, 1, t, s), n);
}

// What a tile does to a state: the product of its decays, and its end from zeros: h, or conj(decay[t]) dh against time.
template <class T, bool PAIRS, int W, bool BACKWARD>
void summarise(const Given& g, const void* dh, Strides dh_strides, const Tile& t, StateOf<T>* product,
               StateOf<T>* end) {
    using S = StateOf<T>;
    using V = Vec<S, W>;
    const bool backwards = g.sequences.reverse != BACKWARD;
    Rows<T> f(g.f, g.f_strides, t, backwards);
    Rows<T> added(BACKWARD ? dh : g.i, BACKWARD ? dh_strides : g.i_strides, numbers<PAIRS>(t), backwards);
    const Constants<S, PAIRS, W> constant(g, t);
    State<S, PAIRS> products, state;
    state.template enter<W>(nullptr, t.columns);
    for_vectors<W>(t.columns, false, [&](int64_t, int64_t slot) {
        products.template set<W>(slot, {V{} + 1, V{}});
    });
    for (int64_t r = 0; r < t.rows; ++r, f.next(), added.next()) {
        for_vectors<W>(t.columns, backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
            prefetch<false, W>(f, c), prefetch<PAIRS, W>(added, c);
            V gate, rest, upper = load<W>(constant.upper.at + slot);
            open_sigmoids<W, S, kShort<T>>(load<W>(f.row + c), gate, rest);
            V decay = upper * gate + load<W>(constant.lower.at + slot), share = upper * rest;
            auto s = state.template get<W>(slot), p = products.template get<W>(slot), x = read<PAIRS, W>(added.row, c);
            if constexpr (BACKWARD) {
                s.re += x.re, s.im += x.im;
            } else {
                x.re = share * activated<KNOWN_LATER, W, S, kShort<T>>(g.kind, x.re);
                if constexpr (PAIRS) x.im = share * activated<KNOWN_LATER, W, S, kShort<T>>(g.kind, x.im);
            }
            auto times_decay = [&](Channels<S, PAIRS, W> v) INLINE_BODY {
                if constexpr (!PAIRS) return Channels<S, PAIRS, W>{decay * v.re, v.im};
                V re = decay * load<W>(constant.cos + c), im = decay * load<W>(constant.sin + c);
                if (BACKWARD) im = -im;
                return Channels<S, PAIRS, W>{re * v.re - im * v.im, re * v.im + im * v.re};
            };
            products.template set<W>(slot, times_decay(p));
            s = times_decay(s);
            if (!BACKWARD) s.re += x.re, s.im += x.im;
            state.template set<W>(slot, s);
        });
    }
    products.template leave<W>(product, t.columns);
    state.template leave<W>(end, t.columns);
}

// sums[c] = the sum of partials[n][c] over n, of runs first.
template <class S>
void add_up(void* sums, const void* partials, const Sequences& s) {
    if (sums == nullptr) return;
    constexpr int64_t block = 256, run = 128;
    S* out = static_cast<S*>(sums);
    const S* from = static_cast<const S*>(partials);
    parallel_for((s.columns + block - 1) / block, s.threads, [&](int64_t b) {
        int64_t first = b * block, n = std::min(block, s.columns - first);
        std::fill_n(out + first, n, S(0));
        const int64_t rows = s.count * s.split;
        for (int64_t start = 0; start < rows; start += run) {
            S of_run[block] = {};
            for (int64_t k = start; k < std::min(start + run, rows); ++k)
                for (int64_t c = 0; c < n; ++c) of_run[c] += from[k * s.columns + first + c];
            for (int64_t c = 0; c < n; ++c) out[first + c] += of_run[c];
        }
    });
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
    Tiling<S> tiling(sequences);
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
        if (t.columns < full) with.template operator()<KNOWN_LATER, 1>();
        else if (twice == full || t.columns < twice || g.kind != SILU) with.template operator()<KNOWN_LATER, full>();
        else if constexpr (twice > full) with.template operator()<SILU, twice>();
    };
    const void *dh = nullptr, *first;
    void* last;
    Strides dh_strides{};
    if constexpr (backward) dh = p.dh, dh_strides = p.dh_strides, first = p.dfinal_state, last = p.dinitial_state;
    else first = g.initial_state, last = p.final_state;
    auto summary = [&](const Tile& t, S* product, S* end) {
        auto f = t.columns < full ? summarise<T, PAIRS, 1, backward> : summarise<T, PAIRS, full, backward>;
        f(g, dh, dh_strides, t, product, end);
    };
    for_tiles<S>(tiling, sequences.reverse != backward, PAIRS, parts<PAIRS>, first, last, tile, walk, summary);
    if constexpr (backward) {
        add_up<S>(p.dlower_bound, p.lower_bound_partials, g.sequences);
        add_up<S>(PAIRS ? p.dtheta : nullptr, p.theta_partials, g.sequences);
    }
}

template <class Problem>
void with_format(const Problem& p) {
    auto with_pairs = [&]<class T>() { p.given.pairs ? run<Problem, T, true>(p) : run<Problem, T, false>(p); };
    switch (p.given.format) {
        case 0: return with_pairs.template operator()<double>();
        case 1: return with_pairs.template operator()<float>();
        case 2: return with_pairs.template operator()<Half>();
        case 3: return with_pairs.template operator()<BFloat16>();
    }
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
void hgru_forward(const Forward* p) { with_format(*p); }
void hgru_backward(const Backward* p) { with_format(*p); }
}
