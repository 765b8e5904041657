// Preconditions of the CPU ops. Each message gives what was got and what is legal.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
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

// The mask's flags, one a token, or nullptr for "every token counts". `mask` must outlive the result.
inline const bool* mask_data(const char* op, const std::optional<Tensor>& mask, std::int64_t T) {
  if (!mask) return nullptr;
  check(mask->scalar_type() == ScalarType::Bool, op, ": mask must be bool, got ", name(mask->scalar_type()));
  check(mask->dim() == 1 && mask->size(0) == T, op, ": mask must have shape [", T, "], got ", shape(*mask));
  return static_cast<const bool*>(mask->const_data_ptr());
}

}  // namespace unirank
