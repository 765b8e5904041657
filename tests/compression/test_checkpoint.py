"""Checkpoints: what is written, what reads it back, and what refuses to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import unirank
from tests.support.stores import contents, flip
from tests.support.tiny import build
from unirank import CompressedModel, InputError, LowRankLinear, RankPlan
from unirank.layerwise.clipping import clipped
from unirank.models.low_rank import align_weights

NAMES = ("llama", "llama-bias", "gemma3", "afm", "afm-bias")
MADE_OF = {"afm": "llama", "afm-bias": "llama-bias"}  # architectures; the others are their own, of the scheme whiten
IDS = torch.arange(2, 22)[None]
READ = """
import sys
{imports}
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        logits = model(torch.arange(2, 22)[None]).logits
    save_file({{"logits": logits}}, sys.argv[1] + "/" + path.replace("\\\\", "/").split("/")[-1] + ".safetensors")
    assert ("unirank" in sys.modules) == {known}
"""
FULL_DISK = """
import dataclasses, resource, signal, sys
from pathlib import Path
import unirank
from transformers import AutoTokenizer

model, text, work, big = sys.argv[1:]
calibration = unirank.Calibration(text=text, windows=4, window=16, batch=2)
compressed = unirank.compress(model, 0.4, calibration=calibration)
wordy = dataclasses.replace(compressed, tokenizer=AutoTokenizer.from_pretrained(big))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))  # weights fit, the word list does not
jobs = [(wordy, "fresh-words"), (wordy, "old-words")]
for job in (*jobs, None, (compressed, "fresh-weights"), (compressed, "old-weights")):
    if job is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        continue
    try:
        job[0].save(Path(work) / job[1], overwrite=True)
    except unirank.WriteError as error:
        print(job[1], error.exit_code)
"""


def compress_tiny(
    name: str, tokenizer: PreTrainedTokenizerFast, text_file: Path, remove: float, clip: float = 0
) -> CompressedModel:
    calibration = unirank.Calibration(text=str(text_file), windows=4, window=16, batch=2, clip=clip)
    scheme = "afm" if name in MADE_OF else "whiten"
    model = build(MADE_OF.get(name, name))
    return unirank.compress(model, remove, tokenizer=tokenizer, scheme=scheme, calibration=calibration)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def low_rank(model: torch.nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer, text_file) -> tuple[Path, dict[str, CompressedModel]]:
    """A folder of checkpoints, and the models they were saved from; "dense" removes nothing."""
    root = tmp_path_factory.mktemp("saved")
    made = {name: compress_tiny(name, tokenizer, text_file, 0.4) for name in NAMES}
    made["dense"] = compress_tiny("llama", tokenizer, text_file, 0)
    for name, compressed in made.items():
        compressed.save(root / name)
    return root, made


def run(source: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source, *map(str, args)], capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def read_elsewhere(saved, tmp_path_factory) -> Path:
    """Logits that a new process computes from the checkpoints after `import unirank`."""
    out = tmp_path_factory.mktemp("logits")
    source = READ.format(imports="import unirank", known=True)
    done = run(source, out, *(saved[0] / name for name in NAMES))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def read_without_unirank(saved, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The same without unirank: first the all-dense checkpoint, then a compressed one."""
    out = tmp_path_factory.mktemp("plain")
    source = READ.format(imports="", known=False)
    return out, run(source, out, saved[0] / "dense", saved[0] / "llama")


@pytest.mark.parametrize("name", NAMES)
def test_a_new_process_computes_the_same_logits_bit_for_bit(name, saved, read_elsewhere) -> None:
    assert low_rank(saved[1][name].model)
    assert torch.equal(load_file(read_elsewhere / f"{name}.safetensors")["logits"], logits_of(saved[1][name].model))


def test_without_unirank_loading_stops_with_a_shape_mismatch(read_without_unirank) -> None:
    out, done = read_without_unirank
    assert done.returncode != 0
    assert "mismatch" in done.stdout + done.stderr
    assert not (out / "llama.safetensors").exists()


def test_an_all_dense_plan_saves_a_plain_checkpoint(saved, read_without_unirank) -> None:
    root, made = saved
    assert "quantization_config" not in json.loads((root / "dense" / "config.json").read_text())
    assert torch.equal(load_file(read_without_unirank[0] / "dense.safetensors")["logits"], logits_of(build("llama")))
    before, after = build("llama").state_dict(), load_file(root / "dense" / "model.safetensors")
    assert after.keys() == before.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert made["dense"].report.low_rank == 0


def test_torch_refuses_the_weights_for_the_dense_class_even_when_not_strict(saved) -> None:
    weights = load_file(saved[0] / "llama" / "model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        build("llama").load_state_dict(weights, strict=False)


def test_a_tied_head_stays_tied_and_is_stored_once(saved) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved[0] / "llama")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with safe_open(saved[0] / "llama" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)


def test_an_untied_head_and_all_biases_are_kept(saved) -> None:
    model, dense = AutoModelForCausalLM.from_pretrained(saved[0] / "llama-bias"), build("llama-bias")
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    for name, module in low_rank(model).items():
        assert torch.equal(module.left.bias, dense.get_submodule(name).bias)


def test_afm_adds_biases_where_there_were_none_and_they_are_not_counted(saved) -> None:
    made, dense = saved[1]["afm"], build("llama")
    modules = low_rank(made.model)
    assert modules
    assert all(dense.get_submodule(name).bias is None for name in modules)
    assert all(module.left.bias.abs().max().item() > 0 for module in modules.values())
    quantization = json.loads((saved[0] / "afm" / "config.json").read_text())["quantization_config"]
    assert quantization["biased"] == list(modules)
    report, plan = made.report, made.plan
    assert report.targets_after == plan.used
    added = sum(module.out_features for module in modules.values())
    assert report.model_after == report.model_before - (plan.total - plan.used) + added


def test_afm_moves_the_biases_that_are_there(saved) -> None:
    made, dense = saved[1]["afm-bias"], build("llama-bias")
    quantization = json.loads((saved[0] / "afm-bias" / "config.json").read_text())["quantization_config"]
    assert "biased" not in quantization
    for name, module in low_rank(made.model).items():
        assert not torch.equal(module.left.bias, dense.get_submodule(name).bias)
    assert made.report.model_after == made.report.model_before - (made.plan.total - made.plan.used)


@pytest.mark.parametrize("clip", [0, 1.0])
@pytest.mark.parametrize("name", ["afm", "afm-bias"])
def test_afm_keeps_the_mean_output_of_every_linear_on_the_calibration_tokens(name, clip, tokenizer, text_file) -> None:
    """Of the tokens as the moments see them: none is longer than `clip` times the median of its batch."""
    made, dense = compress_tiny(name, tokenizer, text_file, 0.4, clip), build(MADE_OF[name])
    tokens = unirank.text.windows.tokenize(made.tokenizer, unirank.text.windows.read_text(str(text_file)), dense)
    windows = unirank.text.windows.calibration_windows(tokens, windows=4, window=16, seed=0, bos=None, name="text")
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for path in low_rank(made.model):

        def catch(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], path: str = path) -> None:
            seen.setdefault(path, []).append(clipped(args[0].flatten(0, 1), clip))

        hooks.append(dense.get_submodule(path).register_forward_pre_hook(catch))
    with torch.no_grad():
        for batch in windows.split(2):
            dense(input_ids=batch)
        for hook in hooks:
            hook.remove()
        for path, module in low_rank(made.model).items():
            x = torch.cat(seen[path])
            output = dense.get_submodule(path)(x)
            lost = (module(x) - output).double().mean(0)
            size = float(output.double().mean(0).abs().max())
            assert float(lost.abs().max()) < 1e-5 * size
            moved = module.left.bias.double() - (0 if name == "afm" else dense.get_submodule(path).bias.double())
            assert float(moved.abs().max()) > 1e-3 * size  # or the bound above would say nothing


@pytest.mark.parametrize("biased", ["model.layers.0.mlp.up_proj", 3, ["model.layers.0.mlp.nothing"], [["x"]], {"a": 1}])
def test_a_hostile_list_of_biases_is_refused(biased: object, saved, tmp_path: Path) -> None:
    folder = shutil.copytree(saved[0] / "afm", tmp_path / "hostile")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["biased"] = biased
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quantization_config\.biased"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_loading_in_bfloat16_rounds_the_factors(saved) -> None:
    loaded = low_rank(AutoModelForCausalLM.from_pretrained(saved[0] / "llama", dtype=torch.bfloat16))
    made = low_rank(saved[1]["llama"].model)
    assert loaded.keys() == made.keys()
    for name, module in loaded.items():
        assert torch.equal(module.left.weight, made[name].left.weight.bfloat16())
        assert torch.equal(module.right.weight, made[name].right.weight.bfloat16())
        assert module.weight.dtype == torch.int64
        assert module.weight.tolist() == [module.rank]


@pytest.mark.parametrize("name", NAMES)
def test_saving_a_loaded_model_again_loses_nothing(name, saved, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved[0] / name).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), logits_of(saved[1][name].model))
    for key in ("ranks", "biased"):
        wanted = getattr(saved[1][name].model.config.quantization_config, key)
        assert getattr(again.config.quantization_config, key) == wanted


def test_a_loaded_model_generates_what_the_saved_one_does(saved) -> None:
    model, tokenizer = unirank.models.loading.load_pretrained(str(saved[0] / "gemma3"), device="cpu")
    made = saved[1]["gemma3"]
    assert unirank.generate(model, tokenizer, "w1 w2", tokens=8) == unirank.generate(
        made.model, made.tokenizer, "w1 w2", tokens=8
    )


def test_gradients_reach_both_factors_of_a_loaded_model(saved) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved[0] / "llama")
    model(IDS, labels=IDS).loss.backward()
    for module in low_rank(model).values():
        assert module.left.weight.grad.abs().sum() > 0
        assert module.right.weight.grad.abs().sum() > 0


def test_the_directory_explains_itself(saved) -> None:
    folder, made = saved[0] / "llama", saved[1]["llama"]
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    ranks = {name: rank for name, rank in made.plan.ranks.items() if rank != "dense"}
    assert quantization == {"quant_method": "unirank", "ranks": ranks}
    assert RankPlan.from_json((folder / "rank_plan.json").read_text()) == made.plan
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["analysis"] == made.identity.as_dict()
    assert provenance["report"]["targets_after"] == made.plan.used
    assert "import unirank" in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"] == made.tokenizer("w1 w2")["input_ids"]


def test_saving_twice_gives_the_same_bytes(saved, tmp_path: Path) -> None:
    saved[1]["llama"].save(tmp_path / "twin")
    assert contents(tmp_path / "twin") == contents(saved[0] / "llama")


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("model.layers.0.mlp.up_proj", 0),
        ("model.layers.0.mlp.up_proj", 33),
        ("model.layers.0.mlp.up_proj", "4"),
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.up_proj", 2.5),
        ("model.layers.0.mlp.nothing", 4),
        ("model.layers.0.mlp", 4),
    ],
)
def test_a_hostile_config_is_refused_before_weights_are_read(name, rank, saved, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(saved[0] / "llama", tmp_path / "hostile")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ranks"] = {name: rank}
    (folder / "config.json").write_text(json.dumps(config))

    def read(*_: object, **__: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", read)
    with pytest.raises(InputError, match=name):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_foreign_directory_is_refused_and_untouched(saved, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="not made by unirank"):
            saved[1]["llama"].save(tmp_path / "theirs", overwrite=overwrite)
    assert contents(tmp_path) == {"theirs/thesis.txt": b"years of work"}


def test_an_own_directory_is_replaced_whole_and_only_when_asked(saved, tmp_path: Path) -> None:
    out = shutil.copytree(saved[0] / "gemma3", tmp_path / "out")
    (out / "model-00002-of-00002.safetensors").write_text("stale")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="--overwrite"):
        saved[1]["llama"].save(out)
    assert contents(tmp_path) == before
    saved[1]["llama"].save(out, overwrite=True)
    assert contents(out) == contents(saved[0] / "llama")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("harm", ["one bit", "cut", "gone"])
def test_damaged_weights_are_named(harm: str, saved, tmp_path: Path) -> None:
    out = Path(shutil.copytree(saved[0] / "llama", tmp_path / "out"))
    assert unirank.open_compressed(out, device="cpu").report == saved[1]["llama"].report
    file = out / "model.safetensors"
    if harm == "one bit":
        flip(file, 1000)
        AutoModelForCausalLM.from_pretrained(out)  # nothing else finds it
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    words = "is missing" if harm == "gone" else "has other bytes than were written"
    with pytest.raises(unirank.InputError, match=rf"out/model\.safetensors {words}"):
        unirank.open_compressed(out, device="cpu")


def test_a_full_disk_leaves_nothing_new_and_the_old_checkpoint(saved, model_dir, text_file, tmp_path: Path) -> None:
    vocabulary = {f"{i}-{'long' * 500}": i for i in range(96)} | {"<unk>": 96}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path / "big")
    work = tmp_path / "work"
    for name in ("old-words", "old-weights"):
        shutil.copytree(saved[0] / "gemma3", work / name)
    before = contents(work)
    done = run(FULL_DISK, model_dir, text_file, work, tmp_path / "big")
    assert done.stdout.split("\n")[:-1] == ["fresh-words 5", "old-words 5", "fresh-weights 5", "old-weights 5"], (
        done.stderr
    )
    assert contents(work) == before
    assert sorted(path.name for path in work.iterdir()) == ["old-weights", "old-words"]


def test_files_get_the_mode_of_the_users_umask(make_model, calibration: unirank.Calibration, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = unirank.compress(make_model(), 0.3, calibration=calibration, store=tmp_path / "store").save(
            tmp_path / "out"
        )
    finally:
        os.umask(before)
    for folder in (out, tmp_path / "store"):
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750


def test_weights_off_a_64_byte_boundary_are_moved_onto_one() -> None:
    linear = torch.nn.Linear(16, 8)
    home, values = linear.weight, linear.weight.detach().clone()
    linear.weight.data = torch.empty(8 * 16 + 1)[1:].view(8, 16).copy_(values)
    assert linear.weight.data_ptr() % 64
    align_weights(linear)
    assert linear.weight.data_ptr() % 64 == 0
    assert linear.weight is home  # tied modules hold the same object
    assert torch.equal(linear.weight, values)
