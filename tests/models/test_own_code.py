"""A model with modelling code of its own: every function and command opens it where that is asked for, never else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers.dynamic_module_utils

import unirank
from tests.support.command_line import Run
from tests.support.tiny import build

CONFIGURATION = """from transformers import LlamaConfig
open({ran!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELLING = """from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
SAID = r"brings code of its own \(trust_remote_code\), which is not run unless that is asked for"


@dataclass(frozen=True)
class Made:
    """A model that brings code, what was made of it, and the file that its code writes when it runs."""

    dense: Path
    store: Path
    small: Path
    text: Path
    ran: Path


@pytest.fixture(scope="module")
def made(tokenizer: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("own")
    dense, ran = folder / "dense", folder / "ran"
    build("llama").save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": MAP}
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "configuration_own.py").write_text(CONFIGURATION.format(ran=str(ran)))
    (dense / "modeling_own.py").write_text(MODELLING)
    calibration = unirank.Calibration(text=str(text_file), windows=6, window=24, batch=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        arguments: dict[str, Any] = {"calibration": calibration, "device": "cpu", "trust_remote_code": True}
        unirank.compress(dense, 0.3, store=folder / "store", **arguments).save(folder / "small")
        assert ran.exists()
        yield Made(dense, folder / "store", folder / "small", text_file, ran)
        forget(ran)


def forget(ran: Path) -> None:
    """As if the code had never run: it would run again, and tell."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    ran.unlink(missing_ok=True)


COMMANDS = {
    "analyze": "analyze {dense} -o {out} --calib {text} --windows 4 --window 24",
    "analyze, dry": "analyze {dense} -o {out} --calib {text} --windows 4 --window 24 --dry-run",
    "plan": "plan {store} -r 0.3 --allocator lems --set windows=1 --set tokens=8 --against {dense} --calib {text}",
    "compress": "compress {dense} -o {out} -r 0.3 --store {store}",
    "compress, streamed": "compress {dense} -o {out} -r 0.3 --store {store} --stream",
    "eval": "eval {small} --against {dense} --text {text} --window 24 --limit 2",
    "report": "report {small} -o {out} --against {dense} --prompt w1",
    "heal": "heal {small} -o {out} --calib {text} --windows 4 --window 24 --passes 1",
    "finetune": "finetune {small} --text {text} -o {out} --steps 1 --window 24 --batch 2 --distill 0.5",
    "densify": "densify {small} -o {out}",
    "diagnose": "diagnose {store} --against {dense} --calib {text} --windows 2 --permutations 9",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs_the_code_only_where_asked(name: str, made: Made, run_unirank: Run, tmp_path: Path) -> None:
    places = {"dense": made.dense, "store": made.store, "small": made.small, "text": made.text, "out": tmp_path / "out"}
    if name == "finetune":
        pytest.importorskip("peft")
    command = [word.format(**places) for word in COMMANDS[name].split()] + ["--device", "cpu"]
    forget(made.ran)
    code, _, err = run_unirank(*command)
    assert code == 2
    assert "brings code of its own (trust_remote_code), which is not run unless that is asked for" in err
    assert "pass --trust-remote-code where you trust it." in err
    assert not made.ran.exists()
    assert not (tmp_path / "out").exists()
    code, _, err = run_unirank(*command, "--trust-remote-code")
    assert code == 0, err
    assert made.ran.exists()


def test_every_function_takes_the_argument_and_says_so_without(made: Made, tmp_path: Path) -> None:
    refused: list[Any] = [
        lambda: unirank.load(made.dense),
        lambda: unirank.load(made.dense, stream=True),
        lambda: unirank.open_compressed(made.small),
        lambda: unirank.open_compressed(made.small, stream=True),
        lambda: unirank.heal(made.small, work=tmp_path / "work"),
        lambda: unirank.finetune(made.small, str(made.text), work=tmp_path / "work"),
        lambda: unirank.write_report(made.small, tmp_path / "page.html", against=str(made.dense)),
        lambda: unirank.analyze(made.dense, tmp_path / "store"),
        lambda: unirank.dry_run(made.dense, tmp_path / "store"),
        lambda: unirank.plan(made.store, 0.3, allocator="lems", against=made.dense, calibration=made.text),
    ]
    forget(made.ran)
    for call in refused:
        with pytest.raises(unirank.InputError, match=SAID):
            call()
    assert not made.ran.exists()
    for stream in (False, True):
        opened = unirank.open_compressed(made.small, device="cpu", trust_remote_code=True, stream=stream)
        assert type(opened.model).__name__ == "OwnForCausalLM"


def test_a_compressed_checkpoint_brings_the_code_itself(made: Made, run_unirank: Run, tmp_path: Path) -> None:
    """Also a streamed and a densified one: where the dense model is gone, they still open."""
    small, plain = tmp_path / "small", tmp_path / "plain"
    trusted = ["--device", "cpu", "--trust-remote-code"]
    asked = ["compress", made.dense, "-r", "0.3", "-o", small, "--store", made.store, "--stream", *trusted]
    assert run_unirank(*asked)[0] == 0
    assert run_unirank("densify", small, "-o", plain, *trusted)[0] == 0
    for folder in (made.small, small, plain):
        assert (folder / "modeling_own.py").read_text() == MODELLING
        moved = Path(shutil.copytree(folder, tmp_path / f"moved-{folder.parent.name}-{folder.name}"))
        code, _, err = run_unirank("eval", moved, "--text", made.text, "--window", 24, "--limit", 2, *trusted)
        assert code == 0, err


def test_a_tokenizer_that_brings_code_is_not_run_either(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    (model_dir / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(unirank.InputError, match=SAID):
        unirank.load(model_dir, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_code_for_the_model_alone_is_not_run_either(model_dir: Path, tmp_path: Path) -> None:
    """A configuration that transformers has, of a type that it has no causal language model of."""
    from transformers import ViTConfig

    config = ViTConfig().to_dict() | {"auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (model_dir / "config.json").write_text(json.dumps(config))
    (model_dir / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(unirank.InputError, match=SAID):
        unirank.load(model_dir, device="cpu")
    assert not (tmp_path / "ran").exists()
