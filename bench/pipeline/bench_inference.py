"""How fast the result is: prefill and decode of a compressed model in every form, against the dense one.

    python -m bench.pipeline.bench_inference --json inference.json --markdown docs/inference.md

Factors and pivoted (see `unirank.LowRankLinear`) have equally many parameters, so the pivoted form has the higher
ranks. Same map is what the pivoted form computes, from two factors: equal error, more parameters, and dense where they
would be as many. Fused is a form after `unirank.fuse`: one product for the down-projections that share an input.
Densified is the pivoted model with its products multiplied out.

Uniform ranks at every removed fraction, on SmolLM2-135M's shape and on a wide Llama (hidden 2048); weights are random,
for speed does not depend on them. `allowed` is the ratio of the parameters that a token passes through, `lm_head`
included: what the compressed model could gain if it were bound by reading weights alone (small batches), or by
arithmetic alone (large ones).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.support.record import write_result
from bench.support.timing import compare, device_of, op_parser, row, show
from unirank.compression.densified import densify
from unirank.disk.files import write_text
from unirank.models.fused import fuse
from unirank.models.low_rank import make_low_rank
from unirank.models.structure import find_linears
from unirank.planning.allocator.targets import uniform_rank
from unirank.provenance import device_name
from unirank.types import Form

FORMS = ("factors", "factors, fused", "pivoted", "pivoted, fused", "same map", "densified")
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "wide": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    },
}


def dense_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], max_position_embeddings=4096, tie_word_embeddings=True)
    model: Any = LlamaForCausalLM(config)
    return model.to(device, dtype).eval()


@torch.no_grad()
def compressed_model(dense: Any, remove: float, *, ranks_of: Form, form: Form) -> tuple[Any, int]:
    """A copy with random factors of the uniform rank of `ranks_of`, stored in `form`, and its linears' parameters."""
    model, used = copy.deepcopy(dense), 0
    generator = torch.Generator().manual_seed(0)
    for spec in find_linears(model)[1]:
        rank = uniform_rank(spec, remove, ranks_of)
        left = torch.randn(spec.m, rank, generator=generator) * rank**-0.5
        right = torch.randn(rank, spec.n, generator=generator) * spec.n**-0.5
        used += spec.rank_cost(rank, form)
        if rank < spec.dense_rank(form):
            make_low_rank(model, spec.name, rank, form=form).set_product(left, right)
        else:
            linear = model.get_submodule(spec.name)
            linear.weight.copy_(left @ right)
    return model, used


def cache_of(model: nn.Module, output: Any) -> dict[str, Any]:
    """The argument that gives the cache of `output` to the next call; `past_key_values` before transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: getattr(output, name)}


@torch.no_grad()
def check(compressed: nn.Module, others: Sequence[nn.Module], ids: torch.Tensor, dtype: torch.dtype) -> None:
    """All give the same logits, and decoding with the cache those of the whole."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    whole = compressed(ids).logits.float()
    for other in others:
        torch.testing.assert_close(other(ids).logits.float(), whole, rtol=tolerance, atol=tolerance)
    first = compressed(ids[:, :-1], use_cache=True)
    last = compressed(ids[:, -1:], **cache_of(compressed, first)).logits[:, -1].float()
    torch.testing.assert_close(last, whole[:, -1], rtol=tolerance, atol=tolerance)


def prefill(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    """Every token's hidden state, and the logits of the last one, as `generate` begins."""

    def run() -> object:
        with torch.inference_mode():
            return model(ids, use_cache=True, logits_to_keep=1)

    return run


def decode(model: nn.Module, ids: torch.Tensor, steps: int) -> Callable[[], object]:
    """`steps` tokens one by one behind a short prompt."""

    def run() -> object:
        with torch.inference_mode():
            out = model(ids[:, :8], use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            for _ in range(steps):
                out = model(token, logits_to_keep=1, **cache_of(model, out))
                token = out.logits[:, -1:].argmax(-1)
            return token

    return run


def main(argv: Sequence[str] | None = None) -> int:
    parser = op_parser(__doc__)
    parser.add_argument("--remove", nargs="+", type=float, default=[0.2, 0.4, 0.6])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args(argv)
    device, dtype = device_of(arguments), getattr(torch, arguments.dtype)
    names = arguments.models or (["tiny"] if arguments.quick else ["smollm2-135m", "wide"])
    length, steps = (16, 2) if arguments.quick else (128, 16)
    rows: list[dict[str, Any]] = []
    for name in names:
        dense = dense_model(name, device, dtype)
        linears = find_linears(dense)[1]
        total, head = sum(spec.params for spec in linears), dense.lm_head.weight.numel()
        for remove in arguments.remove:
            made: dict[str, tuple[Any, int]] = {
                "factors": compressed_model(dense, remove, ranks_of="factors", form="factors"),
                "pivoted": compressed_model(dense, remove, ranks_of="pivoted", form="pivoted"),
                "same map": compressed_model(dense, remove, ranks_of="pivoted", form="factors"),
            }
            for form in ("factors", "pivoted"):
                fused = copy.deepcopy(made[form][0])
                fuse(fused)
                made[f"{form}, fused"] = fused, made[form][1]
            made["densified"] = densify(copy.deepcopy(made["pivoted"][0])), total
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, dense.config.vocab_size, (max(arguments.batch), length), generator=generator)
            ids = ids.to(device)
            check(made["factors"][0], [made["factors, fused"][0]], ids[:1], dtype)
            alike = [made[form][0] for form in ("pivoted, fused", "same map", "densified")]
            check(made["pivoted"][0], alike, ids[:1], dtype)
            for batch in arguments.batch:
                part = ids[:batch]
                for phase, count in (("prefill", part.numel()), ("decode", batch * steps)):

                    def timed(model: nn.Module, *, phase: str = phase, part: torch.Tensor = part) -> Any:
                        return prefill(model, part) if phase == "prefill" else decode(model, part, steps)

                    for form in FORMS:
                        model, used = made[form]
                        times = compare(timed(model), timed(dense), arguments.repeats, device)
                        # lm_head sees one token a sequence in prefill, every token in decode.
                        share = head / length if phase == "prefill" else head
                        allowed = (total + share) / (used + share)
                        more = {"model": name, "form": form, "remove": remove, "phase": phase, "batch": batch}
                        more |= {"allowed": allowed, "tokens": count}
                        shape = f"{name}, {remove:.0%} removed, batch {batch}"
                        one = row(f"{phase} {form}", shape, arguments.dtype, "dense", *times, **more)
                        one |= {"tokens_per_second": count / one["seconds"]}
                        one |= {"dense_tokens_per_second": count / one["baseline_seconds"]}
                        rows.append(one)
    show(rows, device)
    for one in rows:
        print(
            f"{one['shape']}, {one['phase']} {one['form']}: {one['tokens_per_second']:.0f} tokens/s, "
            f"dense {one['dense_tokens_per_second']:.0f}, ratio {one['ratio']:.2f}, allowed {one['allowed']:.2f}"
        )
    write_result(arguments.json, rows, device=device, seed=0)
    if arguments.markdown is not None:
        write_text(arguments.markdown, markdown(rows, arguments.dtype, device))
    return 0


def markdown(rows: Sequence[dict[str, Any]], dtype: str, device: torch.device) -> str:
    """Tokens a second and their ratio to the dense model's, one table a model and phase."""
    lines = [
        "# Speed of the result",
        "",
        f"Made by `python -m bench.pipeline.bench_inference`, do not edit. {dtype}, {device_name(device)}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads; uniform ranks, random weights, for speed does not "
        "depend on them. *wide* is a Llama of four layers with hidden size 2048 and a vocabulary of 8192.",
        "",
        "Tokens a second, and how many times as fast as the dense model: the median of turns in pairs, which is not "
        "quite the quotient of the two columns. Prefill reads 128 tokens a sequence, decode writes 16. Allowed: the "
        "ratio of the parameters that a token passes through; `lm_head` counts for every token in decode, for one of a "
        "sequence in prefill. Factors and pivoted have equally many parameters; same map is what the pivoted form "
        "computes, from two factors (equal error), dense where those would be as many; fused after `unirank.fuse`, one "
        "product for the projections that share an input.",
    ]
    for model, phase in dict.fromkeys((one["model"], one["phase"]) for one in rows):
        lines += [
            "",
            f"## {model}, {phase}",
            "",
            f"| removed | batch | dense | {' | '.join(FORMS)} | allowed |",
        ]
        lines.append("|---" * (len(FORMS) + 4) + "|")
        chosen = [one for one in rows if (one["model"], one["phase"]) == (model, phase)]
        for remove, batch in dict.fromkeys((one["remove"], one["batch"]) for one in chosen):
            forms = {one["form"]: one for one in chosen if (one["remove"], one["batch"]) == (remove, batch)}
            first = forms["factors"]
            cells = [f"{remove:.0%}", str(batch), f"{first['dense_tokens_per_second']:,.0f}"]
            cells += [f"{one['tokens_per_second']:,.0f} ({one['ratio']:.2f}x)" for one in forms.values()]
            lines.append(f"| {' | '.join(cells)} | {first['allowed']:.2f}x |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
