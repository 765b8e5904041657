// The ops of csrc/kernels/ over host memory, kernels emulated; free of Python, so that a sanitizer can drive them too.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace drivers {

using i64 = std::int64_t;

enum class Dtype { Fp32, Fp64, Bf16, Fp16 };

// Where operands lie and in which order threads run; none of it may change a result by a bit.
struct Setting {
  i64 pad = 0;    // elements between the end of a row and the next row
  i64 shift = 0;  // elements by which operands miss a 64-byte boundary
  unsigned seed = 0;
  // Not 0: products in fp32 are added as by a tensor core, so many at a time, with so many bits more than fp32 has.
  i64 group = 0;
  int extra_bits = 0;
};

// Contiguous [T, D] in, {sum of cosines, sum of their squares, count} out.
std::array<double, 3> cosine(Dtype dtype, const void* x, const void* y, i64 T, i64 D, const Setting& setting);

// Adds to gram [N, N] and mean [N], both fp64 or both fp32.
void gram(Dtype dtype, const void* x, i64 T, i64 N, bool fp64_sums, void* gram, void* mean, const Setting& setting);

struct Ranking {
  std::vector<double> value;
  std::vector<i64> cost, dense_cost, offsets;
  i64 budget, min_rank, multiple_of;
  bool pivoted;
};

struct Ranks {
  std::vector<i64> ranks;
  double threshold;
};

// Throws std::invalid_argument with the message that the launcher would raise.
Ranks topk(const Ranking& ranking, bool fp64_scores, unsigned seed);

// B - (index of the first matrix that is not finite), or 0; column-major [B, n, m], of which `upper` looks at i <= j.
i64 scan(bool fp64, const void* a, i64 B, i64 m, i64 n, bool upper, const Setting& setting);

// target = sourceᵀ, both [n, n].
void transpose(bool fp64, const void* source, i64 n, void* target, const Setting& setting);

// The 16-bit floats' conversion.
std::vector<float> widened(Dtype dtype, const std::vector<std::uint16_t>& bits);

// A small kernel, right or wrong, by name; see emulator_driver.cpp. Returns what each thread of its block wrote.
std::vector<i64> probe(const std::string& name, unsigned seed);

}  // namespace drivers
