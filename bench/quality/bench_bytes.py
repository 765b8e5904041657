"""The honest table: perplexity, bytes and speed of dense and compressed models, in 32, 16, 8 and 4 bits, in one run.

    python -m bench.quality.bench_bytes --work WORK --json docs/bytes.json --markdown docs/bytes.md
    python -m bench.quality.bench_bytes --work WORK --json docs/bytes.json --markdown docs/bytes.md --speed

SmolLM2-135M-Instruct: dense, and by the preset `best` at 5, 10, 20 and 40 % removed (64 windows of 512 tokens of
WikiText-2's validation text, seed 0, gradients on all of them, tokens clipped). In float32 and bfloat16, and with 8 and
4 bits a weight (torchao's weight-only quantisation by `unirank.quantize`: decoder linears alone, which is also what is
compressed) beside bfloat16. Perplexity on the first 8 windows of 1024 tokens of WikiText-2's test text and of the
held-out part of Python's documentation. Prefill of 256 tokens and decoding of 16, one sequence.

What WORK has is not made again, so that an interrupted run resumes; every step is a process of its own. An analysis
(15 minutes of one core) and second passes (8 minutes a ratio) that exist already are given by `--store` and
`--checkpoints` (folders best-5, best-10, ...). `--speed` measures the speeds again, all rows turn by turn in 5 minutes,
and nothing else: run it alone on a quiet machine. The conclusions under the table are written from its figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.quality.bench_quality import DEFAULT_DATA
from bench.quality.bytes_page import markdown
from bench.support.record import write_result
from unirank.disk.files import write_json, write_text
from unirank.models.embedded import NAME
from unirank.text.windows import BUILTIN_HELD_OUT

PRESET = "best"
Step = Callable[[dict[str, Any]], dict[str, Any]]


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """The record of one step."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "record.json"
        subprocess.run([sys.executable, "-m", "bench.quality.bytes_job", json.dumps(job), out], check=True)
        return json.loads(out.read_text())


def kept(place: Path, job: dict[str, Any], step: Step, *, again: bool = False) -> dict[str, Any]:
    """The record of a step: that in `place`, where one is; else the step runs, and it is written there."""
    if again or not place.is_file():
        print(f"{job['step']}: {place.stem}", flush=True)
        write_json(place, step(job))
    return json.loads(place.read_text())


def main(argv: Sequence[str] | None = None, step: Step = in_a_process) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="models and records; what is there is not made again")
    parser.add_argument("--store", type=Path, help="an analysis for the preset; default: in WORK")
    parser.add_argument("--checkpoints", type=Path, help="folders best-5 and so on; default: in WORK")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of wiki.valid.txt and wiki.test.raw")
    parser.add_argument("--remove", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--speed", action="store_true", help="measure the speeds again, and nothing else")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the speeds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    tiny = parser.add_argument_group("another model or protocol (its figures are not those of the page)")
    tiny.add_argument("--model", default=NAME)
    tiny.add_argument("--windows", type=int, default=64)
    tiny.add_argument("--window", type=int, default=512, help="tokens of a calibration window")
    tiny.add_argument("--limit", type=int, default=8, help="evaluation windows")
    tiny.add_argument("--evaluation-window", type=int, default=1024)
    tiny.add_argument("--prompt", type=int, default=256, help="tokens of prefill")
    arguments = parser.parse_args(argv)
    work: Path = arguments.work
    checkpoints: Path = arguments.checkpoints or work / "checkpoints"
    for folder in (work, checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    budgets = {f"{PRESET}-{100 * remove:g}": remove for remove in sorted(arguments.remove)}
    calibration = {"text": str(arguments.data / "wiki.valid.txt"), "windows": arguments.windows, "seed": 0, "clip": 2.0}
    calibration |= {"window": arguments.window, "gradient_windows": arguments.windows}
    common = {"model": arguments.model, "preset": PRESET}
    made: dict[str, dict[str, Any]] = {"dense": {}}
    for name, remove in budgets.items():
        job = common | {"step": "checkpoint", "remove": remove, "place": str(checkpoints / name)}
        job |= {"store": str(arguments.store or work / "store"), "calibration": calibration}
        made[name] = kept(work / f"{name}.json", job, step)
    texts = [str(arguments.data / "wiki.test.raw"), BUILTIN_HELD_OUT]
    protocol = {"texts": texts, "window": arguments.evaluation_window, "limit": arguments.limit}
    jobs, rows = {}, []
    for name, remove in {"dense": 0.0, **budgets}.items():
        for bits in (16, 8, 4) if remove else (32, 16, 8, 4):
            label = f"{name}-{bits}"
            jobs[label] = common | {"step": "row", "bits": bits, "place": str(work / label)}
            jobs[label] |= {"source": str(checkpoints / name) if remove else "", "dense": str(work / "dense-16")}
            record = kept(work / f"row-{label}.json", jobs[label] | protocol, step)
            rows.append({"row": label, "model": arguments.model, "remove": remove, "bits": bits} | made[name] | record)
    timing = {"step": "speed", "rows": jobs, "prompt": arguments.prompt, "steps": 16, "repeats": arguments.repeats}
    found = kept(work / "speed.json", timing, step, again=arguments.speed)
    for one in rows:
        one |= {f"{phase}_tokens_per_second": rate for phase, rate in found["rates"][one["row"]].items()}
    meta = {"preset": PRESET, "threads_of_speed": found["threads"]} | {
        key: found[key] for key in ("prompt", "steps", "repeats")
    }
    meta |= {"calibration_windows": arguments.windows, "evaluation_windows": arguments.limit, "seed": 0}
    write_result(arguments.json, rows, **meta)
    text = markdown(rows, meta)
    print(text)
    if arguments.markdown is not None:
        write_text(arguments.markdown, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
