// The delta rule and its gradient: see ../rank_one.h; one token with all that stands around it: see native_step.h.
#include "../rank_one_backward.h"
#include "native_step.h"

extern "C" {
int vector_bytes() { return kVectorBytes; }
int delta_rule_forward(const Forward* f) {
    return unless_out_of_memory([&] { run<true>(*f); });
}
int delta_rule_backward(const Backward* b) {
    return unless_out_of_memory([&] { run_back<true>(*b); });
}
int delta_rule_step(const Step* s) {
    return unless_out_of_memory([&] { s->format == 0 ? step<double>(*s) : step<float>(*s); });
}
}
