// The search for each token's k best features: 8-bit scores with error bounds find candidates, of
// all coordinates or of the few that hold nearly all variance; float32 products of all coordinates
// rank them.

#pragma once

#include <cfloat>
#include <memory>
#include <utility>

#include "cpu_dot8.h"

#ifdef DOT8

namespace {

constexpr int kTokensPerTask = 96;  // their 8-bit copy stays in the second-level cache
// Half-width of the bounds in standard deviations of the rounding error. A feature is lost only if
// two errors differ by two half-widths, 5.6 standard deviations of their difference or more.
constexpr float kBoundWidth = DEVIATIONS;

// Against an exact score only one error counts: its bound is as wide as that of a difference.
constexpr float kBeyond = 0.4142f;

// How much of the bound on what is left out the lower bounds have. As any error would, it rather
// raises the largest scores; a token whose k-th best score does not reach the threshold that the
// lower bounds gave is ranked by the whole product.
constexpr float kRestBelow = 0.25f;

// Rounding errors are uniform and of no direction as long as most coordinates span several steps.
// Where one massive coordinate takes the range for itself, the others round towards zero and the
// error lies along the vector: this much of it, in steps, is tolerated (chance gives 0.29).
constexpr float kAlignedError = 1.3f;
constexpr int kMassive = 16;  // coordinates of more steps are not among "the others"

constexpr int kBisections = 12;  // of the range of the bounds: a 4096th of it

// ---- the encoder in 8 bits ----

// Where the copy lies, and what it is of. Score of feature f for a token of scale s:
// s * (sum of products) * scale[f] + offset[f]; its upper bound lies
// norm_error[f] * s + scale_error[f] * |read| + left_out[f] * |rest| above, the lower as far below,
// where `read` is the part of the token that the copy reads and `rest` what it leaves out.
struct Packing {
  const uint8_t* basis;      // (tiles, d / 4, 64, 4): the directions that are read, in 8 bits; null
                             // where all coordinates are
  const float* basis_scale;  // (directions, padded to 64) length of a step of each
  const float* norms;        // (d_sae) by which features are ranked; null where all are 1
  uint8_t* weights;          // (tiles, width / 4, 64, 4)
  float* table;              // (5, padded): scale, norm_error, offset, scale_error, left_out
  int64_t d, read, d_sae;
  double basis_error;  // of a squared norm in the basis, relative: in 8 bits it is hardly orthogonal

  int64_t width() const { return padded_to(kCoordinates, read); }
  int64_t padded() const { return padded_to(kFeaturesPerTile, d_sae); }
};

struct Rounded {
  int32_t sum;
  float aligned;  // the error's component along the coordinates that are not massive, in steps
};

// out = x * inverse, rounded; |x * inverse| must not exceed kSteps.
Rounded quantise(const float* x, float inverse, int64_t d, int8_t* out) {
  constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: adding it rounds, to even
  IntVec sums = {};
  Vec along = {}, square = {}, none = {};
  for (int64_t i = 0; i < d; i += kLanes) {
    float last[kLanes] = {};
    int64_t inside = std::min<int64_t>(kLanes, d - i);
    if (inside < kLanes) std::memcpy(last, x + i, inside * sizeof(float));
    Vec scaled = load(inside < kLanes ? last : x + i) * inverse;
    Vec rounded = (scaled + kRounds) - kRounds;
    IntVec whole = __builtin_convertvector(rounded, IntVec);
    sums += whole;
    ByteVec bytes = __builtin_convertvector(whole, ByteVec);
    std::memcpy(out + i, &bytes, inside);
    Vec other = ((whole <= kMassive) & (whole >= -kMassive)) ? scaled : none;
    along += (scaled - rounded) * other;
    square += other * other;
  }
  float length = std::sqrt(sum_of(square));
  return {sum_of(sums), length > 0 ? std::fabs(sum_of(along)) / length : 0.0f};
}

constexpr float kUniform = 0.28867513f;  // standard deviation of an error within a step, 1 / √12

// The half-width, in steps, of the bound on an error of which so many lie along the vector itself.
inline float half_width(float aligned) { return std::max(kBoundWidth * kUniform, 2 * aligned); }

// What is read of a row, and the half-width of the bound on the rounding error it already has.
struct Part {
  const float* numbers;
  float error;
};

// A row of the encoder, of which `part` is read, into its lane of a tile.
void pack_feature(const Packing& p, int64_t f, const float* row, Part part, float bias,
                  int8_t* row8) {
  float largest = largest_magnitude(part.numbers, p.read);
  float inverse = largest > 0 ? kSteps / largest : 0.0f, rank = p.norms ? p.norms[f] : 1.0f;
  float square = dot(part.numbers, part.numbers, p.read), norm = std::sqrt(square);
  float whole = p.basis ? dot(row, row, p.d) : square, error = part.error;
  float unsure = static_cast<float>(p.basis_error) * square + 2 * norm * part.error;
  float rest = std::sqrt(std::max(0.0f, whole - square) + unsure);
  if (std::isfinite(norm) && std::isfinite(inverse) && std::isfinite(whole)) {
    Rounded rounded = quantise(part.numbers, inverse, p.read, row8);
    error = std::hypot(error, half_width(rounded.aligned) * largest / kSteps);
    uint8_t* lane = p.weights + f / kFeaturesPerTile * p.width() * kFeaturesPerTile +
                    f % kFeaturesPerTile * 4;
    for (int64_t i = 0; i < p.width(); i += 4, lane += 4 * kFeaturesPerTile) {
      uint32_t four;
      std::memcpy(&four, row8 + i, 4);
      four = kOffset == 128 ? four ^ 0x80808080u : four + kOffset * 0x01010101u;
      std::memcpy(lane, &four, 4);
    }
  } else {
    norm = NAN;  // the caller, finding it in the table, ranks densely
  }
  float* table = p.table + f;
  table[0] = largest / kSteps * rank;
  table[p.padded()] = kBoundWidth * kUniform * norm * rank;
  table[2 * p.padded()] = bias * rank;
  table[3 * p.padded()] = error * rank;
  table[4 * p.padded()] = rest * rank;
}

// Room for what `pack_features` computes of a few rows at a time.
struct Scratch {
  std::vector<int8_t> rows8, part8;
  std::vector<float> parts;

  explicit Scratch(const Packing& p)
      : rows8(kTokensPerTile * padded_to(kCoordinates, p.d), 0),
        part8(p.width(), 0),
        parts(kTokensPerTile * padded_to(kFeaturesPerTile, p.read)) {}
};

// The coordinates of some rows (d) in the basis, by products in 8 bits.
void rotate(const Packing& p, const float* const* rows, Scratch& scratch, Part* parts) {
  int64_t width = padded_to(kCoordinates, p.d), padded = padded_to(kFeaturesPerTile, p.read);
  const int8_t* rows8[kTokensPerTile];
  int32_t start[kTokensPerTile], sums[kTokensPerTile][kFeaturesPerTile];
  float step[kTokensPerTile];
  for (int t = 0; t < kTokensPerTile; ++t) {
    int8_t* row8 = scratch.rows8.data() + t * width;
    float largest = largest_magnitude(rows[t], p.d), inverse = largest > 0 ? kSteps / largest : 0.0f;
    bool bounded = std::isfinite(largest) && std::isfinite(inverse);
    Rounded rounded{0, 0};
    if (bounded) rounded = quantise(rows[t], inverse, p.d, row8);
    step[t] = bounded ? largest / kSteps : NAN;
    rows8[t] = row8;
    start[t] = -kOffset * rounded.sum;
    parts[t] = {scratch.parts.data() + t * padded, half_width(rounded.aligned) * step[t]};
  }
  for (int64_t c = 0; c < padded; c += kFeaturesPerTile) {
    products(p.basis + c * width, width, rows8, start, sums);
    for (int t = 0; t < kTokensPerTile; ++t)
      for (int v = 0; v < kFeaturesPerTile; v += kLanes)
        store(scratch.parts.data() + t * padded + c + v,
              to_float(load(sums[t] + v)) * load(p.basis_scale + c + v) * step[t]);
  }
}

// The rows of `features` (count) of W (d_sae, d), into the copy.
void pack_features(const Packing& p, const float* W, const float* bias, const int64_t* features,
                   int64_t count) {
  Scratch scratch(p);
  for (int64_t i = 0; i < count; i += kTokensPerTile) {
    const float* rows[kTokensPerTile];
    Part parts[kTokensPerTile];
    for (int t = 0; t < kTokensPerTile; ++t) {
      rows[t] = W + features[std::min(i + t, count - 1)] * p.d;
      parts[t] = {rows[t], 0.0f};
    }
    if (p.basis) rotate(p, rows, scratch, parts);
    for (int t = 0; t < std::min<int64_t>(kTokensPerTile, count - i); ++t)
      pack_feature(p, features[i + t], rows[t], parts[t], bias[features[i + t]],
                   scratch.part8.data());
  }
}

// ---- candidates ----

struct Token {
  float inverse;     // of its scale, in which its scores are counted
  float norm, rest;  // of the part that is read and of what is not, in that scale
  float width;       // of the bound on its rounding error, beside that of an error without direction
  bool bounded;      // whether the bounds hold for it
};

struct Candidates {
  float threshold;  // in units of the token's scale, as all bounds
  int size, limit;  // pruned when more than `limit`
  bool overflow;
};

// No bound reaches NaN: nothing more is collected, and the caller ranks this token densely.
const Candidates kClosed{NAN, 0, 0, true};

struct Searcher {
  const Packing& p;
  const float *x, *read, *rest;  // tokens (n, d); the part that is read; the norm of what is not
  const float *W, *bias;
  int64_t k, often, capacity;  // candidates: after how many a token is pruned; for how many room
  int64_t* features;
  float* values;
  uint8_t* failed;
  int32_t* ranked;  // (n) how many features were ranked in float32
};

// `start` is what the sums of products start at.
Token quantise_token(const Searcher& s, int64_t t, int8_t* out, int32_t* start) {
  const float* part = s.read + t * s.p.read;
  float largest = largest_magnitude(part, s.p.read);
  Token token{};
  token.inverse = 1 / (largest > 0 ? largest / kSteps : 1.0f);
  token.norm = std::sqrt(dot(part, part, s.p.read)) * token.inverse;
  token.rest = s.rest ? s.rest[t] * token.inverse : 0.0f;
  token.bounded =
      std::isfinite(token.norm) && std::isfinite(token.inverse) && std::isfinite(token.rest);
  if (!token.bounded) return token;
  Rounded rounded = quantise(part, token.inverse, s.p.read, out);
  *start = -kOffset * rounded.sum;
  token.width = half_width(rounded.aligned) / (kBoundWidth * kUniform);
  token.bounded = rounded.aligned < kAlignedError;
  return token;
}

// The candidates of a token: their upper and lower bounds, in units of its scale, and features.
struct Pool {
  float *upper, *lower;
  int32_t* index;
};

// A number that at least k of the n > k values reach, and hardly more than k: found by bisection,
// which takes a fraction of the time of a selection. `start` is one that at least k reach, or the
// least float; `values` has room for a vector more.
float reached_by(float* values, int n, int64_t k, float start) {
  for (int i = n; i < n + kLanes; ++i) values[i] = values[n - 1];
  Vec least = load(values), most = least;
  for (int i = kLanes; i < n; i += kLanes) {
    Vec v = load(values + i);
    least = v < least ? v : least;
    most = v > most ? v : most;
  }
  float low = least[0], high = most[0];
  for (int u = 1; u < kLanes; ++u) {
    low = std::min(low, least[u]);
    high = std::max(high, most[u]);
  }
  low = std::max(low, start);
  for (int i = n; i < n + kLanes; ++i) values[i] = -INFINITY;
  for (int round = 0; round < kBisections; ++round) {
    float middle = 0.5f * low + 0.5f * high;
    int64_t count = 0;
    for (int i = 0; i < n; i += kLanes) count += __builtin_popcount(reached(load(values + i), middle));
    (count >= k ? low : high) = middle;
  }
  return low;
}

// Keeps the candidates whose upper bound reaches the k-th largest lower bound.
void prune(const Searcher& s, Candidates& c, const Pool& pool) {
  if (c.overflow || c.size <= s.k) return;
  c.threshold = reached_by(pool.lower, c.size, s.k, c.threshold);
  int kept = 0;
  for (int i = 0; i < c.size; ++i) {
    pool.upper[kept] = pool.upper[i];
    pool.lower[kept] = pool.lower[i];
    pool.index[kept] = pool.index[i];
    kept += pool.upper[i] >= c.threshold;
  }
  c.size = kept;
  c.limit = std::max<int>(s.often, kept + kept / 2);
  if (c.limit > s.capacity - 2 * kFeaturesPerTile) c = kClosed;  // too many near-ties
}

// Of one tile of features and one of tokens: those features that may be among the top k.
void search_tile(const Searcher& s, int64_t tile, const int8_t* const* x8, const int32_t* start,
                 const Token* tokens, Candidates* found, const Pool* pools) {
  int32_t sums[kTokensPerTile][kFeaturesPerTile];
  products(s.p.weights + tile * s.p.width() * kFeaturesPerTile, s.p.width(), x8, start, sums);
  const float* table = s.p.table + tile * kFeaturesPerTile;
  int64_t padded = s.p.padded();
  for (int v = 0; v < kFeaturesPerTile; v += kLanes) {
    Vec scale = load(table + v), norm_error = load(table + padded + v),
        offset = load(table + 2 * padded + v), scale_error = load(table + 3 * padded + v),
        left_out = load(table + 4 * padded + v);
    int32_t f = static_cast<int32_t>(tile * kFeaturesPerTile + v);
#pragma GCC unroll 6
    for (int t = 0; t < kTokensPerTile; ++t) {
      Vec score = to_float(load(sums[t] + v)) * scale + offset * tokens[t].inverse;
      Vec rounding = norm_error * tokens[t].width + scale_error * tokens[t].norm;
      Vec rest = left_out * tokens[t].rest;
      Vec upper = score + (rounding + rest);
      uint32_t hits = reached(upper, found[t].threshold);
      if (!hits) continue;
      Vec lower = score - (rounding + kRestBelow * rest);
      for (; hits; hits &= hits - 1) {
        int lane = __builtin_ctz(hits), at = found[t].size++;
        pools[t].upper[at] = upper[lane];
        pools[t].lower[at] = lower[lane];
        pools[t].index[at] = f + lane;
      }
    }
  }
}

// Float32 scores of the candidates that can still be among the k best; writes the k best in the order
// of the features, so that sums over them do not depend on what the candidates were. Returns whether
// the k-th best reaches the threshold: no other feature can then be better.
bool refine(const Searcher& s, int64_t token, const Token& about, const Candidates& c,
            const Pool& pool, std::vector<std::pair<float, int>>& ranked,
            std::vector<float>& exact) {
  const float *x = s.x + token * s.p.d, *norms = s.p.norms;
  float* upper = pool.upper;
  int32_t* index = pool.index;
  ranked.clear();
  exact.resize(c.size);
  auto rank = [&](int i) {
    exact[i] = dot(x, s.W + index[i] * s.p.d, s.p.d) + s.bias[index[i]];
    ranked.push_back({exact[i] * (norms ? norms[index[i]] : 1.0f), i});
  };
  auto better = [&](const std::pair<float, int>& a, const std::pair<float, int>& b) {
    return a.first > b.first || (a.first == b.first && index[a.second] < index[b.second]);
  };
  auto best = [&] {
    std::nth_element(ranked.begin(), ranked.begin() + (s.k - 1), ranked.end(), better);
    return ranked[s.k - 1].first;
  };
  // First those of the highest bounds: the k-th best of them rules most others out.
  int first = 0;
  std::copy(upper, upper + c.size, pool.lower);  // which are of no more use
  int64_t few = std::min<int64_t>(c.size, s.k + s.k / 2);
  float high = reached_by(pool.lower, c.size, few, -FLT_MAX);
  for (int i = 0; i < c.size; ++i) {
    if (upper[i] < high) continue;
    std::swap(upper[i], upper[first]);
    std::swap(index[i], index[first++]);
  }
  for (int i = 0; i < first; ++i) {
    if (i + 2 < first) prefetch(s.W + index[i + 2] * s.p.d, s.p.d);
    rank(i);
  }
  float threshold = best() * about.inverse;
  const float *norm_error = s.p.table + s.p.padded(), *scale_error = norm_error + 2 * s.p.padded();
  for (int i = first; i < c.size; ++i) {
    float rounding = norm_error[index[i]] * about.width + scale_error[index[i]] * about.norm;
    if (!(upper[i] + kBeyond * rounding < threshold)) rank(i);
  }
  float least = best() * about.inverse;
  s.ranked[token] = static_cast<int32_t>(ranked.size());
  auto before = [&](const std::pair<float, int>& a, const std::pair<float, int>& b) {
    return index[a.second] < index[b.second];
  };
  std::sort(ranked.begin(), ranked.begin() + s.k, before);
  for (int64_t j = 0; j < s.k; ++j) {
    int i = ranked[j].second;
    s.features[token * s.k + j] = index[i];
    s.values[token * s.k + j] = exact[i];
  }
  return c.threshold <= least;
}

void search_tokens(const Searcher& s, int64_t begin, int64_t end) {
  int64_t width = s.p.width(), n = end - begin;
  int64_t padded = blocks_of(n, kTokensPerTile) * kTokensPerTile;
  std::vector<int8_t> x8(padded * width, 0);
  std::vector<int32_t> start(padded, 0);
  std::vector<Token> tokens(padded, Token{1, 0, 0, 1, false});
  std::vector<Candidates> found(padded, Candidates{-FLT_MAX, 0, static_cast<int>(s.often), false});
  // Not set to zero: most tokens use a fraction of their room.
  std::unique_ptr<float[]> bounds(new float[2 * padded * s.capacity]);
  std::unique_ptr<int32_t[]> index(new int32_t[padded * s.capacity]);
  std::vector<Pool> pools;
  for (int64_t t = 0; t < padded; ++t) {
    float* upper = bounds.get() + 2 * t * s.capacity;
    pools.push_back({upper, upper + s.capacity, index.get() + t * s.capacity});
  }
  std::vector<float> exact;
  std::vector<std::pair<float, int>> ranked;
  for (int64_t t = 0; t < n; ++t)
    tokens[t] = quantise_token(s, begin + t, x8.data() + t * width, &start[t]);
  for (int64_t t = 0; t < padded; ++t)
    if (!tokens[t].bounded) found[t] = kClosed;
  for (int64_t tile = 0; tile < s.p.padded() / kFeaturesPerTile; ++tile) {
    for (int64_t t = 0; t < padded; t += kTokensPerTile) {
      const int8_t* rows[kTokensPerTile];
      for (int u = 0; u < kTokensPerTile; ++u) rows[u] = x8.data() + (t + u) * width;
      search_tile(s, tile, rows, &start[t], &tokens[t], &found[t], &pools[t]);
      for (int u = 0; u < kTokensPerTile; ++u)
        if (found[t + u].size > found[t + u].limit) prune(s, found[t + u], pools[t + u]);
    }
  }
  for (int64_t t = 0; t < n; ++t) {
    prune(s, found[t], pools[t]);
    bool enough = !found[t].overflow && found[t].size >= s.k;
    s.failed[begin + t] =
        !enough || !refine(s, begin + t, tokens[t], found[t], pools[t], ranked, exact);
  }
}

}  // namespace

#else

namespace {
struct Packing;  // there is none
}

#endif  // DOT8
