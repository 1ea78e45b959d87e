// The selective scan and its gradient: threads over sequences and blocks of channels, rows streamed in time. The state
// of a block, [K, block], stays in the L1 cache; states of all rows never exist.
#include <algorithm>
#include <memory>
#include <new>

#include "../parallel.h"
#include "../exp.h"

namespace {

// How a tensor's rows lie in memory, in elements; columns lie side by side.
struct Strides {
    int64_t batch, row;
};

// All fields are 8 bytes: native.py packs them as one array. S is the state dtype; its tensors are contiguous.
struct Problem {
    const int64_t* cu_seqlens;  // [sequences + 1] with batch 1, or null: `sequences` of `rows` rows
    int64_t sequences, rows, channels, states, format, threads;
    const void *x, *delta;  // [rows of all sequences, channels]
    Strides x_strides, delta_strides;
    const void *A, *B, *C, *D;  // in S: [channels, states], twice [rows of all sequences, states], [channels] or null
    const void* initial_state;  // [sequences, channels, states], or null: zeros
};

struct Forward {
    Problem problem;
    void *y, *final_state;
};

struct Backward {
    Problem problem;
    const void* dy;  // may be null: zeros
    Strides dy_strides;
    const void* dfinal_state;   // may be null: zeros
    void *dx, *ddelta, *dinitial_state;  // null where not needed
    void *dA, *dB, *dC, *dD;             // null where not needed
    void *dA_parts, *dD_parts;           // in S: [sequences, channels, states], [sequences, channels]
    void *dB_parts, *dC_parts;           // in S: [blocks, rows of all sequences, states]
};

static_assert(sizeof(Forward) == 20 * 8 && sizeof(Backward) == 33 * 8, "native.py packs this many fields");

// A block of channels is so many vectors wide (native.py knows it too).
constexpr int kVectors = 4;
// Before loops over these: what they index stays in registers.
#define UNROLL _Pragma("GCC unroll 4")
// Rows whose states are kept at once on the way back, in the L2 cache.
constexpr int64_t kChunk = 32;
// The row that is to be prefetched.
constexpr int64_t kAhead = 4;

template <class S>
constexpr int kLanes = kVectorBytes / sizeof(S);
template <class S>
constexpr int kBlock = kVectors * kLanes<S>;

// Uninitialised numbers at the start of a cache line.
template <class S>
struct Scratch {
    struct Free {
        void operator()(S* p) const { ::operator delete[](p, std::align_val_t(kCacheLine)); }
    };
    std::unique_ptr<S[], Free> memory;
    explicit Scratch(int64_t n) : memory(new (std::align_val_t(kCacheLine)) S[n]) {}
    S* operator+(int64_t i) const { return memory.get() + i; }
};

// A block of channels of one sequence.
struct Tile {
    int64_t sequence, batch, first_row, rows, block, channel, channels;
};

template <class S>
Tile tile_of(const Problem& p, int64_t i) {
    int64_t blocks = (p.channels + kBlock<S> - 1) / kBlock<S>, n = i / blocks, block = i % blocks;
    int64_t channel = block * kBlock<S>, channels = std::min<int64_t>(kBlock<S>, p.channels - channel);
    if (const int64_t* first = p.cu_seqlens) return {n, 0, first[n], first[n + 1] - first[n], block, channel, channels};
    return {n, n, 0, p.rows, block, channel, channels};
}

template <class T>
T* rows_of(const void* tensor, Strides s, const Tile& t) {
    if (tensor == nullptr) return nullptr;
    return static_cast<T*>(const_cast<void*>(tensor)) + t.batch * s.batch + t.first_row * s.row + t.channel;
}

// The first n of W numbers; zeros behind them, or all zeros where there are none.
template <int W, class T>
INLINE Vec<StateOf<T>, W> load_some(const T* from, int64_t n) {
    if (from && n >= W) return load<W>(from);
    T part[W] = {};
    if (from && n > 0) std::memcpy(part, from, n * sizeof(T));
    return load<W>(part);
}

template <int W, class T>
INLINE void store_some(T* to, Vec<StateOf<T>, W> v, int64_t n) {
    if (n >= W) return store(to, v);
    T part[W];
    store(part, v);
    if (n > 0) std::memcpy(to, part, n * sizeof(T));
}

// [channels, states] as [states, width], with zeros for channels that there are not; and back.
template <class S>
OUTLINE void transpose_in(const S* from, int64_t channels, int64_t states, int64_t width, S* to) {
    for (int64_t k = 0; k < states; ++k)
        for (int64_t d = 0; d < width; ++d) to[k * width + d] = from && d < channels ? from[d * states + k] : S(0);
}

template <class S, class From>
OUTLINE void transpose_out(const From* from, int64_t channels, int64_t states, int64_t width, S* to) {
    for (int64_t d = 0; d < channels; ++d)
        for (int64_t k = 0; k < states; ++k) to[d * states + k] = S(from[k * width + d]);
}

// The sum of all lanes, by halves.
template <int W, class S>
INLINE S sum(Vec<S, W> v) {
    if constexpr (W == 1) return v[0];
    else {
        Vec<S, W / 2> half[2];
        std::memcpy(half, &v, sizeof v);
        return sum<W / 2, S>(half[0] + half[1]);
    }
}

// One row's numbers of a block, a vector of channels each.
template <class S, int N>
struct Row {
    static constexpr int W = kLanes<S>;
    Vec<S, W> at[N];

    template <class T>
    INLINE void read(const T* from, int64_t channels) {
        UNROLL
        for (int v = 0; v < N; ++v) at[v] = load_some<W>(from ? from + v * W : nullptr, channels - v * W);
    }
    template <class T>
    INLINE void write(T* to, int64_t channels) const {
        UNROLL
        for (int v = 0; v < N; ++v) store_some<W>(to + v * W, at[v], channels - v * W);
    }
    INLINE Vec<S, W>& operator[](int v) { return at[v]; }
};

// h' = exp(Δ A) h + Δ x B for a row of a block; calls f(k, v, decay, h') for each vector.
template <class S, int N, class F>
INLINE void step(const S* A, const S* B, Row<S, N>& delta, Row<S, N>& input, int64_t states, const S* h, const F& f) {
    constexpr int W = kLanes<S>, width = N * W;
    for (int64_t k = 0; k < states; ++k) {
        UNROLL
        for (int v = 0; v < N; ++v) {
            const int64_t at = k * width + v * W;
            auto decay = exponential<W, S>(delta[v] * load<W>(A + at));
            f(k, v, decay, decay * load<W>(h + at) + input[v] * B[k]);
        }
    }
}

template <class S, class T>
struct Walk {
    const T* row;
    int64_t step;
    Walk(const void* tensor, Strides s, const Tile& t)
        : row(rows_of<const T>(tensor, s, t)), step(s.row) {}
    INLINE const T* operator()(int64_t t) const { return row ? row + t * step : nullptr; }
    INLINE void prefetch(int64_t t) const {
        if (row == nullptr) return;
        const char* line = reinterpret_cast<const char*>(row + t * step);
        for (int i = 0; i < kBlock<S> * int(sizeof(T)); i += kCacheLine) __builtin_prefetch(line + i);
    }
};

template <class E, class T, int N>
void forward_tile(const Forward& f, const Tile& t) {
    using S = StateOf<T>;
    constexpr int W = kLanes<S>, width = N * W;
    const Problem& p = f.problem;
    const int64_t K = p.states, n = t.channels;
    Scratch<S> scratch(2 * K * width);
    S *A = scratch + 0, *h = scratch + K * width;
    const int64_t state = (t.sequence * p.channels + t.channel) * K;
    const S* initial = static_cast<const S*>(p.initial_state);
    transpose_in(static_cast<const S*>(p.A) + t.channel * K, n, K, width, A);
    transpose_in(initial ? initial + state : nullptr, n, K, width, h);
    Row<S, N> D, x, delta, input, y;
    D.read(p.D ? static_cast<const S*>(p.D) + t.channel : nullptr, n);
    const Walk<S, T> xs(p.x, p.x_strides, t);
    const Walk<S, E> deltas(p.delta, p.delta_strides, t);
    const int64_t first = t.batch * p.rows + t.first_row;
    const S *B = static_cast<const S*>(p.B) + first * K, *C = static_cast<const S*>(p.C) + first * K;
    T* out = static_cast<T*>(f.y) + first * p.channels + t.channel;
    for (int64_t r = 0; r < t.rows; ++r, B += K, C += K, out += p.channels) {
        xs.prefetch(r + kAhead), deltas.prefetch(r + kAhead);
        x.read(xs(r), n), delta.read(deltas(r), n);
        UNROLL
        for (int v = 0; v < N; ++v) input[v] = delta[v] * x[v], y[v] = D[v] * x[v];
        step<S, N>(A, B, delta, input, K, h, [&](int64_t k, int v, auto, auto after) INLINE_BODY {
            store(h + k * width + v * W, after);
            y[v] += after * C[k];
        });
        y.write(out, n);
    }
    transpose_out(h, n, K, width, static_cast<S*>(f.final_state) + state);
}

// Walks forward once and keeps the state before every chunk; then takes the chunks from the last to the first, makes the
// states of each again, and goes back through its rows.
template <class E, class T, int N>
void backward_tile(const Backward& b, const Tile& t) {
    using S = StateOf<T>;
    constexpr int W = kLanes<S>, width = N * W;
    const Problem& p = b.problem;
    const int64_t K = p.states, n = t.channels, size = K * width, chunks = (t.rows + kChunk - 1) / kChunk;
    Scratch<S> scratch((3 + kChunk + 1 + kChunk + std::max<int64_t>(chunks, 1)) * size);
    Scratch<double> dA_total(size);
    S *A = scratch + 0, *carry = scratch + size, *dA = scratch + 2 * size, *states = scratch + 3 * size;
    S *decays = states + (kChunk + 1) * size, *before = decays + kChunk * size;
    std::fill_n(dA_total + 0, size, 0.0);

    const int64_t state = (t.sequence * p.channels + t.channel) * K;
    const S* initial = static_cast<const S*>(p.initial_state);
    const S* dfinal = static_cast<const S*>(b.dfinal_state);
    transpose_in(static_cast<const S*>(p.A) + t.channel * K, n, K, width, A);
    transpose_in(initial ? initial + state : nullptr, n, K, width, before);
    transpose_in(dfinal ? dfinal + state : nullptr, n, K, width, carry);
    Row<S, N> D, dD, x, delta, input, dy;
    D.read(p.D ? static_cast<const S*>(p.D) + t.channel : nullptr, n);
    dD.read(static_cast<const S*>(nullptr), n);
    const Walk<S, T> xs(p.x, p.x_strides, t), dys(b.dy, b.dy_strides, t);
    const Walk<S, E> deltas(p.delta, p.delta_strides, t);
    const int64_t first = t.batch * p.rows + t.first_row, all = p.cu_seqlens ? p.rows : p.sequences * p.rows;
    const S *B = static_cast<const S*>(p.B) + first * K, *C = static_cast<const S*>(p.C) + first * K;
    S* dB = static_cast<S*>(b.dB_parts) + (t.block * all + first) * K;
    S* dC = static_cast<S*>(b.dC_parts) + (t.block * all + first) * K;
    T* dx = b.dx ? static_cast<T*>(b.dx) + first * p.channels + t.channel : nullptr;
    E* ddelta = b.ddelta ? static_cast<E*>(b.ddelta) + first * p.channels + t.channel : nullptr;

    auto read = [&](int64_t r) INLINE_BODY {
        x.read(xs(r), n), delta.read(deltas(r), n);
        UNROLL
        for (int v = 0; v < N; ++v) input[v] = delta[v] * x[v];
    };
    for (int64_t c = 0; c + 1 < chunks; ++c) {
        S* h = before + (c + 1) * size;
        std::copy_n(h - size, size, h);
        for (int64_t r = c * kChunk; r < (c + 1) * kChunk; ++r) {
            xs.prefetch(r + kAhead), deltas.prefetch(r + kAhead);
            read(r);
            step<S, N>(A, B + r * K, delta, input, K, h, [&](int64_t k, int v, auto, auto after) INLINE_BODY {
                store(h + k * width + v * W, after);
            });
        }
    }
    for (int64_t c = chunks - 1; c >= 0; --c) {
        const int64_t begin = c * kChunk, rows = std::min(kChunk, t.rows - begin);
        std::copy_n(before + c * size, size, states);
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t r = begin + i;
            read(r);
            dy.read(dys(r), n);
            const S* h = states + i * size;
            Vec<S, W> along;
            step<S, N>(A, B + r * K, delta, input, K, h, [&](int64_t k, int v, auto decay, auto after) INLINE_BODY {
                const int64_t at = i * size + k * width + v * W;
                store(decays + at, decay);
                store(states + at + size, after);
                along = v == 0 ? after * dy[v] : along + after * dy[v];
                if (v == N - 1) dC[r * K + k] = sum<W, S>(along);
            });
        }
        std::fill_n(dA, size, S(0));
        for (int64_t i = rows - 1; i >= 0; --i) {
            const int64_t r = begin + i;
            read(r);
            dy.read(dys(r), n);
            // of Δ x, and of Δ by way of the decays
            Row<S, N> dinput, dstep;
            UNROLL
            for (int v = 0; v < N; ++v) dinput[v] = dstep[v] = Vec<S, W>{};
            for (int64_t k = 0; k < K; ++k) {
                const S of_B = B[r * K + k], of_C = C[r * K + k];
                Vec<S, W> along = {};
                UNROLL
                for (int v = 0; v < N; ++v) {
                    const int64_t at = k * width + v * W;
                    auto g = load<W>(carry + at) + dy[v] * of_C;
                    along += g * input[v];
                    dinput[v] += g * of_B;
                    auto earlier = g * load<W>(decays + i * size + at);
                    store(carry + at, earlier);
                    auto dexponent = earlier * load<W>(states + i * size + at);
                    dstep[v] += dexponent * load<W>(A + at);
                    store(dA + at, load<W>(dA + at) + dexponent * delta[v]);
                }
                dB[r * K + k] = sum<W, S>(along);
            }
            UNROLL
            for (int v = 0; v < N; ++v) {
                dD[v] += x[v] * dy[v];
                dstep[v] += x[v] * dinput[v];
                dinput[v] = delta[v] * dinput[v] + D[v] * dy[v];
            }
            if (dx) dinput.write(dx + r * p.channels, n);
            if (ddelta) dstep.write(ddelta + r * p.channels, n);
        }
        for (int64_t i = 0; i < size; ++i) dA_total.memory[i] += dA[i];
    }
    if (b.dinitial_state) transpose_out(carry, n, K, width, static_cast<S*>(b.dinitial_state) + state);
    if (b.dA) transpose_out(dA_total + 0, n, K, width, static_cast<S*>(b.dA_parts) + state);
    if (b.dD) dD.write(static_cast<S*>(b.dD_parts) + t.sequence * p.channels + t.channel, n);
}

// to[i] = the sum of from[part][i] over the parts, in double and in one order, whoever computed them.
template <class S, class T>
void add_parts(const void* from, int64_t parts, int64_t numbers, void* to, int64_t threads) {
    if (to == nullptr) return;
    constexpr int64_t chunk = 512;
    parallel_for((numbers + chunk - 1) / chunk, threads, [&](int64_t i) {
        double total[chunk] = {};
        int64_t first = i * chunk, n = std::min(chunk, numbers - first);
        for (int64_t part = 0; part < parts; ++part) {
            const S* row = static_cast<const S*>(from) + part * numbers + first;
            for (int64_t j = 0; j < n; ++j) total[j] += row[j];
        }
        for (int64_t j = 0; j < n; ++j) store(static_cast<T*>(to) + first + j, Vec<StateOf<T>, 1>{StateOf<T>(total[j])});
    });
}

// Calls f with the formats of delta and of x. kernels/memory.py counts them in this order.
template <class F>
void with_format(const Problem& p, const F& f) {
    switch (p.format) {
        case 0: return f.template operator()<double, double>();
        case 1: return f.template operator()<float, float>();
        case 2: return f.template operator()<Half, Half>();
        case 3: return f.template operator()<float, Half>();
        case 4: return f.template operator()<BFloat16, BFloat16>();
        case 5: return f.template operator()<float, BFloat16>();
    }
}

// Calls f with each tile and the number of its vectors.
template <class S, class F>
void for_tiles(const Problem& p, const F& f) {
    const int64_t blocks = (p.channels + kBlock<S> - 1) / kBlock<S>;
    parallel_for(p.sequences * blocks, p.threads, [&](int64_t i) {
        const Tile t = tile_of<S>(p, i);
        if (t.channels <= kLanes<S>) f.template operator()<1>(t);
        else f.template operator()<kVectors>(t);
    });
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
void selective_scan_forward(const Forward* f) {
    with_format(f->problem, [&]<class E, class T>() {
        for_tiles<StateOf<T>>(f->problem, [&]<int N>(const Tile& t) { forward_tile<E, T, N>(*f, t); });
    });
}
void selective_scan_backward(const Backward* b) {
    const Problem& p = b->problem;
    with_format(p, [&]<class E, class T>() {
        using S = StateOf<T>;
        for_tiles<S>(p, [&]<int N>(const Tile& t) { backward_tile<E, T, N>(*b, t); });
        const int64_t blocks = (p.channels + kBlock<S> - 1) / kBlock<S>;
        const int64_t rows = p.cu_seqlens ? p.rows : p.sequences * p.rows;
        add_parts<S, S>(b->dA_parts, p.sequences, p.channels * p.states, b->dA, p.threads);
        add_parts<S, S>(b->dD_parts, p.sequences, p.channels, b->dD, p.threads);
        add_parts<S, T>(b->dB_parts, blocks, rows * p.states, b->dB, p.threads);
        add_parts<S, T>(b->dC_parts, blocks, rows * p.states, b->dC, p.threads);
    });
}
}
