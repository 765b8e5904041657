"""Numbers at the edge: for each case what must hold, by how much it does, and the table of it in docs/numerics.md.

`python -m tests.promises.test_numerics` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from unirank import ops
from unirank.analysis.scheme import scheme
from unirank.analysis.scheme.base import Problem
from unirank.errors import NonFiniteError
from unirank.models.low_rank import stored_tensors, weight_product
from unirank.types import Moment

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"
M, N, TOKENS = 96, 128, 512


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(tokens: int = TOKENS) -> torch.Tensor:
    """Correlated inputs `[T, N]` whose spectrum falls over three decades."""
    basis = torch.linalg.qr(normal(N, N, seed=1)).Q
    return normal(tokens, N, seed=2) @ (basis * torch.logspace(0, -3, N, dtype=torch.float64)) @ basis.T


def excess(weight: torch.Tensor, x: torch.Tensor, name: str = "whiten") -> float:
    """How far the output error of a scheme's factors, over all ranks, is above the least possible one.

    The least is the tail of the spectrum of `W X` by a float64 SVD. Over the energy of the outputs.
    """
    moment = Moment(x.T @ x / len(x), x.mean(0), len(x), x.abs().mean(0))
    (factors,) = scheme(name).decompose([Problem("w", weight, moment, min(weight.shape))])
    w = weight.double()
    seen = x - x.mean(0) if name == "afm" else x
    spectrum = torch.linalg.svdvals(w @ seen.T).square()
    total = float(spectrum.sum())
    worst = 0.0
    for r in range(0, len(factors.energy) + 1, 8):
        lost = (w - factors.left[:, :r].double() @ factors.right[:r].double()) @ seen.T
        worst = max(
            worst,
            (float(lost.square().sum()) - float(spectrum[r:].sum())) / total if total else float(lost.abs().max()),
        )
    return worst


def optimal(x: torch.Tensor, weight: torch.Tensor | None = None, name: str = "whiten") -> Callable[[], float]:
    return lambda: excess(normal(M, N, dtype=torch.float32) if weight is None else weight, x, name)


def dead(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, ::7] = 0
    return x


def doubled(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, N // 2 :] = x[:, : N // 2]
    return x


def outlier(x: torch.Tensor, size: float) -> torch.Tensor:
    x = x.clone()
    x[:, 5] *= size
    return x


def gram_error(dtype: torch.dtype, size: float) -> float:
    """Of an accumulated moment against float64, over its trace: what eigenvalues can be wrong by."""
    x = outlier(inputs(4096), size).to(dtype)
    gram, total = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for part in x.split(512):
        ops.gram_accumulate_(gram, total, part)
    exact = x.double().T @ x.double()
    return float(torch.linalg.matrix_norm(gram - exact, 2) / exact.trace())


def cosine_error(dtype: torch.dtype, size: float) -> float:
    x, step = outlier(normal(4096, N, seed=3), size).to(dtype), (0.1 * normal(4096, N, seed=4)).to(dtype)
    y = x + step
    state = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(x.split(512), y.split(512), strict=True):
        ops.cosine_accumulate_(state, a, b)
    exact = torch.cosine_similarity(x.double(), y.double(), dim=-1)
    return abs(float(state[0]) - float(exact.sum())) / len(x)


def pivoting_error(dtype: torch.dtype, decades: float = 1.0) -> float:
    """Of the product, in the Frobenius norm; singular values fall over `decades`."""
    rank = 60
    scale = 10.0 ** (-decades * torch.arange(rank, dtype=torch.float64) / (rank - 1))
    left, right = (normal(M, rank) * scale).to(dtype), normal(rank, N, seed=1).to(dtype)
    stored = stored_tensors(left, right, "pivoted")
    found = weight_product(stored["left.weight"].double(), stored["right.weight"].double(), stored["place"])
    whole = left.double() @ right.double()
    return float((found - whole).norm() / whole.norm())


def equal_energies() -> float:
    """Inputs and weight without any preference: every energy is the same, and no factor is lost."""
    weight = torch.linalg.qr(normal(N, N, seed=6)).Q.float()
    x = torch.linalg.qr(normal(TOKENS, N, seed=7)).Q
    moment = Moment(x.T @ x / TOKENS, x.mean(0), TOKENS)
    (factors,) = scheme("whiten").decompose([Problem("w", weight, moment, N)])
    return float(factors.energy.max() / factors.energy.min() - 1)


def orthogonality(size: float) -> float:
    """Of the left factor, whose columns the global sort takes one by one."""
    x = outlier(inputs(), size)
    moment = Moment(x.T @ x / len(x), x.mean(0), len(x))
    (factors,) = scheme("whiten").decompose([Problem("w", normal(M, N, dtype=torch.float32), moment, M)])
    left = factors.left.double()
    return float((left.T @ left - torch.eye(left.shape[1], dtype=torch.float64)).abs().max())


@dataclass(frozen=True)
class Case:
    """One line of the table: `measure()` must be at most `bound`."""

    name: str
    holds: str
    measure: Callable[[], float]
    bound: float


LEAST = "output error above the least possible, over the outputs' energy"
CASES = (
    Case("as many tokens as inputs and more", LEAST, optimal(inputs()), 1e-12),
    Case("fewer tokens (40) than inputs (128)", LEAST, optimal(inputs(40)), 1e-12),
    Case("one token", LEAST, optimal(inputs(1)), 1e-12),
    Case("every seventh input dead", LEAST, optimal(dead(inputs())), 1e-12),
    Case("all inputs dead", "largest change of an output", optimal(torch.zeros(TOKENS, N).double()), 0.0),
    Case("second half of the inputs a copy of the first", LEAST, optimal(doubled(inputs())), 1e-12),
    Case("an outlier channel of 1e4", LEAST, optimal(outlier(inputs(), 1e4)), 1e-12),
    Case("an outlier channel of 1e8", LEAST, optimal(outlier(inputs(), 1e8)), 1e-12),
    Case("the same, centred (`afm`)", LEAST, optimal(outlier(inputs(), 1e8), name="afm"), 1e-12),
    Case("weights of 1e30", LEAST, optimal(inputs(), 1e30 * normal(M, N, dtype=torch.float32)), 1e-12),
    Case("weights of 1e-30", LEAST, optimal(inputs(), 1e-30 * normal(M, N, dtype=torch.float32)), 1e-12),
    Case("a weight of rank 1", LEAST, optimal(inputs(), normal(M, 1).float() @ normal(1, N, seed=1).float()), 1e-12),
    Case("a weight of zeros", "largest change of an output", optimal(inputs(), torch.zeros(M, N)), 0.0),
    Case("one output", LEAST, optimal(inputs(), normal(1, N, dtype=torch.float32)), 1e-12),
    Case("energies that are all equal", "largest over smallest, less 1", equal_energies, 1e-5),
    Case("left factor, outlier channel of 1e8", "departure from orthonormal columns", lambda: orthogonality(1e8), 1e-9),
    Case("moment, float32 inputs", "error over the trace", lambda: gram_error(torch.float32, 1.0), 1e-6),
    Case("moment, outlier channel of 1e4", "error over the trace", lambda: gram_error(torch.float32, 1e4), 1e-6),
    Case("moment, bfloat16 inputs", "error over the trace", lambda: gram_error(torch.bfloat16, 1e4), 1e-6),
    Case("cosine, float32 streams", "error of the mean", lambda: cosine_error(torch.float32, 1.0), 1e-12),
    Case("cosine, outlier channel of 1e4", "error of the mean", lambda: cosine_error(torch.float32, 1e4), 1e-12),
    Case("pivoted form, float32", "relative error of the product", lambda: pivoting_error(torch.float32), 1e-6),
    Case("pivoted form, bfloat16", "relative error of the product", lambda: pivoting_error(torch.bfloat16), 2e-2),
    Case("pivoted form, float16", "relative error of the product", lambda: pivoting_error(torch.float16), 2e-3),
    Case("pivoted form, energies over 16 decades", "relative error", lambda: pivoting_error(torch.float32, 8.0), 1e-6),
    Case("cosine, bfloat16 streams", "error of the mean", lambda: cosine_error(torch.bfloat16, 1e4), 1e-12),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_holds(case: Case) -> None:
    assert case.measure() <= case.bound


def test_moments_that_overflow_name_the_linear(make_model, calibration, tmp_path: Path) -> None:
    import unirank

    loaded = make_model("llama")
    loaded.model.half()
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight.fill_(60000.0)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1"):
        unirank.analyze(loaded, tmp_path / "store", calibration=calibration)


def test_the_page_has_every_case() -> None:
    lines = PAGE.read_text().splitlines()
    for case in CASES:
        assert any(line.startswith(f"| {case.name} | {case.holds} | {case.bound:g} |") for line in lines), case.name


def table() -> str:
    rows = ["| case | what must hold | at most | measured |", "|---|---|---|---|"]
    rows += [f"| {c.name} | {c.holds} | {c.bound:g} | {max(0.0, c.measure()):.1g} |" for c in CASES]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
