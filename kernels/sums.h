// Sums over rows that lose few digits, however many rows there are.
#pragma once
#include <algorithm>

#include "vectors.h"

// n sums over rows, in LEVELS: rows are added to the lowest; what kFew of them make there goes to the level above, and
// so on. Added to the sum of all rows before it, each would be rounded to the digits of that.
template <class S, int LEVELS>
class Cascade {
    S* const lowest;
    const int64_t n;
    int64_t count[LEVELS] = {};

    S* at(int level) const { return lowest + level * n; }

    OUTLINE void carry() {
        constexpr int W = kLanes<S>;
        int level = 0;
        do {
            S *from = at(level), *to = at(level + 1);
            if (count[level + 1]++ == 0) std::fill_n(to, n, S(0));
            for (int64_t i = 0, end = n; i < end; i += W) {
                store(to + i, load<W>(to + i) + load<W>(from + i));
                store(from + i, Lanes<S>{});
            }
            count[level] = 0;
        } while (++level + 1 < LEVELS && count[level] == kFew);
    }

  public:
    static constexpr int64_t kFew = 32;

    // memory: LEVELS · n numbers, n in whole vectors. The first n of them are zeros then, and rows are added to these.
    Cascade(S* memory, int64_t n) : lowest(memory), n(n) { std::fill_n(lowest, n, S(0)); }

    // After every row.
    INLINE void next() {
        if (++count[0] == kFew) carry();
    }

    // The sums over all rows, in the place of the lowest level: no more rows after this.
    S* total() {
        constexpr int W = kLanes<S>;
        for (int level = 1; level < LEVELS; ++level)
            for (int64_t i = 0; count[level] > 0 && i < n; i += W)
                store(lowest + i, load<W>(lowest + i) + load<W>(at(level) + i));
        return lowest;
    }
};
