"""A small model of an unusual kind, trained here for some minutes: what ranks of their own are worth to it.

    python -m bench.quality.bench_trained --kind experts --seconds 180 --json experts.json

Four layers learn Python's documentation (or `--text`) by a vocabulary of 1024 pieces. `--kind experts`: 8 experts a
layer, of which 2 work for a token; `hybrid`: convolutions and attention by turns (LFM2); `mamba`: one sublayer a layer.
Printed: perplexity on other text, dense, at full rank, and at 20 and 40 % removed with uniform ranks, with `unirank`
and, of experts, with `tied` (one rank for all experts of a stack); seconds of the analysis, and the process's peak.
"""

from __future__ import annotations

import argparse
import copy
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

import unirank
from bench.support.record import write_result
from unirank.experts import count_of, expert_weight, experts_in, stacks_of
from unirank.models.low_rank import make_low_rank
from unirank.models.low_rank_experts import make_low_rank_experts
from unirank.models.structure import weight_of
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT, read_text
from unirank.types import LoadedModel

VOCABULARY = 1024
WINDOW = 128
BATCH = 8


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet)
    core.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def config_of(kind: str, layers: int, hidden: int) -> PretrainedConfig:
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers}
    common |= {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "mamba":
        return MambaConfig(**common, state_size=8)
    common |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
    common["intermediate_size"] = 2 * hidden
    if kind == "hybrid":
        turns = ["conv", "full_attention"] * layers
        return Lfm2Config(**common, layer_types=turns[:layers], block_auto_adjust_ff_dim=False)
    return MixtralConfig(
        **common, num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.02, output_router_logits=True
    )


def model_of(kind: str, layers: int, hidden: int) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(kind, layers, hidden))


def train(model: Any, tokens: torch.Tensor, seconds: float) -> tuple[int, float]:
    """Steps, and the mean loss of the last tenth of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    start = time.monotonic()
    model.train()
    while (spent := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:  # warm up, then down to a tenth
            group["lr"] = 2e-3 * min(1.0, (len(losses) + 1) / 50) * (1 - 0.9 * spent / seconds)
        first = torch.randint(0, len(tokens) - WINDOW, (BATCH,), generator=generator)
        ids = torch.stack([tokens[i : i + WINDOW] for i in first.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    last = losses[-max(1, len(losses) // 10) :]
    return len(losses), sum(last) / len(last)


@torch.no_grad()
def at_full_rank(loaded: LoadedModel) -> Any:
    """A copy whose targets, or where there are experts those, are all factors of full rank, from a float64 SVD."""
    model = copy.deepcopy(loaded.model)
    for spec in [] if any(True for _ in experts_in(model)) else loaded.linears:
        weight = weight_of(model.get_submodule(spec.name))
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        make_low_rank(model, spec.name, spec.k).set_product(u * s, v)
    for path, dense in list(experts_in(model)):
        weights = {
            name: [expert_weight(dense, name, e).double() for e in range(count_of(dense))] for name in stacks_of(dense)
        }
        ranks = {name: dict.fromkeys(range(len(own)), min(own[0].shape)) for name, own in weights.items()}
        made = make_low_rank_experts(model, path, ranks)
        for name, own in weights.items():
            factors: Any = made.factors(name)
            for expert, weight in enumerate(own):
                u, s, v = torch.linalg.svd(weight, full_matrices=False)
                factors.put(expert, u * s, v)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["experts", "hybrid", "mamba"], default="experts")
    parser.add_argument("--seconds", type=float, default=180.0, help="of training")
    parser.add_argument("--text", default=BUILTIN, help="to train and calibrate on")
    parser.add_argument("--held-out", default=BUILTIN_HELD_OUT, help="to measure on")
    parser.add_argument("--windows", type=int, default=64, help="that are measured")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.seconds, arguments.windows, arguments.layers, arguments.hidden = 1.0, 2, 2, 32
    text = read_text(arguments.text).content
    tokenizer = tokenizer_of(text)
    model = model_of(arguments.kind, arguments.layers, arguments.hidden)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    steps, loss = train(model, tokens, arguments.seconds)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters; {steps} steps of {BATCH * WINDOW} tokens, loss {loss:.3f} at the end")

    def perplexity(measured: Any) -> float:
        report = unirank.evaluate(measured, tokenizer, text=arguments.held_out, window=WINDOW, limit=arguments.windows)
        return report.perplexity

    rows: list[dict[str, Any]] = []

    def note(removed: float, ranks: str, measured: Any) -> None:
        rows.append({"removed": removed, "ranks": ranks, "perplexity": perplexity(measured)})
        print(f"{removed:4.0%}  {ranks:10}  {rows[-1]['perplexity']:10.3f}", flush=True)

    note(0.0, "dense", model)
    loaded = unirank.describe(model, tokenizer, source=arguments.kind)
    note(0.0, "full rank", at_full_rank(loaded))
    with tempfile.TemporaryDirectory(prefix="unirank-") as scratch:
        calibration = unirank.Calibration(text=arguments.text, windows=16 if arguments.quick else 128, window=WINDOW)
        start = time.monotonic()
        store = unirank.analyze(loaded, Path(scratch) / "store", calibration=calibration)
        seconds = time.monotonic() - start
        for removed in (0.2, 0.4):
            for allocator in ("uniform", "unirank", "tied")[: 3 if arguments.kind == "experts" else 2]:
                ranks = unirank.plan(store, removed, allocator=allocator)
                note(removed, allocator, unirank.apply(loaded, store, ranks, copy=True).model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"analysis {seconds:.1f} s; peak of the process {peak / 2**20:,.0f} MiB")
    meta = {"kind": arguments.kind, "parameters": size, "steps": steps, "loss": loss}
    meta |= {"analysis_seconds": seconds, "peak_bytes": peak}
    if arguments.json is not None:
        write_result(arguments.json, rows, **meta)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
