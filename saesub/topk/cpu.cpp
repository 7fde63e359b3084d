// The TopK training step on the CPU, one pass over memory each: search, decode, rows, Adam.
//
// Plain C++17 with GCC/Clang vectors, no dependency; built on first use by cpu.py. All matrices
// are dense, row-major and feature-major: W_enc is passed as its transpose, (d_sae, d_in). Sums run
// in an order that does not depend on the number of threads, so a run repeats bit for bit.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HAS_INT8_SEARCH 1
#else
#define HAS_INT8_SEARCH 0
#endif

namespace {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

float dot(const float* a, const float* b, int64_t d) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) sums[u] += load(a + i + u * kLanes) * load(b + i + u * kLanes);
  for (; i + kLanes <= d; i += kLanes) sums[0] += load(a + i) * load(b + i);
  Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0;
  for (int u = 0; u < kLanes; ++u) total += sum[u];
  for (; i < d; ++i) total += a[i] * b[i];
  return total;
}

// y += scale * x
void axpy(float scale, const float* x, float* y, int64_t d) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(y + i, load(y + i) + scale * load(x + i));
  for (; i < d; ++i) y[i] += scale * x[i];
}

void prefetch(const float* row, int64_t d) {
  for (int64_t i = 0; i < d; i += kLanes) __builtin_prefetch(row + i);
}

float largest_magnitude(const float* x, int64_t d) {
  Vec best = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    Vec v = load(x + i), negated = -v;
    v = v > negated ? v : negated;
    best = v > best ? v : best;
  }
  float largest = 0;
  for (int u = 0; u < kLanes; ++u) largest = std::max(largest, best[u]);
  for (; i < d; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Runs task(0) .. task(n_tasks - 1) on up to n_threads threads; 0, or 1 if memory ran out.
template <class Task>
int parallel(int64_t n_tasks, int64_t n_threads, const Task& task) {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  auto work = [&] {
    try {
      for (int64_t i; (i = next.fetch_add(1)) < n_tasks;) task(i);
    } catch (const std::bad_alloc&) {
      failed = 1;
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(n_threads, n_tasks); ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are do the work.
  }
  work();
  for (auto& helper : helpers) helper.join();
  return failed;
}

// ---- search: 8-bit scores with error bounds find candidates, float32 ranks them ----

constexpr int kTokensPerTile = 6;     // 6 × 4 accumulators of 16 lanes fill the registers
constexpr int kFeaturesPerTile = FEATURES_PER_TILE;
constexpr int kTokensPerTask = 96;    // their 8-bit copy stays in the second-level cache
// Half-width of the bounds in standard deviations of the rounding error. A feature is lost only if
// two errors differ by two half-widths, 5.6 standard deviations of their difference or more.
constexpr float kBoundWidth = 4.0f;

// Rounding errors are uniform and of no direction as long as most coordinates span several steps.
// Where one massive coordinate takes the range for itself, the others round towards zero and the
// error lies along the vector: this much of it, in steps, is tolerated (chance gives 0.29).
constexpr float kAlignedError = 1.3f;
constexpr int kMassive = 16;  // coordinates of more steps are not among "the others"

constexpr int kBisections = 12;  // of the range of the bounds: a 4096th of it

// Score of feature f for a token of scale s: s * (sum of products) * scale[f] + offset[f]; its
// upper bound lies norm_error[f] * s + scale_error[f] * |x| above, the lower as far below.
struct Packed {
  const uint8_t* weights;
  const float *scale, *norm_error, *offset, *scale_error;
};

struct Candidates {
  float threshold;  // in units of the token's scale, as all bounds
  int size, limit;  // pruned when more than `limit`
  bool overflow;
};

// No bound reaches NaN: nothing more is collected, and the caller ranks this token densely.
const Candidates kClosed{NAN, 0, 0, true};

struct Searcher {
  const float *x, *W, *bias, *rank_scale;
  int64_t d, d_sae, k;
  int64_t often, capacity;  // candidates of a token: after how many it is pruned; for how many room
  Packed packed;
  int64_t* features;
  float* values;
  uint8_t* failed;
};

#if HAS_INT8_SEARCH

struct Token {
  float scale, inverse, norm;
  int32_t start;  // -128 * sum of the token's 8-bit values: weights are stored as value + 128
  bool bounded;   // whether the bounds hold for it
};

struct Rounded {
  int32_t sum;
  float aligned;  // the error's component along the coordinates that are not massive, in steps
};

// out = x * inverse, rounded; |x * inverse| must not exceed 127.
Rounded quantise(const float* x, float inverse, int64_t d, int8_t* out) {
  __m512i sums = _mm512_setzero_si512(), massive = _mm512_set1_epi32(kMassive);
  __m512 along = _mm512_setzero_ps(), square = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += 16) {
    __mmask16 inside = d - i >= 16 ? 0xFFFF : (1 << (d - i)) - 1;
    __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, x + i), _mm512_set1_ps(inverse));
    __m512i whole = _mm512_cvtps_epi32(scaled);
    sums = _mm512_add_epi32(sums, whole);
    _mm_mask_storeu_epi8(out + i, inside, _mm512_cvtsepi32_epi8(whole));
    __mmask16 other = _mm512_cmple_epi32_mask(_mm512_abs_epi32(whole), massive);
    __m512 error = _mm512_sub_ps(scaled, _mm512_cvtepi32_ps(whole));
    along = _mm512_mask3_fmadd_ps(error, scaled, along, other);
    square = _mm512_mask3_fmadd_ps(scaled, scaled, square, other);
  }
  float length = std::sqrt(_mm512_reduce_add_ps(square));
  float aligned = length > 0 ? std::fabs(_mm512_reduce_add_ps(along)) / length : 0.0f;
  return {_mm512_reduce_add_epi32(sums), aligned};
}

Token quantise_token(const float* x, int64_t d, int8_t* out) {
  float largest = largest_magnitude(x, d);
  Token token{};
  token.scale = largest > 0 ? largest / 127 : 1.0f;
  token.inverse = 1 / token.scale;
  token.norm = std::sqrt(dot(x, x, d));
  token.bounded = std::isfinite(token.norm) && std::isfinite(token.inverse);
  if (!token.bounded) return token;
  Rounded rounded = quantise(x, token.inverse, d, out);
  token.start = -128 * rounded.sum;
  token.bounded = rounded.aligned < kAlignedError;
  return token;
}

// A number that at least k of the n > k values reach, and hardly more than k: found by bisection,
// which takes a fraction of the time of a selection. `start` is one that at least k reach, or the
// least float; `values` has room for 15 more.
float reached_by(float* values, int n, int64_t k, float start) {
  __m512 least = _mm512_set1_ps(FLT_MAX), most = _mm512_set1_ps(-FLT_MAX);
  for (int i = 0; i < n; i += 16) {
    __mmask16 inside = n - i >= 16 ? 0xFFFF : (1 << (n - i)) - 1;
    __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), inside, values + i);
    least = _mm512_mask_min_ps(least, inside, least, v);
    most = _mm512_max_ps(most, v);
    _mm512_storeu_ps(values + i, v);
  }
  float low = std::max(_mm512_reduce_min_ps(least), start), high = _mm512_reduce_max_ps(most);
  for (int round = 0; round < kBisections; ++round) {
    float middle = 0.5f * low + 0.5f * high;
    int64_t reached = 0;
    for (int i = 0; i < n; i += 16)
      reached += __builtin_popcount(_mm512_cmp_ps_mask(
          _mm512_loadu_ps(values + i), _mm512_set1_ps(middle), _CMP_GE_OQ));
    (reached >= k ? low : high) = middle;
  }
  return low;
}

// Keeps the candidates whose upper bound reaches the k-th largest lower bound.
void prune(const Searcher& s, const Token& token, Candidates& c, float* upper, int32_t* index,
           std::vector<float>& lower) {
  if (c.overflow || c.size <= s.k) return;
  lower.resize(s.capacity);
  __m512 per_norm = _mm512_set1_ps(token.norm * token.inverse);
  for (int i = 0; i < c.size; i += 16) {
    __mmask16 inside = c.size - i >= 16 ? 0xFFFF : (1 << (c.size - i)) - 1;
    __m512i ids = _mm512_maskz_loadu_epi32(inside, index + i);
    __m512 width = _mm512_fmadd_ps(_mm512_i32gather_ps(ids, s.packed.scale_error, 4), per_norm,
                                   _mm512_i32gather_ps(ids, s.packed.norm_error, 4));
    __m512 bound = _mm512_maskz_loadu_ps(inside, upper + i);
    _mm512_storeu_ps(lower.data() + i, _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), width, bound));
  }
  c.threshold = reached_by(lower.data(), c.size, s.k, c.threshold);
  int kept = 0;
  for (int i = 0; i < c.size; i += 16) {
    __mmask16 inside = c.size - i >= 16 ? 0xFFFF : (1 << (c.size - i)) - 1;
    __m512 bound = _mm512_maskz_loadu_ps(inside, upper + i);
    __m512i ids = _mm512_maskz_loadu_epi32(inside, index + i);
    __mmask16 stays = _mm512_mask_cmp_ps_mask(
        inside, bound, _mm512_set1_ps(c.threshold), _CMP_GE_OQ);
    _mm512_storeu_ps(upper + kept, _mm512_maskz_compress_ps(stays, bound));
    _mm512_storeu_si512(index + kept, _mm512_maskz_compress_epi32(stays, ids));
    kept += __builtin_popcount(stays);
  }
  c.size = kept;
  c.limit = std::max<int>(s.often, 2 * kept);
  if (c.limit > s.capacity - 2 * kFeaturesPerTile) c = kClosed;  // too many near-ties
}

// One tile: products of 6 tokens with 64 features, and the features that may be among the top k.
void search_tile(const Searcher& s, int64_t block, int64_t groups, const int8_t* const* x8,
                 const Token* tokens, Candidates* found, float* const* upper,
                 int32_t* const* index) {
  const uint8_t* weights = s.packed.weights + block * groups * 4 * kFeaturesPerTile;
  __m512i sums[kTokensPerTile][4];
#pragma GCC unroll 6
  for (int t = 0; t < kTokensPerTile; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[t][v] = _mm512_set1_epi32(tokens[t].start);
  for (int64_t g = 0; g < groups; ++g, weights += 4 * kFeaturesPerTile) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) w[v] = _mm512_loadu_si512(weights + 64 * v);
#pragma GCC unroll 6
    for (int t = 0; t < kTokensPerTile; ++t) {
      int32_t four;
      std::memcpy(&four, x8[t] + 4 * g, 4);
      __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], w[v], a);
    }
  }
  int64_t first = block * kFeaturesPerTile;
  __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    int64_t f = first + 16 * v;
    __m512 scale = _mm512_loadu_ps(s.packed.scale + f);
    __m512 norm_error = _mm512_loadu_ps(s.packed.norm_error + f);
    __m512 offset = _mm512_loadu_ps(s.packed.offset + f);
    __m512 scale_error = _mm512_loadu_ps(s.packed.scale_error + f);
    __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(f)));
#pragma GCC unroll 6
    for (int t = 0; t < kTokensPerTile; ++t) {
      __m512 bound = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][v]), scale, norm_error);
      __m512 rest = _mm512_fmadd_ps(scale_error, _mm512_set1_ps(tokens[t].norm), offset);
      bound = _mm512_fmadd_ps(rest, _mm512_set1_ps(tokens[t].inverse), bound);
      __mmask16 hit =
          _mm512_cmp_ps_mask(bound, _mm512_set1_ps(found[t].threshold), _CMP_GE_OQ);
      if (!hit) continue;
      // Compressed in a register first: a compressing store is slow on Zen 4.
      _mm512_storeu_ps(upper[t] + found[t].size, _mm512_maskz_compress_ps(hit, bound));
      _mm512_storeu_si512(index[t] + found[t].size, _mm512_maskz_compress_epi32(hit, ids));
      found[t].size += __builtin_popcount(hit);
    }
  }
}

// Exact pre-activations of the candidates; writes the k best by rank.
void refine(const Searcher& s, int64_t token, const Candidates& c, const int32_t* index,
            std::vector<std::pair<float, int>>& ranked, std::vector<float>& exact) {
  const float* x = s.x + token * s.d;
  ranked.resize(c.size);
  exact.resize(c.size);
  for (int i = 0; i < c.size; ++i) {
    if (i + 2 < c.size) prefetch(s.W + index[i + 2] * s.d, s.d);
    exact[i] = dot(x, s.W + index[i] * s.d, s.d) + s.bias[index[i]];
    ranked[i] = {exact[i] * (s.rank_scale ? s.rank_scale[index[i]] : 1.0f), i};
  }
  auto better = [](const std::pair<float, int>& a, const std::pair<float, int>& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  };
  std::nth_element(ranked.begin(), ranked.begin() + (s.k - 1), ranked.end(), better);
  for (int64_t j = 0; j < s.k; ++j) {
    s.features[token * s.k + j] = index[ranked[j].second];
    s.values[token * s.k + j] = exact[ranked[j].second];
  }
}

void search_tokens(const Searcher& s, int64_t begin, int64_t end) {
  int64_t groups = blocks_of(s.d, 4), width = groups * 4, n = end - begin;
  int64_t padded = blocks_of(n, kTokensPerTile) * kTokensPerTile;
  std::vector<int8_t> x8(padded * width, 0);
  std::vector<Token> tokens(padded, Token{1, 1, 0, 0, false});
  std::vector<Candidates> found(padded, Candidates{-FLT_MAX, 0, static_cast<int>(s.often), false});
  // Not set to zero: most tokens use a fraction of their room.
  std::unique_ptr<float[]> upper(new float[padded * s.capacity]);
  std::unique_ptr<int32_t[]> index(new int32_t[padded * s.capacity]);
  std::vector<float> lower, exact;
  std::vector<std::pair<float, int>> ranked;
  for (int64_t t = 0; t < n; ++t)
    tokens[t] = quantise_token(s.x + (begin + t) * s.d, s.d, x8.data() + t * width);
  for (int64_t t = 0; t < padded; ++t)
    if (!tokens[t].bounded) found[t] = kClosed;
  for (int64_t block = 0; block < blocks_of(s.d_sae, kFeaturesPerTile); ++block) {
    for (int64_t t = 0; t < padded; t += kTokensPerTile) {
      const int8_t* rows[kTokensPerTile];
      float* uppers[kTokensPerTile];
      int32_t* indices[kTokensPerTile];
      for (int u = 0; u < kTokensPerTile; ++u) {
        rows[u] = x8.data() + (t + u) * width;
        uppers[u] = upper.get() + (t + u) * s.capacity;
        indices[u] = index.get() + (t + u) * s.capacity;
      }
      search_tile(s, block, groups, rows, &tokens[t], &found[t], uppers, indices);
      for (int u = 0; u < kTokensPerTile; ++u)
        if (found[t + u].size > found[t + u].limit)
          prune(s, tokens[t + u], found[t + u], uppers[u], indices[u], lower);
    }
  }
  for (int64_t t = 0; t < n; ++t) {
    float* bounds = upper.get() + t * s.capacity;
    int32_t* ids = index.get() + t * s.capacity;
    prune(s, tokens[t], found[t], bounds, ids, lower);
    s.failed[begin + t] = found[t].overflow || found[t].size < s.k;
    if (!s.failed[begin + t]) refine(s, begin + t, found[t], ids, ranked, exact);
  }
}

struct PackedRow {
  float scale, norm, width;  // width: half-width of the bound, in steps
};

// A row of the dictionary in 8 bits, as value + 128, into its lane of a block.
PackedRow pack_feature(const float* row, int64_t d, int lane, std::vector<int8_t>& row8,
                       uint8_t* block) {
  float largest = largest_magnitude(row, d), inverse = largest > 0 ? 127 / largest : 0.0f;
  PackedRow packed{largest / 127, std::sqrt(dot(row, row, d)), kBoundWidth / std::sqrt(12.0f)};
  if (!std::isfinite(packed.norm) || !std::isfinite(inverse)) {
    packed.norm = NAN;  // the caller, finding it in the table, ranks densely
    return packed;
  }
  packed.width = std::max(packed.width, 2 * quantise(row, inverse, d, row8.data()).aligned);
  for (size_t i = 0; i < row8.size(); i += 4) {
    uint32_t four;
    std::memcpy(&four, row8.data() + i, 4);
    four ^= 0x80808080u;
    std::memcpy(block + i * kFeaturesPerTile + 4 * lane, &four, 4);
  }
  return packed;
}

#endif  // HAS_INT8_SEARCH

// ---- rows: gradients of one feature's encoder and decoder row, from the entries that use it ----

struct Entries {
  const int64_t *start, *token;  // entries of feature f: start[f] .. start[f + 1]
  const float *g_pre, *value;    // gradient of the pre-activation, and the activation
  const float *x, *g_out;        // (n, d): the encoder's input, the gradient of the output
  int64_t d_in, d_out;
};

// The gradient rows of feature f, in enc (d_in) and dec (d_out); returns that of its bias.
float gradient_rows(const Entries& e, int64_t f, float* enc, float* dec) {
  std::memset(enc, 0, e.d_in * sizeof(float));
  std::memset(dec, 0, e.d_out * sizeof(float));
  float bias = 0;
  for (int64_t i = e.start[f]; i < e.start[f + 1]; ++i) {
    axpy(e.g_pre[i], e.x + e.token[i] * e.d_in, enc, e.d_in);
    axpy(e.value[i], e.g_out + e.token[i] * e.d_out, dec, e.d_out);
    bias += e.g_pre[i];
  }
  return bias;
}

// Partial sums are kept for each of these blocks; cpu.py sizes them.
constexpr int64_t kFeaturesPerTask = FEATURES_PER_BLOCK;
constexpr int64_t kTokensPerDecode = TOKENS_PER_BLOCK;

struct AdamSettings {
  double lr, beta1, beta2, eps;
  double clip;   // factor on every gradient
  int64_t step;  // of this update, counted from 1
  int64_t lazy;  // rows without gradient stay, and their moments decay when next touched
};

void adam_row(const AdamSettings& s, int64_t missed, const float* g, float* p, float* m, float* v,
              int64_t d) {
  float new1 = static_cast<float>(1 - s.beta1), new2 = static_cast<float>(1 - s.beta2);
  float keep1 = static_cast<float>(std::pow(s.beta1, missed + 1));
  float keep2 = static_cast<float>(std::pow(s.beta2, missed + 1));
  float rate = static_cast<float>(s.lr / (1 - std::pow(s.beta1, s.step)));
  float root = static_cast<float>(1 / std::sqrt(1 - std::pow(s.beta2, s.step)));
  float clip = static_cast<float>(s.clip), eps = static_cast<float>(s.eps);
#pragma GCC ivdep
  for (int64_t i = 0; i < d; ++i) {
    float grad = g[i] * clip;
    m[i] = keep1 * m[i] + new1 * grad;
    v[i] = keep2 * v[i] + new2 * grad * grad;
    p[i] -= rate * m[i] / (std::sqrt(v[i]) * root + eps);
  }
}

}  // namespace

extern "C" {

int saesub_has_int8_search() { return HAS_INT8_SEARCH; }

// table: (4, d_sae padded to 64) floats: scale, norm_error, offset, scale_error.
int saesub_pack(const float* W, const float* bias, const float* rank_scale, int64_t d,
                int64_t d_sae, uint8_t* weights, float* table, int64_t threads) {
#if HAS_INT8_SEARCH
  int64_t groups = blocks_of(d, 4), n_blocks = blocks_of(d_sae, kFeaturesPerTile);
  int64_t padded = n_blocks * kFeaturesPerTile;
  return parallel(n_blocks, threads, [&](int64_t block) {
    uint8_t* out = weights + block * groups * 4 * kFeaturesPerTile;
    std::vector<int8_t> row8(groups * 4, 0);
    for (int lane = 0; lane < kFeaturesPerTile; ++lane) {
      int64_t f = block * kFeaturesPerTile + lane;
      PackedRow row{0, 0, 0};
      if (f < d_sae) row = pack_feature(W + f * d, d, lane, row8, out);
      float rank = f < d_sae && rank_scale ? rank_scale[f] : 1.0f;
      table[f] = row.scale * rank;
      table[padded + f] = kBoundWidth / std::sqrt(12.0f) * row.norm * rank;
      table[2 * padded + f] = f < d_sae ? bias[f] * rank : -INFINITY;
      table[3 * padded + f] = row.width * row.scale * rank;
    }
  });
#else
  return 2;
#endif
}

int saesub_search(const float* x, const float* W, const float* bias, const float* rank_scale,
                   const uint8_t* weights, const float* table, int64_t n, int64_t d,
                   int64_t d_sae, int64_t k, int64_t* features, float* values, uint8_t* failed,
                   int64_t threads) {
#if HAS_INT8_SEARCH
  int64_t padded = blocks_of(d_sae, kFeaturesPerTile) * kFeaturesPerTile;
  Packed packed{weights, table, table + padded, table + 2 * padded, table + 3 * padded};
  int64_t often = std::max<int64_t>(4 * k, 2 * k + 2 * kFeaturesPerTile);
  // Not a power of two, for then tokens' rooms would share cache sets; and no more than can come.
  int64_t capacity = std::min(16 * often, often + 2 * padded) + 16;
  Searcher s{x, W, bias, rank_scale, d, d_sae, k, often, capacity, packed, features, values, failed};
  return parallel(blocks_of(n, kTokensPerTask), threads, [&](int64_t task) {
    search_tokens(s, task * kTokensPerTask, std::min(n, (task + 1) * kTokensPerTask));
  });
#else
  return 2;
#endif
}

// Reconstruct from the entries offsets[t] .. offsets[t + 1] of every token, and go back to them.
//   x_hat = sum of value * W_dec[feature] + bias; g_out = scale * (x_hat - target);
//   g_pre = W_dec[feature] . g_out where the value is not zero, else zero.
// sums: (blocks of 32 tokens, d + 1) floats: that block's sum of g_out, and of its square.
int saesub_decode(const int64_t* features, const int64_t* offsets, const float* values,
                   const float* W_dec, const float* bias, const float* target, int64_t n,
                   int64_t d, float scale, float* x_hat, float* g_out, float* g_pre, float* sums,
                   int64_t threads) {
  return parallel(blocks_of(n, kTokensPerDecode), threads, [&](int64_t task) {
    float* sum = sums + task * (d + 1);
    std::memset(sum, 0, (d + 1) * sizeof(float));
    for (int64_t t = task * kTokensPerDecode; t < std::min(n, (task + 1) * kTokensPerDecode); ++t) {
      float *out = x_hat + t * d, *g = g_out + t * d;
      if (bias) std::memcpy(out, bias, d * sizeof(float));
      else std::memset(out, 0, d * sizeof(float));
      for (int64_t i = offsets[t]; i < offsets[t + 1]; ++i) {
        if (i + 2 < offsets[t + 1]) prefetch(W_dec + features[i + 2] * d, d);
        if (values[i] != 0) axpy(values[i], W_dec + features[i] * d, out, d);
      }
      for (int64_t i = 0; i < d; ++i) {
        g[i] = scale * (out[i] - target[t * d + i]);
        sum[i] += g[i];
      }
      sum[d] += dot(g, g, d);
      for (int64_t i = offsets[t]; i < offsets[t + 1]; ++i)
        g_pre[i] = values[i] != 0 ? dot(W_dec + features[i] * d, g, d) : 0.0f;
    }
  });
}

// Sort the m entries with a value by feature: start (d_sae + 1), and their token, g_pre and value.
int saesub_sort(const int64_t* features, const int64_t* tokens, const float* values,
                 const float* g_pre, int64_t m, int64_t d_sae, int64_t* start, int64_t* token,
                 float* sorted_g_pre, float* sorted_value) {
  std::fill(start, start + d_sae + 1, 0);
  for (int64_t i = 0; i < m; ++i) start[features[i] + 1] += values[i] != 0;
  for (int64_t f = 0; f < d_sae; ++f) start[f + 1] += start[f];
  for (int64_t i = 0; i < m; ++i) {
    if (values[i] == 0) continue;
    int64_t at = start[features[i]]++;
    token[at] = tokens[i];
    sorted_g_pre[at] = g_pre[i];
    sorted_value[at] = values[i];
  }
  std::memmove(start + 1, start, d_sae * sizeof(int64_t));  // each start had moved to its end
  start[0] = 0;
  return 0;
}

// Of all gradient rows: squared norm (a double for each block of features), and (blocks, d_in)
// partial sums of bias gradient * W_enc row.
int saesub_row_norms(const int64_t* start, const int64_t* token, const float* g_pre,
                      const float* value, const float* x, const float* g_out, const float* W_enc,
                      int64_t d_in, int64_t d_out, int64_t d_sae, double* squares,
                     float* through_encoder, int64_t threads) {
  Entries e{start, token, g_pre, value, x, g_out, d_in, d_out};
  return parallel(blocks_of(d_sae, kFeaturesPerTask), threads, [&](int64_t task) {
    std::vector<float> enc(d_in), dec(d_out);
    float* partial = through_encoder + task * d_in;
    std::memset(partial, 0, d_in * sizeof(float));
    double square = 0;
    int64_t last = std::min(d_sae, (task + 1) * kFeaturesPerTask);
    for (int64_t f = task * kFeaturesPerTask; f < last; ++f) {
      if (start[f] == start[f + 1]) continue;
      float bias = gradient_rows(e, f, enc.data(), dec.data());
      square += dot(enc.data(), enc.data(), d_in) + dot(dec.data(), dec.data(), d_out);
      square += static_cast<double>(bias) * bias;
      if (W_enc) axpy(bias, W_enc + f * d_in, partial, d_in);
    }
    squares[task] = square;
  });
}

// One Adam update of every feature. moved (d_sae) is the last step at which a row was updated; it
// is read and written only in lazy mode.
int saesub_adam_rows(const int64_t* start, const int64_t* token, const float* g_pre,
                      const float* value, const float* x, const float* g_out, int64_t d_in,
                      int64_t d_out, int64_t d_sae, const AdamSettings* settings, float* enc,
                      float* enc_m, float* enc_v, float* dec, float* dec_m, float* dec_v,
                      float* bias, float* bias_m, float* bias_v, int64_t* moved, int64_t threads) {
  Entries e{start, token, g_pre, value, x, g_out, d_in, d_out};
  const AdamSettings& s = *settings;
  return parallel(blocks_of(d_sae, kFeaturesPerTask), threads, [&](int64_t task) {
    std::vector<float> g_enc(d_in), g_dec(d_out);
    int64_t last = std::min(d_sae, (task + 1) * kFeaturesPerTask);
    for (int64_t f = task * kFeaturesPerTask; f < last; ++f) {
      if (s.lazy && start[f] == start[f + 1]) continue;
      int64_t missed = 0;
      if (s.lazy) {
        missed = s.step - 1 - moved[f];
        moved[f] = s.step;
      }
      float g_bias = gradient_rows(e, f, g_enc.data(), g_dec.data());
      int64_t a = f * d_in, b = f * d_out;
      adam_row(s, missed, g_enc.data(), enc + a, enc_m + a, enc_v + a, d_in);
      adam_row(s, missed, g_dec.data(), dec + b, dec_m + b, dec_v + b, d_out);
      adam_row(s, missed, &g_bias, bias + f, bias_m + f, bias_v + f, 1);
    }
  });
}

}  // extern "C"
