"""Step env: what this machine can do at most, which every other time is held against."""

from __future__ import annotations

import os
import time

import torch

from tools.gpu_probe.answers import Probe, short
from unirank.disk.hashing import sha256_tree
from unirank.disk.tensorfile import write_tensors
from unirank.provenance import versions


def env(probe: Probe) -> None:
    """Names and versions; rates of matrix products, of copies, of hashing and of writing."""
    if probe.on_gpu:
        found = torch.cuda.get_device_properties(probe.at)
        capability = ".".join(map(str, torch.cuda.get_device_capability(probe.at)))
        gpu = {"gpu": found.name, "capability": capability, "sms": found.multi_processor_count}
        probe.put("gpu", **gpu, memory=found.total_memory, cuda=torch.version.cuda)
    probe.put("versions", **versions(), cpus=os.cpu_count(), threads=torch.get_num_threads())
    size = 512 if probe.tiny else 8192
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a = torch.randn(size, size, device=probe.at).to(dtype)
        ms = probe.milliseconds(lambda a=a: a @ a)
        probe.put(f"matmul {short(dtype)}", tflops=2 * size**3 / ms / 1e9, ms=ms)
    count = 1 << (20 if probe.tiny else 30)
    a, b = (torch.zeros(count, dtype=torch.uint8, device=probe.at) for _ in range(2))
    probe.put("copy on the device", gbs=2 * count / probe.milliseconds(lambda: b.copy_(a)) / 1e6)
    for pinned in (False, True) if probe.on_gpu else ():
        host = torch.empty(count, dtype=torch.uint8, pin_memory=pinned)
        kind = "page-locked" if pinned else "pageable"
        probe.put(f"to the host, {kind}", gbs=count / probe.milliseconds(lambda h=host: h.copy_(a), 3, 1) / 1e6)
        probe.put(f"from the host, {kind}", gbs=count / probe.milliseconds(lambda h=host: a.copy_(h), 3, 1) / 1e6)
    host = {f"t{i}": torch.zeros(count // 16, dtype=torch.int16) for i in range(8)}
    started = time.perf_counter()
    sha256_tree(host.items())
    probe.put("hash of the host's memory", gbs=count / (time.perf_counter() - started) / 1e9)
    started = time.perf_counter()
    write_tensors(probe.folder() / "t.safetensors", host, {})
    probe.put("write to the disk, hashed", gbs=count / (time.perf_counter() - started) / 1e9)
