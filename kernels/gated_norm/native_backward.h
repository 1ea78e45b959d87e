// The gradient of the gated norm.
#pragma once
#include "native.h"

namespace {

// One head of the backward pass. Any pointer to a result or a parameter may be null.
template <class T, class S>
struct Head {
    const T *x, *gate, *dy;
    T *dx, *dgate;
    const S *weight, *bias;
    S *dweight, *dbias;          // sums
    S *dn, *u, *opened, *slope;  // in the cache; the last three if the gate comes first
    Statistics<S> of;
    int64_t n;
    bool center;
};

// dn, the gradient of a gate that comes last, and the sums; then du as far as it is the same for all.
template <Activation ACT, class E, class T, class S, class F>
INLINE void backward_head(const Head<T, S>& h, const E* u, const F& write) {
    constexpr int W = kLanes<S>;
    Lanes<S> along = {}, total = {};
    for_parts<W>(h.n, [&](int64_t i, auto part) INLINE_BODY {
        Lanes<S> dz = get(h.dy + i, part), n = (get(u + i, part) - h.of.mean) * h.of.inverse, dn, weight;
        if (h.weight) weight = get(h.weight + i, part);
        if constexpr (ACT != kNone) {
            Lanes<S> slope, opened = act<ACT, S>(get(h.gate + i, part), slope);
            if (h.dgate) {
                Lanes<S> z = h.weight ? n * weight : n;
                if (h.bias) z += get(h.bias + i, part);
                put(h.dgate + i, dz * z * slope, part);
            }
            dz = dz * opened;
        }
        dn = h.weight ? dz * weight : dz;
        if (h.dweight) store(h.dweight + i, load<W>(h.dweight + i) + dz * n);
        if (h.dbias) store(h.dbias + i, load<W>(h.dbias + i) + dz);
        along += dn * n, total += dn;
        store(h.dn + i, dn);
    });
    const S inverse = h.of.inverse, slant = -inverse * inverse * (sum(along) / S(h.n));
    const S mean = h.center ? sum(total) / S(h.n) : S(0);
    for_parts<W>(h.n, [&](int64_t i, auto part) INLINE_BODY {
        write(i, part, (load<W>(h.dn + i) - mean) * inverse + (get(u + i, part) - h.of.mean) * slant);
    });
}

template <Activation ACT, class T, class S>
OUTLINE void backward_gate_last(const Head<T, S>& h) {
    backward_head<ACT>(h, h.x, [&](int64_t i, auto part, auto du) INLINE_BODY {
        if (h.dx) put(h.dx + i, du, part);
    });
}

template <class T, class S>
OUTLINE void backward_gate_first(const Head<T, S>& h) {
    constexpr int W = kLanes<S>;
    backward_head<kNone>(h, h.u, [&](int64_t i, auto part, auto du) INLINE_BODY {
        if (h.dgate) put(h.dgate + i, du * get(h.x + i, part) * load<W>(h.slope + i), part);
        if (h.dx) put(h.dx + i, du * load<W>(h.opened + i), part);
    });
}

template <Activation ACT, class T>
void backward(const Backward& b) {
    using S = StateOf<T>;
    const Problem& p = b.problem;
    const int64_t n = p.width, columns = p.columns(), stride = whole_lines<S>(n);
    const int64_t buffers = p.gate_first ? 4 : 1, sums = b.dweight || b.dbias ? 2 * p.heads : 0;
    constexpr int kLevels = 2;
    const int64_t numbers = (buffers + kLevels * sums) * stride + p.around_cache * 2 * whole_lines<S>(columns);
    parallel_with_scratch<S>(p.runs(), p.threads, numbers, [&](int64_t run, S* scratch, int64_t) {
        S *own = std::exchange(scratch, scratch + buffers * stride), *dparameters = scratch;
        scratch += kLevels * sums * stride;
        Cascade<S, kLevels> over_rows(dparameters, sums * stride);
        Place<T> dx(b.dx, p, scratch), dgate(b.dgate, p, scratch);
        for_rows(p, run, [&](int64_t r) INLINE_BODY {
            const T *x = p.row<T>(p.x, p.x_strides, r), *gate = p.row<T>(p.gate, p.gate_strides, r);
            const T* dy = p.row<T>(b.dy, b.dy_strides, r);
            dx.begin(r), dgate.begin(r);
            for (int64_t h = 0, c = 0; h < p.heads; ++h, c += n) {
                Head<T, S> head{x + c, gate ? gate + c : nullptr, dy + c, dx.head(c), dgate.head(c),
                                p.weight.of<S>(h), p.bias.of<S>(h), b.dweight ? dparameters + h * stride : nullptr,
                                b.dbias ? dparameters + (p.heads + h) * stride : nullptr, own};
                head.n = n, head.center = p.center;
                if constexpr (ACT != kNone) {
                    if (p.gate_first) {
                        head.u = own + stride, head.opened = own + 2 * stride, head.slope = own + 3 * stride;
                        gate_first<ACT>(head.x, head.gate, n, head.u, head.opened, head.slope);
                        head.of = measure(head.u, n, p.center, p.eps);
                        backward_gate_first(head);
                        continue;
                    }
                }
                head.of = measure(head.x, n, p.center, p.eps);
                backward_gate_last<ACT>(head);
            }
            dx.end(), dgate.end();
            over_rows.next();
        });
        over_rows.total();
        S* partials = static_cast<S*>(b.partials) + (b.partials ? 2 * run * columns : 0);
        for (void* sum : {b.dweight, b.dbias}) {
            S* to = b.partials ? std::exchange(partials, partials + columns) : static_cast<S*>(sum);
            for (int64_t i = 0; sum && i < p.heads; ++i) std::copy_n(dparameters + i * stride, n, to + i * n);
            dparameters += p.heads * stride;
        }
        finish_stores();
    });
    if (b.partials == nullptr) return;
    const S* from = static_cast<const S*>(b.partials);
    add_parts(from, p.runs(), 2 * columns, columns, static_cast<S*>(b.dweight), p.threads);
    add_parts(from + columns, p.runs(), 2 * columns, columns, static_cast<S*>(b.dbias), p.threads);
}

}  // namespace
