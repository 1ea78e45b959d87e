// Diagonal plus rank one and its gradient: see ../rank_one.h.
#include "../rank_one_backward.h"

extern "C" {
int vector_bytes() { return kVectorBytes; }
void dplr_forward(const Forward* f) { run<false>(*f); }
void dplr_backward(const Backward* b) { run_back<false>(*b); }
}
