// Drives every kernel in every dtype, for AddressSanitizer and UndefinedBehaviorSanitizer to watch. Results are
// compared between seeds and layouts only: right numbers are the Python tests' matter.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>

#include "drivers.h"

using namespace drivers;

namespace {

int runs = 0;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

constexpr Dtype kDtypes[] = {Dtype::Fp32, Dtype::Fp64, Dtype::Bf16, Dtype::Fp16};
constexpr Setting kSettings[] = {{0, 0, 0}, {0, 0, 1}, {0, 0, 2}, {3, 1, 3}, {8, 0, 4}, {1, 2, 5}};

// Room for n elements of any dtype, filled with finite values.
std::vector<double> elements(Dtype dtype, i64 n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<double> room(static_cast<std::size_t>(n));
  for (i64 i = 0; i < n; ++i) {
    const double v = static_cast<double>(random()) / 4294967296.0 - 0.5;
    const float narrow = static_cast<float>(v);
    const auto bits = static_cast<std::uint16_t>(random() & 0xbfff);  // in neither format an infinity
    auto* bytes = reinterpret_cast<unsigned char*>(room.data());
    if (dtype == Dtype::Fp64) std::memcpy(bytes + i * 8, &v, 8);
    if (dtype == Dtype::Fp32) std::memcpy(bytes + i * 4, &narrow, 4);
    if (dtype == Dtype::Bf16 || dtype == Dtype::Fp16) std::memcpy(bytes + i * 2, &bits, 2);
  }
  return room;
}

void drive_cosine(Dtype dtype, i64 T, i64 D) {
  const auto x = elements(dtype, T * D, 1), y = elements(dtype, T * D, 2);
  const auto first = cosine(dtype, x.data(), y.data(), T, D, {});
  for (const Setting& setting : kSettings) {
    const auto again = cosine(dtype, x.data(), y.data(), T, D, setting);
    // Layouts change the order of a sum, schedules nothing.
    const bool same_layout = setting.pad == 0 && setting.shift == 0;
    require(!same_layout || std::memcmp(&first, &again, sizeof first) == 0, "a schedule changed a cosine");
    ++runs;
  }
}

void drive_gram(Dtype dtype, i64 T, i64 N) {
  const auto x = elements(dtype, T * N, 3);
  for (const bool wide : {false, true}) {
    for (const Setting& setting : kSettings) {
      std::vector<double> sums(static_cast<std::size_t>(N * N)), mean(static_cast<std::size_t>(N));
      gram(dtype, x.data(), T, N, wide, sums.data(), mean.data(), setting);
      ++runs;
    }
  }
}

void drive_matrices(bool fp64, i64 B, i64 n) {
  const auto a = elements(fp64 ? Dtype::Fp64 : Dtype::Fp32, B * n * n, 4);
  std::vector<double> turned(static_cast<std::size_t>(n * n));
  for (const Setting& setting : kSettings) {
    for (const bool upper : {false, true}) {
      require(scan(fp64, a.data(), B, n, n, upper, setting) == 0, "a finite matrix was called another");
      ++runs;
    }
    if (B == 1) transpose(fp64, a.data(), n, turned.data(), setting), ++runs;
  }
}

void drive_topk(i64 L, i64 K, bool fp64, bool pivoted) {
  std::mt19937 random(5);
  Ranking ranking{};
  ranking.pivoted = pivoted;
  i64 dense_total = 0;
  for (i64 l = 0; l < L; ++l) {
    ranking.offsets.push_back(l * K);
    for (i64 i = 0; i < K; ++i) ranking.value.push_back(static_cast<double>((K - i) / 2));
    ranking.cost.push_back(1 + random() % 9 + (pivoted ? 2 * K - 1 : 0));
    ranking.dense_cost.push_back(1 + random() % (2 * 9 * K));
    dense_total += ranking.dense_cost.back();
  }
  ranking.offsets.push_back(L * K);
  for (const i64 multiple_of : {1, 2, 4}) {
    ranking.budget = dense_total / 2;
    ranking.min_rank = 0;
    ranking.multiple_of = multiple_of;
    const Ranks first = topk(ranking, fp64, 0);
    for (unsigned seed = 1; seed < 5; ++seed, ++runs) {
      require(topk(ranking, fp64, seed).ranks == first.ranks, "a schedule changed a rank");
    }
  }
  const Ranking good = ranking;
  for (int fault = 0; fault < 7 && L > 1; ++fault) {
    ranking = good;
    if (fault == 0) ranking.offsets[1] = 5 * K * L;
    if (fault == 1) ranking.offsets[1] = -7;
    if (fault == 2) ranking.cost[0] = 0;
    if (fault == 3) ranking.dense_cost[0] = INT64_MAX, ranking.dense_cost[1] = INT64_MAX;
    if (fault == 4) ranking.value[0] = -1;
    if (fault == 5) ranking.budget = -1;
    if (fault == 6) ranking.cost[0] = 1, ranking.pivoted = true;
    bool refused = false;
    try {
      topk(ranking, fp64, 1);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    require(refused || fault == 4, "a malformed ranking was accepted");
    ++runs;
  }
}

}  // namespace

int main() {
  for (const Dtype dtype : kDtypes) {
    for (const i64 T : {0, 1, 9}) {
      for (const i64 D : {0, 1, 31, 32, 33, 255, 257, 1024, 1025, 1536}) drive_cosine(dtype, T, D);
    }
    drive_cosine(dtype, 600, 5);
    for (const i64 T : {0, 1, 130}) {
      for (const i64 N : {0, 1, 31, 33, 70}) drive_gram(dtype, T, N);
    }
  }
  for (const bool fp64 : {false, true}) {
    for (const i64 n : {1, 2, 31, 32, 33, 70}) {
      for (const i64 B : {0, 1, 3}) drive_matrices(fp64, B, n);
    }
    for (const bool pivoted : {false, true}) {
      drive_topk(0, 1, fp64, pivoted);
      drive_topk(1, 1, fp64, pivoted);
      drive_topk(7, 13, fp64, pivoted);
      drive_topk(300, 3, fp64, pivoted);
    }
  }
  std::printf("%d runs\n", runs);
}
