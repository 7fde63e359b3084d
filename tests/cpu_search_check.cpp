// Checks the 8-bit search against the whole product, for processors that Python's tests do not run
// on: compile it for one, and run it there or in an emulator. It returns 0 if all is found.
//
//     c++ -O3 -std=c++17 -pthread -D… cpu_search_check.cpp    (the flags of saesub.topk.cpu_library)

#include <cstdio>
#include <random>

#include "../saesub/topk/cpu.cpp"

#ifdef DOT8
namespace {

struct Problem {
  int64_t n, d, d_sae, k;
  std::vector<float> x, W, bias;

  Problem(int64_t n, int64_t d, int64_t d_sae, int64_t k)
      : n(n), d(d), d_sae(d_sae), k(k), x(n * d), W(d_sae * d), bias(d_sae) {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    for (float& v : x) v = normal(random);
    for (float& v : W) v = normal(random) / std::sqrt(static_cast<float>(d));
    for (float& v : bias) v = normal(random) / 10;
    for (int64_t t = 0; t < n; ++t) x[t * d] *= t % 7 == 0 ? 300 : 1;  // massive coordinates
  }
};

// The k-th best scores of a token by the search and by the whole product, apart by this much.
float worst(const Problem& q, const std::vector<float>& values) {
  float most = 0;
  for (int64_t t = 0; t < q.n; ++t) {
    std::vector<float> scores(q.d_sae), found(values.begin() + t * q.k, values.begin() + (t + 1) * q.k);
    for (int64_t f = 0; f < q.d_sae; ++f)
      scores[f] = dot(&q.x[t * q.d], &q.W[f * q.d], q.d) + q.bias[f];
    std::sort(scores.rbegin(), scores.rend());
    std::sort(found.rbegin(), found.rend());
    for (int64_t j = 0; j < q.k; ++j) most = std::max(most, std::fabs(scores[j] - found[j]));
  }
  return most;
}

// The first `read` coordinates as the basis: exact in 8 bits.
std::vector<uint8_t> first_coordinates(int64_t d, int64_t read) {
  int64_t width = padded_to(kCoordinates, d);
  std::vector<uint8_t> tiles(padded_to(kFeaturesPerTile, read) * width, kOffset);
  for (int64_t c = 0; c < read; ++c)
    tiles[c / kFeaturesPerTile * width * kFeaturesPerTile + c / 4 * 4 * kFeaturesPerTile +
          c % kFeaturesPerTile * 4 + c % 4] = static_cast<uint8_t>(kSteps + kOffset);
  return tiles;
}

bool check(int64_t n, int64_t d, int64_t d_sae, int64_t k, int64_t read) {
  Problem q(n, d, d_sae, k);
  auto basis = first_coordinates(d, read);
  std::vector<float> scale(padded_to(kFeaturesPerTile, read), 1.0f / kSteps);
  Packing p{};
  p.d = d, p.read = read, p.d_sae = d_sae;
  if (read < d) p.basis = basis.data(), p.basis_scale = scale.data();
  std::vector<uint8_t> weights(p.padded() * p.width()), failed(n);
  std::vector<float> table(5 * p.padded()), part(n * read), rest(n), values(n * k);
  std::vector<int64_t> features(n * k);
  std::vector<int32_t> ranked(n);
  p.weights = weights.data(), p.table = table.data();
  for (int64_t t = 0; t < n; ++t) {
    std::copy(&q.x[t * d], &q.x[t * d] + read, &part[t * read]);
    rest[t] = std::sqrt(dot(&q.x[t * d] + read, &q.x[t * d] + read, d - read));
  }
  saesub_pack(&p, q.W.data(), q.bias.data(), nullptr, 0, nullptr, 0, p.padded() / kFeaturesPerTile, 2);
  saesub_search(&p, q.x.data(), part.data(), rest.data(), q.W.data(), q.bias.data(), n, k,
                features.data(), values.data(), failed.data(), ranked.data(), 2);
  int64_t by_the_whole = 0;
  for (int64_t t = 0; t < n; ++t) {
    if (!failed[t]) continue;
    ++by_the_whole;  // the caller ranks these: here they are taken out
    std::vector<float> scores(d_sae);
    saesub_scores(&q.x[t * d], q.W.data(), q.bias.data(), 1, d, d_sae, scores.data(), 1);
    std::sort(scores.rbegin(), scores.rend());
    std::copy(scores.begin(), scores.begin() + k, &values[t * k]);
  }
  float apart = worst(q, values);
  std::printf("%s: %ld tokens, d %ld of which %ld are read, %ld features: %ld by the whole, %g apart\n",
              saesub_instructions(), (long)n, (long)d, (long)read, (long)d_sae, (long)by_the_whole,
              apart);
  return apart < 1e-3f && by_the_whole < n / 4;
}

}  // namespace

int main() {
  bool right = check(200, 64, 1000, 8, 64) && check(97, 37, 500, 3, 37) &&
               check(150, 96, 1024, 8, 80) && check(64, 576, 2048, 32, 540);
  return right ? 0 : 1;
}
#else
int main() { return 2; }
#endif
