#include "mock.h"

#include <cstdlib>
#include <cstring>

namespace mock {

State& state() {
  static State s;
  return s;
}

int enter(const std::string& routine) {
  State& s = state();
  s.log.push_back(routine);
  const auto fault = s.faults.find(routine);
  if (fault == s.faults.end() || fault->second.after-- > 0) return 0;
  s.lost = fault->second.loses;
  s.last_error = fault->second.loses ? fault->second.loses : 98;  // cudaErrorInvalidDeviceFunction
  return fault->second.status;
}

bool expect(bool good, const std::string& routine, const std::string& what) {
  if (!good) state().violations.push_back(routine + ": " + what);
  return good;
}

bool on_device(const void* p, std::size_t bytes) {
  const State& s = state();
  const char* address = static_cast<const char*>(p);
  if (!s.strict_memory) return address != nullptr;
  auto after = s.memory.upper_bound(address);
  if (after == s.memory.begin()) return false;
  const auto& [start, size] = *--after;
  return address + bytes <= start + size;
}

void* allocate(const char* kind, std::size_t bytes) {
  State& s = state();
  if (s.allocations_that_succeed == 0) return nullptr;
  if (s.allocations_that_succeed > 0) --s.allocations_that_succeed;
  char* p = static_cast<char*>(std::malloc(bytes));
  std::memset(p, 0xff, bytes);  // NaN as float and double, -1 as int
  ++s.live[kind];
  ++s.created[kind];
  if (std::string(kind) == "device memory") s.memory[p] = bytes;
  return p;
}

void release(const char* kind, void* p) {
  State& s = state();
  --s.live[kind];
  s.memory.erase(static_cast<char*>(p));
  std::free(p);
}

}  // namespace mock
