"""A MODEL, not a measurement: what an analysis costs on GPUs, stage by stage, before and after what issue 18 changed.

What was before: hidden states of every layer on the disk, hashed on the way, by one thread whose pace was the job's;
one thread that hashes weights; eigenproblems one after the other; Gram matrices that are read and written in float64
for every 2048 tokens. After: none of the first, several threads, several matrices at a time, 8192 tokens, page-locked
buffers, layers read ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.support.devices import HOST, HOST_SHARE, MEMORY_SHARE, PRODUCT_SHARE, Device, eigh_seconds, together
from bench.support.shapes import Model

WINDOWS, WINDOW = 256, 2048
GOAL = 120.0  # seconds of a 7B model on an H100

Range = tuple[float, float]  # least and most seconds


@dataclass(frozen=True)
class Stage:
    """One row: what it is, least and most seconds, and who is at work.

    `lane` is "first" (before all others), "calibrates" and "decomposes" (the GPU, one after the other, or beside each
    other after the changes) or "disk" (threads of the host, beside the GPU).
    """

    name: str
    seconds: Range
    lane: str


@dataclass(frozen=True)
class Changes:
    """What was changed; the defaults are what is built now, `BEFORE` what was before."""

    streams_on_disk: bool = False
    hashing: int = HOST.hashing
    chunk: int = 8192  # tokens between two passes over a Gram matrix
    gram_share: float = PRODUCT_SHARE["bf16"]  # of tensor cores, by the size of a panel
    together: bool = True  # eigenproblems several at a time
    pinned: bool = True
    prefetch: bool = True
    units: str = "fp64"


AFTER = Changes()
# 0.45: the first panel of 1024 rows fills 32 of an H100's 132 multiprocessors.
BEFORE = Changes(True, 1, 2048, 0.45, together=False, pinned=False, prefetch=False)


def stages(model: Model, device: Device, changes: Changes = AFTER, gpus: int = 1) -> list[Stage]:
    """Stages of the analysis (`whiten`) of one of `gpus`: bf16 weights and streams, `WINDOWS` windows of `WINDOW`.

    Loading a model that fits into the GPU is not counted. One that does not is read three times: for the check of its
    numbers, for its hash, and layer by layer.
    """
    tokens, share = WINDOWS * WINDOW, 1 / gpus
    weights = 2.0 * sum(m * n for m, n in model.all_linears())
    hidden = 2.0 * tokens * model.hidden * share
    memory = MEMORY_SHARE * device.memory
    on_gpu = 2 * hidden < (device.size - _resident(model, weights, device)) / 4
    copy = HOST_SHARE * device.host if changes.pinned else HOST.pageable
    hashing = weights / (changes.hashing * HOST.sha256)
    found = []
    if _streamed(weights, device):
        slow, fast = (weights / rate for rate in HOST.disk)
        if changes.hashing > 1:  # beside the reading
            known = (fast + max(fast, hashing), slow + max(slow, hashing))
        else:
            known = (2 * fast + hashing, 2 * slow + hashing)
        found.append(Stage("weights read, checked and hashed", known, "first"))
        # Read ahead, a layer comes while the one before is at work; else the GPU waits for both.
        lane = "disk" if changes.prefetch else "calibrates"
        moved = 0.0 if changes.prefetch else weights / copy
        found.append(Stage("layers from the disk", (fast + moved, slow + moved), lane))
    else:
        found.append(Stage("hash of the weights", _both(weights / copy + hashing), "first"))
    found += [
        Stage("forward passes", _both(_forward(model, device, tokens * share)), "calibrates"),
        Stage("Gram matrices", _both(_gram(model, device, changes, tokens * share)), "calibrates"),
        Stage("cosines", _both(3 * model.layers * 2 * hidden / memory), "calibrates"),
    ]
    if not on_gpu:
        moved = 2 * model.layers * hidden / copy
        found.append(Stage("hidden states to the host and back", _both(moved), "calibrates"))
    if gpus > 1:
        moments = model.layers * sum(4.0 * n * n for n in model.inputs)
        found.append(Stage("sums over the processes", _both(2 * moments / device.link), "calibrates"))
    products = spread([_product_flops(m, n) for m, n in model.linears], gpus)
    rate = PRODUCT_SHARE[changes.units] * getattr(device, changes.units)
    found += [
        Stage("products of the decomposition", _both(model.layers * products / rate), "decomposes"),
        Stage("eigenproblems", _eigenproblems(model, device, changes, gpus), "decomposes"),
    ]
    factors = sum(2.0 * min(m, n) * (m + n) for m, n in model.all_linears())
    if gpus > 1:
        found.append(Stage("factors to process 0", _both(factors * (1 - share) / device.link), "decomposes"))
    streams = (model.layers - 1) * hidden if changes.streams_on_disk and gpus == 1 else 0.0
    for name, size in (("hidden states to the disk", streams), ("factors to the disk", factors)):
        if size:  # copied, hashed and written by one thread, piece after piece
            slow, fast = (size * (1 / copy + 1 / HOST.sha256 + 1 / disk) for disk in HOST.disk)
            found.append(Stage(name, (fast, slow), "disk"))
    return found


def total(found: Sequence[Stage], *, beside: bool = False) -> Range:
    """Least and most seconds of the whole: the GPU's stages, or the writing thread where that takes longer.

    `beside`: calibration and decomposition hide each other entirely, which is the most that overlap can give; without,
    not at all. The truth lies between, for both want the same multiprocessors and memory.
    """
    return _whole(found, 0, beside), _whole(found, 1, beside)


def _whole(found: Sequence[Stage], which: int, beside: bool) -> float:
    lanes: dict[str, float] = dict.fromkeys(("first", "calibrates", "decomposes", "disk"), 0.0)
    for stage in found:
        lanes[stage.lane] += stage.seconds[which]
    work = (lanes["calibrates"], lanes["decomposes"])
    return lanes["first"] + max(lanes["disk"], max(work) if beside else sum(work))


def spread(costs: Sequence[float], gpus: int) -> float:
    """What the GPU with the most to do gets, when the dearest go first, each to whoever has least."""
    load = [0.0] * gpus
    for cost in sorted(costs, reverse=True):
        load[load.index(min(load))] += cost
    return max(load)


def _both(seconds: float) -> Range:
    return seconds, seconds


def _streamed(weights: float, device: Device) -> bool:
    return weights > 0.9 * device.size


def _resident(model: Model, weights: float, device: Device) -> float:
    """Bytes of weights that stay on the GPU: all, or one layer and the embeddings."""
    embeddings = 2.0 * model.vocabulary * model.hidden
    return embeddings + (weights / model.layers if _streamed(weights, device) else weights)


def _forward(model: Model, device: Device, tokens: float) -> float:
    """Products on tensor cores, and what runs between them op by op, in memory.

    Bytes a token: a norm in float32 is 32 a channel (read, widened, squared, scaled, rounded), two of them; two
    residual sums 12; rotary embeddings 20 a channel of q and k; the gated activation 10 a channel of the MLP.
    """
    products = 2 * tokens * sum(m * n for m, n in model.linears) + 2 * tokens * WINDOW * model.query  # causal
    moved = tokens * (76 * model.hidden + 20 * (model.query + model.key_value) + 10 * model.mlp)
    peak = PRODUCT_SHARE["bf16"] * device.bf16
    return model.layers * (products / peak + moved / (MEMORY_SHARE * device.memory))


def _gram(model: Model, device: Device, changes: Changes, tokens: float) -> float:
    """Half of `xᵀx` on tensor cores; for each chunk the float32 half is written and read, the float64 one both."""
    seconds = 0.0
    for n in model.inputs:
        passes = max(1.0, tokens / changes.chunk)
        seconds += tokens * n * (n + 1) / (changes.gram_share * device.bf16)
        seconds += passes * n * n / 2 * (4 + 4 + 8 + 8) / (MEMORY_SHARE * device.memory)
    return model.layers * seconds


def _product_flops(m: int, n: int) -> float:
    """`W C Wᵀ` through the square part, the factors, and for a tall weight its Cholesky QR."""
    k = min(m, n)
    return 2.0 * k * n * n + 4.0 * k * k * max(m, n)


def _eigenproblems(model: Model, device: Device, changes: Changes, gpus: int) -> Range:
    found = []
    for which in (0, 1):
        costs = []
        for m, n in model.linears:
            k = min(m, n)
            gain = together(k) if changes.together and gpus == 1 else 1.0
            costs.append(eigh_seconds(k, device, changes.units)[which] / gain)
        found.append(model.layers * spread(costs, gpus))
    return found[0], found[1]
