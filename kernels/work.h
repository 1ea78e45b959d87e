// Work shared among threads that each need numbers of their own, and sums of what they made.
#pragma once
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "parallel.h"
#include "sums.h"

// Uninitialised numbers at the start of a cache line.
template <class S>
struct Scratch {
    struct Free {
        void operator()(S* p) const { ::operator delete[](p, std::align_val_t(kCacheLine)); }
    };
    std::unique_ptr<S[], Free> memory;
    explicit Scratch(int64_t n) : memory(new (std::align_val_t(kCacheLine)) S[n]) {}
    S* operator+(int64_t i) const { return memory.get() + i; }
};

// What a C function returns to Python, which no exception may reach: 1 if memory ran out, else 0.
template <class F>
int unless_out_of_memory(const F& f) {
    try {
        f();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

struct Nothing {};

// Calls f(i, scratch, thread) for i in [0, n), each once, on torch's threads; `numbers` of scratch to each thread, which
// has a GUARD meanwhile. The caller's thread takes the memory, so that it is the one to throw where there is none.
template <class S, class GUARD = Nothing, class F>
void parallel_with_scratch(int64_t n, int64_t threads, int64_t numbers, const F& f) {
    threads = std::min(n, threads);
    std::vector<Scratch<S>> scratch;
    scratch.reserve(threads);
    for (int64_t i = 0; i < threads; ++i) scratch.emplace_back(numbers);
    std::atomic<int64_t> next = 0;
    parallel_for(threads, threads, [&](int64_t thread) {
        [[maybe_unused]] GUARD guard;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i, scratch[thread] + 0, thread);
    });
}

// to[i] = the sum of from[part][i] over the parts, which lie `apart`, in double and in one order, whoever computed them.
template <class S, class T>
void add_parts(const S* from, int64_t parts, int64_t apart, int64_t numbers, T* to, int64_t threads) {
    if (to == nullptr) return;
    constexpr int64_t block = 512;
    parallel_for((numbers + block - 1) / block, threads, [&](int64_t i) {
        alignas(kCacheLine) double memory[3 * block];
        const int64_t first = i * block, n = std::min(block, numbers - first);
        Cascade<double, 3> sums(memory, whole_lines<double>(n));
        for (int64_t part = 0; part < parts; ++part, sums.next()) {
            const S* row = from + part * apart + first;
            for (int64_t j = 0; j < n; ++j) memory[j] += row[j];
        }
        const double* total = sums.total();
        for (int64_t j = 0; j < n; ++j) store(to + first + j, Vec<StateOf<T>, 1>{StateOf<T>(total[j])});
    });
}
