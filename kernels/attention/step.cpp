// One token of attention with a cache of keys and values: rotary positions, the token's rows, and softmax over all.
#include <cmath>
#include <limits>

#include "../products.h"

namespace {

// [batch, rows, heads, columns] in three places: the token's row, all before it, and where the last ones are kept, the
// token's behind the others.
struct Cached {
    Heads token, before, kept;
    int64_t copy;  // are the others still to be copied there?
};

// All fields are 8 bytes: step.py packs them as one array. For head h of group g = h / (heads / groups)
//
//     p = softmax of scale · q · keys[s, g] + log_decays[s + 1, h] + ... + log_decays[S, h],   y = Σ p[s] values[s, g]
//
// over s <= S, the token's own row.
struct Step {
    int64_t batch, heads, groups, keys, values, rows, format, threads;  // rows: S
    int64_t kept;    // how many rows are kept, the token's included
    int64_t window;  // how many rows are seen, the token's included
    double scale;
    const int64_t* start;   // [batch], the first row that is seen; null: 0
    const int64_t* length;  // [batch], the tokens before this one
    const void* frequency;  // in S: [keys / 2], by which times the length q and k are rotated; null: they are not
    Heads q;
    Cached k, v, log_decay;  // log_decay in S, of one column a head, or null
    void* y;                 // [batch, 1, heads, values]
};

static_assert(sizeof(Step) == 58 * 8, "step.py packs this many fields");

// So many rows of the cache are done at a time, whoever does them, and merged in one order.
constexpr int64_t kRows = 128;

// What the rows of a chunk make of a head: the largest score, the sum of exp(score - largest) and of that times values,
// and what all heads' log decays of these rows add up to. Scores count from the chunk's last row on.
template <class S>
struct Parts {
    int64_t chunks, heads, width;
    Scratch<S> sums, most, total;
    Scratch<double> forgotten;

    Parts(int64_t batch, int64_t chunks, int64_t heads, int64_t width)
        : chunks(chunks), heads(heads), width(width), sums(batch * chunks * heads * width),
          most(batch * chunks * heads), total(batch * chunks * heads), forgotten(batch * chunks * heads) {}
    int64_t at(int64_t b, int64_t chunk, int64_t head) const { return (b * chunks + chunk) * heads + head; }
};

// The first row that sequence b's token sees.
inline int64_t first_row(const Step& s, int64_t b) {
    return std::max(s.rows + 1 - s.window, s.start ? s.start[b] : int64_t(0));
}

// to = the first n of x, rotated by angles of which cos and sin are given; a number without a partner stays.
template <class T, class S>
void rotate(const T* x, const S* cos, const S* sin, int64_t n, S* to) {
    const int64_t half = cos ? n / 2 : 0;
    for (int64_t i = 2 * half; i < n; ++i) to[i] = load<1>(x + i)[0];
    for (int64_t i = 0; i < half; ++i) {
        const S a = load<1>(x + i)[0], b = load<1>(x + half + i)[0];
        to[i] = a * cos[i] - b * sin[i], to[half + i] = a * sin[i] + b * cos[i];
    }
}

// Sequence b's token: its rows to where they are kept, and q, times the scale, to [heads, width].
template <class T, class S>
OUTLINE void begin(const Step& s, int64_t b, S* scratch, S* q, int64_t width) {
    const int64_t half = s.keys / 2, last = s.kept - 1;
    S *cos = nullptr, *sin = nullptr, *row = scratch;
    if (s.frequency) {
        cos = row + width, sin = cos + width;
        for (int64_t i = 0; i < half; ++i) {
            const S angle = S(s.length[b]) * static_cast<const S*>(s.frequency)[i];
            cos[i] = std::cos(angle), sin[i] = std::sin(angle);
        }
    }
    for (int64_t h = 0; h < s.heads; ++h, q += width) {
        std::fill_n(q, width, S(0));
        rotate(s.q.at<const T>(b, 0, h), cos, sin, s.keys, q);
        for (int64_t i = 0; i < s.keys; ++i) q[i] *= S(s.scale);
        if (s.log_decay.token.data) *s.log_decay.kept.at<S>(b, last, h) = *s.log_decay.token.at<const S>(b, 0, h);
    }
    for (int64_t g = 0; g < s.groups; ++g) {
        rotate(s.k.token.at<const T>(b, 0, g), cos, sin, s.keys, row);
        T* to = s.k.kept.at<T>(b, last, g);
        for (int64_t i = 0; i < s.keys; ++i) store(to + i, Vec<S, 1>{row[i]});
        std::memcpy(s.v.kept.at<T>(b, last, g), s.v.token.at<const T>(b, 0, g), s.values * sizeof(T));
    }
}

// Row number t of those that a token sees, its own the last.
template <class T>
INLINE const T* row_of(const Step& s, const Cached& x, int64_t b, int64_t t, int64_t head) {
    return t < s.rows ? x.before.at<const T>(b, t, head) : x.kept.at<const T>(b, s.kept - 1, head);
}

// Rows from, ..., to - 1 of one sequence and group: scores [heads of the group, kRows] and then their part in y.
template <class T, class S>
OUTLINE void part(const Step& s, const Parts<S>& parts, int64_t b, int64_t chunk, int64_t g, const S* q, int64_t width,
                  S* scores) {
    constexpr int W = kLanes<S>;
    const int64_t from = std::max(chunk * kRows, first_row(s, b)), to = std::min((chunk + 1) * kRows, s.rows + 1);
    const int64_t each = s.heads / s.groups, first = g * each, n = to - from;
    for (int64_t t = 0; t < n; t += 4) {
        const T* row[4];
        UNROLL
        for (int i = 0; i < 4; ++i) row[i] = row_of<T>(s, s.k, b, from + std::min(t + i, n - 1), g);
        for (int64_t h = 0; h < each; ++h) {
            Lanes<S> sums[4] = {};
            for (int64_t i = 0; i < s.keys; i += W) {
                const auto x = load<W>(q + (first + h) * width + i);
                UNROLL
                for (int j = 0; j < 4; ++j) sums[j] = multiply_add(x, load_some(row[j] + i, s.keys - i), sums[j]);
            }
            sums_of_four<S>(sums, scores + h * kRows + t);
        }
    }
    for (int64_t h = 0; h < each; ++h) {
        S* score = scores + h * kRows;
        const int64_t at = parts.at(b, chunk, first + h);
        double since = 0;
        for (int64_t t = n - 1; t >= 0 && s.log_decay.token.data; --t) {
            score[t] += S(since);
            since += *row_of<S>(s, s.log_decay, b, from + t, first + h);
        }
        const S most = *std::max_element(score, score + n);
        Lanes<S> total = {};
        std::fill(score + n, score + multiple(n, W), -std::numeric_limits<S>::infinity());
        for (int64_t t = 0; t < n; t += W) {
            const auto p = exponential<W, S>(load<W>(score + t) - most);
            store(score + t, p);
            total += p;
        }
        parts.most.memory[at] = most, parts.total.memory[at] = sum(total), parts.forgotten.memory[at] = since;
        for_blocks<S>(s.values, [&]<int N>(int64_t column) {
            Lanes<S> sums[N] = {};
            for (int64_t t = 0; t < n; ++t) {
                const T* row = row_of<T>(s, s.v, b, from + t, g) + column;
                UNROLL
                for (int i = 0; i < N; ++i)
                    sums[i] = multiply_add(all(score[t]), load_some(row + i * W, s.values - column - i * W), sums[i]);
            }
            UNROLL
            for (int i = 0; i < N; ++i) store(parts.sums + (at * parts.width + column + i * W), sums[i]);
        });
    }
}

// Of the chunk's rows, with all their heads, those that are kept elsewhere.
template <class T>
OUTLINE void copy(const Step& s, const Cached& x, int64_t b, int64_t chunk, int64_t heads, int64_t columns) {
    if (!x.copy) return;
    const int64_t dropped = s.rows + 1 - s.kept, to = std::min((chunk + 1) * kRows, s.rows);
    const bool together = x.before.head == columns && x.kept.head == columns;
    const int64_t parts = together ? 1 : heads, bytes = heads / parts * columns * sizeof(T);
    for (int64_t t = std::max(chunk * kRows, dropped); t < to; ++t)
        for (int64_t h = 0; h < parts; ++h)
            std::memcpy(x.kept.at<T>(b, t - dropped, h), x.before.at<const T>(b, t, h), bytes);
}

// y of one head from the parts of all chunks, the last one first.
template <class T, class S>
OUTLINE void finish(const Step& s, const Parts<S>& parts, int64_t b, int64_t h, S* y) {
    constexpr int W = kLanes<S>;
    const int64_t first = first_row(s, b), least = first > s.rows ? parts.chunks : first / kRows;
    S most = -std::numeric_limits<S>::infinity(), total = 0;
    std::fill_n(y, parts.width, S(0));
    double since = 0;
    for (int64_t chunk = parts.chunks - 1; chunk >= least; --chunk) {
        const int64_t at = parts.at(b, chunk, h);
        const S score = parts.most.memory[at] + S(since), larger = std::max(most, score);
        since += parts.forgotten.memory[at];
        const S before = std::exp(most - larger), more = std::exp(score - larger);
        most = larger, total = total * before + parts.total.memory[at] * more;
        for (int64_t i = 0; i < parts.width; i += W) {
            const auto sums = load<W>(parts.sums + (at * parts.width + i));
            store(y + i, multiply_add(all(before), load<W>(y + i), all(more) * sums));
        }
    }
    T* to = static_cast<T*>(s.y) + (b * s.heads + h) * s.values;
    // a token whose sequence begins behind it sees nothing
    const auto share = all(total > 0 ? 1 / total : S(0));
    for (int64_t i = 0; i < s.values; i += W) store_some(to + i, share * load<W>(y + i), s.values - i);
}

template <class T>
void step(const Step& s) {
    using S = StateOf<T>;
    const int64_t width = whole_vectors<S>(s.keys), each = s.heads / s.groups;
    const Parts<S> parts(s.batch, s.rows / kRows + 1, s.heads, whole_vectors<S>(s.values));
    const Scratch<S> q(s.batch * s.heads * width);
    auto run = [&](int64_t n, int64_t numbers, const auto& f) {
        parallel_with_scratch<S, FlushDenormals>(n, s.threads, numbers, f);
    };
    run(s.batch, 3 * width, [&](int64_t b, S* scratch, int64_t) {
        begin<T, S>(s, b, scratch, q + b * s.heads * width, width);
    });
    // groups take turns chunk by chunk: a page of memory is visited once
    run(s.batch * parts.chunks * s.groups, each * kRows, [&](int64_t i, S* scratch, int64_t) {
        const int64_t g = i % s.groups, chunk = i / s.groups % parts.chunks, b = i / s.groups / parts.chunks;
        if (first_row(s, b) < std::min((chunk + 1) * kRows, s.rows + 1))
            part<T, S>(s, parts, b, chunk, g, q + b * s.heads * width, width, scratch);
        if (g > 0) return;
        copy<T>(s, s.k, b, chunk, s.groups, s.keys), copy<T>(s, s.v, b, chunk, s.groups, s.values);
        copy<S>(s, s.log_decay, b, chunk, s.heads, 1);
    });
    run(s.batch * s.heads, parts.width, [&](int64_t i, S* scratch, int64_t) {
        finish<T, S>(s, parts, i / s.heads, i % s.heads, scratch);
    });
}

}  // namespace

extern "C" {
int vector_bytes() { return kVectorBytes; }
int attention_step(const Step* s) {
    return unless_out_of_memory([&] { with_format(s->format, [&]<class T>() { step<T>(*s); }); });
}
}
