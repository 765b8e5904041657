"""transformers splits a compressed checkpoint over processes where that is right, and refuses at loading where not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import unirank

SAID = r"cannot be loaded with tensor parallelism \(tp_plan, tp_size = 2\).*device_map='auto'.*unirank densify"

WORKER = """
import sys
import torch, unirank
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
ids = torch.arange(2, 30)[None]
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for name in ("fsdp_size", "pp_size", "tp_size"):
    try:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(**{name: 2}))
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, whole(ids).logits)
        sys.stdout.write(f"{name} same\\n")
    except unirank.InputError as error:
        sys.stdout.write(f"{name} {error}\\n")
"""


@pytest.fixture
def small(make_model, calibration: unirank.Calibration, tmp_path: Path) -> Path:
    return unirank.compress(make_model(), 0.3, calibration=calibration).save(tmp_path / "small")


def test_tensor_parallelism_is_refused_before_the_weights_are_read(small: Path, monkeypatch) -> None:
    config = AutoConfig.from_pretrained(small)
    config.distributed_config = SimpleNamespace(tp_size=2)
    monkeypatch.setattr(LlamaForCausalLM, "_load_pretrained_model", lambda *_, **__: pytest.fail("they were read"))
    with pytest.raises(unirank.InputError, match=SAID):
        AutoModelForCausalLM.from_pretrained(small, config=config)


def test_tensor_parallelism_of_older_releases_is_refused_at_loading(small: Path, monkeypatch) -> None:
    """They leave the number of parts on the model alone."""
    monkeypatch.setattr(LlamaForCausalLM, "_tp_size", 2)
    with pytest.raises(unirank.InputError, match=SAID):
        AutoModelForCausalLM.from_pretrained(small)
    monkeypatch.setattr(LlamaForCausalLM, "_tp_size", 1)
    assert type(AutoModelForCausalLM.from_pretrained(small)) is LlamaForCausalLM


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without processes")
def test_what_transformers_splits_over_two_processes(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers.distributed.configuration_utils")
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(small)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for name in ("fsdp_size same", "pp_size same"):
        assert said.count(name) == 2, done.stdout
    assert done.stdout.count("tp_size A compressed checkpoint cannot be loaded with tensor parallelism") == 2
