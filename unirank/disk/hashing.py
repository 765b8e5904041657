"""SHA-256 of texts, files and tensors, and what differs between two records."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from unirank.queues import has_queues, to_host

_WORD, _BLOCK = 8, 1024  # bytes in a word, and words in a block, of `fingerprint`
_AHEAD = 1 << 30  # bytes of tensors of a GPU that wait in the host's memory to be hashed (**choice**)
_SUMMED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def sha256_text(text: str) -> str:
    """SHA-256 of the UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_files(directory: Path, pattern: str = "*.safetensors") -> dict[str, str]:
    """SHA-256 of the files in `directory` that match `pattern`, by name; several at a time."""
    files = sorted(directory.glob(pattern))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip((file.name for file in files), pool.map(_sha256_file, files), strict=True))


def _sha256_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and raw bytes, in the order given; one thread."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(_head(name, tensor).encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def sha256_tree(named: Iterable[tuple[str, torch.Tensor]], *, limit: int | None = None) -> str:
    """SHA-256 over the sorted lines `name dtype shape hash`, where `hash` is the SHA-256 of the tensor's raw bytes.

    Tensors are hashed by as many threads as torch has; neither their number nor the order of `named` changes the
    result. Those of a GPU are brought to the host one after the other, behind what the caller's queue holds.

    Args:
        limit: tensors of no more bytes than these wait to be hashed, but for one, while the next is made; for tensors
            that are read when `named` gives them. None is without limit, for tensors that are in memory anyway, and
            `_AHEAD` for those of a GPU.
    """
    lines: list[str] = []
    waiting: deque[tuple[str, int, Future[str]]] = deque()
    held = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, tensor in named:
            # Copied here, where the order in which the caller's queue writes is known, and not in the threads.
            if has_queues(tensor.device):
                tensor, limit = to_host(tensor), _AHEAD if limit is None else limit
            waiting.append((_head(name, tensor).strip(), tensor.nbytes, pool.submit(_sha256_tensor, tensor)))
            held += tensor.nbytes
            del tensor
            while limit is not None and held > limit and len(waiting) > 1:
                head, size, future = waiting.popleft()
                lines.append(f"{head} {future.result()}\n")
                held -= size
        lines += [f"{head} {future.result()}\n" for head, _, future in waiting]
    return sha256_text("".join(sorted(lines)))


def fingerprint(tensor: torch.Tensor) -> str:
    """Tells whether a tensor was written to since, at the cost of three passes of additions on its own device.

    Of its bytes as words, sums over blocks and over places in a block, which also tell what was moved; of its values
    the sum, which also tells a change of all signs. No proof against a forger, and no name for the content: SHA-256 is.
    """
    digest = hashlib.sha256(_head("", tensor).encode())
    flat = tensor.detach().contiguous().flatten()
    words = flat.numel() * flat.element_size() // (_WORD * _BLOCK) * _BLOCK
    if tensor.dtype not in _SUMMED or not words:
        digest.update(_raw(flat))
        return digest.hexdigest()
    if flat.storage_offset() * flat.element_size() % _WORD:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    blocks = octets[: words * _WORD].view(torch.int64).view(-1, _BLOCK)
    for part in (blocks.sum(1), blocks.sum(0), octets[words * _WORD :]):
        digest.update(_raw(part))
    digest.update(repr(float(flat.sum())).encode())
    return digest.hexdigest()


def _head(name: str, tensor: torch.Tensor) -> str:
    return f"{name} {tensor.dtype} {list(tensor.shape)}\n"


def _raw(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, which are copied only from another device or where they do not lie in order."""
    flat = to_host(tensor).flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _sha256_tensor(tensor: torch.Tensor) -> str:
    return hashlib.sha256(_raw(tensor)).hexdigest()


def differences(old: Any, new: Any, *, was: str = "store", path: str = "") -> list[str]:
    """What differs between two JSON records, in words; hashes only where nothing that can be read differs.

    `was` says where the old one is.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), was=was, path=f"{path}.{key}".lstrip("."))
        return [line for line in lines if "sha256" not in line] or lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = ({str(index): value for index, value in enumerate(both)} for both in (old, new))
        return differences(*pairs, was=was, path=path)
    short = [value[:12] if "sha256" in path and isinstance(value, str) else value for value in (old, new)]
    return [] if old == new else [f"{path} ({was}: {short[0]!r}, now: {short[1]!r})"]
