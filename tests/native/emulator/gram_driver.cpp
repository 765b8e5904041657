#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "drivers.h"
#include "kernels/gram.cuh"

namespace drivers {
namespace {

using namespace unirank::kernels;

// In place of cuBLAS, which refuses a leading dimension below the rows of its matrix. The squares on the diagonal are
// the product's to fill, but nothing may rely on their upper halves.
struct Multiply {
  i64 group;
  int extra_bits;

  template <typename In, typename C>
  void operator()(const In* x, i64 stride, i64 T, i64 first, i64 last, int beta, C* out, i64 ld) const {
    if (stride < last) throw std::runtime_error("cublasGemmEx failed: CUBLAS_STATUS_INVALID_VALUE");
    for (i64 i = first; i < last; ++i) {
      C* row = out + (i - first) * ld;
      for (i64 j = 0; j < last; ++j) row[j] = j > i ? C(kNaN) : beta == 0 ? C(0) : row[j];
      if (group != 0 && std::is_same_v<C, float>) {
        for (i64 j = 0; j <= i; ++j) row[j] = static_cast<C>(cut_off(x, stride, T, i, j, static_cast<float>(row[j])));
        continue;
      }
      for (i64 t = 0; t < T; ++t) {
        const C factor = widen(x[t * stride + i]);
        for (i64 j = 0; j <= i; ++j) row[j] += factor * static_cast<C>(widen(x[t * stride + j]));
      }
    }
  }

  // The exact products of a group and the sum so far are shifted to the largest exponent among them and cut off below
  // its last bit; then they are added exactly, and the sum is cut off to fp32. All towards zero.
  template <typename In>
  float cut_off(const In* x, i64 stride, i64 T, i64 i, i64 j, float sum) const {
    for (i64 begin = 0; begin < T; begin += group) {
      std::vector<double> terms{sum};
      for (i64 t = begin; t < std::min(begin + group, T); ++t) {
        terms.push_back(static_cast<double>(widen(x[t * stride + i])) * static_cast<double>(widen(x[t * stride + j])));
      }
      double largest = 0, exact = 0;
      for (const double term : terms) largest = std::max(largest, std::abs(term));
      if (largest == 0) continue;
      const double last_bit = std::ldexp(1.0, std::ilogb(largest) - 23 - extra_bits);
      for (const double term : terms) exact += std::trunc(term / last_bit) * last_bit;
      const auto nearest = static_cast<float>(exact);
      sum = std::abs(nearest) > std::abs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
    }
    return sum;
  }
};

template <typename In, typename Acc>
void run(const void* x, i64 T, i64 N, Acc* gram, Acc* mean, const Setting& setting) {
  using Scratch = GramScratch<In, Acc>;
  auto rows = lay_out<In>(x, T, N, setting);
  emulator::Guarded<Acc> sums(N * N), column_sums(N);
  std::memcpy(sums.data(), gram, static_cast<std::size_t>(N * N) * sizeof(Acc));
  std::memcpy(column_sums.data(), mean, static_cast<std::size_t>(N) * sizeof(Acc));
  emulator::Guarded<double> partial(kMaxSlices * N);
  emulator::Guarded<Compute<In>> product(Scratch::widens ? std::min(kPanel, N) * N : 0);
  accumulate_gram(emulator::Launch{setting.seed}, Multiply{setting.group, setting.extra_bits},
                  Rows<In>{rows.data(), N + setting.pad, T, N}, Scratch{partial.data(), product.data()}, sums.data(),
                  column_sums.data());
  sums.check();
  column_sums.check();
  partial.check();
  product.check();
  std::memcpy(gram, sums.data(), static_cast<std::size_t>(N * N) * sizeof(Acc));
  std::memcpy(mean, column_sums.data(), static_cast<std::size_t>(N) * sizeof(Acc));
}

}  // namespace

void gram(Dtype dtype, const void* x, i64 T, i64 N, bool fp64_sums, void* gram, void* mean, const Setting& setting) {
  if (T == 0 || N == 0) return;  // as in the launcher
  with_element(dtype, [&]<typename In>(In) {
    if (fp64_sums) {
      run<In>(x, T, N, static_cast<double*>(gram), static_cast<double*>(mean), setting);
    } else {
      run<In>(x, T, N, static_cast<float*>(gram), static_cast<float*>(mean), setting);
    }
  });
}

}  // namespace drivers
