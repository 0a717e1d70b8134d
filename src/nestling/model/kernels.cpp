// Two parts of training on a CPU that torch computes in many passes over memory: causal attention, forward and backward, and
// the loss of a chunk of logits with its gradient. Here scores, probabilities and logits stay in a core's cache.
//
// Products take pairs of bfloat16 and sum in float32; everything else is float32. Each (text, head of keys) and each row of
// logits is computed by one thread from beginning to end, so that the numbers do not depend on how many threads there are.
// Built by kernels.py with the options of this machine; without products of pairs there is nothing in here.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#ifdef __AVX512BF16__
#include <immintrin.h>

typedef uint16_t Half;  // a bfloat16
typedef uint32_t Pair;  // two of them: neighbours along what a product sums over
typedef __m512 Vec;

constexpr int64_t LANES = 16;
constexpr int64_t ROWS = 4, PANELS = 4;    // of a product's tile: its 16 sums and what they are made of fit into 32 registers
constexpr int64_t QUERIES = 32;            // taken together: what is read for all of them stays in the first cache
constexpr int64_t KEYS = PANELS * LANES;   // of which the backward pass holds scores at a time
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

static inline Vec all(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline Vec widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
static inline Vec load(const Half* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline void store(Half* p, Vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

// 2^x = 2^n · 2^r with |r| <= 1/2, the latter by its series up to r^6.
static inline Vec power_of_two(Vec x) {
    x = _mm512_max_ps(all(-200), x);  // 0; also for -inf, from which nothing can be subtracted
    const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
    Vec y = all(1.54035304e-4f);
    for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, LN_2, 1.0f}) y = _mm512_fmadd_ps(y, r, all(c));
    return _mm512_scalef_ps(y, n);
}

// c[m][n] (+)= Σ_k a[m][k] · b[k][n]. Factors are pairs: a's lie `row` and `step` apart, b's rows `wide`.
struct Left { const Pair* data; int64_t row, step; };
struct Right { const Pair* data; int64_t wide; };
struct Sums { float* data; int64_t wide; bool add; };

template <int M, int N>
static inline void tile(Left a, Right b, int64_t k, Sums c) {
    Vec sums[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) sums[m][n] = c.add ? load(c.data + m * c.wide + n * LANES) : all(0);
    for (int64_t i = 0; i < k; i++) {
        __m512bh panel[N];
        for (int n = 0; n < N; n++) panel[n] = (__m512bh)_mm512_loadu_si512(b.data + i * b.wide + n * LANES);
        for (int m = 0; m < M; m++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(a.data[m * a.row + i * a.step]);
            for (int n = 0; n < N; n++) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], both, panel[n]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(c.data + m * c.wide + n * LANES, sums[m][n]);
}

template <int N>
static inline void rows(int64_t m, Left a, Right b, int64_t k, Sums c) {
    if (m == 4) tile<4, N>(a, b, k, c);
    else if (m == 3) tile<3, N>(a, b, k, c);
    else if (m == 2) tile<2, N>(a, b, k, c);
    else tile<1, N>(a, b, k, c);
}

// At most ROWS rows of c, any number of columns that vectors fill.
static void product(int64_t m, int64_t columns, Left a, Right b, int64_t k, Sums c) {
    int64_t n = 0;
    for (; n + KEYS <= columns; n += KEYS) rows<PANELS>(m, a, {b.data + n, b.wide}, k, {c.data + n, c.wide, c.add});
    for (; n + 2 * LANES <= columns; n += 2 * LANES) rows<2>(m, a, {b.data + n, b.wide}, k, {c.data + n, c.wide, c.add});
    for (; n < columns; n += LANES) rows<1>(m, a, {b.data + n, b.wide}, k, {c.data + n, c.wide, c.add});
}

// Vectors of one kind, one text and one head: each token's lies `token` numbers behind the last one's.
struct Heads { Half* data; int64_t token; };
static inline Half* row(Heads x, int64_t t) { return x.data + t * x.token; }
static inline Left pairs(Heads x, int64_t t) { return {(const Pair*)row(x, t), x.token / 2, 1}; }

// Ask the memory for tokens that come next: they lie far apart, and machines do not look that far ahead by themselves.
template <int WRITTEN = 0>
static void ask(Heads x, int64_t from, int64_t to, int64_t size) {
    for (int64_t t = from; t < to; t++)
        for (int64_t i = 0; i < size; i += 2 * LANES) __builtin_prefetch(row(x, t) + i, WRITTEN);
}

// [t / 2][size]: tokens 2t and 2t + 1 as pairs, for sums over tokens; zeros behind the last token, up to `room`.
static void pair_tokens(Heads x, int64_t tokens, int64_t room, int64_t size, Pair* to) {
    for (int64_t t = 0; t < room; t += 2)
        for (int64_t i = 0; i < size; i += LANES) {
            const auto read = [&](int64_t at) {
                return at < tokens ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(row(x, at) + i))) : _mm512_setzero_si512();
            };
            _mm512_storeu_si512(to + t / 2 * size + i, _mm512_or_si512(read(t), _mm512_slli_epi32(read(t + 1), 16)));
        }
}

// [size / 2][room]: each token's pairs in a column, for sums over a vector; zeros behind the last token.
static void stand_up(Heads x, int64_t tokens, int64_t room, int64_t size, Pair* to) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t t = 0; t < room; t += LANES) {
        ask(x, t + 2 * LANES, std::min(t + 3 * LANES, tokens), size);
        for (int64_t i = 0; i < size / 2; i += LANES) {
            const int64_t used = std::min(LANES, size / 2 - i);
            const __mmask16 valid = (1u << used) - 1;
            __m512i square[LANES];
            for (int64_t r = 0; r < LANES; r++)
                square[r] = t + r < tokens ? _mm512_maskz_loadu_epi32(valid, (const Pair*)row(x, t + r) + i) : _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int far = 8; far; far /= 2) {  // swap the two corners of squares of twice this size
                const __m512i bit = _mm512_set1_epi32(far);
                const __mmask16 right = _mm512_test_epi32_mask(lane, bit);
                const __m512i upper = _mm512_mask_add_epi32(lane, right, lane, _mm512_set1_epi32(16 - far));
                const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lane, bit), right, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
                for (int r = 0; r < LANES; r++)
                    if (!(r & far)) {
                        const __m512i a = square[r], b = square[r + far];
                        square[r] = _mm512_permutex2var_epi32(a, upper, b);
                        square[r + far] = _mm512_permutex2var_epi32(a, lower, b);
                    }
            }
            for (int64_t r = 0; r < used; r++) _mm512_storeu_si512(to + (i + r) * room + t, square[r]);
        }
    }
}

static inline int64_t rounded(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Memory of one thread, and its parts one after another, on borders of cache lines.
static std::unique_ptr<char, decltype(&std::free)> memory(int64_t bytes) { return {(char*)std::aligned_alloc(64, rounded(bytes, 64)), std::free}; }
struct Room {
    char* next;
    template <class T> T* take(int64_t count) { T* part = (T*)next; next += rounded(count * sizeof(T), 64); return part; }
};

// What one call computes: of tensors [B, T, H, K], and k, v and their gradients [B, T, H_kv, K].
struct Call {
    int64_t texts, tokens, heads, kv_heads, size, threads;
    int64_t window;           // how many tokens are seen, a token itself among them; 0: all
    const int32_t* segments;  // [B, T] document of each token, or null: one for all
    float* logs;              // [B, H, T] log2 Σ 2^score of each query
    Half *q, *k, *v, *out, *d_out, *d_q, *d_k, *d_v;

    Heads of_queries(Half* x, int64_t text, int64_t head) const { return {x + (text * tokens * heads + head) * size, heads * size}; }
    Heads of_keys(Half* x, int64_t text, int64_t head) const { return {x + (text * tokens * kv_heads + head) * size, kv_heads * size}; }
};

// Who sees whom in one text.
struct Sight {
    const int32_t* segments;
    int64_t window;

    // Which of 16 keys a query sees.
    __mmask16 seen(int64_t key, int64_t query) const {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i behind = _mm512_sub_epi32(_mm512_set1_epi32(query - key), lane);  // of keys ahead: huge without a sign
        const __mmask16 near = _mm512_cmplt_epu32_mask(behind, _mm512_set1_epi32(window));
        if (!segments) return near;
        return _mm512_mask_cmpeq_epi32_mask(near, _mm512_maskz_loadu_epi32(near, segments + key), _mm512_set1_epi32(segments[query]));
    }

    // A key at the border of a vector before which these queries see none.
    int64_t lowest(int64_t from, int64_t to) const {
        int64_t low = std::max(from + 1 - window, (int64_t)0);
        if (segments) {
            const auto range = std::minmax_element(segments + from, segments + to);
            while (low < from && (segments[low] < *range.first || segments[low] > *range.second)) low++;
        }
        return low / LANES * LANES;
    }
};
static inline Sight sight(const Call& c, int64_t text) {
    return {c.segments ? c.segments + text * c.tokens : nullptr, c.window ? c.window : c.tokens};
}

// e^(score - most) of the keys in [low, end) that a query sees, in bfloat16, and 0 for the others; returns their sum and log2 of
// the sum without `most`. Scores are in units of 1 / scale of powers of two.
struct Total { float sum, log; };
static inline Total weigh(const float* score, int64_t low, int64_t end, int64_t query, const Sight& sees, Vec scale, Half* weight) {
    Vec most = all(-INFINITY), total = all(0);
    for (int64_t s = low; s < end; s += LANES) most = _mm512_mask_max_ps(most, sees.seen(s, query), most, load(score + s));
    const float top = _mm512_reduce_max_ps(most) * scale[0];
    for (int64_t s = low; s < end; s += LANES) {
        const Vec p = _mm512_maskz_mov_ps(sees.seen(s, query), power_of_two(load(score + s) * scale - all(top)));
        store(weight + s, p);
        total += p;
    }
    const float sum = _mm512_reduce_add_ps(total);
    return {sum, top + std::log2(sum)};
}

// out = softmax(q kᵀ / √size) v of the query heads that share one head of keys.
static void forward(const Call& c, int64_t b, int64_t g, Room room) {
    const int64_t tokens = c.tokens, size = c.size, wide = rounded(tokens, QUERIES), group = c.heads / c.kv_heads;
    const Sight sees = sight(c, b);
    Pair* keys = room.take<Pair>(size / 2 * wide);
    Pair* values = room.take<Pair>(wide / 2 * size);
    float* scores = room.take<float>(QUERIES * wide);
    Half* weights = room.take<Half>(ROWS * wide);
    float* sums = room.take<float>(ROWS * size);
    stand_up(c.of_keys(c.k, b, g), tokens, wide, size, keys);
    pair_tokens(c.of_keys(c.v, b, g), tokens, wide, size, values);
    const Vec scale = all(LOG2_E / std::sqrt((float)size));
    for (int64_t h = g * group; h < (g + 1) * group; h++) {
        const Heads q = c.of_queries(c.q, b, h), out = c.of_queries(c.out, b, h);
        float* logs = c.logs + (b * c.heads + h) * tokens;
        for (int64_t from = 0; from < tokens; from += QUERIES) {
            const int64_t to = std::min(from + QUERIES, tokens), low = sees.lowest(from, to), next = std::min(to + QUERIES, tokens);
            ask(q, to, next, size);
            ask<1>(out, from, to, size);
            for (int64_t s = low; s < to; s += KEYS)
                for (int64_t t = std::max(from, s / ROWS * ROWS); t < to; t += ROWS)
                    product(std::min(ROWS, to - t), std::min(KEYS, rounded(to - s, LANES)), pairs(q, t), {keys + s, wide}, size / 2,
                            {scores + (t - from) * wide + s, wide, false});
            for (int64_t t = from; t < to; t += ROWS) {
                const int64_t count = std::min(ROWS, to - t), end = rounded(t + count, LANES);
                Total totals[ROWS];
                for (int64_t r = 0; r < count; r++) {
                    totals[r] = weigh(scores + (t + r - from) * wide, low, end, t + r, sees, scale, weights + r * wide);
                    logs[t + r] = totals[r].log;
                }
                product(count, size, {(const Pair*)(weights + low), wide / 2, 1}, {values + low / 2 * size, size}, (end - low) / 2, {sums, size, false});
                for (int64_t r = 0; r < count; r++)
                    for (int64_t i = 0; i < size; i += LANES) store(row(out, t + r) + i, load(sums + r * size + i) * all(1 / totals[r].sum));
            }
        }
    }
}

// Two rows of 16 numbers as pairs, and each row rounded.
struct Rounded { __m512i pairs; __m256i even, odd; };
static inline Rounded round_both(Vec even, Vec odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return {_mm512_permutexvar_epi16(order, both), _mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1)};
}

static inline float inner(const Half* a, const Half* b, int64_t size) {
    Vec sum = all(0);
    for (int64_t i = 0; i < size; i += LANES) sum += load(a + i) * load(b + i);
    return _mm512_reduce_add_ps(sum);
}

// Of two queries, t and t + 1, and `columns` keys from s: p = softmax(..) and ds = p (dp - mean), as pairs, and the rows of ds.
struct Scores { const float *scores, *d_weights, *logs, *means; Pair *weights, *d_scores; Half *even, *odd; };
static inline void differentiate(const Scores& of, int64_t t, int64_t tokens, int64_t s, int64_t columns, const Sight& sees, Vec scale) {
    for (int64_t n = 0; n < columns; n += LANES) {
        Vec p[2] = {all(0), all(0)}, ds[2] = {all(0), all(0)};
        for (int64_t r = 0; r < 2 && t + r < tokens; r++) {
            const Vec power = load(of.scores + r * KEYS + n) * scale - all(of.logs[r]);
            p[r] = _mm512_maskz_mov_ps(sees.seen(s + n, t + r), power_of_two(power));
            ds[r] = p[r] * (load(of.d_weights + r * KEYS + n) - all(of.means[r]));
        }
        const Rounded d = round_both(ds[0], ds[1]);
        _mm512_storeu_si512(of.weights + n, round_both(p[0], p[1]).pairs);
        _mm512_storeu_si512(of.d_scores + n, d.pairs);
        _mm256_storeu_si256((__m256i*)(of.even + n), d.even);
        _mm256_storeu_si256((__m256i*)(of.odd + n), d.odd);
    }
}

// With p = softmax(..), d_v = pᵀ d_out, dp = d_out vᵀ, ds = p (dp - Σ d_out · out), d_q = ds k / √size, d_k = dsᵀ q / √size.
static void backward(const Call& c, int64_t b, int64_t g, Room room) {
    const int64_t tokens = c.tokens, size = c.size, wide = rounded(tokens, KEYS), group = c.heads / c.kv_heads;
    const Sight sees = sight(c, b);
    Pair *keys = room.take<Pair>(size / 2 * wide), *values = room.take<Pair>(size / 2 * wide), *key_pairs = room.take<Pair>(wide / 2 * size);
    Pair *q_pairs = room.take<Pair>(QUERIES / 2 * size), *out_pairs = room.take<Pair>(QUERIES / 2 * size);
    float *d_k = room.take<float>(wide * size), *d_v = room.take<float>(wide * size), *d_q = room.take<float>(ROWS * size);
    float *scores = room.take<float>(QUERIES * KEYS), *d_weights = room.take<float>(QUERIES * KEYS);
    Pair *weights = room.take<Pair>(QUERIES / 2 * KEYS), *d_scores = room.take<Pair>(QUERIES / 2 * KEYS);
    Half* d_rows = room.take<Half>(QUERIES * wide);
    stand_up(c.of_keys(c.k, b, g), tokens, wide, size, keys);
    stand_up(c.of_keys(c.v, b, g), tokens, wide, size, values);
    pair_tokens(c.of_keys(c.k, b, g), tokens, wide, size, key_pairs);
    std::fill(d_k, d_k + wide * size, 0.0f);
    std::fill(d_v, d_v + wide * size, 0.0f);
    const float root = 1 / std::sqrt((float)size);
    const Vec scale = all(LOG2_E * root);
    for (int64_t h = g * group; h < (g + 1) * group; h++) {
        const Heads q = c.of_queries(c.q, b, h), out = c.of_queries(c.out, b, h), d_out = c.of_queries(c.d_out, b, h), to_q = c.of_queries(c.d_q, b, h);
        const float* logs = c.logs + (b * c.heads + h) * tokens;
        for (int64_t from = 0; from < tokens; from += QUERIES) {
            const int64_t to = std::min(from + QUERIES, tokens), low = sees.lowest(from, to), next = std::min(to + QUERIES, tokens);
            for (const Heads& x : {q, out, d_out}) ask(x, to, next, size);
            ask<1>(to_q, from, to, size);
            float means[QUERIES];
            for (int64_t t = from; t < to; t++) means[t - from] = inner(row(d_out, t), row(out, t), size);
            pair_tokens({row(q, from), q.token}, to - from, QUERIES, size, q_pairs);
            pair_tokens({row(d_out, from), d_out.token}, to - from, QUERIES, size, out_pairs);
            for (int64_t s = low; s < to; s += KEYS) {
                const int64_t columns = std::min(KEYS, rounded(to - s, LANES)), start = std::max(from, s / ROWS * ROWS);
                for (int64_t t = start; t < to; t += ROWS) {
                    const int64_t count = std::min(ROWS, to - t), place = (t - from) * KEYS;
                    product(count, columns, pairs(q, t), {keys + s, wide}, size / 2, {scores + place, KEYS, false});
                    product(count, columns, pairs(d_out, t), {values + s, wide}, size / 2, {d_weights + place, KEYS, false});
                }
                for (int64_t t = start; t < to; t += 2) {
                    const int64_t r = t - from, place = r * KEYS;
                    const Scores of = {scores + place, d_weights + place, logs + t, means + r, weights + place / 2, d_scores + place / 2,
                                       d_rows + r * wide + s, d_rows + (r + 1) * wide + s};
                    differentiate(of, t, to, s, columns, sees, scale);
                }
                for (int64_t n = 0; n < columns; n += ROWS) {  // queries before these keys have no part in their gradients
                    const int64_t skip = (std::max(start, (s + n) / 2 * 2) - from) / 2, count = rounded(to - from, 2) / 2 - skip;
                    product(ROWS, size, {weights + skip * KEYS + n, 1, KEYS}, {out_pairs + skip * size, size}, count, {d_v + (s + n) * size, size, true});
                    product(ROWS, size, {d_scores + skip * KEYS + n, 1, KEYS}, {q_pairs + skip * size, size}, count, {d_k + (s + n) * size, size, true});
                }
            }
            for (int64_t t = from; t < to; t += ROWS) {
                const int64_t count = std::min(ROWS, to - t), span = rounded(t + count, 2) - low;
                product(count, size, {(const Pair*)(d_rows + (t - from) * wide + low), wide / 2, 1}, {key_pairs + low / 2 * size, size}, span / 2, {d_q, size, false});
                for (int64_t r = 0; r < count; r++)
                    for (int64_t i = 0; i < size; i += LANES) store(row(to_q, t + r) + i, load(d_q + r * size + i) * all(root));
            }
        }
    }
    const Heads to_k = c.of_keys(c.d_k, b, g), to_v = c.of_keys(c.d_v, b, g);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < size; i += LANES) {
            store(row(to_k, t) + i, load(d_k + t * size + i) * all(root));
            store(row(to_v, t) + i, load(d_v + t * size + i));
        }
}

// Gradient of weight · -log softmax(logits)[target] in the logits' place; returns the loss. `room` is of one row.
static float loss_row(Half* logits, int64_t size, int64_t target, float weight, float* room) {
    const int64_t whole = size / LANES * LANES;
    const __mmask16 rest = (1u << (size - whole)) - 1;
    const auto read = [&](int64_t i) {
        return i < whole ? load(logits + i) : _mm512_mask_mov_ps(all(-INFINITY), rest, widen(_mm256_maskz_loadu_epi16(rest, logits + i)));
    };
    const float chosen = read(target / LANES * LANES)[target % LANES];
    Vec most = all(-INFINITY), total = all(0);
    for (int64_t i = 0; i < size; i += LANES) most = _mm512_max_ps(most, read(i));
    const Vec top = all(_mm512_reduce_max_ps(most) * LOG2_E);
    for (int64_t i = 0; i < size; i += LANES) {
        const Vec p = power_of_two(read(i) * all(LOG2_E) - top);
        store(room + i, p);
        total += p;
    }
    const float sum = _mm512_reduce_add_ps(total);
    const Vec scale = all(weight / sum);
    room[target] -= sum;
    for (int64_t i = 0; i < whole; i += LANES) store(logits + i, load(room + i) * scale);
    if (rest) _mm256_mask_storeu_epi16(logits + whole, rest, (__m256i)_mm512_cvtneps_pbh(load(room + whole) * scale));
    return weight * ((top[0] + std::log2(sum)) * LN_2 - chosen);
}

extern "C" {
int64_t able() { return 1; }

static int64_t bytes(const Call& n) {  // more than either direction takes of a room
    const int64_t wide = rounded(n.tokens, KEYS);
    return 4 * (4 * wide * n.size + QUERIES * (2 * wide + 2 * n.size + 4 * KEYS) + ROWS * n.size) + 64 * 16;
}

void attend(const Call* c, int64_t back) {
#pragma omp parallel num_threads(c->threads)
    {
        const auto room = memory(bytes(*c));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c->texts * c->kv_heads; i++)
            (back ? backward : forward)(*c, i / c->kv_heads, i % c->kv_heads, {room.get()});
    }
}

// logits [rows][size], which the gradient takes the place of; losses [rows].
void losses(int64_t threads, int64_t rows, int64_t size, Half* logits, const int64_t* targets, const float* weights, float* losses) {
#pragma omp parallel num_threads(threads)
    {
        const auto room = memory(4 * rounded(size, LANES));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) losses[i] = loss_row(logits + i * size, size, targets[i], weights[i], (float*)room.get());
    }
}
}
#else
extern "C" int64_t able() { return 0; }
#endif
