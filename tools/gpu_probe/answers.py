"""A step's arguments, how it writes answers down, and how it measures time."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Probe:
    """One step's run: `device` is "cuda" or "cpu", `shape` a key of `random_model.SHAPES`."""

    step: str
    device: str
    tiny: bool
    shape: str
    layers: int
    windows: int
    work: Path
    trace: Path
    results: Path

    @cached_property
    def at(self) -> torch.device:
        """The device."""
        return torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def folder(self) -> Path:
        """A fresh one."""
        return Path(tempfile.mkdtemp(dir=self.work))

    def put(self, name: str, **values: Any) -> None:
        """Write one answer: a line of the results, and what a person sees."""
        line = json.dumps({"step": self.step, "name": name, **values}, default=str)
        with self.results.open("a") as file:
            file.write(line + "\n")
        print(line[:400], flush=True)

    def attempt(self, name: str, run: Callable[[], Any]) -> Any:
        """One answer of `run`, with its values where it gives a dict; an exception is an answer too."""
        started = time.perf_counter()
        try:
            found = run()
            self.settle()
        except Exception as error:  # what broke is the point
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-6:]
            self.put(name, ok=False, error=f"{type(error).__name__}: {error}"[:600], at=frames)
            return None
        values = found if isinstance(found, dict) else {}
        self.put(name, ok=True, **({"seconds": time.perf_counter() - started} | values))
        return found

    def settle(self) -> None:
        """Wait until the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], Any], repeats: int = 10, warm: int = 2, most: float = 4.0) -> float:
        """The median of `repeats` warm runs, fewer after `most` seconds; a GPU's own events where there is one."""
        for _ in range(warm):
            run()
        self.settle()
        times, begun = [], time.perf_counter()
        for _ in range(repeats):
            if self.on_gpu:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                run()
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last))
            else:
                started = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - started))
            if time.perf_counter() - begun > most:
                break
        return statistics.median(times)

    def time(self, name: str, run: Callable[[], Any], repeats: int = 3, warm: int = 1) -> None:
        """An answer that is a time."""
        self.attempt(name, lambda: {"ms": self.milliseconds(run, repeats, warm)})

    def peak(self) -> int:
        """Bytes of the device at most since `forget_peak`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else 0

    def forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()


def short(dtype: torch.dtype) -> str:
    """Its name: "float64"."""
    return str(dtype).removeprefix("torch.")
