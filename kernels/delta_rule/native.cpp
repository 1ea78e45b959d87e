// The delta rule and its gradient: see ../rank_one.h.
#include "../rank_one_backward.h"

extern "C" {
int vector_bytes() { return kVectorBytes; }
int delta_rule_forward(const Forward* f) {
    return unless_out_of_memory([&] { run<true>(*f); });
}
int delta_rule_backward(const Backward* b) {
    return unless_out_of_memory([&] { run_back<true>(*b); });
}
}
