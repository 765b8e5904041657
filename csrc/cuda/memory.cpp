#include "cuda/memory.h"

#include <dlfcn.h>

#include <cstring>

#include "cuda/context.h"

namespace unirank::cuda {

const char* words_of_torch() {
  using Words = const char* (*)();
  // In the global scope, or in that of the libraries that this one was linked with.
  static const auto function =
      reinterpret_cast<Words>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return function ? function() : nullptr;
}

std::string allocation_failure(const char* op, std::int64_t bytes, const char* words_of_torch) {
  const std::string start = std::string(op) + ": ";
  if (words_of_torch && *words_of_torch) return start + words_of_torch;
  const std::string lost = words_of_a_lost_context();
  if (!lost.empty()) return start + "torch could not allocate " + std::to_string(bytes) + " bytes." + lost;
  return start + kOutOfMemory + ". Tried to allocate " + std::to_string(bytes) + " bytes.";
}

}  // namespace unirank::cuda
