// Runs a grid block by block, and a block as one fiber per CUDA thread, in an order that a seed chooses.
//
// A fiber runs until it needs others: at a barrier, a warp operation or an atomic. Then the scheduler picks the next.
// Seed 0 is round robin; any other seed shuffles blocks, warps and lanes and lets random warps lag behind, because a
// missing barrier shows only when someone is late. What CUDA leaves undefined stops the launch with a Fault.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

using Place = std::source_location;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr unsigned kWarp = 32;

enum class State { Ready, AtBarrier, AtWarp, Done };

// What all named lanes do together: each hands in a value and a lane to read from; a vote hands in a predicate.
struct WarpCall {
  enum Kind { Sync, Shuffle, Vote } kind = Sync;
  unsigned mask = 0;
  unsigned source = 0;
  std::uint64_t value = 0, result = 0;
};

struct Thread {
  Fiber fiber;
  State state = State::Ready;
  uint3 index{};
  unsigned rank = 0;
  bool predicate = false;
  WarpCall call;
  Place place;  // where it waits

  unsigned warp() const { return rank / kWarp; }
  unsigned lane() const { return rank % kWarp; }
};

class Machine {
 public:
  dim3 grid, block;
  uint3 block_index{};
  Thread* current = nullptr;
  std::uint64_t block_serial = 0;  // tells the blocks of all launches apart
  std::uint64_t epoch = 0;         // barriers that the block has passed
  std::vector<std::uint64_t> warp_epoch;
  unsigned votes = 0;  // of the last barrier
  unsigned live = 0;

  template <typename Body>
  void launch(dim3 new_grid, dim3 new_block, unsigned seed, Body&& body) {
    const unsigned threads = new_block.x * new_block.y * new_block.z;
    if (threads == 0 || threads > 1024 || new_block.z > 64) throw Fault("invalid block size");
    if (new_grid.x == 0 || new_grid.y == 0 || new_grid.z == 0 || new_grid.x > 0x7fffffffu || new_grid.y > 65535 ||
        new_grid.z > 65535) {
      throw Fault("invalid grid size");
    }
    grid = new_grid;
    block = new_block;
    body_ = body;
    adversarial_ = seed != 0;
    random_.seed(seed);
    while (threads_.size() < threads) threads_.push_back(std::make_unique<Thread>());
    size_ = threads;
    warp_epoch.assign((threads + kWarp - 1) / kWarp, 0);
    std::vector<std::uint64_t> blocks(std::uint64_t{grid.x} * grid.y * grid.z);
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
    if (adversarial_) std::shuffle(blocks.begin(), blocks.end(), random_);
    for (const std::uint64_t b : blocks) {
      block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
      run_block();
    }
  }

  // The rest is called by threads of the running block.

  unsigned barrier(bool predicate, const Place& place) {
    current->predicate = predicate;
    wait(State::AtBarrier, place);
    return votes;
  }

  std::uint64_t warp_call(WarpCall call, const Place& place) {
    if (!(call.mask >> current->lane() & 1u)) fault("the calling lane is not in the mask", *current, place);
    current->call = call;
    wait(State::AtWarp, place);
    return current->call.result;
  }

  // Others may run here: before an atomic, whose order nobody may rely on.
  void pause(const Place& place) {
    if (adversarial_ && random_() % 2) wait(State::Ready, place);
  }

  [[noreturn]] void fault(const std::string& what, const Thread& thread, const Place& place) const {
    const std::string path = place.file_name();
    throw Fault(what + ": block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) +
                "), thread " + std::to_string(thread.rank) + ", " + path.substr(path.find_last_of('/') + 1) + ":" +
                std::to_string(place.line()));
  }

  static Machine& instance() {
    static Machine machine;
    return machine;
  }

 private:
  static void entry() {
    Machine& machine = instance();
    Thread& thread = *machine.current;
    thread.fiber.arrived();
    try {
      machine.body_();
    } catch (const std::exception& error) {
      machine.error_ = error.what();
    }
    thread.state = State::Done;
    thread.fiber.suspend();
  }

  void wait(State state, const Place& place) {
    current->state = state;
    current->place = place;
    current->fiber.suspend();
  }

  void run_block() {
    ++block_serial;
    epoch = 0;
    std::fill(warp_epoch.begin(), warp_epoch.end(), 0);
    live = size_;
    for (unsigned i = 0; i < size_; ++i) {
      Thread& t = *threads_[i];
      t.rank = i;
      t.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
      t.state = State::Ready;
      t.fiber.start(&Machine::entry);
    }
    std::vector<unsigned> order(warp_epoch.size());
    for (unsigned w = 0; w < order.size(); ++w) order[w] = w;
    while (live > 0) {
      bool progress = false;
      if (adversarial_) std::shuffle(order.begin(), order.end(), random_);
      for (const unsigned warp : order) {
        if (adversarial_ && random_() % 4 != 0) {
          progress = true;  // this warp lags; it will run in a later pass
          continue;
        }
        progress |= run_warp(warp);
        progress |= release_warp(warp);
      }
      progress |= release_barrier();
      if (!progress) fault_waiting("deadlock");
    }
  }

  bool run_warp(unsigned warp) {
    const unsigned begin = warp * kWarp, lanes = std::min(kWarp, size_ - begin);
    const unsigned turn = adversarial_ ? random_() % lanes : 0;
    bool progress = false;
    for (unsigned i = 0; i < lanes; ++i) {
      Thread& thread = *threads_[begin + (i + turn) % lanes];
      if (thread.state != State::Ready) continue;
      current = &thread;
      thread.fiber.resume();
      progress = true;
      if (!error_.empty()) throw Fault(std::exchange(error_, {}));
      if (thread.state == State::Done) --live;
    }
    return progress;
  }

  // Completes each warp call whose named lanes have all arrived.
  bool release_warp(unsigned warp) {
    bool progress = false;
    for (unsigned i = warp * kWarp; i < std::min(size_, (warp + 1) * kWarp); ++i) {
      if (threads_[i]->state == State::AtWarp && all_arrived(*threads_[i])) {
        complete(*threads_[i]);
        progress = true;
      }
    }
    return progress;
  }

  Thread* lane_of(const Thread& thread, unsigned lane) const {
    const unsigned rank = thread.warp() * kWarp + lane;
    return rank < size_ ? threads_[rank].get() : nullptr;
  }

  bool all_arrived(const Thread& caller) const {
    bool arrived = true;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(caller.call.mask >> lane & 1u)) continue;
      const Thread* other = lane_of(caller, lane);
      if (!other) fault("the mask names a lane that the block does not have", caller, caller.place);
      if (other->state == State::Done) fault("a lane named in the mask has exited", caller, caller.place);
      if (other->state == State::AtBarrier) {
        fault("a lane named in the mask waits at a barrier", caller, caller.place);
      }
      if (other->state != State::AtWarp) {
        arrived = false;
      } else if (other->call.mask != caller.call.mask || other->call.kind != caller.call.kind) {
        fault("lanes of one warp make different calls", caller, caller.place);
      }
    }
    return arrived;
  }

  void complete(const Thread& caller) {
    const unsigned mask = caller.call.mask;
    std::array<std::uint64_t, kWarp> value{};
    std::uint64_t ballot = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      value[lane] = lane_of(caller, lane)->call.value;
      if (value[lane]) ballot |= std::uint64_t{1} << lane;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      Thread& thread = *lane_of(caller, lane);
      if (thread.call.kind == WarpCall::Shuffle && !(mask >> thread.call.source & 1u)) {
        fault("shuffle from a lane outside the mask", thread, thread.place);
      }
      thread.call.result = thread.call.kind == WarpCall::Vote ? ballot : value[thread.call.source];
      thread.state = State::Ready;
    }
    if (caller.call.kind == WarpCall::Sync && mask == ~0u) ++warp_epoch[caller.warp()];
  }

  bool release_barrier() {
    unsigned waiting = 0, counted = 0;
    const Thread* first = nullptr;
    for (unsigned i = 0; i < size_; ++i) {
      const Thread& t = *threads_[i];
      if (t.state != State::AtBarrier) continue;
      if (!first) first = &t;
      if (t.place.line() != first->place.line()) fault("threads wait at different barriers", t, t.place);
      ++waiting;
      counted += t.predicate;
    }
    if (!first || waiting < live) return false;
    if (live < size_) fault("barrier after some threads have exited", *first, first->place);
    votes = counted;
    ++epoch;
    for (unsigned i = 0; i < size_; ++i) threads_[i]->state = State::Ready;
    return true;
  }

  [[noreturn]] void fault_waiting(const std::string& what) const {
    for (unsigned i = 0; i < size_; ++i) {
      if (threads_[i]->state != State::Done) fault(what, *threads_[i], threads_[i]->place);
    }
    throw Fault(what);
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  unsigned size_ = 0;
  std::function<void()> body_;
  std::string error_;
  bool adversarial_ = false;
  std::mt19937 random_;
};

// launch(kernel, grid, block, arguments...) as the kernels' host side wants it; empty grids launch nothing.
struct Launch {
  unsigned seed = 0;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) const {
    if (grid.x == 0 || grid.y == 0) return;
    Machine::instance().launch(grid, block, seed, [=] { kernel(arguments...); });
  }
};

}  // namespace emulator
