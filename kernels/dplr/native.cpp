// Diagonal plus rank one and its gradient: see ../rank_one.h.
#include "../rank_one_backward.h"

extern "C" {
int vector_bytes() { return kVectorBytes; }
int dplr_forward(const Forward* f) {
    return unless_out_of_memory([&] { run<false>(*f); });
}
int dplr_backward(const Backward* b) {
    return unless_out_of_memory([&] { run_back<false>(*b); });
}
}
