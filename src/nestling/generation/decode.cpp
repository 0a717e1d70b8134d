// A few tokens of several texts through a pre-norm decoder on a CPU: what torch does in hundreds of calls, in one.
//
// Weights come in panels of 16 outputs, [out / 16][in][16], so that a panel's outputs are the lanes of a vector: float32,
// bfloat16, or int8 with a scale per output. Activations, norms and sums are float32; keys and values float32 or bfloat16.
// Where the machine multiplies pairs of bfloat16, panels hold them, [out / 16][in / 2][16][2], and inputs are rounded too.
// All threads walk through the layers together and meet at barriers; each has its own share of outputs, or of
// (text, head). Built by native.py with the options of this machine.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int LANES = 16;
constexpr int AHEAD = 4096;  // bytes: weights are asked for so much before they are used, as machines look no further than a page
typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(32), aligned(2)));
typedef uint32_t Word __attribute__((vector_size(64), aligned(4)));
typedef int32_t Int __attribute__((vector_size(64), aligned(4)));
typedef int8_t Byte __attribute__((vector_size(16), aligned(1)));

static inline Vec load(const float* p) { return *(const Vec*)p; }
static inline Vec load(const uint16_t* p) { return (Vec)(__builtin_convertvector(*(const Half*)p, Word) << 16); }
#ifdef __AVX512F__  // what the general forms should become, and with some compilers do not
static inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
static inline Vec load(const int8_t* p) { return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
#else
static inline float sum(Vec v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }
static inline Vec load(const int8_t* p) { return __builtin_convertvector(__builtin_convertvector(*(const Byte*)p, Int), Vec); }
#endif
static inline Vec all(float x) { return x - Vec{}; }
static inline void store(float* p, Vec v) { *(Vec*)p = v; }
static inline void store(uint16_t* p, Vec v) {  // round to nearest, ties to even
    Word bits = (Word)v;
    *(Half*)p = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Half);
}

struct Pair { uint16_t even, odd; };

// What a kind of weight is multiplied with, and how.
template <class W> struct Form {
    typedef float Input;
    typedef Vec Panel;
    static constexpr int STEP = 1;
    static Panel read(const W* p) { return load(p); }
    static Vec add(Vec sum, Panel w, const float* x) { return sum + w * *x; }
};
#ifdef __AVX512BF16__
constexpr int PAIRS = 1;
template <> struct Form<Pair> {
    typedef uint16_t Input;
    typedef __m512bh Panel;
    static constexpr int STEP = 2;
    static Panel read(const Pair* p) { return (Panel)_mm512_loadu_si512(p); }
    static Vec add(Vec sum, Panel w, const uint16_t* x) {
        int32_t both;
        std::memcpy(&both, x, 4);
        return (Vec)_mm512_dpbf16_ps((__m512)sum, w, (Panel)_mm512_set1_epi32(both));
    }
};
#else
constexpr int PAIRS = 0;
#endif

// e^x = 2^n · e^r with |r| <= ln 2 / 2, the latter by its series up to r^6.
static inline Vec exponential(Vec x) {
    x = x < -87.0f ? all(-87.0f) : x > 87.0f ? all(87.0f) : x;
    const Vec t = x * 1.44269504f;
    const Int n = __builtin_convertvector(t + (t < 0.0f ? all(-0.5f) : all(0.5f)), Int);
    const Vec whole = __builtin_convertvector(n, Vec), r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec y = all(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + c;
    return y * (Vec)((n + 127) << 23);
}

struct Linear { const void* weight; const float* scale; const float* bias; int64_t out, in; };
struct Norm { const float* weight; const float* bias; double eps; };  // with a bias: layer norm, else RMS norm
struct Layer { Norm attention_norm, feed_forward_norm, query_norm, key_norm; Linear joint, output, gate, up, down; };
// `embedding` [vocabulary][D] in bfloat16 (`half`) or float32; of every place: `placed` [D], what is added to it, and `cos` and
// `sin` [head / 2] of its angles, where the model has any.
struct Model {
    const Layer* layers;
    Norm norm;
    const void* embedding;
    const float *placed, *cos, *sin;
    int64_t half, vocabulary, n_layers, d_model, heads, kv_heads, head, ff, kind, activation, threads;
};
struct Cache { void* stored; int64_t *lengths, rows, capacity, half; };  // stored [L][2][rows][kv_heads][capacity + 1][head]
// ids [count][width], of which `counts` are valid (all where there are none); `rows` of the cache, or those from `first` on.
struct Texts { int64_t count, width, at_once, first; const int64_t *ids, *rows, *counts; };
// One entry per token: the text's row in the cache and the token's place. `several`: a text may have more than one.
struct Tokens { int64_t count, several; const int64_t *rows, *places; };

template <class W, int P, int B>
static void tile(const W* w, const typename Form<W>::Input* x, int64_t ldx, int64_t in, Vec* y) {
    constexpr int STEP = Form<W>::STEP;
    Vec acc[P][B] = {};
    for (int64_t k = 0; k < in; k += STEP) {
        typename Form<W>::Panel panel[P];
        for (int p = 0; p < P; p++) {
            const W* from = w + (p * in + k) / STEP * LANES;
            panel[p] = Form<W>::read(from);
            if (B > 2) __builtin_prefetch((const char*)from + AHEAD);  // one or two tokens leave no time for it
        }
        for (int b = 0; b < B; b++)
            for (int p = 0; p < P; p++) acc[p][b] = Form<W>::add(acc[p][b], panel[p], x + b * ldx + k);
    }
    for (int p = 0; p < P; p++)
        for (int b = 0; b < B; b++) y[p * B + b] = acc[p][b];
}

template <class W, int P, int B>
static void panels(const Linear& m, int64_t first, int64_t last, const typename Form<W>::Input* x, int64_t ldx, float* y, int64_t ldy, bool add) {
    Vec sums[P * B];
    for (int64_t n = first; n < last; n += P) {
        tile<W, P, B>((const W*)m.weight + n * m.in / Form<W>::STEP * LANES, x, ldx, m.in, sums);
        for (int p = 0; p < P; p++)
            for (int b = 0; b < B; b++) {
                const int64_t o = (n + p) * LANES;
                Vec v = sums[p * B + b];
                if (m.scale) v *= load(m.scale + o);
                if (m.bias) v += load(m.bias + o);
                float* to = y + b * ldy + o;
                const int64_t room = m.out - o;
                if (room >= LANES) store(to, add ? v + load(to) : v);
                else for (int64_t i = 0; i < room; i++) to[i] = add ? to[i] + v[i] : v[i];
            }
    }
}

template <class W, int B>
static void rows(const Linear& m, int64_t first, int64_t last, const typename Form<W>::Input* x, int64_t ldx, float* y, int64_t ldy, bool add) {
    constexpr int P = B == 16 ? 1 : B >= 4 ? 2 : 4;
    const int64_t even = first + (last - first) / P * P;
    panels<W, P, B>(m, first, even, x, ldx, y, ldy, add);
    panels<W, 1, B>(m, even, last, x, ldx, y, ldy, add);
}

// Inputs as the weights want them: as they are, or rounded into this thread's own memory.
static const float* inputs(const float* x, int64_t, int64_t, int64_t&, float*) { return x; }
static const uint16_t* inputs(const float* x, int64_t n, int64_t in, int64_t& ldx, uint16_t*) {
    static thread_local std::vector<uint16_t> rounded;
    const int64_t wide = (in + LANES - 1) / LANES * LANES;
    rounded.resize(n * wide);
    for (int64_t b = 0; b < n; b++) {
        int64_t i = 0;
        for (; i + LANES <= in; i += LANES) store(&rounded[b * wide + i], load(x + b * ldx + i));
        for (; i < in; i++) {
            Vec last = {x[b * ldx + i]};
            uint16_t one[LANES];
            store(one, last);
            rounded[b * wide + i] = one[0];
        }
    }
    ldx = wide;
    return rounded.data();
}

// y[b] (+)= W x[b] for this thread's panels; blocks of panels stay in cache while all tokens use them.
template <class W>
static void linear(const Linear& m, int64_t n, const float* from_x, int64_t ldx, float* y, int64_t ldy, bool add) {
    const auto* x = inputs(from_x, n, m.in, ldx, (typename Form<W>::Input*)nullptr);
    const int64_t all = (m.out + LANES - 1) / LANES, team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = all * me / team, last = all * (me + 1) / team;
    for (int64_t from = first; from < last; from += 4) {
        const int64_t to = from + 4 < last ? from + 4 : last;
        int64_t b = 0;
        for (; b + 24 <= n; b += 12) rows<W, 12>(m, from, to, x + b * ldx, ldx, y + b * ldy, ldy, add);
        for (; b + 16 <= n; b += 16) rows<W, 16>(m, from, to, x + b * ldx, ldx, y + b * ldy, ldy, add);
        for (; b + 8 <= n; b += 8) rows<W, 8>(m, from, to, x + b * ldx, ldx, y + b * ldy, ldy, add);
        for (; b + 4 <= n; b += 4) rows<W, 4>(m, from, to, x + b * ldx, ldx, y + b * ldy, ldy, add);
        for (; b + 2 <= n; b += 2) rows<W, 2>(m, from, to, x + b * ldx, ldx, y + b * ldy, ldy, add);
        for (; b < n; b++) rows<W, 1>(m, from, to, x + b * ldx, ldx, y + b * ldy, ldy, add);
    }
}

static void normalise(const Norm& m, const float* x, float* y, int64_t size) {
    float mean = 0, square = 0;
    if (m.bias) {
        for (int64_t i = 0; i < size; i++) mean += x[i];
        mean /= size;
    }
    for (int64_t i = 0; i < size; i++) square += (x[i] - mean) * (x[i] - mean);
    const float factor = 1 / std::sqrt(square / size + (float)m.eps);
    for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * factor * m.weight[i] + (m.bias ? m.bias[i] : 0);
}

static inline Vec activate(Vec x, int64_t kind) {
    if (kind == 0) return x / (1 + exponential(-x));
    if (kind == 1) return x / (1 + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));  // by tanh, rewritten
    if (kind == 3) return x > 0.0f ? x * x : Vec{};
    for (int i = 0; i < LANES; i++) x[i] *= 0.5f * (1 + std::erf(x[i] * 0.7071067811865476f));
    return x;
}

// Neighbours (x[2i], x[2i + 1]) are turned by one angle.
static void turn(float* x, const float* cos, const float* sin, int64_t size) {
    for (int64_t i = 0; i < size / 2; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
}

// The first `size` lanes, of which there may be fewer than a vector has.
template <class T>
static inline void store(T* p, Vec v, int64_t size) {
    if (size >= LANES) return store(p, v);
    T all[LANES];
    store(all, v);
    std::memcpy(p, all, size * sizeof(T));
}

// `scores` has room for the span and a vector, `query` for a head and a vector. A head's last vector may reach into the next
// place, which the cache always has: there the query is zero, and what is mixed is not stored. The memory is asked for values
// while keys are read, and for the `next` keys while values are: most of the time would pass in waiting for it.
template <class KV>
static void attend(const float* q, const KV* keys, const KV* values, const KV* next, int64_t span, int64_t size, float* scores,
                   float* query, float* out) {
    const float scale = 1 / std::sqrt((float)size);
    float most = -INFINITY;
    for (int64_t i = 0; i < size + LANES; i++) query[i] = i < size ? q[i] * scale : 0;
    for (int64_t s = 0; s < span; s++) {
        Vec acc = {};
        for (int64_t i = 0; i < size; i += LANES) {
            acc += load(query + i) * load(keys + s * size + i);
            __builtin_prefetch(values + s * size + i);
        }
        scores[s] = sum(acc);
        most = scores[s] > most ? scores[s] : most;
    }
    for (int64_t s = span; s % LANES; s++) scores[s] = -INFINITY;
    Vec totals = {};
    for (int64_t s = 0; s < span; s += LANES) {
        const Vec weights = exponential(load(scores + s) - most);
        store(scores + s, weights);
        totals += weights;
    }
    for (int64_t s = span; s % LANES; s++) totals[s % LANES] -= scores[s];
    const float total = sum(totals);
    for (int64_t i = 0; i < size; i += LANES) {
        Vec even = {}, odd = {};
        int64_t s = 0;
        for (; s + 2 <= span; s += 2) {
            even += load(values + s * size + i) * scores[s];
            odd += load(values + (s + 1) * size + i) * scores[s + 1];
            __builtin_prefetch(next + s * size + i);
            __builtin_prefetch(next + (s + 1) * size + i);
        }
        if (s < span) even += load(values + s * size + i) * scores[s];
        store(out + i, (even + odd) / total, size - i);
    }
}

template <class KV> struct Place { KV *keys, *values, *next; };  // the last: keys of the head behind it
template <class KV>
static Place<KV> at(const Model& m, const Cache& cache, int64_t l, int64_t row, int64_t g) {
    const int64_t head = (cache.capacity + 1) * m.head, all = cache.rows * m.kv_heads * head;
    KV* keys = (KV*)cache.stored + 2 * l * all + (row * m.kv_heads + g) * head;
    return {keys, keys + all, keys + head};
}

// Norm and turn the queries and the key of one token and key/value head, and store key and value.
template <class KV>
static void remember(const Model& m, const Layer& layer, const Tokens& tokens, int64_t b, int64_t g, Place<KV> to, float* joint) {
    const int64_t size = m.head, group = m.heads / m.kv_heads, place = tokens.places[b];
    float* k = joint + (m.heads + g) * size;
    const float* v = joint + (m.heads + m.kv_heads + g) * size;
    const int64_t angles = place * size / 2;
    for (int64_t h = 0; h <= group; h++) {
        float* x = h < group ? joint + (g * group + h) * size : k;
        const Norm& norm = h < group ? layer.query_norm : layer.key_norm;
        if (norm.weight) normalise(norm, x, x, size);
        if (m.cos) turn(x, m.cos + angles, m.sin + angles, size);
    }
    for (int64_t i = 0; i < size; i += LANES) {
        store(to.keys + place * size + i, load(k + i), size - i);
        store(to.values + place * size + i, load(v + i), size - i);
    }
}

template <class W, class KV>
static void walk(const Model& m, const Cache& cache, const Tokens& tokens, float* x, float* space) {
    const int64_t n = tokens.count, d = m.d_model, width = (m.heads + 2 * m.kv_heads) * m.head, wide = m.heads * m.head;
    const int64_t ff = (m.ff + LANES - 1) / LANES * LANES;  // room for whole vectors
    float *joint = space, *mixed = joint + n * width, *inner = mixed + n * wide, *upper = inner + n * ff;
    const int64_t group = m.heads / m.kv_heads;
    int64_t longest = 0;
    for (int64_t b = 0; b < n; b++) longest = tokens.places[b] > longest ? tokens.places[b] : longest;
#pragma omp parallel num_threads(m.threads)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        std::vector<float> normed(n * d), scores(longest + 1 + LANES), query(m.head + LANES);
        for (int64_t l = 0; l < m.n_layers; l++) {
            const Layer& layer = m.layers[l];
            for (int64_t b = 0; b < n; b++) normalise(layer.attention_norm, x + b * d, &normed[b * d], d);
            linear<W>(layer.joint, n, normed.data(), d, joint, width, false);
#pragma omp barrier
            const int64_t first = n * m.kv_heads * me / team, end = n * m.kv_heads * (me + 1) / team;
            const auto mix = [&](int64_t b, int64_t g) {
                const Place<KV> from = at<KV>(m, cache, l, tokens.rows[b], g);
                for (int64_t h = g * group; h < (g + 1) * group; h++)
                    attend(joint + b * width + h * m.head, from.keys, from.values, from.next, tokens.places[b] + 1,
                           m.head, scores.data(), query.data(), mixed + b * wide + h * m.head);
            };
            for (int64_t t = first; t < end; t++) {
                const int64_t b = t / m.kv_heads, g = t % m.kv_heads;
                remember(m, layer, tokens, b, g, at<KV>(m, cache, l, tokens.rows[b], g), joint + b * width);
                if (!tokens.several) mix(b, g);
            }
            if (tokens.several) {  // a token sees those before it, which other threads may store
#pragma omp barrier
                for (int64_t t = first; t < end; t++) mix(t / m.kv_heads, t % m.kv_heads);
            }
#pragma omp barrier
            linear<W>(layer.output, n, mixed, wide, x, d, true);
#pragma omp barrier
            for (int64_t b = 0; b < n; b++) normalise(layer.feed_forward_norm, x + b * d, &normed[b * d], d);
            linear<W>(layer.up, n, normed.data(), d, upper, ff, false);
            if (layer.gate.weight) linear<W>(layer.gate, n, normed.data(), d, inner, ff, false);
            const int64_t parts = (m.ff + LANES - 1) / LANES, last = parts * (me + 1) / team * LANES;
            for (int64_t b = 0; b < n; b++)
                for (int64_t i = parts * me / team * LANES; i < last; i += LANES) {
                    float* u = upper + b * ff + i;
                    store(u, layer.gate.weight ? activate(load(inner + b * ff + i), m.activation) * load(u) : activate(load(u), m.activation));
                }
#pragma omp barrier
            linear<W>(layer.down, n, upper, ff, x, d, true);
#pragma omp barrier
        }
#pragma omp for
        for (int64_t b = 0; b < n; b++) normalise(m.norm, x + b * d, x + b * d, d);
    }
}

template <class W>
static void any_cache(const Model& m, const Cache& cache, const Tokens& tokens, float* x, float* space) {
    cache.half ? walk<W, uint16_t>(m, cache, tokens, x, space) : walk<W, float>(m, cache, tokens, x, space);
}

static void embed(const Model& m, int64_t id, int64_t place, float* x) {
    const int64_t d = m.d_model;
    for (int64_t i = 0; i < d; i++) {
        const uint32_t bits = m.half ? (uint32_t)((const uint16_t*)m.embedding)[id * d + i] << 16 : ((const uint32_t*)m.embedding)[id * d + i];
        std::memcpy(x + i, &bits, sizeof bits);
        if (m.placed) x[i] += m.placed[place * d + i];
    }
}

extern "C" {
// Whether bfloat16 comes in pairs (kind 3) on this machine.
int64_t pairs() { return PAIRS; }

// y [count, width, D]: outputs of the last layer, zeros at padding; the lengths of the texts' rows grow. True where a token has no
// place in the cache or in the vocabulary; then nothing is done.
int64_t decode(const Model* m, const Cache* cache, const Texts* texts, float* y) {
    static thread_local std::vector<float> memory;  // not made anew, as that would fill it with zeros
    std::vector<int64_t> from, rows, places;
    for (int64_t i = 0; i < texts->count; i++) {
        const int64_t row = texts->rows ? texts->rows[i] : texts->first + i, valid = texts->counts ? texts->counts[i] : texts->width;
        for (int64_t t = i * texts->width; t < i * texts->width + valid; t++) {
            const int64_t place = cache->lengths[row] + t - i * texts->width;
            if (place < 0 || place >= cache->capacity || texts->ids[t] < 0 || texts->ids[t] >= m->vocabulary) return 1;
            from.push_back(t), rows.push_back(row), places.push_back(place);
        }
    }
    const int64_t d = m->d_model, all = from.size(), width = (2 * m->heads + 2 * m->kv_heads) * m->head + 2 * (m->ff + LANES);
    if (texts->counts) std::memset(y, 0, texts->count * texts->width * d * sizeof(float));
    for (int64_t first = 0; first < all; first += texts->at_once) {
        const int64_t n = std::min(texts->at_once, all - first);
        if ((int64_t)memory.size() < n * (d + width)) memory.resize(n * (d + width));
        float *x = memory.data(), *space = x + n * d;
        for (int64_t b = 0; b < n; b++) embed(*m, texts->ids[from[first + b]], places[first + b], x + b * d);
        const Tokens tokens = {n, texts->width > 1, &rows[first], &places[first]};
        if (m->kind == 0) any_cache<float>(*m, *cache, tokens, x, space);
#ifdef __AVX512BF16__
        else if (m->kind == 3) any_cache<Pair>(*m, *cache, tokens, x, space);
#endif
        else if (m->kind == 1) any_cache<uint16_t>(*m, *cache, tokens, x, space);
        else any_cache<int8_t>(*m, *cache, tokens, x, space);
        for (int64_t b = 0; b < n; b++) std::memcpy(y + from[first + b] * d, x + b * d, d * sizeof(float));
    }
    for (int64_t t = 0; t < all; t++) cache->lengths[rows[t]]++;
    return 0;
}

// y [n, out] = x [n, in] Wᵀ.
void project(const Linear* w, int64_t kind, int64_t threads, int64_t n, const float* x, float* y) {
#pragma omp parallel num_threads(threads)
    {
        if (kind == 0) linear<float>(*w, n, x, w->in, y, w->out, false);
#ifdef __AVX512BF16__
        else if (kind == 3) linear<Pair>(*w, n, x, w->in, y, w->out, false);
#endif
        else if (kind == 1) linear<uint16_t>(*w, n, x, w->in, y, w->out, false);
        else linear<int8_t>(*w, n, x, w->in, y, w->out, false);
    }
}
}
