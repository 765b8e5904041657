"""Errors that unirank raises on purpose, and its warnings; each says in a sentence what was got and what is legal."""

from __future__ import annotations

import inspect
import warnings

# What errors of memory say that have no class of their own: torch's allocator on a CPU; the CUDA runtime, of which the
# native ops pass the text on; cuBLAS and cuSOLVER, which allocate by themselves; the system, also through Rust.
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, a GPU's (torch has a class for it), or one of the system or a library that is known by its text.

    Whoever turns errors of others into one of ours lets these pass, for what helps is less work, not another input.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(said in str(error) for said in _NO_MEMORY)


class UnirankError(Exception):
    """Base of every deliberate error; the command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 1


class InputError(UnirankError, ValueError):
    """The caller asked for something that is not legal (a value, a path, a model, a text)."""

    exit_code = 2


class StoreError(UnirankError):
    """An analysis store is missing, damaged, incomplete or belongs to other inputs."""

    exit_code = 3


class NonFiniteError(UnirankError):
    """A NaN or an infinity appeared; the message names the layer or the window."""

    exit_code = 4


class WriteError(UnirankError):
    """Output could not be written (full disk, no permission); nothing half-written was left behind."""

    exit_code = 5


def first_line(error: BaseException) -> str:
    """What somebody else's error says, to be a part of a sentence of ours: its first line, or its class's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")


def capitalised(words: str) -> str:
    """`words` as the beginning of a sentence: str.capitalize would make names such as 100M small."""
    return words[:1].upper() + words[1:]


class UnirankWarning(UserWarning):
    """What was asked for is legal and rarely what one wants; says what would be better. The run goes on."""


def warn(sentence: str) -> None:
    """Warn by `sentence`. The line that is named is the one outside of unirank from which the call came."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "unirank":
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, UnirankWarning, stacklevel=level)
