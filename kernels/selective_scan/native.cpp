// The selective scan and its gradient: threads over sequences and blocks of channels, rows streamed in time. The state
// of a block, [K, block], stays in the L1 cache; states of all rows never exist.
#include "native_backward.h"

namespace {

template <class E, class T, int N, class S>
void forward_block(const Forward& f, const Block& t, S* scratch) {
    constexpr int W = kLanes<S>, width = N * W;
    const Problem& p = f.problem;
    const int64_t K = p.states, n = t.channels;
    S *A = scratch, *h = scratch + K * width;
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

template <class E, class T>
void forward(const Forward& f) {
    using S = StateOf<T>;
    const int64_t numbers = 2 * f.problem.states * kBlock<S>;
    for_blocks<S>(f.problem, numbers, [&]<int N>(const Block& t, S* own, int64_t) { forward_block<E, T, N>(f, t, own); });
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
int selective_scan_forward(const Forward* f) {
    return with_format(f->problem, [&]<class E, class T>() { forward<E, T>(*f); });
}
int selective_scan_backward(const Backward* b) {
    return with_format(b->problem, [&]<class E, class T>() { backward<E, T>(*b); });
}
}
