// Causal depthwise convolution over time and its gradient. A thread takes a run of rows for a block of columns and goes
// through it row by row; the few rows of the past stay in the L1 cache.
#include <vector>

#include "../parallel.h"
#include "cut.h"
#include "sigmoid.h"

namespace {

struct Forward {
    Problem problem;
    void *y, *final_state;
};

struct Backward {
    Problem problem;
    const void* dy;  // may be null: zeros
    Strides dy_strides;
    const void* dfinal_state;   // may be null: zeros
    void *dx, *dinitial_state;  // null where not needed
    void *partials, *sums;      // [runs, width + 1, columns], [width + 1, columns]: of the taps and the bias; or null
};

template <class T>
const T* or_zeros(const T* row, int64_t column) {
    return row ? row + column : reinterpret_cast<const T*>(zeros);
}

// One row of one tile: where its vectors read and write.
template <class T, class S>
struct Row {
    int64_t columns, width, stride;
    const S *taps, *bias;          // taps are `stride` apart
    std::vector<const T*> window;  // x[t - width + 1] to x[t]
    const T* next;                 // x[t + 1], to be prefetched
    T* out;                        // y[t]

    Row(const Problem& p, int64_t column, int64_t columns)
        : columns(columns), width(p.width), stride(p.columns), taps(static_cast<const S*>(p.taps) + column),
          bias(or_zeros(static_cast<const S*>(p.bias), column)), window(p.width) {}

    void look_at(const Cut& cut, const Piece& piece, int64_t t, int64_t column) {
        for (int64_t k = 0; k < width; ++k) window[k] = or_zeros(cut.extended<T>(piece, t + k), column);
        next = t + 1 < piece.length ? cut.extended<T>(piece, t + width) + column : window[0];
    }
};

// Here `out` is the gradient of x[t - width + 1], which is complete.
template <class T, class S>
struct GradientRow : Row<T, S> {
    const T *dy, *next_dy, *dlast;  // dlast: what the final state adds to it
    std::vector<S*> past;           // dz[t], which is written, to dz[t - width + 1]
    std::vector<S*> partial;        // the sums of the taps and the bias, or nulls

    GradientRow(const Problem& p, int64_t column, int64_t columns)
        : Row<T, S>(p, column, columns), past(p.width), partial(p.width + 1) {}
};

// As many pointers as there are taps, in registers if that is a fixed number.
template <int TAPS, class T>
struct Few {
    T* at[TAPS];
    INLINE explicit Few(const std::vector<T*>& rows) { std::copy_n(rows.data(), TAPS, at); }
    INLINE T* operator[](int64_t k) const { return at[k]; }
};
template <class T>
struct Few<0, T> {
    T* const* at;
    INLINE explicit Few(const std::vector<T*>& rows) : at(rows.data()) {}
    INLINE T* operator[](int64_t k) const { return at[k]; }
};

template <int W, int TAPS, bool SILU, class T, class S>
OUTLINE void forward_row(const Row<T, S>& r) {
    const int64_t width = TAPS ? TAPS : r.width, stride = r.stride;
    const Few<TAPS, const T> window(r.window);
    const S *taps = r.taps, *bias = r.bias;
    const T* next = r.next;
    T* y = r.out;
    for_vectors<W>(r.columns, false, [&](int64_t c, int64_t) INLINE_BODY {
        __builtin_prefetch(next + c);
        auto z = load<W>(bias + c);
        for (int64_t k = 0; k < width; ++k) z += load<W>(taps + k * stride + c) * load<W>(window[k] + c);
        if constexpr (SILU) {
            Vec<S, W> of_z, of_minus_z;
            sigmoids<W, S>(z, of_z, of_minus_z);
            z *= of_z;
        }
        store(y + c, z);
    });
}

template <int W, int TAPS, bool SILU, class T, class S>
OUTLINE void backward_row(const GradientRow<T, S>& r) {
    const int64_t width = TAPS ? TAPS : r.width, stride = r.stride;
    const Few<TAPS, const T> window(r.window);
    const Few<TAPS, S> past(r.past), partial(r.partial);
    S* const dbias = r.partial[width];
    const S *taps = r.taps, *bias = r.bias;
    const T *next = r.next, *dy = r.dy, *next_dy = r.next_dy, *dlast = r.dlast;
    T* dx = r.out;
    for_vectors<W>(r.columns, false, [&](int64_t c, int64_t slot) INLINE_BODY {
        __builtin_prefetch(next + c);
        __builtin_prefetch(next_dy + c);
        auto dz = load<W>(dy + c);
        if constexpr (SILU) {
            auto z = load<W>(bias + c);
            for (int64_t k = 0; k < width; ++k) z += load<W>(taps + k * stride + c) * load<W>(window[k] + c);
            Vec<S, W> of_z, of_minus_z;
            sigmoids<W, S>(z, of_z, of_minus_z);
            dz *= of_z * (1 + z * of_minus_z);
        }
        if (dbias) {
            for (int64_t k = 0; k < width; ++k)
                store(partial[k] + slot, load<W>(partial[k] + slot) + dz * load<W>(window[k] + c));
            store(dbias + slot, load<W>(dbias + slot) + dz);
        }
        auto d = load<W>(dlast + c) + load<W>(taps + c) * dz;
        for (int64_t k = 1; k < width; ++k) d += load<W>(taps + k * stride + c) * load<W>(past[k] + slot);
        store(past[0] + slot, dz);
        store(dx + c, d);
    });
}

// f<lanes, taps, silu>() for a problem and a number of columns; 0 taps stand for any number.
template <class S, class F>
auto pick(const Problem& p, int64_t columns, const F& f) {
    constexpr int full = kVectorBytes / sizeof(S);
    auto with_taps = [&]<int W>() {
        if (p.width == 4) return p.silu ? f.template operator()<W, 4, true>() : f.template operator()<W, 4, false>();
        return p.silu ? f.template operator()<W, 0, true>() : f.template operator()<W, 0, false>();
    };
    return columns >= full ? with_taps.template operator()<full>() : with_taps.template operator()<1>();
}

// A row of results is computed in its place, or in a buffer if it is to go around the cache or is not needed.
template <class T>
struct Place {
    bool around_cache;
    T* row = nullptr;
    alignas(kCacheLine) char buffer[kStateBytes];

    T* begin(T* place) {
        row = place;
        return row && !around_cache ? row : reinterpret_cast<T*>(buffer);
    }
    void end(int64_t columns) {
        if (row && around_cache) copy_around_cache(row, buffer, columns * sizeof(T));
    }
};

// Rows of sums, one slot for each vector. They are zeros at first.
template <class S>
struct Sums {
    static constexpr int64_t line = kCacheLine / sizeof(S);
    int64_t stride;
    std::vector<S> memory;
    S* first;

    Sums(int64_t rows, int64_t columns) : stride((columns + line - 1) / line * line), memory(rows * stride + line) {
        auto address = reinterpret_cast<uintptr_t>(memory.data());
        first = reinterpret_cast<S*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
    }
    S* operator[](int64_t row) { return first + row * stride; }
    void clear() { std::fill(memory.begin(), memory.end(), S(0)); }

    void write(int64_t row, int64_t n, S* columns) {
        int64_t lanes = kVectorBytes / sizeof(S), apart = n < lanes ? n : n / lanes * lanes;
        std::copy_n((*this)[row], apart, columns);
        // the last vector has columns of the one before
        if (apart < n) std::copy_n((*this)[row] + apart, lanes, columns + n - lanes);
    }
};

template <class T>
void copy_row(const T* from, int64_t n, T* to) {
    from ? std::memcpy(to, from, n * sizeof(T)) : std::memset(to, 0, n * sizeof(T));
}

template <class T>
void forward(const Forward& f) {
    using S = StateOf<T>;
    const Problem& p = f.problem;
    const Cut cut(p, (p.width + 1) * (sizeof(S) + sizeof(T)), sizeof(S));
    auto tile = [&](int64_t i) {
        int64_t column = cut.column(i), columns = cut.columns(i);
        Row<T, S> row(p, column, columns);
        Place<T> y{p.around_cache && columns * sizeof(T) >= 1024};
        auto compute = pick<S>(p, columns, []<int W, int K, bool SILU>() { return &forward_row<W, K, SILU, T, S>; });
        cut.for_pieces(cut.run(i), [&](const Piece& piece) {
            for (int64_t t = piece.begin; t < piece.end; ++t) {
                row.look_at(cut, piece, t, column);
                row.out = y.begin(cut.row<T>(f.y, p.contiguous(), piece, t) + column);
                compute(row);
                y.end(columns);
            }
        });
        finish_stores();
    };
    auto final_state = [&](int64_t n) {
        Piece piece = cut.whole(n);
        for (int64_t i = 0; i < p.before(); ++i)
            copy_row(cut.extended<T>(piece, piece.length + i), p.columns, cut.state<T>(f.final_state, n, i));
    };
    int64_t tiles = cut.tiles(), states = p.before() ? p.sequences : 0;
    parallel_for(tiles + states, p.threads, [&](int64_t i) { i < tiles ? tile(i) : final_state(i - tiles); });
}

// Adds the sums of all runs, in double and in one order, whoever computed them.
template <class S>
void add_partials(const Backward& b, int64_t runs) {
    constexpr int64_t chunk = 512;
    int64_t numbers = (b.problem.width + 1) * b.problem.columns;
    parallel_for((numbers + chunk - 1) / chunk, b.problem.threads, [&](int64_t i) {
        double sum[chunk] = {};
        int64_t first = i * chunk, n = std::min(chunk, numbers - first);
        for (int64_t run = 0; run < runs; ++run) {
            const S* from = static_cast<const S*>(b.partials) + run * numbers + first;
            for (int64_t j = 0; j < n; ++j) sum[j] += from[j];
        }
        std::copy_n(sum, n, static_cast<S*>(b.sums) + first);
    });
}

template <class T>
void backward(const Backward& b) {
    using S = StateOf<T>;
    const Problem& p = b.problem;
    const Cut cut(p, (p.width + 1) * (3 * sizeof(S) + sizeof(T)) + 2 * sizeof(T), sizeof(S));
    auto tile = [&](int64_t i) {
        int64_t column = cut.column(i), columns = cut.columns(i);
        GradientRow<T, S> row(p, column, columns);
        Place<T> drow{p.around_cache && columns * sizeof(T) >= 1024};
        Sums<S> past(p.width, columns), partial(b.partials ? p.width + 1 : 0, columns);
        auto compute = pick<S>(p, columns, []<int W, int K, bool SILU>() { return &backward_row<W, K, SILU, T, S>; });
        auto dy = [&](const Piece& piece, int64_t t) {
            bool there = b.dy && t < piece.length;
            return or_zeros(there ? cut.row<T>(b.dy, b.dy_strides, piece, t) : nullptr, column);
        };
        cut.for_pieces(cut.run(i), [&](const Piece& piece) {
            past.clear();
            // Row t of x with the initial state in front gets its gradient from dz[t - before] to dz[t]. Those of the
            // next run that it takes are computed here as well; those after the end are zeros.
            for (int64_t t = piece.begin; t < piece.end + p.before(); ++t) {
                const bool inside = t < piece.length, summed = b.partials && t < piece.end;
                const T *dlast = nullptr, *nothing = or_zeros<T>(nullptr, 0);
                if (inside) row.look_at(cut, piece, t, column);
                else std::fill(row.window.begin(), row.window.end(), nothing);
                if (!inside && b.dfinal_state) dlast = cut.state<T>(b.dfinal_state, piece.sequence, t - piece.length);
                row.dy = dy(piece, t), row.next_dy = dy(piece, t + 1), row.dlast = or_zeros(dlast, column);
                for (int64_t k = 0; k < p.width; ++k) row.past[k] = past[(t - k + p.width) % p.width];
                for (int64_t k = 0; k <= p.width; ++k) row.partial[k] = summed ? partial[k] : nullptr;
                T* out = nullptr;
                int64_t of = t - p.before();
                if (b.dx && of >= piece.begin) out = cut.row<T>(b.dx, p.contiguous(), piece, of);
                if (b.dinitial_state && of < 0 && piece.begin == 0) out = cut.state<T>(b.dinitial_state, piece.sequence, t);
                row.out = drow.begin(out ? out + column : nullptr);
                compute(row);
                drow.end(columns);
            }
        });
        S* sums = static_cast<S*>(b.partials) + cut.run(i) * (p.width + 1) * p.columns + column;
        for (int64_t k = 0; b.partials && k <= p.width; ++k)
            partial.write(k, columns, sums + k * p.columns);
        finish_stores();
    };
    // An empty sequence hands the gradient of its final state on.
    auto empty_sequence = [&](int64_t n) {
        for (int64_t i = 0; i < p.before() && cut.whole(n).length == 0; ++i) {
            const T* dfinal = b.dfinal_state ? cut.state<T>(b.dfinal_state, n, i) : nullptr;
            copy_row(dfinal, p.columns, cut.state<T>(b.dinitial_state, n, i));
        }
    };
    int64_t tiles = cut.tiles(), states = p.cu_seqlens && b.dinitial_state ? p.sequences : 0;
    parallel_for(tiles + states, p.threads, [&](int64_t i) { i < tiles ? tile(i) : empty_sequence(i - tiles); });
    if (b.partials) add_partials<S>(b, cut.runs);
}

// Calls f with the format of x. native.py counts them in this order.
template <class F>
void with_format(const Problem& p, const F& f) {
    switch (p.format) {
        case 0: return f.template operator()<double>();
        case 1: return f.template operator()<float>();
        case 2: return f.template operator()<Half>();
        case 3: return f.template operator()<BFloat16>();
    }
}

}  // namespace

static_assert(sizeof(Forward) == 20 * 8 && sizeof(Backward) == 26 * 8, "native.py packs this many fields");

extern "C" {
int vector_bytes() { return kVectorBytes; }
void short_conv_forward(const Forward* p) {
    with_format(p->problem, [&]<class T>() { forward<T>(*p); });
}
void short_conv_backward(const Backward* p) {
    with_format(p->problem, [&]<class T>() { backward<T>(*p); });
}
}
