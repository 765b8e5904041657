// A kernel operand on the heap, exactly as long as it should be. Around it lie bytes that are NaN in every float
// format, so a read out of bounds shows in the result, and a write out of bounds is found by check(). Under
// AddressSanitizer nothing lies around it, and the sanitizer reports both.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

namespace emulator {

template <typename T>
class Guarded {
 public:
  // `shift`: elements by which the operand starts after a boundary of 64 bytes. Filled with 0xff.
  explicit Guarded(std::int64_t size, std::int64_t shift = 0)
      : bytes_(static_cast<std::size_t>(size) * sizeof(T)),
        skipped_(kMargin + static_cast<std::size_t>(shift) * sizeof(T)) {
    void* block = nullptr;
    if (posix_memalign(&block, 64, skipped_ + bytes_ + kMargin) != 0) throw std::bad_alloc();
    block_.reset(static_cast<unsigned char*>(block));
    std::memset(block, 0xff, skipped_ + bytes_ + kMargin);
  }

  T* data() { return reinterpret_cast<T*>(block_.get() + skipped_); }
  T& operator[](std::int64_t i) { return data()[i]; }

  void check() const {
    for (std::size_t i = 0; i < skipped_; ++i) require(block_[i] == 0xff);
    for (std::size_t i = 0; i < kMargin; ++i) require(block_[skipped_ + bytes_ + i] == 0xff);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kMargin = 0;
#else
  static constexpr std::size_t kMargin = 256;
#endif
  static void require(bool condition) {
    if (!condition) throw std::runtime_error("write outside an operand");
  }
  std::size_t bytes_, skipped_;
  struct Free {
    void operator()(unsigned char* block) const { std::free(block); }
  };
  std::unique_ptr<unsigned char[], Free> block_;
};

}  // namespace emulator
