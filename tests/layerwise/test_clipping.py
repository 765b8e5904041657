"""A few tokens of enormous length do not make the moments, and nothing that is no number hides behind the clipping."""

from __future__ import annotations

import pytest
import torch

import unirank
from tests.support.threads import with_threads
from tests.support.tiny import WORDS
from unirank.layerwise.clipping import clip_factors, clipped, scaled
from unirank.layerwise.recording import layers_of, record
from unirank.layerwise.statistics import calibrate_layer
from unirank.types import LayerStats, LoadedModel

WINDOWS = torch.randint(2, len(WORDS), (5, 24), generator=torch.Generator().manual_seed(2))


def tokens(count: int = 400, n: int = 16) -> torch.Tensor:
    """Standard normal `[count, n]`, of which three tokens are a thousand times as long, and of one direction."""
    x = torch.randn(count, n, generator=torch.Generator().manual_seed(0))
    x[[0, 100, 200]] = 1e3 * torch.ones(n)
    return x


def largest_share(x: torch.Tensor) -> float:
    """Of the energy of a second moment, what the first direction holds."""
    energies = torch.linalg.eigvalsh(x.double().T @ x.double())
    return float(energies[-1] / energies.sum())


def statistics(loaded: LoadedModel, clip: float, *, batch: int = 2, mean_abs: bool = False) -> list[LayerStats]:
    recording = record(loaded, WINDOWS, batch=batch)
    streams = recording.start
    return [
        calibrate_layer(loaded, index, recording, streams, mean_abs=mean_abs, clip=clip)
        for index in range(loaded.layer_count)
    ]


@pytest.mark.parametrize("clip", [1.0, 2.0, 7.5])
def test_no_token_is_longer_than_the_clip_allows_and_directions_stay(clip: float) -> None:
    x = tokens()
    norms = x.double().norm(dim=1)
    limit = clip * norms.sort().values[(len(x) - 1) // 2]
    found = clipped(x, clip).double()
    torch.testing.assert_close(found.norm(dim=1), norms.clamp(max=limit), rtol=1e-6, atol=0)
    torch.testing.assert_close(found / found.norm(dim=1)[:, None], x.double() / norms[:, None], rtol=1e-6, atol=1e-7)
    short = norms <= limit
    assert 0 < int(short.sum()) < len(x)
    assert torch.equal(found[short], x[short].double())


def test_three_tokens_of_four_hundred_no_longer_hold_the_energy() -> None:
    x = tokens()
    assert largest_share(x) > 0.999
    assert largest_share(clipped(x, 2.0)) < 0.2


def test_off_and_nothing_to_clip_give_the_tensor_itself() -> None:
    x = tokens()
    assert clipped(x, 0.0) is x
    assert clipped(x, 1e6) is x
    assert clip_factors(x[:0], 2.0) is None
    assert scaled(x, None) is x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 5])
def test_what_is_no_number_stays(value: float, where: int) -> None:
    """In an outlier (0) and in a usual token (5), and the others are clipped as without it."""
    x = tokens()
    plain = clipped(x, 2.0)
    x[where, 3] = value
    found = clipped(x, 2.0)
    torch.testing.assert_close(found[where], x[where], rtol=0, atol=0, equal_nan=True)
    others = torch.arange(len(x)) != where
    assert found[others].isfinite().all()
    torch.testing.assert_close(found[others], plain[others], rtol=1e-2, atol=1e-2)
    assert not clipped(torch.full((4, 3), value), 2.0).isfinite().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["input_layernorm", "mlp.up_proj"])
def test_a_layer_that_gives_no_number_is_still_an_error(weight: str, value: float, make_model) -> None:
    loaded = make_model("llama")
    layers_of(loaded)[1].get_parameter(f"{weight}.weight").data[3] = value
    with pytest.raises(unirank.NonFiniteError, match=r"model\.layers\.1\b"):
        statistics(loaded, 2.0)


def test_tokens_that_are_zero_have_no_say_in_the_median() -> None:
    x = tokens()
    few = torch.zeros(4000, x.shape[1])
    few[::10] = x
    found = clipped(few, 2.0)
    assert torch.equal(found[::10], clipped(x, 2.0))
    assert not found.isnan().any()
    assert clipped(torch.zeros(7, 3), 2.0).equal(torch.zeros(7, 3))


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e30), (torch.float16, 6e4), (torch.bfloat16, 1e30)])
def test_an_outlier_whose_square_overflows_is_clipped(dtype: torch.dtype, large: float) -> None:
    x = tokens().clamp(-1, 1).to(dtype)
    usual = float(x.double().norm(dim=1).median())
    x[7] = large
    found = clipped(x, 2.0)
    assert found.dtype == dtype
    assert float(found[7].double().norm()) == pytest.approx(2 * usual, rel=1e-2)
    assert torch.equal(found[8:], x[8:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_moments_are_those_of_the_clipped_tokens_of_every_batch(name: str, make_model) -> None:
    loaded = make_model(name)
    caught: dict[str, list[torch.Tensor]] = {}
    handles = [
        loaded.model.get_submodule(spec.name).register_forward_pre_hook(
            lambda _, args, key=spec.name: caught.setdefault(key, []).append(args[0].flatten(0, -2).double())
        )
        for spec in loaded.linears
    ]
    with torch.no_grad():
        for ids in WINDOWS.split(2):
            loaded.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    any_clipped = False
    for stats in statistics(loaded, 1.2, mean_abs=True):
        for owner, moment in stats.moments.items():
            x = torch.cat([clipped(batch, 1.2) for batch in caught[owner]])
            any_clipped |= not x.equal(torch.cat(caught[owner]))
            torch.testing.assert_close(moment.c, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moment.mean, x.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moment.mean_abs, x.abs().mean(0), rtol=1e-4, atol=1e-5)
            assert moment.tokens == WINDOWS.numel()
    assert any_clipped


def test_cosines_and_streams_are_not_clipped(make_model) -> None:
    plain, clip = statistics(make_model("llama"), 0.0), statistics(make_model("llama"), 1.0)
    assert [stats.cosines for stats in plain] == [stats.cosines for stats in clip]
    assert not torch.equal(next(iter(plain[0].moments.values())).c, next(iter(clip[0].moments.values())).c)


def test_the_bits_do_not_depend_on_the_number_of_threads(make_model) -> None:
    x = torch.randn(4097, 300, generator=torch.Generator().manual_seed(3))
    x[::50] *= 100

    def run() -> list[torch.Tensor]:
        stats = statistics(make_model("llama"), 1.1)
        return [clipped(x, 1.5), *(moment.c for one in stats for moment in one.moments.values())]

    first, *others = with_threads(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
