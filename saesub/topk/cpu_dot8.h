// Products of 8-bit vectors, by whichever instructions the processor has.
//
// Weights lie in tiles of 64 features: for every four coordinates the four bytes of each feature,
// side by side. A weight w is stored as w + kOffset, since most instructions multiply an unsigned
// byte by a signed one; a token's sum starts at -kOffset times the sum of its bytes.

#pragma once

#include "cpu_vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define DOT8 "avx512vnni"
#define DOT8_AVX512VNNI
#elif defined(__AVXVNNI__)
#define DOT8 "avxvnni"
#define DOT8_AVXVNNI
#elif defined(__AVX2__)
#define DOT8 "avx2"
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOT8 "neon"
#define DOT8_NEON
#endif

#ifdef DOT8
#ifdef DOT8_NEON
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

namespace {

constexpr int kFeaturesPerTile = FEATURES_PER_TILE;
constexpr int kTokensPerTile = 6;
constexpr int kCoordinates = COORDINATES;

#if defined(DOT8_AVX512VNNI)
constexpr int kSteps = 127, kOffset = 128;  // of the range, either side of zero
constexpr int kAtOnce = 6, kVectors = 4;    // tokens, and vectors of features: accumulators
constexpr int kFours = 1;                   // of coordinates, in one addition to the sums
typedef __m512i Sums;
inline Sums broadcast(int32_t x) { return _mm512_set1_epi32(x); }
inline Sums load_sums(const void* p) { return _mm512_loadu_si512(p); }
inline void store_sums(void* p, Sums v) { _mm512_storeu_si512(p, v); }
inline Sums add_products(Sums sums, const Sums* w, const Sums* x) {
  return _mm512_dpbusd_epi32(sums, w[0], x[0]);
}
#elif defined(DOT8_AVXVNNI)
constexpr int kSteps = 127, kOffset = 128;
constexpr int kAtOnce = 6, kVectors = 2, kFours = 1;
typedef __m256i Sums;
inline Sums add_products(Sums sums, const Sums* w, const Sums* x) {
  return _mm256_dpbusd_avx_epi32(sums, w[0], x[0]);
}
#elif !defined(DOT8_NEON)
// Two products are added up in 16 bits, and two of these sums before they are widened: with seven
// bits on either side that does not overflow (4 * 127 * 63 = 32,004).
constexpr int kSteps = 63, kOffset = 64;
constexpr int kAtOnce = 3, kVectors = 2, kFours = 2;
typedef __m256i Sums;
inline Sums add_products(Sums sums, const Sums* w, const Sums* x) {
  Sums both = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], x[0]), _mm256_maddubs_epi16(w[1], x[1]));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
}
#else
constexpr int kSteps = 127, kOffset = 0;  // both signed
constexpr int kAtOnce = 6, kVectors = 4, kFours = 1;
typedef int32x4_t Sums;
inline Sums broadcast(int32_t x) { return vdupq_n_s32(x); }
inline Sums load_sums(const void* p) { return vld1q_s32(static_cast<const int32_t*>(p)); }
inline void store_sums(void* p, Sums v) { vst1q_s32(static_cast<int32_t*>(p), v); }
inline Sums add_products(Sums sums, const Sums* w, const Sums* x) {
  return vdotq_s32(sums, vreinterpretq_s8_s32(w[0]), vreinterpretq_s8_s32(x[0]));
}
#endif
#if !defined(DOT8_AVX512VNNI) && !defined(DOT8_NEON)
inline Sums broadcast(int32_t x) { return _mm256_set1_epi32(x); }
inline Sums load_sums(const void* p) { return _mm256_loadu_si256(static_cast<const Sums*>(p)); }
inline void store_sums(void* p, Sums v) { _mm256_storeu_si256(static_cast<Sums*>(p), v); }
#endif

constexpr int kPerVector = sizeof(Sums) / 4;  // features
static_assert(kFeaturesPerTile % (kPerVector * kVectors) == 0, "a tile is whole vectors");
static_assert(kTokensPerTile % kAtOnce == 0, "a tile is whole sets of tokens");

// out[t][f] = start[t] + sum over coordinates of a tile's weights of feature f and of token t's.
// A function of its own: inlined among others, its sums are kept in memory by some compilers.
__attribute__((noinline)) void products(const uint8_t* tile, int64_t width, const int8_t* const* tokens,
                     const int32_t* start, int32_t (*out)[kFeaturesPerTile]) {
  constexpr int64_t kRow = 4 * kFeaturesPerTile;  // bytes of four coordinates
  for (int t0 = 0; t0 < kTokensPerTile; t0 += kAtOnce) {
    for (int f0 = 0; f0 < kFeaturesPerTile; f0 += kPerVector * kVectors) {
      Sums sums[kAtOnce][kVectors];
#pragma GCC unroll 6
      for (int t = 0; t < kAtOnce; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[t][v] = broadcast(start[t0 + t]);
      const uint8_t* weights = tile + 4 * f0;
      for (int64_t i = 0; i < width; i += 4 * kFours, weights += kFours * kRow) {
        Sums w[kVectors][kFours];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          for (int u = 0; u < kFours; ++u)
            w[v][u] = load_sums(weights + u * kRow + 4 * kPerVector * v);
#pragma GCC unroll 6
        for (int t = 0; t < kAtOnce; ++t) {
          Sums x[kFours];
          for (int u = 0; u < kFours; ++u) {
            int32_t four;
            std::memcpy(&four, tokens[t0 + t] + i + 4 * u, 4);
            x[u] = broadcast(four);
          }
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[t][v] = add_products(sums[t][v], w[v], x);
        }
      }
#pragma GCC unroll 6
      for (int t = 0; t < kAtOnce; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          store_sums(out[t0 + t] + f0 + v * kPerVector, sums[t][v]);
    }
  }
}

// A bit for each lane that is at least the threshold; none of NaN.
inline uint32_t reached(Vec v, float threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(threshold), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(threshold), _CMP_GE_OQ));
#else
  const uint32_t bits[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_f32((float32x4_t)v, vdupq_n_f32(threshold)), vld1q_u32(bits)));
#endif
}

}  // namespace

#endif  // DOT8
