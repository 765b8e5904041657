// The operands of the ops, for the CPU and the CUDA side alike: preconditions, pointers, and dispatch by dtype. Each
// message gives what was got and what is legal; what only one side asks for stands there.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace unirank {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// std::invalid_argument arrives in Python as ValueError. STD_TORCH_CHECK would make it a RuntimeError
// and put the path of this source file into the user's message.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shape(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (std::int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << ']';
  return out.str();
}

inline const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline bool is_full(ScalarType type) { return type == ScalarType::Double || type == ScalarType::Float; }

inline bool is_floating(ScalarType type) {
  return is_full(type) || type == ScalarType::Half || type == ScalarType::BFloat16;
}

// Calls `run` with the element type of a floating dtype; each side has its own types for the 16-bit ones.
template <typename Bf16, typename Fp16, typename Run>
void with_element_type(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Double:
      return run.template operator()<double>();
    case ScalarType::Float:
      return run.template operator()<float>();
    case ScalarType::BFloat16:
      return run.template operator()<Bf16>();
    default:
      return run.template operator()<Fp16>();
  }
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// cosine_accumulate_: state [3], x and y [T, D].
inline void check_streams(const char* op, const Tensor& state, const Tensor& x, const Tensor& y) {
  check(state.scalar_type() == ScalarType::Double && state.dim() == 1 && state.size(0) == 3 && state.is_contiguous(),
        op, ": state must be contiguous float64 of shape [3], got ", name(state.scalar_type()), " of shape ",
        shape(state));
  check(x.dim() == 2, op, ": x must have shape [T, D], got ", shape(x));
  check(y.dim() == 2 && y.size(0) == x.size(0) && y.size(1) == x.size(1), op, ": y must have the shape of x, ",
        shape(x), ", got ", shape(y));
  const ScalarType type = x.scalar_type();
  check(is_floating(type), op, ": x must be float32, float64, bfloat16 or float16, got ", name(type));
  check(y.scalar_type() == type, op, ": y must have the dtype of x, ", name(type), ", got ", name(y.scalar_type()));
}

// gram_accumulate_: x [T, N].
inline void check_tokens(const char* op, const Tensor& x) {
  check(x.dim() == 2, op, ": x must have shape [T, N], got ", shape(x));
  check(is_floating(x.scalar_type()), op, ": x must be float32, float64, bfloat16 or float16, got ",
        name(x.scalar_type()));
}

// gram_accumulate_: gram [N, N], mean [N].
inline void check_moments(const char* op, const Tensor& gram, const Tensor& mean, std::int64_t N) {
  check(gram.dim() == 2 && gram.size(0) == N && gram.size(1) == N && gram.is_contiguous(), op,
        ": gram must be contiguous of shape [", N, ", ", N, "], got ", shape(gram));
  check(mean.dim() == 1 && mean.size(0) == N && mean.is_contiguous(), op, ": mean must be contiguous of shape [", N,
        "], got ", shape(mean));
  check(is_full(gram.scalar_type()) && mean.scalar_type() == gram.scalar_type(), op,
        ": gram and mean must both be float64 or both float32, got ", name(gram.scalar_type()), " and ",
        name(mean.scalar_type()));
}

// The largest order whose workspace length (about 4 K^2 + 7 K) still fits LAPACK's 32-bit integers; cuSOLVER's own
// 64-bit routines give up a little above it.
inline constexpr std::int64_t kMaxOrder = 23000;

// batched_svd: a [B, M, N].
inline void check_matrices(const char* op, const Tensor& a) {
  check(is_full(a.scalar_type()), op, ": a must be float32 or float64, got ", name(a.scalar_type()));
  check(a.dim() == 3, op, ": a must have shape [B, M, N], got ", shape(a));
  check(std::min(a.size(1), a.size(2)) <= kMaxOrder && std::max(a.size(1), a.size(2)) <= (1 << 30), op,
        ": the smaller side of a matrix must be at most ", kMaxOrder, ", got ", shape(a));
}

// matmul_: out [B, M, N] contiguous, a [B, M, K], b [B, K, N], all of one full dtype.
inline void check_matmul(const char* op, const Tensor& out, const Tensor& a, const Tensor& b) {
  const ScalarType type = out.scalar_type();
  check(is_full(type) && a.scalar_type() == type && b.scalar_type() == type, op,
        ": out, a and b must all be float64 or all float32, got ", name(type), ", ", name(a.scalar_type()), " and ",
        name(b.scalar_type()));
  check(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1), op,
        ": a and b must have shapes [B, M, K] and [B, K, N], got ", shape(a), " and ", shape(b));
  check(out.dim() == 3 && out.size(0) == a.size(0) && out.size(1) == a.size(1) && out.size(2) == b.size(2) &&
            out.is_contiguous(),
        op, ": out must be contiguous of shape [", a.size(0), ", ", a.size(1), ", ", b.size(2), "], got ", shape(out));
}

// batched_eigh: a [B, N, N].
inline void check_square_matrices(const char* op, const Tensor& a) {
  check_matrices(op, a);
  check(a.size(1) == a.size(2), op, ": a must have shape [B, N, N], got ", shape(a));
}

// global_topk: value [C], cost [L].
inline void check_ranking(const char* op, const Tensor& value, const Tensor& cost) {
  check(is_full(value.scalar_type()), op, ": value must be float32 or float64, got ", name(value.scalar_type()));
  check(value.dim() == 1, op, ": value must have shape [C], got ", shape(value));
  check(cost.dim() == 1, op, ": cost must have shape [L], got ", shape(cost));
}

// global_topk: cost and dense_cost [L], offsets [L + 1].
inline void check_integers(const char* op, const char* argument, const Tensor& t, std::int64_t length) {
  check(t.scalar_type() == ScalarType::Long, op, ": ", argument, " must be int64, got ", name(t.scalar_type()));
  check(t.dim() == 1 && t.size(0) == length, op, ": ", argument, " must have shape [", length, "], got ", shape(t));
}

}  // namespace unirank
