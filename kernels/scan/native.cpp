// h[t] = a[t] h[t-1] + x[t] and its gradient: threads over sequences, and over the columns of few, rows streamed in time.
// A complex row [D, 2] is a real row of 2 D columns with another product.
#include "../waves.h"

namespace {

struct Forward {
    Sequences sequences;
    int64_t format, pairs, in_cache;
    const void *a, *x;  // [B, T, columns]
    Strides a_strides, x_strides;
    const void* initial_state;  // [N, columns], or null: zeros
    void *h, *final_state;
};

struct Backward {
    Sequences sequences;
    int64_t format, pairs, in_cache;
    const void *a, *h, *dh;  // dh may be null: zeros
    Strides a_strides, h_strides, dh_strides;
    const void *initial_state, *dfinal_state;
    void *da, *dx, *dinitial_state;  // null where not needed
};

static_assert(sizeof(Forward) == 22 * 8 && sizeof(Backward) == 27 * 8, "native.py packs this many fields");

// a * s + x, or conj(a) * s + x.
template <bool PAIRS, bool CONJ = false, class V>
INLINE V multiply_add(V a, V s, V x) {
    if constexpr (PAIRS) return complex_multiply_add<CONJ>(a, s, x);
    else return a * s + x;
}

// Parts of rows that are in the cache, or a thread's with their neighbours, are walked through in groups of vectors, each
// many rows down while its state stays in registers: row by row, the hardware fetches what lies between the parts. From
// memory, rows arrive faster one by one.
template <class S>
constexpr int kGroup = 4 * kCacheLine / sizeof(S);
constexpr int64_t kRowsOfGroup = 32;

template <class S, int W>
INLINE int64_t rows_together(int64_t left) {
    return kGrouped<S, W> ? std::min(left, kRowsOfGroup) : 1;
}

template <class S>
S* part_of_state(const void* state, const Tile& t, const Sequences& s) {
    return state ? static_cast<S*>(const_cast<void*>(state)) + t.sequence * s.columns + t.column : nullptr;
}

template <class A, class T, bool PAIRS, int W, class S>
void walk(const Forward& p, const Tiling<S>& tiling, const Tile& t, const S* start, S* end) {
    const bool backwards = p.sequences.reverse;
    const int64_t n = t.columns;
    Rows<A> a(p.a, p.a_strides, t, backwards);
    Rows<T> x(p.x, p.x_strides, t, backwards);
    Output<T> h(p.h, tiling.contiguous(), t, backwards, tiling.around_cache());
    Slots<S> state;
    state.template read<W>(start, n);

    constexpr int P = kPartLanes<S, W>, K = W / P;
    const int64_t a_step = a.step, x_step = x.step, h_step = h.rows.step;
    for (int64_t r = 0, rows; r < t.rows; r += rows, a.next(rows), x.next(rows), h.next(n, rows)) {
        rows = rows_together<S, W>(t.rows - r);
        for_vectors<W>(n, backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
            if constexpr (!kGrouped<S, W>) a.prefetch(c), x.prefetch(c), h.prefetch(c);
            Vec<S, P> s[K];
            UNROLL for (int k = 0; k < K; ++k) s[k] = load<P>(state.at + slot + k * P);
            const A* a_row = a.row + c;
            const T* x_row = x.row + c;
            T* h_row = h.row + c;
            for (int64_t i = 0; i < rows; ++i, a_row += a_step, x_row += x_step, h_row += h_step) {
                UNROLL for (int k = 0; k < K; ++k) {
                    s[k] = multiply_add<PAIRS>(load<P>(a_row + k * P), s[k], load<P>(x_row + k * P));
                    store(h_row + k * P, s[k]);
                }
            }
            UNROLL for (int k = 0; k < K; ++k) store(state.at + slot + k * P, s[k]);
        });
    }
    if (end) state.template write<W>(end, n);
}

template <class A, class T, bool PAIRS, int W, class S>
void walk(const Backward& p, const Tiling<S>& tiling, const Tile& t, const S* start, S* end) {
    const bool backwards = !p.sequences.reverse;
    const int64_t n = t.columns;
    Rows<A> a(p.a, p.a_strides, t, backwards);
    Rows<T> dh(p.dh, p.dh_strides, t, backwards), before(p.da ? p.h : nullptr, p.h_strides, t, backwards);
    Output<A> da(p.da, tiling.contiguous(), t, backwards, tiling.around_cache());
    Output<T> dx(p.dx, tiling.contiguous(), t, backwards, tiling.around_cache());
    // conj(a[t+1]) g[t+1]
    Slots<S> carry;
    carry.template read<W>(start, n);

    constexpr int P = kPartLanes<S, W>, K = W / P;
    auto step = [](const A* a, const T* dh, const auto* h_before, A* da, T* dx, Vec<S, P> carry) INLINE_BODY {
        constexpr Vec<S, P> zero = {};
        auto g = load<P>(dh) + carry;
        store(da, multiply_add<PAIRS, true>(load<P>(h_before), g, zero));
        store(dx, g);
        return multiply_add<PAIRS, true>(load<P>(a), g, zero);
    };
    const int64_t a_step = a.step, dh_step = dh.step, h_step = before.step, da_step = da.rows.step,
                  dx_step = dx.rows.step;
    before.next();
    for (int64_t r = t.continues ? 0 : 1, rows; r < t.rows; r += rows) {
        rows = rows_together<S, W>(t.rows - r);
        for_vectors<W>(n, backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
            if constexpr (!kGrouped<S, W>)
                a.prefetch(c), before.prefetch(c), dh.prefetch(c), da.prefetch(c), dx.prefetch(c);
            Vec<S, P> s[K];
            UNROLL for (int k = 0; k < K; ++k) s[k] = load<P>(carry.at + slot + k * P);
            const A* a_row = a.row + c;
            const T *dh_row = dh.row + c, *h_row = before.row + c;
            A* da_row = da.row + c;
            T* dx_row = dx.row + c;
            for (int64_t i = 0; i < rows; ++i) {
                UNROLL for (int k = 0; k < K; ++k) {
                    const int at = k * P;
                    s[k] = step(a_row + at, dh_row + at, h_row + at, da_row + at, dx_row + at, s[k]);
                }
                a_row += a_step, dh_row += dh_step, h_row += h_step, da_row += da_step, dx_row += dx_step;
            }
            UNROLL for (int k = 0; k < K; ++k) store(carry.at + slot + k * P, s[k]);
        });
        a.next(rows), dh.next(rows), before.next(rows), da.next(n, rows), dx.next(n, rows);
    }
    if (t.rows > 0 && !t.continues) {
        const S* initial_state = part_of_state<S>(p.initial_state, t, p.sequences);
        if (initial_state == nullptr) initial_state = reinterpret_cast<const S*>(zeros);
        for_vectors<W>(n, backwards, [&](int64_t first, int64_t slot) {
            for (int64_t c = first; c < first + W; c += P, slot += P) {
                auto s = load<P>(carry.at + slot);
                store(carry.at + slot, step(a.row + c, dh.row + c, initial_state + c, da.row + c, dx.row + c, s));
            }
        });
        da.next(n), dx.next(n);
    }
    if (end) carry.template write<W>(end, n);
}

// The product of a tile's decays, and its end where it starts from zeros: h, or conj(a[t]) g[t] against time.
template <class A, class T, bool PAIRS, int W, bool BACKWARD, class S>
void summarise(const void* a_data, Strides a_strides, const void* x_data, Strides x_strides, const Tile& t,
               bool backwards, S* product, S* end) {
    Rows<A> a(a_data, a_strides, t, backwards);
    Rows<T> x(x_data, x_strides, t, backwards);
    Slots<S> products, state;
    state.template read<W>(nullptr, t.columns);
    for_vectors<W>(t.columns, false, [&](int64_t, int64_t slot) {
        Vec<S, W> one = {};
        for (int i = 0; i < W; i += PAIRS ? 2 : 1) one[i] = 1;
        store(products.at + slot, one);
    });
    for (int64_t r = 0; r < t.rows; ++r, a.next(), x.next()) {
        for_vectors<W>(t.columns, backwards, [&](int64_t c, int64_t slot) INLINE_BODY {
            constexpr Vec<S, W> zero = {};
            a.prefetch(c), x.prefetch(c);
            auto decay = load<W>(a.row + c), s = load<W>(state.at + slot), added = load<W>(x.row + c);
            if constexpr (BACKWARD) s = multiply_add<PAIRS, true>(decay, s + added, zero);
            else s = multiply_add<PAIRS>(decay, s, added);
            store(state.at + slot, s);
            store(products.at + slot, multiply_add<PAIRS, BACKWARD>(decay, load<W>(products.at + slot), zero));
        });
    }
    products.template write<W>(product, t.columns);
    state.template write<W>(end, t.columns);
}

// Calls f with the formats of a and of x, and whether columns are pairs. kernels/memory.py counts them in this order.
template <class Problem, class F>
void with_format(const Problem& p, const F& f) {
    auto with_pairs = [&]<class A, class T>() {
        p.pairs ? f.template operator()<A, T, true>() : f.template operator()<A, T, false>();
    };
    switch (p.format) {
        case 0: return with_pairs.template operator()<double, double>();
        case 1: return with_pairs.template operator()<float, float>();
        case 2: return with_pairs.template operator()<Half, Half>();
        case 3: return with_pairs.template operator()<float, Half>();
        case 4: return with_pairs.template operator()<BFloat16, BFloat16>();
        case 5: return with_pairs.template operator()<float, BFloat16>();
    }
}

template <class Problem>
void run(const Problem& p) {
    constexpr bool backward = std::is_same_v<Problem, Backward>;
    const bool backwards = p.sequences.reverse != backward;
    with_format(p, [&]<class A, class T, bool PAIRS>() {
        using S = StateOf<T>;
        const Waves<S> waves(p.sequences, sizeof(T), kGroup<S>);
        const Tiling<S>& tiling = waves.tiling;
        const bool in_waves = waves.chunks > 1;
        const bool in_groups = in_waves || (p.in_cache && tiling.cuts_rows() && !tiling.around_cache());
        const void *x, *first;
        void* last;
        Strides x_strides;
        if constexpr (backward) x = p.dh, x_strides = p.dh_strides, first = p.dfinal_state, last = p.dinitial_state;
        else x = p.x, x_strides = p.x_strides, first = p.initial_state, last = p.final_state;
        auto walk_through = [&](const Tile& t, const S* start, S* end) {
            auto with = [&]<int W>() { walk<A, T, PAIRS, W>(p, tiling, t, start, end); };
            if (in_groups && t.columns >= kGroup<S>) with.template operator()<kGroup<S>>();
            else with_width<S, PAIRS>(t.columns, with);
        };
        if (in_waves) return waves.walk(backwards, first, last, walk_through);
        auto summary = [&](const Tile& t, S* product, S* end) {
            constexpr int full = kVectorBytes / sizeof(S), least = PAIRS ? 2 : 1;
            auto f = summarise<A, T, PAIRS, full, backward, S>;
            if (t.columns < full) f = summarise<A, T, PAIRS, least, backward, S>;
            f(p.a, p.a_strides, x, x_strides, t, backwards, product, end);
        };
        auto tile = [&](int64_t i) { return tiling[i]; };
        for_tiles<S>(tiling, backwards, PAIRS, 1, first, last, tile, walk_through, summary);
    });
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
void scan_forward(const Forward* p) { run(*p); }
void scan_backward(const Backward* p) { run(*p); }
}
