#include "core/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/lanes.h"

namespace unirank {
namespace {

// Four sets of accumulators hide the latency of the multiply-add and still fit the sixteen registers of AVX2.
constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * kLanes;

struct Moments {
  LanesD xy[kUnroll] = {}, xx[kUnroll] = {}, yy[kUnroll] = {};
};

template <typename T>
UNIRANK_INLINE void add_step(const T* x, const T* y, Moments& m) {
  for (int u = 0; u < kUnroll; ++u) {
    const LanesD a = load_lanes_fp64(x + u * kLanes);
    const LanesD b = load_lanes_fp64(y + u * kLanes);
    m.xy[u] += a * b;
    m.xx[u] += a * a;
    m.yy[u] += b * b;
  }
}

UNIRANK_INLINE double sum(const LanesD (&v)[kUnroll]) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += (v[0][i] + v[1][i]) + (v[2][i] + v[3][i]);
  return total;
}

double finish(double xy, double xx, double yy) {
  if (!std::isfinite(xx) || !std::isfinite(yy)) return std::numeric_limits<double>::quiet_NaN();
  if (xx == 0 || yy == 0) return 0;
  // Two roots, because xx * yy overflows long before its root does.
  return std::clamp(xy / (std::sqrt(xx) * std::sqrt(yy)), -1.0, 1.0);
}

template <typename T>
UNIRANK_INLINE double row_cosine_body(const T* x, const T* y, std::int64_t D) {
  Moments m;
  std::int64_t d = 0;
  for (; d + kStep <= D; d += kStep) add_step(x + d, y + d, m);
  if (d < D) {
    // Zero padding adds exact zeros; the tail needs no second code path.
    T xt[kStep] = {}, yt[kStep] = {};
    std::copy(x + d, x + D, xt);
    std::copy(y + d, y + D, yt);
    add_step(xt, yt, m);
  }
  return finish(sum(m.xy), sum(m.xx), sum(m.yy));
}

template <typename T>
UNIRANK_INLINE void widen_body(const T* source, float* target, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const LanesF v = load_lanes(source + i);
    std::memcpy(target + i, &v, sizeof v);
  }
  if (i < n) {
    T tail[kLanes] = {};
    std::copy(source + i, source + n, tail);
    const LanesF v = load_lanes(tail);
    std::memcpy(target + i, &v, static_cast<std::size_t>(n - i) * sizeof(float));
  }
}

}  // namespace

UNIRANK_WIDE double row_cosine(const double* x, const double* y, std::int64_t D) { return row_cosine_body(x, y, D); }
UNIRANK_WIDE double row_cosine(const float* x, const float* y, std::int64_t D) { return row_cosine_body(x, y, D); }
UNIRANK_WIDE double row_cosine(const Bf16* x, const Bf16* y, std::int64_t D) { return row_cosine_body(x, y, D); }
UNIRANK_WIDE double row_cosine(const Fp16* x, const Fp16* y, std::int64_t D) { return row_cosine_body(x, y, D); }

void widen_row(const double* source, double* target, std::int64_t n) { std::copy(source, source + n, target); }
void widen_row(const float* source, float* target, std::int64_t n) { std::copy(source, source + n, target); }
UNIRANK_WIDE void widen_row(const Bf16* source, float* target, std::int64_t n) { widen_body(source, target, n); }
UNIRANK_WIDE void widen_row(const Fp16* source, float* target, std::int64_t n) { widen_body(source, target, n); }

}  // namespace unirank
