// What the CPU's loops are made of: vectors of the processor's own width, and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes), aligned(1)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline IntVec load(const int32_t* p) { return *reinterpret_cast<const IntVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec to_float(IntVec v) { return __builtin_convertvector(v, Vec); }

template <class V>
inline auto sum_of(V v) {
  auto total = v[0];
  for (int u = 1; u < kLanes; ++u) total += v[u];
  return total;
}

float dot(const float* a, const float* b, int64_t d) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) sums[u] += load(a + i + u * kLanes) * load(b + i + u * kLanes);
  for (; i + kLanes <= d; i += kLanes) sums[0] += load(a + i) * load(b + i);
  float total = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
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
  for (int64_t i = 0; i < d; i += 16) __builtin_prefetch(row + i);
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

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
inline int64_t padded_to(int64_t size, int64_t n) { return blocks_of(n, size) * size; }

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

}  // namespace
