// The delta rule and its gradient: see ../rank_one.h.
#include "../rank_one_backward.h"

extern "C" {
int vector_bytes() { return kVectorBytes; }
void delta_rule_forward(const Forward* f) { run<true>(*f); }
void delta_rule_backward(const Backward* b) { run_back<true>(*b); }
}
