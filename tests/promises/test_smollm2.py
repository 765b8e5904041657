"""The main job on the real SmolLM2-135M: small calibration, real weights, real text, a real second process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unirank
from unirank.analysis.store import AnalysisStore
from unirank.models.low_rank import count_target
from unirank.types import LoadedModel

pytestmark = pytest.mark.smollm2
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def store(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> AnalysisStore:
    # Without clipping: the figures here are compared with the papers' moment.
    calibration = unirank.Calibration(windows=16, window=128, batch=8, clip=0)
    return unirank.analyze(
        unirank.load(smollm2, device="cpu"), tmp_path_factory.mktemp("s") / "store", calibration=calibration
    )


def compressed(smollm2: str, store: AnalysisStore, remove: float, allocator: str) -> unirank.CompressedModel:
    plan = unirank.plan(store, remove, allocator=allocator)
    return unirank.apply(unirank.load(smollm2, device="cpu"), store, plan)


def perplexity(model: unirank.CompressedModel | LoadedModel) -> float:
    return unirank.evaluate(model.model, model.tokenizer, window=512, limit=2).perplexity


def test_the_targets_are_the_210_linears_of_30_layers(smollm2: str) -> None:
    loaded = unirank.load(smollm2, device="cpu")
    assert len(loaded.linears) == 210
    assert loaded.layer_count == 30
    assert sum(spec.params for spec in loaded.linears) == 106_168_320


def test_the_first_sublayers_show_the_outlier_channels(store: AnalysisStore) -> None:
    first = store.cosines()[0]
    assert first["mlp"].mean < 0.2 < first["attention"].mean
    assert store.cosines()[12]["mlp"].mean > 0.95


def test_unirank_beats_uniform_at_an_equal_budget_counted_from_the_modules(smollm2: str, store: AnalysisStore) -> None:
    results = {}
    for allocator in ("unirank", "uniform"):
        model = compressed(smollm2, store, 0.2, allocator)
        names = model.plan.ranks
        recount = sum(count_target(model.model.get_submodule(name)) for name in names)
        assert recount == model.plan.used <= model.plan.budget == 84_934_656
        results[allocator] = perplexity(model)
    assert results["unirank"] < results["uniform"]


def cholesky_whitening(loaded: LoadedModel, windows: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """SVD-LLM as its paper writes it, with nothing of ours: `U sigma` and `Vᵀ S⁻¹` of every linear, `S Sᵀ = Σ x xᵀ`."""
    linears = {
        name: module
        for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    moments: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(_module: object, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, 1).double()
            moments[name] = moments.get(name, 0) + x.T @ x

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    for ids in windows:
        loaded.model(ids[None])
    for handle in handles:
        handle.remove()
    factors = {}
    for name, module in linears.items():
        s = torch.linalg.cholesky(moments.pop(name))
        u, sigma, vt = torch.linalg.svd(module.weight.double() @ s, full_matrices=False)
        factors[name] = u * sigma, torch.linalg.solve_triangular(s, vt, upper=False, left=False)
    return factors


@torch.no_grad()
def test_whiten_at_uniform_ranks_has_the_perplexity_of_cholesky_whitening(smollm2: str, store: AnalysisStore) -> None:
    reference = unirank.load(smollm2, device="cpu")
    factors = cholesky_whitening(reference, unirank.make_workbench(reference, store).windows)
    for remove in (0.2, 0.4):
        for name, (left, right) in factors.items():
            weight = reference.model.get_submodule(name).weight
            m, n = weight.shape
            rank = int((1 - remove) * m * n / (m + n))
            weight.copy_(left[:, :rank] @ right[:rank])
        expected = perplexity(reference)
        assert perplexity(compressed(smollm2, store, remove, "uniform")) == pytest.approx(expected, rel=0.005)


def test_nothing_removed_is_the_dense_model_bit_for_bit(smollm2: str, store: AnalysisStore) -> None:
    model = compressed(smollm2, store, 0.0, "unirank").model
    dense = unirank.load(smollm2, device="cpu").model
    for (name, a), (other, b) in zip(model.state_dict().items(), dense.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


LOAD = """
import sys
{importing}
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = AutoTokenizer.from_pretrained(sys.argv[1])({prompt!r}, return_tensors="pt").input_ids
assert model.lm_head.weight is model.model.embed_tokens.weight
with torch.no_grad():
    save_file({{"logits": model(ids).logits}}, sys.argv[2])
"""


def test_another_process_gets_the_same_logits_and_none_without_unirank(
    smollm2: str, store: AnalysisStore, tmp_path: Path
) -> None:
    model = compressed(smollm2, store, 0.4, "unirank")
    out = model.save(tmp_path / "out")
    logits = tmp_path / "logits.safetensors"
    code = LOAD.format(importing="import unirank", prompt=PROMPT)
    subprocess.run([sys.executable, "-c", code, out, logits], check=True)
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(load_file(logits)["logits"], model.model(ids).logits)
    without = LOAD.format(importing="", prompt=PROMPT)
    result = subprocess.run([sys.executable, "-c", without, out, logits], capture_output=True, text=True)
    assert result.returncode != 0
    assert "mismatch" in result.stderr


def test_a_target_holds(smollm2: str, store: AnalysisStore) -> None:
    target = unirank.Target(max_perplexity_increase=0.5, window=512, limit=2, evaluations=3)
    made = unirank.compress(smollm2, target=target, store=store.path, device="cpu")
    dense = perplexity(unirank.load(smollm2, device="cpu"))
    assert made.plan.remove > 0.01
    assert perplexity(made) == made.evaluations[0]["report"]["perplexity"] <= 1.5 * dense
