"""GPUs as their makers describe them, and how much of that a kind of work gets. Nothing here was measured by us."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak rates per second, without sparsity: bytes of memory, flops of bf16 tensor cores, fp32 and fp64 units.

    `driver_name` is what the driver calls it: other variants (PCIe, 40 GB) have other peaks. `fp64` is that of tensor
    cores where there are any for it.
    """

    driver_name: str
    memory: float
    bf16: float
    fp32: float
    fp64: float
    link: float  # bytes to another GPU of the machine, one direction: NVLink, or PCIe where there is none
    host: float  # bytes to the host, one direction: PCIe
    size: float  # bytes of memory


# Datasheets of NVIDIA: H100 and H200 Tensor Core GPU, A100 80 GB, L4, HGX B200 (for one GPU); the paper on the Ada
# architecture for the RTX 4090 (bf16 with fp32 sums). PCIe x16: 64 GB/s in generation 5, 32 in generation 4.
DEVICES = {
    "H100": Device("NVIDIA H100 80GB HBM3", 3.35e12, 989e12, 67e12, 67e12, 450e9, 64e9, 80e9),
    "H200": Device("NVIDIA H200", 4.8e12, 989e12, 67e12, 67e12, 450e9, 64e9, 141e9),
    "A100": Device("NVIDIA A100-SXM4-80GB", 2.04e12, 312e12, 19.5e12, 19.5e12, 300e9, 32e9, 80e9),
    "L4": Device("NVIDIA L4", 300e9, 121e12, 30.3e12, 0.47e12, 32e9, 32e9, 24e9),
    "4090": Device("NVIDIA GeForce RTX 4090", 1.01e12, 165e12, 82.6e12, 1.29e12, 32e9, 32e9, 24e9),
    "B200": Device("NVIDIA B200", 7.7e12, 2250e12, 75e12, 37e12, 900e9, 64e9, 180e9),
}

# Shares of the peaks that real work gets. (choice: plausible for large products and plain passes, and set so that the
# counts of the review of the CUDA code come out; that they do is no evidence for either)
MEMORY_SHARE = 0.8
PRODUCT_SHARE = {"bf16": 0.6, "fp32": 0.7, "fp64": 0.55}
HOST_SHARE = 0.8  # of PCIe, from and to page-locked memory


@dataclass(frozen=True)
class Host:
    """What the machine around the GPU does in a second.

    Attributes:
        pageable: bytes of a copy between GPU and pageable memory. (choice; 3 to 10 GB/s are usual)
        sha256: bytes that one thread hashes; 1.67 GB/s were measured on this project's build machine.
        hashing: threads that hash.
        disk: bytes that a disk writes, slow and fast. (choice: a cloud's volume, one NVMe disk)
    """

    pageable: float = 6e9
    sha256: float = 1.67e9
    hashing: int = 8
    disk: tuple[float, float] = (0.5e9, 2e9)


HOST = Host()

# An eigenproblem of 4096 in float64 on an H100, with vectors, by cuSOLVER: 0.2 to 0.5 s. Published shares of the peak
# fit that: below 3 % on an H100 (Wang et al., "Extracting the Potential of Emerging Hardware Accelerators for Symmetric
# Eigenvalue Decomposition"; 9 n³ flops at 3 % of 67 TF/s are 0.31 s), about 1.5 % for libraries that use several GPUs
# (the same group, arXiv 2511.16174).
EIGH_SIZE, EIGH_SECONDS = 4096, (0.2, 0.5)
EIGH_FLOPS = 9  # n³ of them
# A column of the tridiagonal form costs at least a few launches that wait for each other. (choice)
EIGH_COLUMN = 20e-6
# How many times faster several at a time are than one after the other: memory's half is shared, what idles is filled.
# (guess, as in the review: 45 to 110 s become 25 to 60; larger ones leave less idle)
EIGH_TOGETHER = {4096: 1.8, 8192: 1.3}


def eigh_seconds(n: int, device: Device, units: str = "fp64") -> tuple[float, float]:
    """Least and most seconds of one eigenproblem of size n with vectors.

    By size as n³. By device in two halves: the matrix-vector products of the tridiagonal form scale with the memory's
    rate, the rest stays as it is (it is far from any peak) unless the units of `units` would need longer.
    """
    reference = DEVICES["H100"]
    itemsize = {"fp64": 8, "fp32": 4}[units]
    work = EIGH_FLOPS * n**3 / (PRODUCT_SHARE[units] * getattr(device, units))
    seconds = []
    for whole in EIGH_SECONDS:
        half = whole / 2 * (n / EIGH_SIZE) ** 3
        seconds.append(max(half * reference.memory / device.memory * itemsize / 8 + max(half, work), n * EIGH_COLUMN))
    return seconds[0], seconds[1]


def together(n: int) -> float:
    """The gain of solving several of size n at a time."""
    return EIGH_TOGETHER[4096] if n <= EIGH_SIZE else EIGH_TOGETHER[8192]
