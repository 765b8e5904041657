"""The checks that tests/gpu makes of the whole path on a GPU hold on the CPU, so that they are known to work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.on_device import CHECKS, CPU, Bench, difference


# Schemes and architectures are one check with other arguments; the GPU runs all of them.
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ("gemma3", "gpt-neox", "opt", "scheme svd")])
def test_on_the_cpu(name: str, tmp_path: Path, tokenizer, text_file: Path) -> None:
    CHECKS[name](Bench(CPU, tmp_path, tokenizer, text_file))


def test_a_difference_is_seen(tmp_path: Path, tokenizer, text_file: Path) -> None:
    bench = Bench(CPU, tmp_path, tokenizer, text_file)
    _, one = bench.analyzed(CPU)
    _, other = bench.analyzed(CPU, calibration={"seed": 1})
    assert difference(one, one).energy == 0
    assert difference(one, other).energy > 0.01
