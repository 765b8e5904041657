"""Writing that leaves nothing half-written, and hashes of what was read."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from unirank.errors import InputError, WriteError, is_out_of_memory


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into a WriteError (disk full, no permission)."""
    try:
        yield
    except Exception as error:
        # tokenizers raises a bare Exception when the system refuses, and torch.save a RuntimeError.
        text = str(error)
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        told = type(error) is Exception and "(os error " in text
        told = told or (type(error) is RuntimeError and frame.f_globals["__name__"] == "torch.serialization")
        if is_out_of_memory(error) or not (told or isinstance(error, OSError | SafetensorError)):
            raise
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
        reason = "the disk is full" if full else getattr(error, "strerror", None) or text
        raise WriteError(f"Could not write {path}: {reason}. Nothing half-written was left behind.") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see the old file or the whole new one.

    What earlier writers of `path` left when they were killed is deleted. Raises WriteError (disk full, no permission);
    nothing of the file is left then.
    """
    # In a directory of its own, for safetensors writes under a name of its own choice and then renames.
    with explained(path), _scratch(path) as folder:
        temporary = folder / path.name
        write(temporary)
        temporary.chmod(_file_mode())
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """An empty directory beside `path`, gone at the end; what killed runs left of theirs goes first.

    A lock, which ends with the process however that ends, tells `_sweep` of other runs that it is in use.
    """
    for left in [file for file in path.parent.iterdir() if re.fullmatch(leftover(re.escape(path.name)), file.name)]:
        _sweep(left)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.unirank-", suffix=".tmp", dir=path.parent))
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks, where nothing is swept either
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
        finally:
            os.close(handle)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def leftover(name: str) -> str:
    """Pattern of what a killed writer leaves beside the file or directory whose name has the pattern `name`."""
    return rf"\.({name})\.unirank-\w+\.(tmp|old)"


def _sweep(left: Path) -> None:
    """Delete a directory that a killed writer left, unless another run holds it."""
    try:
        handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:  # its writer has finished, or it is none of ours
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if left.suffix == ".old":  # killed between the two steps of `_exchange`
            path = left.with_name(left.name[1:].partition(".unirank-")[0])
            if not path.exists():
                os.replace(left, path)
                return
        shutil.rmtree(left)
    except OSError:  # another run holds it, or we may not; a leftover is no failure
        return
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
        with explained(path):
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, tensor.nbytes))  # else a full disk would end us later
            flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
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
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)


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
    out = Path(os.path.realpath(out))  # a link stays, and what it points to is replaced
    make_directory(out.parent)
    with explained(out), _scratch(out) as scratch:
        staging = scratch / out.name
        staging.mkdir()
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


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step, so that `other` exists at every moment; in two steps where the system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux; Python has no name for it
    current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is not None and swap(current, os.fsencode(one), current, os.fsencode(other), exchange) == 0:
        return
    old = one.parent.with_suffix(".old")  # beside `other`; if this ends here, the next run puts it back
    os.replace(other, old)
    try:
        os.replace(one, other)
    except OSError:
        os.replace(old, other)
        raise
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


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def delete_matching(folder: Path, pattern: str) -> None:
    """Delete what is in `folder` and has a name that the regular expression `pattern` matches as a whole."""
    for file in list(folder.iterdir()):
        if re.fullmatch(pattern, file.name):
            delete(file)
