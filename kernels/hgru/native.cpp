// HGRN's gates and scan in one pass, and their gradient in another: threads over sequences and blocks of channels, rows
// streamed in time. Complex channels are held apart in real and imaginary parts while they are computed with.
#include "../parallel.h"
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
    void *lower_bound_partials, *theta_partials;   // [N, channels]
};

static_assert(sizeof(Forward) == 23 * 8 && sizeof(Backward) == 35 * 8, "native.py packs this many fields");

// W channels: their numbers, or real and imaginary parts.
template <class S, bool PAIRS, int W>
struct Channels {
    Vec<S, W> re, im;
};

constexpr int even_lane(int i) { return 2 * i; }
constexpr int odd_lane(int i) { return 2 * i + 1; }

template <bool PAIRS, int W, class T>
INLINE Channels<StateOf<T>, PAIRS, W> read(const T* row, int64_t c) {
    using S = StateOf<T>;
    if constexpr (!PAIRS) return {load<W>(row + c), Vec<S, W>{}};
    else if constexpr (W == 1) return {load<1>(row + 2 * c), load<1>(row + 2 * c + 1)};
    else {
        Vec<S, W> low = load<W>(row + 2 * c), high = load<W>(row + 2 * c + W);
        return [&]<int... I>(std::integer_sequence<int, I...>) INLINE_BODY {
            return Channels<S, PAIRS, W>{__builtin_shufflevector(low, high, even_lane(I)...),
                                         __builtin_shufflevector(low, high, odd_lane(I)...)};
        }(std::make_integer_sequence<int, W>());
    }
}

template <bool PAIRS, int W, class T, class S>
INLINE void write(T* row, int64_t c, const Channels<S, PAIRS, W>& v) {
    if constexpr (!PAIRS) store(row + c, v.re);
    else if constexpr (W == 1) store(row + 2 * c, v.re), store(row + 2 * c + 1, v.im);
    else {
        [&]<int... I>(std::integer_sequence<int, I...>) INLINE_BODY {
            store(row + 2 * c, Vec<S, W>(__builtin_shufflevector(v.re, v.im, I / 2 + (I & 1) * W...)));
            store(row + 2 * c + W, Vec<S, W>(__builtin_shufflevector(v.re, v.im, W / 2 + I / 2 + (I & 1) * W...)));
        }(std::make_integer_sequence<int, W>());
    }
}

// The state of a tile's channels, one slot for each of its vectors.
template <class S, bool PAIRS>
struct State {
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
        for_vectors<W>(n, false, [&](int64_t c, int64_t slot) { set<W>(slot, read<PAIRS, W>(row, c)); });
    }
    template <int W>
    OUTLINE void leave(S* row, int64_t n) const {
        for_vectors<W>(n, false, [&](int64_t c, int64_t slot) { write<PAIRS, W>(row, c, get<W>(slot)); });
    }
};

// A sum over rows for each channel: of runs of rows first, so that little is lost where there are many.
template <class S>
struct Sum {
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
};

// The part of a tensor [N, channels] that belongs to a tile.
template <class S>
S* part(const void* p, int64_t parts, const Tile& t, const Sequences& s) {
    return p ? static_cast<S*>(const_cast<void*>(p)) + (t.sequence * s.columns + t.column) * parts : nullptr;
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

template <class T, bool PAIRS, Kind KIND, int W>
void forward_tile(const Forward& p, const Tiling<StateOf<T>>& tiling, const Tile& t) {
    using S = StateOf<T>;
    constexpr int64_t parts = PAIRS ? 2 : 1;
    const Given& g = p.given;
    const bool backwards = g.sequences.reverse;
    const int64_t n = t.columns, kind = g.kind;
    const Strides packed = tiling.contiguous();
    Rows<T> i(g.i, g.i_strides, numbers<PAIRS>(t), backwards), f(g.f, g.f_strides, t, backwards);
    Output<T> h(p.h, {packed.batch * parts, packed.row * parts}, numbers<PAIRS>(t), backwards, tiling.around_cache());
    const S *lower_bound = of_channels<S>(g.lower_bound, t), *cos = of_channels<S>(g.cos, t),
            *sin = of_channels<S>(g.sin, t);
    State<S, PAIRS> state;
    state.template enter<W>(part<S>(g.initial_state, parts, t, g.sequences), n);
    for (int64_t r = 0; r < t.rows; ++r, i.next(), f.next(), h.next(n * parts)) {
        for_vectors<W>(n, backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
            f.prefetch(c), i.prefetch(c * parts), h.prefetch(c * parts);
            if constexpr (PAIRS) i.prefetch(2 * c + W), h.prefetch(2 * c + W);
            Vec<S, W> sigmoid, rest, unused;
            sigmoids<W, S>(load<W>(f.row + c), sigmoid, rest);
            Vec<S, W> lower = load<W>(lower_bound + c), upper = 1 - lower;
            Vec<S, W> decay = upper * sigmoid + lower, share = upper * rest;
            auto x = read<PAIRS, W>(i.row, c);
            auto s = state.template get<W>(slot);
            x.re = share * activated<KIND, W, S>(kind, x.re, unused);
            if constexpr (PAIRS) {
                x.im = share * activated<KIND, W, S>(kind, x.im, unused);
                Vec<S, W> re = decay * load<W>(cos + c), im = decay * load<W>(sin + c);
                x.re = re * s.re + (x.re - im * s.im);
                x.im = re * s.im + (x.im + im * s.re);
            } else {
                x.re = decay * s.re + x.re;
            }
            state.template set<W>(slot, x);
            write<PAIRS, W>(h.row, c, x);
        });
    }
    state.template leave<W>(part<S>(p.final_state, parts, t, g.sequences), n);
}

template <class T, bool PAIRS, Kind KIND, int W>
void backward_tile(const Backward& p, const Tiling<StateOf<T>>& tiling, const Tile& t) {
    using S = StateOf<T>;
    constexpr int64_t parts = PAIRS ? 2 : 1;
    const Given& g = p.given;
    const bool backwards = !g.sequences.reverse, around = tiling.around_cache();
    const int64_t n = t.columns, kind = g.kind;
    const Strides packed = tiling.contiguous(), packed_numbers = {packed.batch * parts, packed.row * parts};
    const Tile wide = numbers<PAIRS>(t);
    Rows<T> i(g.i, g.i_strides, wide, backwards), f(g.f, g.f_strides, t, backwards);
    Rows<T> dh(p.dh, p.dh_strides, wide, backwards), before(p.h, p.h_strides, wide, backwards);
    Output<T> di(p.di, packed_numbers, wide, backwards, around), df(p.df, packed, t, backwards, around);
    const S *lower_bound = of_channels<S>(g.lower_bound, t), *cos = of_channels<S>(g.cos, t),
            *sin = of_channels<S>(g.sin, t);
    Sum<S> dlower_bound, dtheta;
    dlower_bound.template start<W>(p.dlower_bound, n);
    dtheta.template start<W>(PAIRS ? p.dtheta : nullptr, n);
    // conj(decay[t+1]) dh[t+1], where dh is the whole gradient of a row
    State<S, PAIRS> carry;
    carry.template enter<W>(part<S>(p.dfinal_state, parts, t, g.sequences), n);

    auto row = [&](auto* h_before) INLINE_BODY {
        for_vectors<W>(n, backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
            f.prefetch(c), df.prefetch(c);
            for (int64_t part = 0; part < parts; ++part) {
                int64_t at = c * parts + part * W;
                i.prefetch(at), dh.prefetch(at), before.prefetch(at), di.prefetch(at);
            }
            Vec<S, W> sigmoid, rest, slope_re, slope_im;
            sigmoids<W, S>(load<W>(f.row + c), sigmoid, rest);
            Vec<S, W> lower = load<W>(lower_bound + c), upper = 1 - lower;
            Vec<S, W> decay = upper * sigmoid + lower, share = upper * rest, ddecay;
            auto x = read<PAIRS, W>(i.row, c), d = read<PAIRS, W>(dh.row, c), h = read<PAIRS, W>(h_before, c);
            auto later = carry.template get<W>(slot);
            x.re = activated<KIND, W, S>(kind, x.re, slope_re);
            d.re += later.re;
            if constexpr (PAIRS) {
                x.im = activated<KIND, W, S>(kind, x.im, slope_im);
                d.im += later.im;
                Vec<S, W> cosine = load<W>(cos + c), sine = load<W>(sin + c);
                // e^{i theta} h[t-1] and e^{-i theta} dh
                Vec<S, W> re = cosine * h.re, im = cosine * h.im;
                re -= sine * h.im;
                im += sine * h.re;
                later.re = cosine * d.re;
                later.im = cosine * d.im;
                later.re += sine * d.im;
                later.im -= sine * d.re;
                if (dtheta.needed) {
                    Vec<S, W> turn = re * d.im;
                    turn -= im * d.re;
                    dtheta.add(slot, decay * turn);
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
            carry.template set<W>(slot, later);
            write<PAIRS, W>(di.row, c, x);
            store(df.row + c, ddecay * (share * sigmoid));
            if (dlower_bound.needed) dlower_bound.add(slot, ddecay * rest);
        });
        di.next(n * parts);
        df.next(n);
    };
    for (int64_t r = 1; r < t.rows; ++r, i.next(), f.next(), dh.next()) {
        before.next();
        row(before.row);
        if (r % Sum<S>::kRun == 0) dlower_bound.template end_run<W>(n), dtheta.template end_run<W>(n);
    }
    const S* initial_state = part<S>(g.initial_state, parts, t, g.sequences);
    if (t.rows > 0) row(initial_state ? initial_state : reinterpret_cast<const S*>(zeros));
    dlower_bound.template end_run<W>(n), dtheta.template end_run<W>(n);
    if (p.dinitial_state) carry.template leave<W>(part<S>(p.dinitial_state, parts, t, g.sequences), n);
    if (dlower_bound.needed) dlower_bound.total.template write<W>(part<S>(p.lower_bound_partials, 1, t, g.sequences), n);
    if (dtheta.needed) dtheta.total.template write<W>(part<S>(p.theta_partials, 1, t, g.sequences), n);
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
        for (int64_t start = 0; start < s.count; start += run) {
            S of_run[block] = {};
            for (int64_t k = start; k < std::min(start + run, s.count); ++k)
                for (int64_t c = 0; c < n; ++c) of_run[c] += from[k * s.columns + first + c];
            for (int64_t c = 0; c < n; ++c) out[first + c] += of_run[c];
        }
    });
}

template <class Problem, class T, bool PAIRS>
void run(const Problem& p) {
    using S = StateOf<T>;
    const Given& g = p.given;
    Sequences sequences = g.sequences;
    // rows of pairs must fit where rows of numbers do
    if (PAIRS) sequences.block = std::min<int64_t>(sequences.block, kStateBytes / sizeof(S)) / 2;
    const Tiling<S> tiling(sequences);
    parallel_for(tiling.tiles(), sequences.threads, [&](int64_t number) {
        const Tile t = tiling[number];
        auto tile = [&]<Kind KIND, int W>() {
            if constexpr (std::is_same_v<Problem, Forward>) forward_tile<T, PAIRS, KIND, W>(p, tiling, t);
            else backward_tile<T, PAIRS, KIND, W>(p, tiling, t);
        };
        constexpr int full = kVectorBytes / sizeof(S), few = full > 4 ? 4 : 1;
        if (t.columns >= full && g.kind == SILU) tile.template operator()<SILU, full>();
        else if (t.columns >= full) tile.template operator()<KNOWN_LATER, full>();
        else if (t.columns >= few) tile.template operator()<KNOWN_LATER, few>();
        else tile.template operator()<KNOWN_LATER, 1>();
        finish_stores();
    });
    if constexpr (std::is_same_v<Problem, Backward>) {
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
