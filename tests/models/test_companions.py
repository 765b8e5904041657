"""What belongs to a checkpoint goes into all that is made of it; weights, pickles, code and what is private do not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import unirank
from tests.support.tiny import build
from unirank.compression.card import EVALUATIONS_FILE, PLAN_FILE, PROVENANCE_FILE
from unirank.compression.densified import densify, save_dense
from unirank.models.companions import read_companions, write_companions

OF_THE_TOKENIZER = (
    "tokenizer.model",
    "tokenizer.model.v3",
    "sentencepiece.bpe.model",
    "spiece.model",
    "source.spm",
    "qwen.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
OTHERS = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "LICENSE",
    "LICENSE.txt",
    "Notice.md",
    "USE_POLICY.md",
)
NEVER = (
    "pytorch_model.bin",
    "consolidated.00.pth",
    "model.gguf",
    "model.onnx",
    "pytorch_model.bin.index.json",
    "params.json",
    "trainer_state.json",
    "credentials.json",
    "my-records.json",
    "quantize_config.json",
    "optimizer.pt",
    "word2vec.model",
    "data.txt",
    "notes.md",
    "picture.png",
    "modeling_own.py",
    ".env",
    ".private.json",
    "two words.json",
    "onnx/config.json",
    "original/tokenizer.model",
    EVALUATIONS_FILE,
)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"of {name}")


@pytest.fixture
def source(model_dir: Path) -> Path:
    """A checkpoint with all of these beside its weights."""
    put(model_dir, *OF_THE_TOKENIZER, *OTHERS, *NEVER)
    (model_dir / "added_tokens.json").write_text("{}")
    (model_dir / "special_tokens_map.json").write_text("{}")
    (model_dir / "chat_template.json").write_text("{}")
    return model_dir


def carried(folder: Path) -> set[str]:
    return {name for name in (*OF_THE_TOKENIZER, *OTHERS, *NEVER) if (folder / name).is_file()}


@pytest.mark.parametrize("stream", [False, True])
def test_they_go_into_what_is_compressed_densified_healed_and_tuned(
    stream: bool, source: Path, calibration: unirank.Calibration, text_file: Path, tmp_path: Path
) -> None:
    expected = {*OF_THE_TOKENIZER, *OTHERS}
    out = unirank.compress(source, 0.3, calibration=calibration, stream=stream, device="cpu").save(tmp_path / "out")
    dense = shutil.copytree(source, tmp_path / "dense-model")
    shutil.rmtree(source)  # what is made of the checkpoint does not depend on it
    opened = unirank.open_compressed(out, stream=stream, device="cpu")
    densify(opened.model, pages=opened.pages)
    made = [out, save_dense(opened, tmp_path / "dense")]
    if not stream:
        settings = unirank.Heal(passes=1)
        healed = unirank.heal(out, calibration, settings, work=tmp_path / "heal", against=dense, device="cpu")
        short = unirank.Finetune(steps=1, batch=2, window=24)
        made.append(healed.save(tmp_path / "healed"))
        made.append(unirank.finetune(made[-1], str(text_file), short, work=tmp_path / "t").save(tmp_path / "tuned"))
    for folder in made:
        assert carried(folder) == expected, folder
        for name in ("tokenizer.model", "1_Pooling/config.json", "LICENSE"):
            assert (folder / name).read_text() == f"of {name}"
        assert AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"] == [3, 4]
        assert "of README" not in (folder / "config.json").read_text()


def test_what_transformers_and_we_write_is_never_replaced(source: Path, calibration, tmp_path: Path) -> None:
    put(source, "README.md", PLAN_FILE, PROVENANCE_FILE)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.5}))
    out = unirank.compress(source, 0.3, calibration=calibration, device="cpu").save(tmp_path / "out")
    assert unirank.open_compressed(out, device="cpu").plan.used > 0
    assert "Compressed by unirank" in (out / "README.md").read_text()
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5


def test_a_model_in_memory_has_those_of_where_it_was_loaded_from(
    source: Path, tokenizer: PreTrainedTokenizerFast, calibration, tmp_path: Path
) -> None:
    model, own = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    out = unirank.compress(model, 0.3, tokenizer=own, calibration=calibration, copy=True).save(tmp_path / "own")
    assert carried(out) == {*OF_THE_TOKENIZER, *OTHERS}
    # Another tokenizer: the files of the old one would contradict it.
    out = unirank.compress(model, 0.3, tokenizer=tokenizer, calibration=calibration).save(tmp_path / "other")
    assert carried(out) == set(OTHERS)
    assert unirank.describe(build("llama"), tokenizer).companions is None


def test_another_tokenizer_than_the_loaded_one_goes_without_the_files(source: Path, tokenizer, tmp_path: Path) -> None:
    loaded = unirank.load(source, device="cpu")
    (tmp_path / "out").mkdir()
    write_companions(dataclasses.replace(loaded, tokenizer=tokenizer).companions, tmp_path / "out", tokenizer)
    assert carried(tmp_path / "out") == set(OTHERS)


def test_code_goes_along_only_where_it_is_trusted(source: Path) -> None:
    own = AutoTokenizer.from_pretrained(source)
    assert "modeling_own.py" not in read_companions(source, own).files
    assert "modeling_own.py" in read_companions(source, own, trust_remote_code=True).files


def test_pickles_under_other_names_and_large_files_stay(source: Path, tokenizer, monkeypatch) -> None:
    (source / "tokenizer.model").write_bytes(b"\x80\x04\x95 a pickle")
    (source / "vocab.json").write_bytes(b"PK\x03\x04 an archive of torch")
    monkeypatch.setattr("unirank.models.companions._LARGEST", 10)
    (source / "spiece.model").write_text("of 11 bytes")
    (source / "source.spm").write_text("of 10 byte")
    found = read_companions(source, tokenizer).tokenizer
    assert "source.spm" in found
    assert not {"tokenizer.model", "vocab.json", "spiece.model"} & found.keys()


def test_a_link_out_of_the_checkpoint_is_not_followed(source: Path, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("a private key")
    for name in ("LICENSE", "added_tokens.json"):
        (source / name).unlink()
        (source / name).symlink_to(tmp_path / "secret" / "config.json")
    (source / "2_Dense").symlink_to(tmp_path / "secret")
    (source / "COPYING").symlink_to("LICENSE.txt")  # stays inside
    found = read_companions(source, tokenizer)
    assert not any(b"private" in content for content in (*found.files.values(), *found.tokenizer.values()))
    assert found.files["COPYING"] == b"of LICENSE.txt"


def test_modules_with_weights_stay_and_what_names_them(source: Path, tokenizer) -> None:
    put(source, "2_Dense/config.json", "2_Dense/model.safetensors")
    found = read_companions(source, tokenizer).files
    assert "1_Pooling/config.json" in found
    assert not {"modules.json", "2_Dense/config.json", "2_Dense/model.safetensors"} & found.keys()


def test_a_model_of_the_hub(source: Path, calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its cache every file is a link to a blob; without a network the cache is all there is."""
    home, commit = tmp_path / "hub", "0" * 40
    repository = home / "models--some--model"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        blob = repository / "blobs" / file.relative_to(source).as_posix().replace("/", "--")
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
    out = unirank.compress("some/model", 0.3, calibration=calibration, device="cpu").save(tmp_path / "out")
    assert carried(out) == {*OF_THE_TOKENIZER, *OTHERS}
    assert not any(file.is_symlink() for file in out.rglob("*"))
