#include "core/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/lanes.h"

namespace unirank {
namespace {

// kStep partial sums of each product, whatever the width: enough independent ones to hide the latency of the
// multiply-add, and an order of summation that no instruction set changes.
double total(const double (&v)[kStep]) {
  double sum = 0;
  for (int i = 0; i < kStep / 4; ++i) sum += (v[i] + v[i + 4]) + (v[i + 8] + v[i + 12]);
  return sum;
}

double finish(double xy, double xx, double yy) {
  if (!std::isfinite(xx) || !std::isfinite(yy)) return std::numeric_limits<double>::quiet_NaN();
  if (xx == 0 || yy == 0) return 0;
  // Two roots, because xx * yy overflows long before its root does.
  return std::clamp(xy / (std::sqrt(xx) * std::sqrt(yy)), -1.0, 1.0);
}

template <int Bytes>
struct Moments {
  Step<Bytes> xy = {}, xx = {}, yy = {};

  template <typename T>
  UNIRANK_INLINE void add_step(const T* x, const T* y) {
    Step<Bytes> a, b;
    load_step<Bytes>(x, a);
    load_step<Bytes>(y, b);
    for (std::size_t u = 0; u < sizeof a / Bytes; ++u) {
      xy[u] += a[u] * b[u];
      xx[u] += a[u] * a[u];
      yy[u] += b[u] * b[u];
    }
  }

  static UNIRANK_INLINE double sum(const Step<Bytes>& v) {
    double parts[kStep];
    std::memcpy(parts, v, sizeof parts);
    return total(parts);
  }
};

struct RowCosine {
  template <int Bytes, typename T>
  static UNIRANK_INLINE double run(const T* x, const T* y, std::int64_t D) {
    Moments<Bytes> m;
    std::int64_t d = 0;
    for (; d + kStep <= D; d += kStep) m.add_step(x + d, y + d);
    if (d < D) {
      // Zero padding adds exact zeros; the tail needs no second code path.
      T xt[kStep] = {}, yt[kStep] = {};
      std::copy(x + d, x + D, xt);
      std::copy(y + d, y + D, yt);
      m.add_step(xt, yt);
    }
    return finish(m.sum(m.xy), m.sum(m.xx), m.sum(m.yy));
  }
};

}  // namespace

double row_cosine(const double* x, const double* y, std::int64_t D) { return dispatch<RowCosine>(x, y, D); }
double row_cosine(const float* x, const float* y, std::int64_t D) { return dispatch<RowCosine>(x, y, D); }
double row_cosine(const Bf16* x, const Bf16* y, std::int64_t D) { return dispatch<RowCosine>(x, y, D); }
double row_cosine(const Fp16* x, const Fp16* y, std::int64_t D) { return dispatch<RowCosine>(x, y, D); }

}  // namespace unirank
