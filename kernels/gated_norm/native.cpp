// The gated norm on rows [B, T, H, V], and its gradient. A thread takes a run of rows and goes through it head by head;
// what it needs of a head several times stays in the L1 cache, in the format of the sums.
#include "native_backward.h"

namespace {

// y of a head u, which is x, or x and its gate in the format of the sums.
template <Activation ACT, class E, class T, class S = StateOf<T>>
OUTLINE void forward_head(const E* u, const T* gate, const S* weight, const S* bias, Statistics<S> of, int64_t n, T* y) {
    for_parts<kLanes<S>>(n, [&](int64_t i, auto part) INLINE_BODY {
        Lanes<S> z = (get(u + i, part) - of.mean) * of.inverse, slope;
        if (weight) z = z * get(weight + i, part);
        if (bias) z += get(bias + i, part);
        if constexpr (ACT != kNone) z = z * act<ACT, S>(get(gate + i, part), slope);
        put(y + i, z, part);
    });
}

template <Activation ACT, class T>
void forward(const Forward& f) {
    using S = StateOf<T>;
    const Problem& p = f.problem;
    const int64_t n = p.width, stride = p.gate_first ? whole_lines<S>(n) : 0;
    const int64_t numbers = stride + p.around_cache * whole_lines<S>(p.columns());
    parallel_with_scratch<S>(p.runs(), p.threads, numbers, [&](int64_t run, S* scratch, int64_t) {
        S* u = std::exchange(scratch, scratch + stride);
        Place<T> y(f.y, p, scratch);
        for_rows(p, run, [&](int64_t r) INLINE_BODY {
            const T *x = p.row<T>(p.x, p.x_strides, r), *gate = p.row<T>(p.gate, p.gate_strides, r);
            y.begin(r);
            for (int64_t h = 0, c = 0; h < p.heads; ++h, c += n) {
                const S *weight = p.weight.of<S>(h), *bias = p.bias.of<S>(h);
                T* out = y.head(c);
                if constexpr (ACT != kNone) {
                    if (p.gate_first) {
                        S* none = nullptr;
                        gate_first<ACT>(x + c, gate + c, n, u, none, none);
                        forward_head<kNone, S, T>(u, nullptr, weight, bias, measure(u, n, p.center, p.eps), n, out);
                        continue;
                    }
                }
                forward_head<ACT, T, T>(x + c, gate ? gate + c : nullptr, weight, bias,
                                        measure(x + c, n, p.center, p.eps), n, out);
            }
            y.end();
        });
        finish_stores();
    });
}

// Calls f with the activation and the format of x. native.py counts them in this order.
template <class T, class F>
void with_activation(const Problem& p, const F& f) {
    switch (p.activation) {
        case kNone: return f.template operator()<kNone, T>();
        case kIdentity: return f.template operator()<kIdentity, T>();
        case kSilu: return f.template operator()<kSilu, T>();
        case kSigmoid: return f.template operator()<kSigmoid, T>();
    }
}

template <class F>
int with_types(const Problem& p, const F& f) {
    return unless_out_of_memory([&] { with_format(p.format, [&]<class T>() { with_activation<T>(p, f); }); });
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
int gated_norm_forward(const Forward* p) {
    return with_types(p->problem, [&]<Activation ACT, class T>() { forward<ACT, T>(*p); });
}
int gated_norm_backward(const Backward* p) {
    return with_types(p->problem, [&]<Activation ACT, class T>() { backward<ACT, T>(*p); });
}
}
