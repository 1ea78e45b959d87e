// Work shared among torch's own threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// GOMP_parallel of the OpenMP runtime that torch has loaded, or null: then everything runs on the caller's thread.
// It is handed over as a pointer so that a library never links, and so never starts, a second runtime.
using RunTeam = void (*)(void (*body)(void*), void* argument, unsigned threads, unsigned flags);
static RunTeam run_team = nullptr;

extern "C" void use_openmp(RunTeam function) { run_team = function; }

// How many threads share the work.
extern "C" int team_size() {
    if (run_team == nullptr) return 1;
    std::atomic<int> size = 0;
    run_team([](void* argument) { ++*static_cast<std::atomic<int>*>(argument); }, &size, 0, 0);
    return size;
}

// Calls f(i) for i in [0, n), each once, by whichever thread is free.
template <class F>
void parallel_for(int64_t n, int64_t threads, const F& f) {
    if (n <= 1 || threads <= 1 || run_team == nullptr) {
        for (int64_t i = 0; i < n; ++i) f(i);
        return;
    }
    struct Team {
        const F& f;
        int64_t n;
        std::atomic<int64_t> next;
    } team{f, n, 0};
    auto body = [](void* argument) {
        Team& team = *static_cast<Team*>(argument);
        for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.n;) team.f(i);
    };
    // 0 threads means as many as torch set; naming another number makes the runtime rebuild its pool.
    run_team(body, &team, 0, 0);
}

// Until another thread has counted so far.
inline void wait_for(const std::atomic<int64_t>& counted, int64_t number) {
    // longer than a part of the work takes: the other thread is not running
    constexpr int tries = 4096;
    for (int n = 0; counted.load(std::memory_order_acquire) < number; ++n) {
        if (n >= tries) std::this_thread::yield();
#if defined(__x86_64__)
        else _mm_pause();
#endif
    }
}
