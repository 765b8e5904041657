// Token cosine over one row of activations, free of torch.
#pragma once

#include <cstdint>

namespace unirank {

// The two 16-bit formats as raw bits; arithmetic happens only after widening.
struct Bf16 {
  std::uint16_t bits;
};
struct Fp16 {
  std::uint16_t bits;
};

// cos(x, y) of two rows of D elements, products and sums in fp64, clamped to [-1, 1].
// A row of norm zero gives 0; a row whose squared norm is not finite gives NaN.
// The sums are made in one fixed order, so the bits depend on nothing but the two rows.
double row_cosine(const double* x, const double* y, std::int64_t D);
double row_cosine(const float* x, const float* y, std::int64_t D);
double row_cosine(const Bf16* x, const Bf16* y, std::int64_t D);
double row_cosine(const Fp16* x, const Fp16* y, std::int64_t D);

}  // namespace unirank
