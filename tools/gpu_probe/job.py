"""Steps layers, whole and profile: the time of an analysis, and where it goes."""

from __future__ import annotations

import importlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

import unirank
from tools.gpu_probe.answers import Probe
from tools.gpu_probe.random_model import calibration, depth, random_model
from unirank.analysis.calibration import texts_of, windows_of
from unirank.types import LoadedModel

# What is timed: where its caller finds it, its name there, and what it is. A test finds every one.
PLACES = (
    ("unirank.analysis.fill_store", "weights_hash", "hash of the weights"),
    ("unirank.analysis.fill_store", "record", "embeddings and the layers' arguments"),
    ("unirank.analysis.fill_store", "calibrate_layer", "calibrate"),
    ("unirank.analysis.fill_store", "decompose_layer", "decompose"),
    ("unirank.ops", "gram_accumulate_", "gram"),
    ("unirank.ops", "cosine_accumulate_", "cosine"),
    ("unirank.ops", "batched_eigh", "eigenproblems"),
    ("unirank.analysis.scheme.two_sided", "_square", "Cholesky"),
    ("unirank.analysis.scheme.two_sided", "_householder", "Householder QR, where Cholesky fails"),
    ("unirank.analysis.store:AnalysisStore", "write_layer", "write"),
    ("unirank.disk.tensorfile", "_sum", "write: hash"),
)


def owner(place: str) -> Any:
    """The module, or the class behind the colon."""
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


@contextmanager
def timed(probe: Probe, *, waiting: bool) -> Iterator[tuple[dict[str, float], Counter[str]]]:
    """Inside, seconds and calls of `PLACES`; `waiting`: with the device idle before and after each call."""
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    before = []

    def wrapped(original: Any, label: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if waiting:
                probe.settle()
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                if waiting:
                    probe.settle()
                seconds[label] += time.perf_counter() - started
                calls[label] += 1

        return call

    try:
        for place, name, label in PLACES:
            original = getattr(owner(place), name)
            before.append((owner(place), name, original))
            setattr(owner(place), name, wrapped(original, label))
        yield seconds, calls
    finally:
        for place, name, original in before:
            setattr(place, name, original)


def layers(probe: Probe) -> None:
    """Two layers of a model: a bare forward pass, the analysis as it is, where its time goes, plan and truncation."""
    work, deep = probe.folder(), depth(probe)
    loaded, text = random_model(probe, probe.layers, work)
    settings = calibration(probe, text)

    def whole(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "whole_model": seconds / probe.layers * deep}

    probe.attempt(f"bare forward pass, {probe.shape}", lambda: whole(_floor(probe, loaded, settings)))

    def analysis(name: str, **more: Any) -> dict[str, Any]:
        probe.forget_peak()
        started = time.perf_counter()
        unirank.analyze(loaded, work / name, calibration=settings, **more)
        probe.settle()
        found = whole(time.perf_counter() - started) | {"peak": probe.peak()}
        return found | {"bytes": sum(file.stat().st_size for file in (work / name).glob("*"))}

    probe.attempt(f"analysis, {probe.shape}", lambda: analysis("a"))
    probe.attempt(f"analysis, {probe.shape}, again", lambda: analysis("b"))
    probe.attempt(f"analysis, {probe.shape}, hidden states kept", lambda: analysis("c", keep_hidden=True))
    for waiting in (False, True):
        with timed(probe, waiting=waiting) as (seconds, calls):
            probe.attempt(f"analysis, {probe.shape}, {'step by step' if waiting else 'timed'}", lambda: analysis("d"))
        for label, spent in sorted(seconds.items(), key=lambda item: -item[1]):
            kind = "idle before and after" if waiting else "of all threads"
            probe.put(f"{label}, {kind}", seconds=spent, calls=calls[label])
        _clear(work / "d")

    def applied() -> dict[str, float]:
        started = time.perf_counter()
        store = unirank.open_store(work / "a")
        plan = unirank.plan(store, 0.3)
        planned, started = time.perf_counter() - started, time.perf_counter()
        unirank.truncate(loaded, store, plan)
        probe.settle()
        return {"plan": planned, "truncate": time.perf_counter() - started}

    probe.attempt(f"plan and truncate, {probe.shape}", applied)


def _clear(store: Any) -> None:
    for file in store.glob("*"):
        file.unlink()
    store.rmdir()


def _floor(probe: Probe, loaded: LoadedModel, settings: unirank.Calibration) -> float:
    """Seconds of the decoder over the calibration windows, warm."""
    ids = windows_of(loaded, texts_of(loaded, settings), settings)
    spent = 0.0
    with torch.no_grad():
        for part in (ids[: settings.batch], ids):
            probe.settle()
            started = time.perf_counter()
            for batch in part.split(settings.batch):
                loaded.model.base_model(input_ids=batch.to(probe.at), use_cache=False)
            probe.settle()
            spent = time.perf_counter() - started
    return spent


def whole(probe: Probe) -> None:
    """A whole analysis; every layer's end is written, so that a run that is cut off still tells its pace."""
    work = probe.folder()
    loaded, text = random_model(probe, None, work)
    settings = calibration(probe, text)
    started = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        elapsed = time.perf_counter() - started
        probe.put(f"progress, {probe.shape}", stage=stage, done=done, total=total, elapsed=elapsed)

    def run() -> dict[str, Any]:
        unirank.analyze(loaded, work / "store", calibration=settings, progress=progress)
        return {"peak": probe.peak()}

    probe.attempt(f"whole analysis, {probe.shape}, {settings.windows} x {settings.window}", run)


def profile(probe: Probe) -> None:
    """A trace of the analysis of one layer."""
    work = probe.folder()
    loaded, text = random_model(probe, 1, work)
    settings = unirank.Calibration(text=str(text), windows=8, window=64 if probe.tiny else 2048, batch=4)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if probe.on_gpu else [])]
    with profiler(activities=activities) as run:
        unirank.analyze(loaded, work / "store", calibration=settings)
        probe.settle()
    by = "cuda_time_total" if probe.on_gpu else "cpu_time_total"
    print(run.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=70))
    run.export_chrome_trace(str(probe.trace))
    probe.put("profile", ok=True, trace=probe.trace.name)
