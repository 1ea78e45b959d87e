// Causal depthwise convolution over time and its gradient. A thread takes a run of rows for a block of columns and goes
// through it row by row; the few rows of the past stay in the L1 cache.
#include "../work.h"
#include "taps.h"

namespace {

// Problem.taps arrive as [columns, width], numbers apart as these say.
struct TapStrides {
    int64_t column, tap;
};

struct Forward {
    Problem problem;
    TapStrides tap_strides;
    void *y, *final_state;
};

struct Backward {
    Problem problem;
    TapStrides tap_strides;
    const void* dy;  // may be null: zeros
    Strides dy_strides;
    const void* dfinal_state;   // may be null: zeros
    void *dx, *dinitial_state;  // null where not needed
    void *partials, *sums;      // [runs, width + 1, columns], [width + 1, columns]: of the taps and the bias; or null
};

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

// Rows of sums, one slot for each vector.
template <class S>
struct Sums {
    int64_t rows, stride;
    S* first;

    // Takes its numbers from `scratch`, which then begins behind them.
    Sums(int64_t rows, int64_t columns, S*& scratch)
        : rows(rows), stride(whole_lines<S>(columns)), first(std::exchange(scratch, scratch + rows * stride)) {}
    S* operator[](int64_t row) { return first + row * stride; }
    int64_t numbers() const { return rows * stride; }
    void clear() { std::fill_n(first, numbers(), S(0)); }

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
    auto tile = [&](int64_t i, S* scratch) {
        int64_t column = cut.column(i), columns = cut.columns(i);
        Row<T, S> row(p, column, columns, scratch);
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
    parallel_with_scratch<S>(tiles + states, p.threads, Row<T, S>::numbers(p), [&](int64_t i, S* scratch, int64_t) {
        i < tiles ? tile(i, scratch) : final_state(i - tiles);
    });
}

template <class T>
void backward(const Backward& b) {
    using S = StateOf<T>;
    // of the sums over a run's rows
    constexpr int kLevels = 2;
    const Problem& p = b.problem;
    const Cut cut(p, (p.width + 1) * (3 * sizeof(S) + sizeof(T)) + 2 * sizeof(T), sizeof(S));
    const int64_t sums_of_parameters = b.partials ? p.width + 1 : 0;
    auto tile = [&](int64_t i, S* scratch) {
        int64_t column = cut.column(i), columns = cut.columns(i);
        GradientRow<T, S> row(p, column, columns, scratch);
        Place<T> drow{p.around_cache && columns * sizeof(T) >= 1024};
        Sums<S> past(p.width, columns, scratch), partial(sums_of_parameters, columns, scratch);
        Cascade<S, kLevels> over_rows(partial.first, partial.numbers());
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
                else std::fill_n(row.window, p.width, nothing);
                if (!inside && b.dfinal_state) dlast = cut.state<T>(b.dfinal_state, piece.sequence, t - piece.length);
                row.dy = dy(piece, t), row.next_dy = dy(piece, t + 1), row.dlast = or_zeros(dlast, column);
                for (int64_t k = 0; k < p.width; ++k) row.past[k] = past[(t - k + p.width) % p.width];
                for (int64_t k = 0; k <= p.width; ++k) row.partial[k] = summed ? partial[k] : nullptr;
                T* out = nullptr;
                int64_t of = t - p.before();
                if (b.dx && of >= piece.begin) out = cut.row<T>(b.dx, p.contiguous(), piece, of);
                const bool early = piece.begin == 0 && of < 0;
                if (b.dinitial_state && early) out = cut.state<T>(b.dinitial_state, piece.sequence, t);
                row.out = drow.begin(out ? out + column : nullptr);
                compute(row);
                drow.end(columns);
                if (summed) over_rows.next();
            }
        });
        over_rows.total();
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
    const int64_t sums = p.width + kLevels * sums_of_parameters;
    const int64_t numbers = GradientRow<T, S>::numbers(p) + sums * whole_lines<S>(cut.block);
    parallel_with_scratch<S>(tiles + states, p.threads, numbers, [&](int64_t i, S* scratch, int64_t) {
        i < tiles ? tile(i, scratch) : empty_sequence(i - tiles);
    });
    if (b.partials == nullptr) return;
    const int64_t n = sums_of_parameters * p.columns;
    add_parts(static_cast<const S*>(b.partials), cut.runs, n, n, static_cast<S*>(b.sums), p.threads);
}

// Calls f with p, whose taps then lie as the kernels read them, [width, columns].
template <class S, class P, class F>
void with_taps(P p, const F& f) {
    Problem& problem = p.problem;
    const S* from = static_cast<const S*>(problem.taps);
    Scratch<S> taps(problem.width * problem.columns);
    for (int64_t k = 0; k < problem.width; ++k) {
        S* to = taps + k * problem.columns;
        for (int64_t c = 0; c < problem.columns; ++c) to[c] = from[c * p.tap_strides.column + k * p.tap_strides.tap];
    }
    problem.taps = taps + 0;
    f(p);
}

}  // namespace

static_assert(sizeof(Forward) == 22 * 8 && sizeof(Backward) == 28 * 8, "native.py packs this many fields");

extern "C" {
int vector_bytes() { return kVectorBytes; }
int short_conv_forward(const Forward* p) {
    return unless_out_of_memory([&] {
        with_format(p->problem.format, [&]<class T>() { with_taps<StateOf<T>>(*p, forward<T>); });
    });
}
int short_conv_backward(const Backward* p) {
    return unless_out_of_memory([&] {
        with_format(p->problem.format, [&]<class T>() { with_taps<StateOf<T>>(*p, backward<T>); });
    });
}
}
