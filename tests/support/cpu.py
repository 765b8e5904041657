"""What this machine's processor is: MKL, torch's matrix products, keeps promises on Intel's alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_CPU = Path("/proc/cpuinfo")
INTEL = torch.backends.mkl.is_available() and _CPU.is_file() and "GenuineIntel" in _CPU.read_text()
on_intel = pytest.mark.skipif(not INTEL, reason="MKL keeps the order of sums on Intel CPUs alone")
