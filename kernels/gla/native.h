// What gla's forward and backward kernels share: the problem as native.py packs it, and who does which part.
#pragma once
#include "../products.h"

// All fields are 8 bytes: native.py packs them as one array. S is the state dtype; its tensors but log_decay are
// contiguous.
struct Problem {
    const int64_t* cu_seqlens;  // [sequences + 1] with batch 1, or null: `sequences` of `rows` rows
    int64_t sequences, rows, heads, keys, values;
    int64_t decays;  // of a head and row: `keys` or 1
    int64_t format, threads;
    double scale;
    Heads q, k, v;              // [B, rows, heads, keys or values]
    Heads log_decay;            // in S: [B, rows, heads, decays], or null: nothing decays
    const void* initial_state;  // in S: [sequences, heads, keys, values], or null: zeros
    const void* bonus;          // in S: [heads, keys], or null: a row sees the state after it
};

struct Forward {
    Problem problem;
    void *y, *final_state;
};

struct Backward {
    Problem problem;
    Heads dy;                                          // null: zeros
    const void* dfinal_state;                          // null: zeros
    void *dq, *dk, *dv, *dlog_decay, *dinitial_state;  // null where not needed
    void* dbonus;                                      // null where not needed
    void* dbonus_parts;                                // in S: [chunks, heads, keys], or null with dbonus
    void* states;   // in S: twice [chunks, heads, whole vectors of values, whole vectors of keys]
    int64_t chunk;  // rows of a chunk
};

static_assert(sizeof(Forward) == 30 * 8 && sizeof(Backward) == 42 * 8, "native.py packs this many fields");

// What a thread does from the first row of a sequence to the last. The heads take turns chunk by chunk, so that every
// page of memory is visited once.
struct Share {
    int64_t sequence, head, heads, column, columns;
};

// Cuts sequences into shares of heads and, where there are few of these, of a state's columns; two for each thread.
class Shares {
    int64_t heads, columns, group, block;

  public:
    int64_t groups, blocks, count;

    // block: of columns, a multiple of `unit`.
    Shares(const Problem& p, int64_t unit, int64_t threads) : heads(p.heads), columns(p.values) {
        // the states of one share stay in the L2 cache
        constexpr int64_t most = 8;
        const int64_t wanted = threads > 1 ? 2 * threads : 1, units = (columns + unit - 1) / unit;
        const int64_t parts = std::clamp<int64_t>((wanted + p.sequences - 1) / p.sequences, 1, heads);
        group = std::min((heads + parts - 1) / parts, most);
        groups = (heads + group - 1) / group;
        const int64_t known = p.sequences * groups, cuts = std::min(units, (wanted + known - 1) / known);
        block = (units + cuts - 1) / cuts * unit;
        blocks = (columns + block - 1) / block;
        count = known * blocks;
    }
    int64_t widest() const { return std::min(block, columns); }
    Share operator[](int64_t i) const {
        const int64_t column = i % blocks * block, head = i / blocks % groups * group;
        return {i / blocks / groups, head, std::min(group, heads - head), column, std::min(block, columns - column)};
    }
};

// The columns of a share in a head's state among states [sequences, heads, keys, values]; null where there are none.
template <class S>
S* state_of(const void* states, const Problem& p, const Share& share, int64_t head) {
    if (states == nullptr) return nullptr;
    const int64_t number = share.sequence * p.heads + head;
    return static_cast<S*>(const_cast<void*>(states)) + number * p.keys * p.values + share.column;
}

// The sum of a[i] b[i] c[i]; a and c have zeros behind them, up to whole vectors.
template <class S>
INLINE S dot_of_three(const S* a, const S* b, const S* c, int64_t n) {
    constexpr int W = kLanes<S>;
    Lanes<S> total = {};
    for (int64_t i = 0; i < n; i += W)
        total = multiply_add(load<W>(a + i) * load_some(b + i, n - i), load<W>(c + i), total);
    return sum(total);
}

// y += (S')ᵀ q for S' = diag(decay) S + k vᵀ, or with a bonus (EXCLUSIVE) for S, over the rows of a chunk: kTile keys,
// of which there are `keys`, and N vectors of columns, of which there are `columns`. q, k, decay [rows, width] from the
// first of the keys; v, y [rows, stride]; from, to [keys, V] may be the same, `from` null: zeros.
template <class S, int N, bool EXCLUSIVE>
void forward_tile(int64_t rows, const S* q, const S* k, const S* decay, int64_t width, const S* v, S* y, int64_t stride,
                  const S* from, S* to, int64_t V, int64_t keys, int64_t columns) {
    constexpr int W = kLanes<S>;
    Lanes<S> state[kTile][N];
    UNROLL
    for (int i = 0; i < kTile; ++i) {
        UNROLL
        for (int n = 0; n < N; ++n)
            state[i][n] = from && i < keys ? load_some(from + i * V + n * W, columns - n * W) : Lanes<S>{};
    }
    for (int64_t t = 0; t < rows; ++t, q += width, k += width, decay += width, v += stride, y += stride) {
        UNROLL
        for (int n = 0; n < N; ++n) {
            auto value = load<W>(v + n * W), out = load<W>(y + n * W);
            UNROLL
            for (int i = 0; i < kTile; ++i) {
                if constexpr (EXCLUSIVE) out = multiply_add(all(q[i]), state[i][n], out);
                state[i][n] = multiply_add(all(decay[i]), state[i][n], all(k[i]) * value);
                if constexpr (!EXCLUSIVE) out = multiply_add(all(q[i]), state[i][n], out);
            }
            store(y + n * W, out);
        }
    }
    UNROLL
    for (int i = 0; i < kTile; ++i) {
        if (i >= keys) break;
        UNROLL
        for (int n = 0; n < N; ++n) store_some(to + i * V + n * W, state[i][n], columns - n * W);
    }
}
