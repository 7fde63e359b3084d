// The TopK training step on the CPU, one pass over memory each: search, decode, rows, Adam.
//
// Plain C++17 with GCC/Clang vectors, no dependency; built on first use by cpu.py. All matrices
// are dense, row-major and feature-major: W_enc is passed as its transpose, (d_sae, d_in). Sums run
// in an order that does not depend on the number of threads, so a run repeats bit for bit.

#include "cpu_search.h"

namespace {

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

const char* saesub_instructions() {
#ifdef DOT8
  return DOT8;
#else
  return "";
#endif
}

int saesub_steps() {
#ifdef DOT8
  return kSteps;
#else
  return 0;
#endif
}

int saesub_offset() {
#ifdef DOT8
  return kOffset;
#else
  return 0;
#endif
}

#ifdef DOT8
// The rows of `tiles` tiles of W (d_sae, d) into the copy, and the norms of the decoder's rows into
// `norms`, if given.
int saesub_pack(const Packing* packing, const float* W, const float* bias, const float* W_dec,
                int64_t d_out, float* norms, int64_t first_tile, int64_t tiles, int64_t threads) {
  const Packing& p = *packing;
  return parallel(tiles, threads, [&](int64_t tile) {
    int64_t features[kFeaturesPerTile], first = (first_tile + tile) * kFeaturesPerTile;
    int64_t count = std::min<int64_t>(kFeaturesPerTile, p.d_sae - first);
    for (int64_t i = 0; i < count; ++i) {
      int64_t f = features[i] = first + i;
      if (norms) norms[f] = std::sqrt(dot(W_dec + f * d_out, W_dec + f * d_out, d_out));
    }
    pack_features(p, W, bias, features, count);
    for (int64_t f = first + count; f < first + kFeaturesPerTile; ++f)
      for (int row = 0; row < 5; ++row)
        p.table[row * p.padded() + f] = row == 2 ? -INFINITY : 0.0f;
  });
}

int saesub_search(const Packing* packing, const float* x, const float* read, const float* rest,
                  const float* W, const float* bias, int64_t n, int64_t k, int64_t* features,
                  float* values, uint8_t* failed, int32_t* ranked, int64_t threads) {
  const Packing& p = *packing;
  int64_t often = std::max<int64_t>(4 * k, 2 * k + 2 * kFeaturesPerTile);
  // Not a power of two, for then tokens' rooms would share cache sets; and no more than can come.
  int64_t capacity = std::min(64 * often, often + 2 * p.padded()) + 2 * kLanes;
  Searcher s{p, x,     read,     rest,   W,      bias,    k,
             often, capacity, features, values, failed, ranked};
  return parallel(blocks_of(n, kTokensPerTask), threads, [&](int64_t task) {
    search_tokens(s, task * kTokensPerTask, std::min(n, (task + 1) * kTokensPerTask));
  });
}
#endif

// scores[t][f] = x[t] . W[f] + bias[f], for a few tokens: W (d_sae, d) is read once.
int saesub_scores(const float* x, const float* W, const float* bias, int64_t n, int64_t d,
                  int64_t d_sae, float* scores, int64_t threads) {
  return parallel(blocks_of(d_sae, kFeaturesPerTask), threads, [&](int64_t task) {
    int64_t last = std::min(d_sae, (task + 1) * kFeaturesPerTask);
    for (int64_t f = task * kFeaturesPerTask; f < last; ++f)
      for (int64_t t = 0; t < n; ++t) scores[t * d_sae + f] = dot(x + t * d, W + f * d, d) + bias[f];
  });
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
// is read and written only in lazy mode. With a `packing`, rows that moved go into that copy, and
// the norms of their decoder rows into `norms` (d_sae), if there are any.
int saesub_adam_rows(const int64_t* start, const int64_t* token, const float* g_pre,
                      const float* value, const float* x, const float* g_out, int64_t d_in,
                      int64_t d_out, int64_t d_sae, const AdamSettings* settings, float* enc,
                      float* enc_m, float* enc_v, float* dec, float* dec_m, float* dec_v,
                      float* bias, float* bias_m, float* bias_v, int64_t* moved, const Packing* packing,
                     float* norms, int64_t threads) {
  Entries e{start, token, g_pre, value, x, g_out, d_in, d_out};
  const AdamSettings& s = *settings;
  return parallel(blocks_of(d_sae, kFeaturesPerTask), threads, [&](int64_t task) {
    std::vector<float> g_enc(d_in), g_dec(d_out);
    int64_t last = std::min(d_sae, (task + 1) * kFeaturesPerTask);
    int64_t updated[kFeaturesPerTask], count = 0;
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
      if (norms) norms[f] = std::sqrt(dot(dec + b, dec + b, d_out));
      updated[count++] = f;
    }
#ifdef DOT8
    if (packing) pack_features(*packing, enc, bias, updated, count);
#endif
  });
}

}  // extern "C"
