"""What a longer float32 sum costs a gram: sums as a CPU, as float32 units and as tensor cores of a GPU make them.

`python -m tests.ops.test_gram_sums` prints the table of docs/numerics.md; with the name or folder of a model it takes
that model's activations too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ops.tolerance import gram_bound

PAGES = Path(__file__).parents[2] / "docs"
LENGTHS = (2048, 8192, 16384)
# How float32 sums are made: products that are added at once, and bits that each of them keeps below the last of the
# largest, as the bit-accurate models of Khattak and Mikaitis (arXiv 2512.07004) have it. None: one by one, rounded.
WAYS = {
    "rounded, one by one": None,
    "Hopper, Blackwell": (16, 2),
    "Ampere, Ada": (8, 1),
    "Volta": (4, 0),
}


def bf16(x: np.ndarray) -> np.ndarray:
    """Cut to bfloat16, as float32."""
    return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def gram(x: np.ndarray, way: tuple[int, int] | None) -> np.ndarray:
    """`xᵀx` of `x [T, N]`, whose products are exact in float64, summed in float32 over all T, in one of the `WAYS`."""
    total = np.zeros((x.shape[1],) * 2, np.float32)
    if way is None:
        for row in x:
            total += row[:, None] * row
        return total
    group, extra_bits = way
    for begin in range(0, len(x), group):
        part = x[begin : begin + group].astype(np.float64)
        terms = np.concatenate([total[None].astype(np.float64), part[:, :, None] * part[:, None, :]])
        _, exponent = np.frexp(np.abs(terms).max(0))
        last_bit = np.ldexp(1.0, exponent - 24 - extra_bits)
        exact = (np.trunc(terms / last_bit) * last_bit).sum(0)
        nearest = exact.astype(np.float32)
        total = np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)
    return total


def errors(x: np.ndarray, way: tuple[int, int] | None) -> tuple[float, float]:
    """The largest error of an entry over that of `|x|ᵀ|x|`, and the mean relative error of the diagonal."""
    wide = x.astype(np.float64)
    truth, scale = wide.T @ wide, np.abs(wide).T @ np.abs(wide)
    off = gram(x, way) - truth
    return float((np.abs(off) / scale).max()), float((off.diagonal() / truth.diagonal()).mean())


def inputs(tokens: int, kind: str) -> np.ndarray:
    """Activations `[tokens, 12]` in bfloat16: normal ones, or with three channels of 1000 times the size that keep
    their sign, as outlier channels of trained models do."""
    x = np.random.default_rng(tokens).standard_normal((tokens, 12))
    if kind == "outlier channels":
        x[:, :3] = 1000 * (1 + 0.1 * x[:, :3])
    return bf16(x)


KINDS = ("normal", "outlier channels")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_chunk_of_the_gpu_keeps_the_bound(way: str, kind: str) -> None:
    worst, _ = errors(inputs(8192, kind), WAYS[way])
    assert worst <= gram_bound(8192, *(WAYS[way] or ()))


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way]])
def test_what_is_cut_off_is_a_bias_and_grows_with_the_length(way: str) -> None:
    # Why a chunk is not longer: rounding is random and grows like the root, cutting off goes one way.
    biases = [errors(inputs(tokens, "outlier channels"), WAYS[way])[1] for tokens in LENGTHS]
    assert 0 > biases[0] > biases[1] > biases[2]
    assert abs(biases[1]) > 2 * abs(biases[0])


def activations_of(model: str) -> dict[str, np.ndarray]:
    """Inputs of two linears of a fourth layer on the pages of docs: the channels of most energy, and middling ones."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found: dict[str, list[np.ndarray]] = {"q_proj": [], "down_proj": []}
    loaded = AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=4, dtype=torch.bfloat16)
    layer = loaded.model.layers[3]
    for name, module in (("q_proj", layer.self_attn.q_proj), ("down_proj", layer.mlp.down_proj)):
        module.register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0][0].float().numpy()))
    pages = "\n".join(path.read_text() for path in sorted(PAGES.glob("*.md")))
    ids = AutoTokenizer.from_pretrained(model)(pages, return_tensors="pt").input_ids[0, : max(LENGTHS)]
    with torch.no_grad():
        for window in ids.split(1024):
            loaded.model(window[None])
    taken = {}
    for name, parts in found.items():
        x = np.concatenate(parts)
        order = np.argsort(-(x.astype(np.float64) ** 2).sum(0))
        taken[f"inputs of {name}"] = x[:, [*order[:40], *order[len(order) // 2 :][:40]]]
    return taken


def excess(x: np.ndarray, way: tuple[int, int] | None) -> float:
    """By how much the output error of a random matrix, cut to half its rank, is above the least possible one, over it,
    where the moment was summed in float32."""
    exact = x.astype(np.float64).T @ x.astype(np.float64)
    weight = np.random.default_rng(0).standard_normal((x.shape[1],) * 2)
    _, vectors = np.linalg.eigh(weight @ gram(x, way).astype(np.float64) @ weight.T)
    least = np.linalg.eigvalsh(weight @ exact @ weight.T)[: x.shape[1] // 2].sum()
    lost = vectors[:, : x.shape[1] // 2]
    return float(np.trace(lost.T @ weight @ exact @ weight.T @ lost) / least - 1)


def table(model: str | None = None) -> str:
    lines = ["| sums of | tokens | " + " | ".join(WAYS) + " |", "|---|---|" + "---|" * len(WAYS)]
    cases = {kind: inputs(max(LENGTHS), kind) for kind in KINDS} | (activations_of(model) if model else {})
    for name, x in cases.items():
        for tokens in LENGTHS:
            cells = ["{:.1g} ({:+.0e})".format(*errors(x[:tokens], way)) for way in WAYS.values()]
            lines.append(f"| {name} | {tokens} | " + " | ".join(cells) + " |")
    bounds = ["", *(f"{gram_bound(8192, *way):.1g}" for way in WAYS.values() if way)]
    lines.append("| bound | 8192 | " + " | ".join(bounds) + " |")
    for name, x in cases.items():
        cells = [f"{excess(x[:8192], way):.0e}" for way in WAYS.values()]
        lines.append(f"| error of the outputs, {name} | 8192 | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*sys.argv[1:2]))
