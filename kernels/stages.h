// Work of one team of threads that follows in stages.
#pragma once
#include <thread>

#include "parallel.h"
#include "simd.h"

// How much of what threads have taken, one item after the other, is done. A thread that takes an item of the next stage
// waits for all of the stage before, which others have taken: whoever waits, waits for one that works.
class Progress {
    // So often a thread looks whether it may go on before it lets others run: longer than it waits for one that works.
    static constexpr int64_t kSpins = 20000;
    std::atomic<int64_t> done = 0;

    static void pause_a_little() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

  public:
    void finish_one() { done.fetch_add(1, std::memory_order_release); }
    void wait_for(int64_t items) const {
        // whom it waits for may need this processor, and who gives it up may not have it back for long
        for (int64_t spins = 1; done.load(std::memory_order_acquire) < items; ++spins)
            if (spins % kSpins == 0) std::this_thread::yield();
            else pause_a_little();
    }
};
