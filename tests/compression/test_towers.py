"""A model with a vision tower, from the analysis to the checkpoint and back: only its text decoder is compressed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig

import unirank
from bench.quality import bench_towers
from tests.support import towers
from tests.support.command_line import Run
from tests.support.every_decoder import tiny_config
from unirank.compression.checkpoint import CompressedModel
from unirank.compression.densified import save_dense
from unirank.models.low_rank import LowRankLinear
from unirank.types import LoadedModel

pytestmark = pytest.mark.filterwarnings("ignore::unirank.UnirankWarning")  # of few tokens
IDS = torch.arange(2, 26)[None]
KINDS = sorted(towers.CONFIGS)


@dataclass(frozen=True)
class Made:
    dense: Path
    store: Path
    out: Path
    compressed: CompressedModel


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> unirank.Calibration:
    return unirank.Calibration(text=str(text_file), windows=6, window=24, batch=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, calibration: unirank.Calibration) -> Callable[[str], Made]:
    """`made("llava")`: a checkpoint, its analysis, and what was made of it at 30 %; once for each type."""
    root, known = tmp_path_factory.mktemp("towers"), {}

    def make(kind: str) -> Made:
        if kind not in known:
            dense, store, out = (root / f"{kind}-{what}" for what in ("dense", "store", "out"))
            towers.save_dense(kind, dense)
            compressed = unirank.compress(dense, 0.3, calibration=calibration, store=store, device="cpu")
            compressed.save(out)
            known[kind] = Made(dense, store, out, compressed)
        return known[kind]

    return make


def processor_of(kind: str, folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder) if kind in towers.PROCESSED else None


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_found_and_sees_text_as_the_whole_model_does(kind: str, made: Callable[[str], Made]) -> None:
    loaded = unirank.load(made(kind).dense, device="cpu")
    assert type(loaded.model) is type(AutoModelForImageTextToText.from_pretrained(made(kind).dense))
    assert loaded.layers == "model.language_model.layers"
    assert {spec.sublayer for spec in loaded.linears} == {"attention", "mlp"}
    inside = sum(spec.params for spec in loaded.linears)
    assert 2 * inside < sum(p.numel() for p in loaded.model.model.parameters())  # the tower is larger
    with torch.no_grad():
        seen = loaded.model.base_model(input_ids=IDS).last_hidden_state  # what calibration runs
        assert torch.equal(seen, loaded.model.get_decoder()(input_ids=IDS).last_hidden_state)
        whole = loaded.model(input_ids=IDS, output_hidden_states=True)
        assert torch.equal(seen, whole.hidden_states[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_image_and_text_in_text_out_and_towers_as_they_were(kind: str, made: Callable[[str], Made]) -> None:
    one = made(kind)
    model: Any = AutoModelForImageTextToText.from_pretrained(one.out)
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) > 5
    inputs = towers.look(kind, processor_of(kind, one.out))
    given = towers.look(kind, processor_of(kind, one.dense))
    assert all(torch.equal(inputs[name], given[name]) for name in given)
    found = logits(model, inputs)
    assert found.isfinite().all()
    assert torch.equal(found, logits(one.compressed.model, inputs))
    assert not torch.equal(found, logits(model, inputs | {"pixel_values": inputs["pixel_values"] / 2}))
    length = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == length + 4

    before, after = (load_file(folder / "model.safetensors") for folder in (one.dense, one.out))
    compressed = {name.rpartition(".left.")[0] for name in after if ".left." in name}
    whole = [name for name in before if name.rpartition(".")[0] not in compressed]
    assert sum("vision" in name or "visual" in name for name in whole) > 20
    assert not any("vision" in name or "visual" in name for name in compressed)
    assert all(torch.equal(before[name], after[name]) for name in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_checkpoint(kind: str, made: Callable[[str], Made]) -> None:
    one = made(kind)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (one.dense, one.out))
    assert after["architectures"] == before["architectures"]
    names = [path.name for path in one.dense.iterdir() if "processor" in path.name]
    assert names
    assert all((one.dense / name).read_bytes() == (one.out / name).read_bytes() for name in names)
    if kind in towers.PROCESSED:
        assert type(processor_of(kind, one.out)) is type(processor_of(kind, one.dense))
    card = (one.out / "README.md").read_text()
    assert "AutoModelForImageTextToText, AutoProcessor" in card
    assert "pipeline_tag: image-text-to-text" in card


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_rank_that_its_matrices_have_it_is_the_dense_model(
    kind: str, made: Callable[[str], Made], calibration: unirank.Calibration, tmp_path: Path
) -> None:
    loaded = unirank.describe(towers.build(kind), towers.make_tokenizer())
    for spec in loaded.linears:
        u, s, v = torch.linalg.svd(spec.stored_in(loaded.model).detach(), full_matrices=False)
        spec.stored_in(loaded.model).data.copy_((u[:, :8] * s[:8]) @ v[:8])
    inputs = towers.look(kind, processor_of(kind, made(kind).dense))
    dense = logits(loaded.model, inputs)
    ranks = {spec.name: 8 for spec in loaded.linears}
    out = unirank.compress(loaded, ranks=ranks, calibration=calibration).save(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == len(ranks)
    torch.testing.assert_close(logits(model, inputs), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_it_has_the_same_bytes(
    kind: str, made: Callable[[str], Made], calibration: unirank.Calibration, tmp_path: Path
) -> None:
    one = made(kind)
    streamed = unirank.compress(one.dense, 0.3, calibration=calibration, store=one.store, device="cpu", stream=True)
    streamed.save(tmp_path / "out")
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (one.out / weights).read_bytes()


@pytest.mark.parametrize("stream", [False, True])
def test_densified_it_is_a_plain_model_with_its_towers(
    stream: bool, made: Callable[[str], Made], tmp_path: Path
) -> None:
    one = made("gemma3")
    opened = unirank.open_compressed(one.out, device="cpu", stream=stream)
    plain = unirank.densify(opened.model, pages=opened.pages)
    save_dense(replace(opened, model=plain), tmp_path / "plain")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
    configs = {type(model.config.vision_config), type(model.config.text_config), type(model.config)}
    assert {type(module.config) for module in plain.modules() if hasattr(module, "config")} == configs
    inputs = towers.look("gemma3", AutoProcessor.from_pretrained(tmp_path / "plain"))
    torch.testing.assert_close(logits(model, inputs), logits(one.compressed.model, inputs), rtol=1e-4, atol=1e-4)


def test_it_is_evaluated_generates_and_is_trained_further(
    made: Callable[[str], Made], calibration: unirank.Calibration, text_file: Path, tmp_path: Path
) -> None:
    """Healed and tuned on text alone; nothing outside the low-rank linears changes."""
    one = made("llava")
    opened = unirank.open_compressed(one.out, device="cpu")
    report = opened.evaluate(text_file, window=24, limit=2)
    assert report == one.compressed.evaluate(text_file, window=24, limit=2)
    assert opened.generate("w3 w4", tokens=3)
    tower = {name: tensor.clone() for name, tensor in opened.model.state_dict().items() if "vision" in name}
    settings = unirank.Heal(passes=1)
    healed = unirank.heal(opened, calibration, settings, work=tmp_path / "healing", against=one.dense)
    tuned = unirank.finetune(
        healed, str(text_file), unirank.Finetune(steps=1, batch=2, window=16), work=tmp_path / "tuning"
    )
    assert not hasattr(tuned.model.config, "use_cache")  # which only the text's part has
    state = tuned.model.state_dict()
    assert tower
    assert all(torch.equal(tensor, state[name]) for name, tensor in tower.items())
    again = AutoModelForImageTextToText.from_pretrained(tuned.save(tmp_path / "out"))
    assert logits(again, towers.look("llava", processor_of("llava", tmp_path / "out"))).isfinite().all()


def test_a_model_in_memory_comes_with_its_processor(calibration: unirank.Calibration, tmp_path: Path) -> None:
    loaded = unirank.describe(towers.build("llava"), towers.make_processor("llava"))
    out = unirank.compress(loaded, 0.3, calibration=calibration).save(tmp_path / "out")
    assert type(AutoProcessor.from_pretrained(out)).__name__ == "LlavaProcessor"


def test_commands_open_it_by_themselves(made: Callable[[str], Made], run_unirank: Run, text_file: Path) -> None:
    one = made("qwen2_5_vl")
    code, said, err = run_unirank(
        "compress", one.dense, "-r", 0.3, "-o", one.out.with_name("out"), "--store", one.store, "--device", "cpu"
    )
    assert code == 0, err
    assert "AutoModelForImageTextToText.from_pretrained" in said
    asked = ("--against", one.dense, "--text", text_file, "--window", 24, "--limit", 2, "--device", "cpu")
    code, said, err = run_unirank("eval", one.out.with_name("out"), *asked, "--no-speed")
    assert code == 0, err


def test_the_text_alone_opens_where_transformers_has_a_class_for_it(
    calibration: unirank.Calibration, tmp_path: Path
) -> None:
    """Qwen 3.5 has two classes for one type: what `architectures` names is taken, here and there."""
    torch.manual_seed(0)
    config = tiny_config("qwen3_5")
    tokenizer = towers.make_tokenizer()
    for auto, name in ((AutoModelForImageTextToText, "whole"), (AutoModelForCausalLM, "text")):
        auto.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    assert unirank.load(tmp_path / "text", device="cpu").layers == "model.layers"
    loaded = unirank.load(tmp_path / "whole", device="cpu")
    assert loaded.layers == "model.language_model.layers"
    loaded = unirank.describe(loaded.model, tokenizer)  # for transformers exchanges the tokenizer of this type
    compressed = unirank.compress(loaded, 0.3, calibration=calibration)
    compressed.save(tmp_path / "out")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    assert torch.equal(logits(text, {"input_ids": IDS}), logits(compressed.model, {"input_ids": IDS}))


def refused(folder: Path, said: str, streams: Sequence[bool] = (False, True)) -> None:
    towers.make_tokenizer().save_pretrained(folder)
    for stream in streams:
        with pytest.raises(unirank.InputError, match=rf"^[^\n]*{said}[^\n]*\.$"):
            unirank.load(folder, device="cpu", stream=stream)


def test_an_encoder_beside_the_decoder_is_refused(tmp_path: Path) -> None:
    tiny_config("t5gemma2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path, "writes text by an encoder and a decoder")


def test_a_model_without_text_is_refused(tmp_path: Path) -> None:
    CLIPVisionConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path, "no causal language model .AutoModelForCausalLM, or AutoModelForImageTextToText")


def test_a_model_that_reads_no_text_without_an_image_is_refused(tmp_path: Path) -> None:
    AutoModelForImageTextToText.from_config(tiny_config("blip-2")).save_pretrained(tmp_path)
    refused(tmp_path, "reads pixel_values, not token ids", streams=[False])


def test_layers_that_only_run_with_images_are_refused(calibration: unirank.Calibration) -> None:
    config = tiny_config("mllama")
    config.text_config.cross_attention_layers = [1]
    model = AutoModelForImageTextToText.from_config(config).eval()
    loaded: LoadedModel = unirank.describe(model, towers.make_tokenizer())
    with pytest.raises(unirank.InputError, match=r"does not call every layer of model\.language_model\.layers once"):
        unirank.compress(loaded, 0.3, calibration=calibration)


def test_the_bench_of_pictures_runs(tmp_path: Path) -> None:
    """It also compares the towers of what it makes with the dense ones."""
    assert bench_towers.main(["--quick", "--presets", "unirank", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["removed"] for row in rows] == [0.0, 0.1, 0.2, 0.3]
