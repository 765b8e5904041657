#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "cuda/launch.h"
#include "cuda/ops.h"
#include "kernels/failure.cuh"
#include "kernels/topk.cuh"

namespace unirank::cuda {
namespace {

constexpr const char* kOp = "global_topk";

// CUB is called twice: it first says how much memory it needs.
template <typename Call>
void with_storage(Scratch& scratch, const Call& call) {
  std::size_t bytes = 0;
  STD_CUDA_CHECK(call(nullptr, bytes));
  void* storage = scratch.take<char>(static_cast<i64>(bytes));
  STD_CUDA_CHECK(call(storage, bytes));
}

template <typename T>
T fetch(const T* device, cudaStream_t stream) {
  T value;
  STD_CUDA_CHECK(cudaMemcpyAsync(&value, device, sizeof value, cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return value;
}

// Waits for the device once, at the end, to learn whether the input was legal.
template <typename Score>
void search(const Queue& queue, const kernels::RankProblem<Score>& problem, Scratch& scratch, i64* ranks,
            double* threshold) {
  const i64 C = problem.C, L = problem.L;
  using Key = kernels::SortKey<Score>;
  const kernels::RankScratch<Score> buffers{
      scratch.take<Key>(C),          scratch.take<Key>(C),    scratch.take<std::int32_t>(C),
      scratch.take<std::int32_t>(C), scratch.take<i64>(C),    scratch.take<i64>(C),
      scratch.take<i64>(L),          scratch.take<double>(L), scratch.take<kernels::RankStatus>(1),
  };
  const auto sort = [&](const Key* keys, Key* sorted, const std::int32_t* index, std::int32_t* order, i64 count) {
    with_storage(scratch, [&](void* storage, std::size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(storage, bytes, keys, sorted, index, order, count, 0, 8 * int(sizeof(Key)),
                                             queue.stream());
    });
  };
  const auto add_up = [&](const i64* steps, i64* spent, i64 count) {
    with_storage(scratch, [&](void* storage, std::size_t& bytes) {
      return cub::DeviceScan::InclusiveSum(storage, bytes, steps, spent, count, queue.stream());
    });
  };
  kernels::search_ranks(queue, sort, add_up, problem, buffers, ranks, threshold);
  const kernels::RankStatus status = fetch(buffers.status, queue.stream());
  const auto failure =
      kernels::failure_message(status, problem, [&](const auto* device) { return fetch(device, queue.stream()); });
  check(failure.empty(), kOp, ": ", failure);
}

void check_prices(const char* argument, const Tensor& t, i64 length, const Tensor& value) {
  check_integers(kOp, argument, t, length);
  check_device(kOp, argument, t, value);
}

}  // namespace

std::tuple<Tensor, Tensor> global_topk(Tensor value, Tensor cost, Tensor dense_cost, Tensor offsets,
                                       std::int64_t budget, std::int64_t min_rank, std::int64_t multiple_of,
                                       bool pivoted) {
  check_ranking(kOp, value, cost);
  const i64 C = value.size(0), L = cost.size(0);
  check(C < (i64{1} << 31), kOp, ": value must have fewer than 2^31 components, got ", C);
  check_prices("cost", cost, L, value);
  check_prices("dense_cost", dense_cost, L, value);
  check_prices("offsets", offsets, L + 1, value);
  check(min_rank >= 0, kOp, ": min_rank must be at least 0, got ", min_rank);
  check(multiple_of >= 1, kOp, ": multiple_of must be at least 1, got ", multiple_of);

  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  value = contiguous(kOp, value);
  cost = contiguous(kOp, cost);
  dense_cost = contiguous(kOp, dense_cost);
  offsets = contiguous(kOp, offsets);
  Tensor ranks = empty(kOp, cost, {L});
  Tensor threshold = allocated(kOp, sizeof(double),
                               [&] { return torch::stable::new_empty(value, std::vector<i64>{}, ScalarType::Double); });
  const Queue queue(value);
  Scratch scratch(kOp, value);
  const auto run = [&]<typename Score>(const Score* scores) {
    const kernels::RankProblem<Score> problem{scores,
                                              const_data<i64>(cost),
                                              const_data<i64>(dense_cost),
                                              const_data<i64>(offsets),
                                              C,
                                              L,
                                              budget,
                                              min_rank,
                                              multiple_of,
                                              pivoted};
    search(queue, problem, scratch, data<i64>(ranks), data<double>(threshold));
  };
  if (value.scalar_type() == ScalarType::Double) {
    run(const_data<double>(value));
  } else {
    run(const_data<float>(value));
  }
  return {ranks, threshold};
}

}  // namespace unirank::cuda
