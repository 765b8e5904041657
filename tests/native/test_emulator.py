"""What the emulator computes and what it refuses: a test that relies on it relies on these."""

from __future__ import annotations

import subprocess
from types import ModuleType

import numpy as np
import pytest
import torch
from emulation import Builder

LANES = np.arange(96) % 32


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("barrier_orders", 95 - np.arange(96)),
        ("warp_barrier_orders", np.arange(96) ^ 1),
        ("shuffles_move_values", 70000 + 100 * np.minimum(LANES + 1, 31) + (LANES ^ 5)),
        ("half_warps_may_shuffle_alone", np.where(LANES < 16, LANES ^ 1, -1)),
        ("votes_count", np.full(96, 100 * 48 + 10 * (4 + 0 + 1) + 2)),
        ("atomics_lose_nothing", np.full(96, 1000 * 96 + 95)),
    ],
)
def test_legal_kernels_compute(emulated: ModuleType, name: str, want: np.ndarray) -> None:
    for seed in range(50):
        assert emulated.probe(name, seed) == want.tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_barrier", "read of unwritten shared memory|race: read of what another thread just wrote"),
        (
            "overwritten_too_early",
            "race: write over what another thread just read|race: read of what another thread just wrote",
        ),
        ("two_writers", "race: write over what another thread just wrote"),
        ("warp_barrier_between_warps", "read of unwritten shared memory|race: read"),
        ("reads_the_last_blocks_memory", "read of unwritten shared memory"),
        ("shared_out_of_bounds", r"shared memory index 96 of 96: block \(\d, 0\), thread 95, emulator_driver.cpp:\d+"),
        ("divergent_barrier", "barrier after some threads have exited"),
        ("different_barriers", "threads wait at different barriers"),
        ("shuffle_with_absent_lanes", "a lane named in the mask has exited"),
        ("shuffle_from_outside_the_mask", "shuffle from a lane outside the mask"),
        ("shuffle_without_the_caller", "the calling lane is not in the mask"),
        ("shuffle_against_a_barrier", "a lane named in the mask waits at a barrier"),
        ("misaligned_load", "misaligned load"),
        ("writes_outside_an_operand", "write outside an operand"),
    ],
)
def test_illegal_kernels_are_refused(emulated: ModuleType, name: str, message: str) -> None:
    refused = 0
    for seed in range(50):
        try:
            emulated.probe(name, seed)
        except RuntimeError as error:
            refused += 1
            with pytest.raises(RuntimeError, match=message):
                raise error
    # Where the fault is in the order of reads and writes, some orders happen to be harmless.
    assert refused > 40


def test_seeds_are_different_schedules(emulated: ModuleType) -> None:
    assert len({emulated.probe("reports_who_came_first", seed)[0] for seed in range(50)}) > 10
    assert emulated.probe("reports_who_came_first", 0)[0] == 0
    assert emulated.probe("reports_who_came_first", 9) == emulated.probe("reports_who_came_first", 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_widened_as_torch_does(emulated: ModuleType, dtype: torch.dtype) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    got = torch.tensor(emulated.widen(bits.tolist(), dtype == torch.bfloat16))
    want = torch.from_numpy(bits.astype(np.int16)).view(dtype).float()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_kernels_are_clean_under_sanitizers(builder: Builder) -> None:
    done = subprocess.run([builder.sanitized_program()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 1000
