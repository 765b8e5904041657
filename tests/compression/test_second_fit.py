"""The fit of one linear: whatever it may change, no output is further from the dense model's than it was before."""

from __future__ import annotations

import itertools

import pytest
import torch

import unirank
from unirank.analysis.scheme.two_sided import Target, damped, solve
from unirank.compression.second_fit import Pair, Refine, fit
from unirank.models.low_rank import LowRankLinear
from unirank.models.structure import weight_of
from unirank.types import DENSE, LinearSpec, LoadedModel, Rank

TOKENS = 400
# A linear without a bias, one with, and one that is stored transposed; the second is wider than tall, the third taller.
LINEARS = [
    ("llama", "model.layers.1.mlp.up_proj"),
    ("llama-bias", "model.layers.1.mlp.down_proj"),
    ("gpt2", "transformer.h.1.mlp.c_fc"),
]
SETTINGS = [
    Refine(mix=mix, centred=centred, metric=metric, dense=True)
    for mix, centred, metric in itertools.product((0.5, 1.0), (False, True), (False, True))
]


def streams(n: int, *, shift: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of one linear, `[TOKENS, N]` float64: of the dense model, and of one that lost a part and moved the mean.

    `shift` is how large the mean is, in standard deviations.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dense = random(TOKENS, n) @ (torch.eye(n, dtype=torch.float64) + random(n, n) / n**0.5) + shift * random(n)
    own = 0.8 * dense + 0.2 * random(TOKENS, n) + 0.3 * random(n)
    return dense, own


@pytest.fixture
def linear(request: pytest.FixtureRequest, make_model) -> tuple[LoadedModel, LinearSpec]:
    name, path = request.param
    loaded = make_model(name)
    (spec,) = [spec for spec in loaded.linears if spec.name == path]
    module = loaded.model.get_submodule(path)
    if module.bias is not None:
        torch.nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(9))
    return loaded, spec


def pair_of(dense: torch.Tensor, own: torch.Tensor) -> Pair:
    pair = Pair.zeros(dense.shape[1], torch.device("cpu"))
    for x, y in zip(dense.split(150), own.split(150), strict=True):
        pair.add(x.float(), y.float())
    return pair


def errors(module: torch.nn.Module, own: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """How far the mean output, and on average an output, is from what the dense model gives: `|.|²` of either."""
    with torch.no_grad():
        lost = module(own.float()).double() - wanted
    return float(lost.mean(0).square().sum()), float(lost.square().sum(1).mean())


@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.mix}-{s.centred}-{s.metric}")
@pytest.mark.parametrize("linear", LINEARS, indirect=True, ids=lambda pair: pair[0])
def test_a_linear_of_full_rank_is_no_worse_than_before(linear, settings: Refine, shift: float) -> None:
    loaded, spec = linear
    module = loaded.model.get_submodule(spec.name)
    dense, own = streams(spec.n, shift=shift)
    with torch.no_grad():
        wanted = module(dense.float()).double()
    before = errors(module, own, wanted)
    g = torch.eye(spec.m, dtype=torch.float64) if settings.metric else None
    fit(loaded, spec, DENSE, pair_of(dense, own), g, settings)
    assert loaded.model.get_submodule(spec.name) is module  # no bias came to a class that has no place for it
    after = errors(module, own, wanted)
    assert before[0] > 0.1
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    if settings.mix == 1.0 and settings.centred and module.bias is not None:
        assert after[0] < 1e-6 * before[1]


@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.mix}-{s.centred}-{s.metric}")
@pytest.mark.parametrize("linear", LINEARS, indirect=True, ids=lambda pair: pair[0])
def test_a_linear_of_low_rank_is_no_worse_than_its_first_truncation(linear, settings: Refine, shift: float) -> None:
    loaded, spec = linear
    module = loaded.model.get_submodule(spec.name)
    weight, bias = weight_of(module).detach().double(), module.bias
    bias = None if bias is None else bias.detach().clone()
    dense, own = streams(spec.n, shift=shift)
    with torch.no_grad():
        wanted = module(dense.float()).double()
    unchanged, rank = errors(module, own, wanted), spec.max_rank // 2
    fit(loaded, spec, rank, pair_of(dense, own), torch.eye(spec.m).double() if settings.metric else None, settings)
    found = loaded.model.get_submodule(spec.name)
    assert isinstance(found, LowRankLinear)
    assert found.rank == rank
    assert (found.left.bias is not None) == (settings.centred or bias is not None)
    (first,) = solve([Target(weight, dense.T @ dense / TOKENS, None, rank)])
    truncated = LowRankLinear(spec.n, spec.m, rank, bias=bias is not None)
    with torch.no_grad():
        truncated.left.weight.copy_(first.left)
        truncated.right.weight.copy_(first.right)
        if bias is not None:
            truncated.left.bias.copy_(bias)
    after = errors(found, own, wanted)
    assert after[1] <= errors(truncated, own, wanted)[1]
    if settings.centred:
        assert after[0] <= unchanged[0]


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("linear", LINEARS, indirect=True, ids=lambda pair: pair[0])
def test_a_fit_is_the_one_of_its_definition_in_every_shape(linear, metric: bool) -> None:
    """`A⁻¹ U_r U_rᵀ A B` by the solver of the schemes, from the best map `B` that a plain solve gives."""
    loaded, spec = linear
    module, settings = loaded.model.get_submodule(spec.name), Refine(mix=0.7, shrink=0)
    weight, rank = weight_of(module).detach().double(), spec.max_rank // 2
    dense, own = streams(spec.n, shift=0.5)
    roots = torch.randn(spec.m, spec.m, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    g = roots @ roots.T if metric else None
    fit(loaded, spec, rank, pair_of(dense, own), g, settings)
    moment = damped(own.T @ own / TOKENS, settings.damping)
    ridge = moment - own.T @ own / TOKENS
    aim = (settings.mix * dense.T @ own + (1 - settings.mix) * own.T @ own) / TOKENS + ridge
    best = torch.linalg.solve(moment, (weight @ aim).T).T
    (wanted,) = solve([Target(best, moment, None if g is None else damped(g, settings.metric_damping), rank)])
    found = loaded.model.get_submodule(spec.name).dense_weight().detach().double()
    torch.testing.assert_close(found, wanted.left @ wanted.right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [DENSE, 4])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_fit_that_does_not_fit_the_dtype_is_an_error_and_changes_nothing(part: str, rank: Rank, make_model) -> None:
    loaded = make_model("llama-bias")
    spec = loaded.linears[0]
    module = loaded.model.get_submodule(spec.name).half()
    # The dense stream is 1e8 times the other one: the best map, or what the mean needs, is beyond 65504.
    n = spec.n
    dense, own = streams(n, shift=0.0 if part == "weight" else 1.0)
    own = own - own.mean(0)
    dense = 1e8 * dense if part == "weight" else dense * 1e-3 + 1e6
    pair = Pair.zeros(n, torch.device("cpu"))
    pair.add(dense, own)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with pytest.raises(unirank.NonFiniteError, match=rf"second fit of {spec.name} .* torch\.float16"):
        fit(loaded, spec, rank, pair, None, Refine(mix=1.0, damping=1e-9, centred=part == "bias"))
    assert loaded.model.get_submodule(spec.name) is module
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_precision_streams_are_those_of_float32(dtype: torch.dtype) -> None:
    dense, own = (x.to(dtype) for x in streams(6, shift=1.0))
    dense[:, 2] *= 1000  # an outlier channel, whose products are beyond the range of float16
    found, wanted = Pair.zeros(6, dense.device), Pair.zeros(6, dense.device)
    found.add(dense, own)
    wanted.add(dense.double(), own.double())
    for name in ("own", "cross", "own_sum", "dense_sum"):
        a, b = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_an_outlier_does_not_bend_the_fit_where_tokens_are_clipped() -> None:
    """One factor a token for both streams, found from `x'`: the map between them that it asks for is the same."""
    dense, own = streams(24, shift=0.0)
    kept = Pair.zeros(24, torch.device("cpu"))
    kept.add(dense, own)
    dense[5], own[5] = 1e4 * dense[5], 1e4 * own[5]
    limit = 2 * own.norm(dim=1).sort().values[(TOKENS - 1) // 2]
    factors = (limit / own.norm(dim=1)).clamp(max=1)[:, None]
    found, bent = Pair.zeros(24, torch.device("cpu"), clip=2.0), Pair.zeros(24, torch.device("cpu"))
    for pair in (found, bent):
        pair.add(dense, own)
    x, y = dense * factors, own * factors
    assert int((factors < 1).sum()) < TOKENS // 4
    torch.testing.assert_close(found.own, y.T @ y)
    torch.testing.assert_close(found.cross, x.T @ y)
    torch.testing.assert_close(found.own_sum, y.sum(0))
    torch.testing.assert_close(found.dense_sum, x.sum(0))
    assert found.tokens == bent.tokens == TOKENS
    assert float((found.own - kept.own).norm()) < 0.1 * float(kept.own.norm())
    assert float((bent.own - kept.own).norm()) > 1e4 * float(kept.own.norm())


@pytest.mark.parametrize("stream", [0, 1])
def test_what_is_no_number_stays_where_tokens_are_clipped(stream: int) -> None:
    both = streams(24, shift=0.0)
    both[stream][5, 3] = float("nan")
    pair = Pair.zeros(24, torch.device("cpu"), clip=2.0)
    pair.add(*both)
    assert pair.cross.isnan().any()
