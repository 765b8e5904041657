// Memory from torch, and the words where it has none left.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "operands.h"

namespace unirank::cuda {

// What to raise where torch could not make a tensor of so many bytes: "OP: " and torch's own words where it still has
// them, else "OP: CUDA out of memory. ..." or what became of the context. The stable ABI turns torch's exceptions into
// a return code, so the class torch.OutOfMemoryError does not arrive, and before torch 2.13 nor does its text.
std::string allocation_failure(const char* op, std::int64_t bytes, const char* words_of_torch);

// The text of the calling thread's last exception inside torch; null before torch 2.13, which is asked for it by name
// because the library also loads into older ones.
const char* words_of_torch();

template <typename Make>
Tensor allocated(const char* op, std::int64_t bytes, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    throw std::runtime_error(allocation_failure(op, bytes, words_of_torch()));
  }
}

inline Tensor empty(const char* op, const Tensor& like, const std::vector<std::int64_t>& shape) {
  std::int64_t bytes = static_cast<std::int64_t>(like.element_size());
  for (const std::int64_t length : shape) bytes *= length;
  return allocated(op, bytes, [&] { return torch::stable::new_empty(like, shape); });
}

inline Tensor empty_bytes(const char* op, const Tensor& like, std::int64_t bytes) {
  return allocated(op, bytes, [&] { return torch::stable::new_empty(like, {bytes}, ScalarType::Byte); });
}

inline Tensor contiguous(const char* op, const Tensor& t) {
  return allocated(op, t.numel() * static_cast<std::int64_t>(t.element_size()),
                   [&] { return torch::stable::contiguous(t); });
}

}  // namespace unirank::cuda
