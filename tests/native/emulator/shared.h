// Shared memory that knows who touched each element when. It reports an index out of bounds, a read of what this block
// never wrote, and a race: two threads at one element, one of them writing, with no barrier between.
#pragma once

#include <cstdint>

#include "block.h"

namespace emulator {

// A moment of one thread: the barriers that its block and its warp had passed.
struct Access {
  static constexpr std::uint32_t kNobody = ~0u, kSeveral = ~0u - 1;
  std::uint32_t thread = kNobody;
  std::uint64_t epoch = 0, warp_epoch = 0;

  static Access now() {
    const Machine& m = Machine::instance();
    return {m.current->rank, m.epoch, m.warp_epoch[m.current->warp()]};
  }

  // Whether a barrier, of the block or of a warp that both belong to, orders this access before `later`.
  bool before(const Access& later) const {
    if (thread == kNobody || thread == later.thread || epoch < later.epoch) return true;
    return thread != kSeveral && thread / kWarp == later.thread / kWarp && warp_epoch < later.warp_epoch;
  }
};

template <typename T, unsigned kSize>
class Shared {
 public:
  class Element {
   public:
    Element(Shared& owner, unsigned i, const Place& place) : owner_(owner), i_(i), place_(place) {}
    operator T() const { return owner_.read(i_, place_); }
    Element& operator=(const T& v) {
      owner_.write(i_, v, place_);
      return *this;
    }
    Element& operator=(const Element& other) { return *this = static_cast<T>(other); }
    Element& operator+=(const T& v) { return *this = static_cast<T>(*this) + v; }

   private:
    Shared& owner_;
    unsigned i_;
    Place place_;
  };

  // A subscript takes one argument, so the place of use rides along with it.
  struct Index {
    std::int64_t value;
    Place place;
    template <typename I>
    Index(I i, const Place& place = Place::current()) : value(static_cast<std::int64_t>(i)), place(place) {}
  };

  Element operator[](const Index& index) {
    const Machine& m = Machine::instance();
    if (serial_ != m.block_serial) {  // a new block finds nothing of the last one's
      serial_ = m.block_serial;
      std::fill(std::begin(cell_), std::end(cell_), Cell{});
    }
    if (index.value < 0 || index.value >= kSize) {
      m.fault("shared memory index " + std::to_string(index.value) + " of " + std::to_string(kSize), *m.current,
              index.place);
    }
    return {*this, static_cast<unsigned>(index.value), index.place};
  }

 private:
  struct Cell {
    T value{};
    Access written, read;
  };

  T read(unsigned i, const Place& place) {
    Cell& cell = cell_[i];
    const Access now = Access::now();
    const Machine& m = Machine::instance();
    if (cell.written.thread == Access::kNobody) m.fault("read of unwritten shared memory", *m.current, place);
    if (!cell.written.before(now)) m.fault("race: read of what another thread just wrote", *m.current, place);
    const bool others = !cell.read.before(now);
    cell.read = now;
    if (others) cell.read.thread = Access::kSeveral;
    return cell.value;
  }

  void write(unsigned i, const T& v, const Place& place) {
    Cell& cell = cell_[i];
    const Access now = Access::now();
    const Machine& m = Machine::instance();
    if (!cell.written.before(now)) m.fault("race: write over what another thread just wrote", *m.current, place);
    if (!cell.read.before(now)) m.fault("race: write over what another thread just read", *m.current, place);
    cell.value = v;
    cell.written = now;
  }

  std::uint64_t serial_ = 0;
  Cell cell_[kSize];
};

}  // namespace emulator

// One block runs at a time, so static storage is one block's memory.
#define UNIRANK_SHARED(T, name, n) static ::emulator::Shared<T, (n)> name
