"""Writing that leaves nothing half-written, and hashes of what was read."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from unirank.errors import InputError, WriteError


def _explain(path: Path, error: Exception) -> WriteError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    return WriteError(f"Could not write {path}: {reason}. Nothing half-written was left behind.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see the old file or the whole new one.

    What earlier writers of `path` left when they were killed is deleted. Raises WriteError (disk full, no permission);
    the temporary file is gone then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _sweep(path)
        with _held(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600)):
            write(temporary)
            temporary.chmod(_file_mode())
            _sync(temporary)
            os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise _explain(path, error) from error
    finally:
        with suppress(OSError):  # also when the parent is no directory; the first error is the one to tell
            temporary.unlink()


@contextmanager
def _held(handle: int) -> Iterator[None]:
    """Hold the open file or directory against `_sweep`; the lock ends with the process, however that ends."""
    try:
        with suppress(OSError):  # a file system without locks, where nothing is swept either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sweep(path: Path) -> None:
    """Delete what writers of `path` left beside it when they were killed: what nobody holds."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+|unirank-\w+)\.(tmp|old)")
    for left in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
        try:
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # its writer has finished, or it is no file of ours
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        except OSError:  # another run is writing it, or may not be disturbed; a leftover is no failure
            continue
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write sorted, indented JSON atomically: the same record gives the same bytes."""
    write_text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def mapped_copy(folder: Path, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` in a file of `folder` that is mapped into memory, so that the system can put it aside.

    The file has no name any more when this returns; its space is free when the copy is. Raises WriteError when the
    disk has no room.
    """
    path = folder / f".hidden.{os.getpid()}.tmp"
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, tensor.nbytes))  # else a full disk would end the process later
        flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise _explain(path, error) from error
    finally:
        path.unlink(missing_ok=True)
    return flat.copy_(tensor.flatten()).view(tensor.shape)


def link_or_copy(source: Path, path: Path) -> None:
    """Give the file `source` a second name `path`, or copy it where the file system has no such links.

    For files that are replaced and never written into. Raises WriteError like `write_atomically`.
    """

    def fill(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)

    write_atomically(path, fill)


def make_directory(path: Path) -> None:
    """Create `path` and its parents. Raises WriteError when the file system refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explain(path, error) from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory, which is made where it is not there, against other runs that would write into it.

    The lock is the system's and ends with the process, however that ends; it leaves no file. Network file systems that
    know no locks are used without. Raises InputError when another run holds it, WriteError like `make_directory`.
    """
    made = not directory.is_dir()
    make_directory(directory)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another run is at work in {directory}; wait for it, or choose another.") from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP):
                raise
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):  # that it is not empty is how it should be
                directory.rmdir()


def beside(path: Path, suffix: str) -> Path:
    """`path` with `suffix` behind its name, also where it is written as `.` or `..`. Raises InputError for the root."""
    named = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    if not named.name:
        raise InputError(f"The directory {path} has no name that {suffix} could follow; choose another.")
    return named.with_name(named.name + suffix)


def check_output(out: Path, *, marker: str, overwrite: bool) -> None:
    """Refuse an output directory that exists and is not ours, or is ours and not to be overwritten.

    `marker` is the file by which our own directories are known. Raises InputError.
    """
    if not out.exists() and not out.is_symlink():
        parent = next(p for p in [out.absolute().parent, *out.absolute().parents] if p.exists())
        if not parent.is_dir():
            raise InputError(f"Cannot create {out}: {parent} is not a directory.")
        if not os.access(parent, os.W_OK):
            raise InputError(f"Cannot create {out}: no permission to write in {parent}.")
        return
    if not out.is_dir():
        raise InputError(f"The output {out} exists and is not a directory.")
    entries = os.listdir(out)
    if entries and marker not in entries:
        raise InputError(
            f"The output directory {out} exists and was not made by unirank (it has no {marker}); "
            "choose another or empty it."
        )
    if entries and not overwrite:
        raise InputError(f"The output directory {out} exists already; pass --overwrite to replace it.")


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory beside `out` that takes its place when the block ends well, and vanishes otherwise.

    Raises WriteError when the file system refuses.
    """
    staging: Path | None = None
    out = Path(os.path.realpath(out))  # a link stays, and what it points to is replaced
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.unirank-", suffix=".tmp", dir=out.parent))
        with _held(os.open(staging, os.O_RDONLY)):
            staging.chmod(_file_mode() | 0o111 & ~_umask())
            yield staging
            for file in staging.iterdir():
                if file.is_file():
                    file.chmod(_file_mode())
                    _sync(file)
            if out.exists():
                _exchange(staging, out)  # what was there goes where the new one came from, and from there away
            else:
                os.replace(staging, out)
            _sync(out.parent)
    except Exception as error:
        # tokenizers raises a bare Exception when the system refuses; only its text tells.
        if isinstance(error, OSError | SafetensorError) or (type(error) is Exception and "(os error " in str(error)):
            raise _explain(out, error) from error
        raise
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step, so that `other` exists at every moment; in two steps where the system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux; Python has no name for it
    current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is not None and swap(current, os.fsencode(one), current, os.fsencode(other), exchange) == 0:
        return
    old = one.with_suffix(".old")
    os.replace(other, old)
    os.replace(one, other)
    os.replace(old, one)


def _file_mode() -> int:
    return 0o666 & ~_umask()  # the user's own; safetensors makes files that only their owner can read


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def bytes_on_disk(directory: Path, pattern: str = "*.safetensors") -> int:
    """Bytes of the files in `directory` that match `pattern`."""
    return sum(file.stat().st_size for file in directory.glob(pattern))


def sha256_text(text: str) -> str:
    """SHA-256 of the UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and raw bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu").contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(old: Any, new: Any, *, was: str = "store", path: str = "") -> list[str]:
    """What differs between two JSON records, in words; hashes only where nothing that can be read differs.

    `was` says where the old one is.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), was=was, path=f"{path}.{key}".lstrip("."))
        return [line for line in lines if "sha256" not in line] or lines
    short = [value[:12] if "sha256" in path and isinstance(value, str) else value for value in (old, new)]
    return [] if old == new else [f"{path} ({was}: {short[0]!r}, now: {short[1]!r})"]
