"""Curves of what is expected of every rank: their neighbours, and scales that were measured inside of a plan."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.curves import curve_of
from unirank.planning.allocator import curves
from unirank.planning.allocator.curves import Curve
from unirank.types import LinearSpec


def test_scales_are_found_behind_noise_by_kind_and_depth() -> None:
    """Planted: a factor of the kind, one that rises with depth, and noise half as large as the signal."""
    generator = torch.Generator().manual_seed(0)
    kinds, layers = [0.3, 1.0, 2.0, 0.7], 24
    linears = [LinearSpec(f"{l}.{k}", l, "mlp", str(k), 40, 40) for l in range(layers) for k in range(len(kinds))]
    table = [curve_of(1.5, 1 + spec.layer % 3) for spec in linears]
    asked = [curves.neighbours(curve, 20, 40) for curve in table]
    assert set(asked) == {(15, 25)}
    true = torch.tensor([kinds[int(spec.kind)] * (0.5 + spec.layer / layers) for spec in linears], dtype=torch.float64)
    drop = torch.tensor([[float(c.errors[i] - c.errors[i + 5]) for c in table] for i in (14, 19)], dtype=torch.float64)
    own = [20] * len(table)
    noisy = true * drop + 0.5 * drop.mean() * torch.randn(drop.shape, generator=generator, dtype=torch.float64)
    found = curves.measured_scales(linears, table, own, asked, *noisy.tolist())
    assert float((found / true).log().abs().median()) < 0.2
    assert torch.corrcoef(torch.stack([found.log(), true.log()]))[0, 1] > 0.9
    found = curves.measured_scales(linears, table, own, asked, *(true * drop).tolist())
    assert float((found / true).log().abs().max()) < 0.25
    # A rise that noise made negative leaves a scale above 0; no rise at all says nothing; one secant is enough.
    found = curves.measured_scales(linears[:2], table[:2], own[:2], asked[:2], [-0.1, 1.0], [0.0, 1.0])
    assert bool((found > 0).all())
    found = curves.measured_scales(linears[:2], table[:2], own[:2], [(None, None)] * 2, [0.0, 0.0], [0.0, 0.0])
    assert found.tolist() == [1, 1]
    once = curves.measured_scales(linears[:1], table[:1], own[:1], [(15, None)], [3.0], [0.0])
    assert float(once) == pytest.approx(3 / float(drop[0, 0]))


def test_neighbours_are_legal_and_another_rank() -> None:
    curve = curve_of(1.0)
    assert curves.neighbours(curve, 40, 40) == (30, None)
    assert curves.neighbours(curve, 1, 40) == (None, 2)
    assert curves.neighbours(curve, 38, 40) == (29, 40)
    coarse = Curve(torch.tensor([8, 16, 24, 40]), torch.tensor([1, 2, 3, 4]), torch.tensor([3.0, 2.0, 1.0, 0.0]))
    assert curves.neighbours(coarse, 16, 30) == (8, 24)
    assert curves.neighbours(coarse, 40, 30) == (16, None)
    assert curves.neighbours(coarse, 8, 30) == (None, 16)
    flat = dataclasses.replace(coarse, errors=torch.zeros(4))
    assert curves.neighbours(flat, 16, 30) == (None, None)
