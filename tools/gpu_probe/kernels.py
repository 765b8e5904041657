"""Step kernels: rates of the ops at real sizes beside plain torch, and how exact a tensor core's sums are."""

from __future__ import annotations

import torch

from tools.gpu_probe.answers import Probe, short
from unirank import ops


def kernels(probe: Probe) -> None:
    """Rates and errors; the rates of the device itself are in the step env."""
    for T, N in [(512, 96)] if probe.tiny else [(16384, 4096), (16384, 11008), (8192, 8192)]:
        rates(probe, T, N)
    for T in (256,) if probe.tiny else (2048, 8192, 32768):
        bias(probe, T)
    ranking(probe, 560, 20 if probe.tiny else 8192)


def _sums(probe: Probe, n: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype, device=probe.at) for shape in ((n, n), (n,))]


def rates(probe: Probe, T: int, N: int) -> None:
    """`T` tokens of width `N` in bfloat16."""
    x, y = (torch.randn(T, N, device=probe.at).bfloat16() for _ in range(2))
    state = torch.zeros(3, dtype=torch.float64, device=probe.at)
    ms = probe.milliseconds(lambda: ops.cosine_accumulate_(state, x, y), 20)
    probe.put(f"cosine {T} x {N}", ms=ms, gbs=4 * T * N / ms / 1e6)
    for kept in (torch.float64, torch.float32):
        out = _sums(probe, N, kept)
        ms = probe.milliseconds(lambda out=out: ops.gram_accumulate_(*out, x))
        probe.put(f"gram {T} x {N} into {short(kept)}", ms=ms, tflops=T * N * (N + 1) / ms / 1e9)
        del out
    ms = probe.milliseconds(lambda: x.T @ x)
    probe.put(f"plain x'x {T} x {N} in bfloat16", ms=ms, tflops=2 * T * N * N / ms / 1e9)
    if probe.on_gpu:
        ms = probe.milliseconds(lambda: torch.mm(x.T, x, out_dtype=torch.float32))
        probe.put(f"one product x'x {T} x {N} into float32", ms=ms, tflops=2 * T * N * N / ms / 1e9)


def bias(probe: Probe, T: int) -> None:
    """A column with a mean adds up positive numbers: where sums are cut off instead of rounded, the diagonal sinks."""
    x = (torch.randn(T, 512, device=probe.at) + 1).bfloat16()
    truth, ours = x.double().T @ x.double(), _sums(probe, 512)
    ops.gram_accumulate_(*ours, x)
    found = {"ours": ours[0], "float32": (x.float().T @ x.float()).double()}
    if probe.on_gpu:
        found["one product"] = torch.mm(x.T, x, out_dtype=torch.float32).double()
    for key, gram in found.items():
        relative = (gram - truth) / truth
        mean = float(relative.diagonal().mean())
        probe.put(f"gram error {key} T={T}", mean=mean, worst=float(relative.abs().max()))


def ranking(probe: Probe, segments: int, K: int) -> None:
    """`global_topk` over all components of a model."""
    value = torch.rand(segments, K, device=probe.at, dtype=torch.float64).sort(1, descending=True).values.flatten()
    rest = [torch.full((segments,), v, device=probe.at) for v in (3 * K, 2 * K * K)]
    rest.append(torch.arange(segments + 1, device=probe.at) * K)
    budget = int(0.6 * segments * 2 * K * K)
    for multiple in (1, 64):
        ms = probe.milliseconds(lambda m=multiple: ops.global_topk(value, *rest, budget, 0, m), 5, 1)
        probe.put(f"global_topk of {segments * K}, multiples of {multiple}", ms=ms)
