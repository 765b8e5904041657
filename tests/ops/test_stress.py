"""The CPU kernels called from many Python threads at once give the bits that they give alone."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.cases import random_problem
from unirank import ops

pytestmark = pytest.mark.slow

CORE = Path(__file__).resolve().parents[2] / "csrc"
CALLERS, CALLS = 8, 12


def jobs() -> list[Callable[[], tuple[Tensor, ...]]]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(700, 257, generator=g), torch.randn(700, 257, generator=g)
    a = torch.stack([(m := torch.randn(60, 60, generator=g, dtype=torch.float64)) + m.T for _ in range(5)])
    problem = random_problem(6, 100, levels=5000)

    def cosine() -> tuple[Tensor, ...]:
        state = torch.zeros(3, dtype=torch.float64)
        ops.cosine_accumulate_(state, x, y)
        return (state,)

    def gram() -> tuple[Tensor, ...]:
        total, mean = torch.zeros(257, 257, dtype=torch.float64), torch.zeros(257, dtype=torch.float64)
        ops.gram_accumulate_(total, mean, x.bfloat16())
        return total, mean

    return [
        cosine,
        gram,
        lambda: ops.batched_eigh(a),
        lambda: ops.batched_svd(a[:, :, :40]),
        lambda: ops.global_topk(*problem, 20_000, 1, 4),
        lambda: ops.global_topk(*problem, 20_000, 1, 4, pivoted=True),
    ]


def test_concurrent_callers_with_changing_thread_counts_get_the_same_bits() -> None:
    work = jobs()
    threads = torch.get_num_threads()
    alone = [job() for job in work]
    start = threading.Barrier(CALLERS)

    def caller(seed: int) -> None:
        order = random.Random(seed)
        start.wait()
        for _ in range(CALLS):
            torch.set_num_threads(order.choice((1, 2, 3, 4)))
            index = order.randrange(len(work))
            for got, want in zip(work[index](), alone[index], strict=True):
                assert torch.equal(got, want)

    try:
        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(caller, range(CALLERS)))
    finally:
        torch.set_num_threads(threads)


PROGRAM = r"""
#include <thread>
#include <vector>
#include "core/moment.h"
#include "core/rank_search.h"
#include "core/rows.h"

int main() {
  using namespace unirank;
  constexpr long D = 100, T = 40;
  std::vector<float> x(D * T);
  for (long i = 0; i < D * T; ++i) x[i] = static_cast<float>((i * 37) % 101 - 50);
  std::vector<double> score(T);
  for (long i = 0; i < T; ++i) score[i] = static_cast<double>(T - i / 3);
  const std::int64_t cost[] = {43, 45}, dense[] = {400, 500}, offsets[] = {0, T / 2, T};
  const Ranking<double> ranking{score.data(), cost, dense, offsets, 2, 600, 1, 1, false};
  Ranking<double> pivoted = ranking;
  pivoted.pivoted = true;
  const auto ranks = search_ranks(ranking).ranks, pivoted_ranks = search_ranks(pivoted).ranks;
  const double cosine = row_cosine(x.data(), x.data() + D, D);
  std::vector<int> wrong(4);
  std::vector<std::thread> threads;
  for (int k = 0; k < 4; ++k) {
    threads.emplace_back([&, k] {
      TileScratch<float> scratch;
      double sums[kMaxTile] = {};
      for (int repeat = 0; repeat < 20; ++repeat) {
        wrong[k] += search_ranks(ranking).ranks != ranks;
        wrong[k] += search_ranks(pivoted).ranks != pivoted_ranks;
        wrong[k] += row_cosine(x.data(), x.data() + D, D) != cosine;
        tile_moment(RowsOf<float>{x.data(), D}, 0, T, 0, D, 0, D, scratch, sums);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (int w : wrong) if (w) return 1;
}
"""


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_thread_sanitizer_finds_nothing_in_the_core(isa: str, sanitized: Path) -> None:
    result = subprocess.run([sanitized], env={"UNIRANK_ISA": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("tsan")
    (folder / "main.cpp").write_text(PROGRAM)
    sources = [str(CORE / "core" / f"{name}.cpp") for name in ("isa", "moment", "rank_search", "rows")]
    program = folder / "main"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", "-Wno-psabi", f"-I{CORE}"]
    built = subprocess.run(
        [compiler, *flags, str(folder / "main.cpp"), *sources, "-o", str(program)], capture_output=True, text=True
    )
    if built.returncode != 0 and "tsan" in built.stderr:
        pytest.skip("this compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    probe = subprocess.run([program], capture_output=True, text=True)
    if "unexpected memory mapping" in probe.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    return program
