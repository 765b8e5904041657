"""Run by test_kills.py: loads everything once, then forks a child a job; each runs a command and comes to harm.

Reads jobs as JSON lines, each [directory, arguments, harm, when]; writes a JSON line for each: exit code (negative for
a signal), what was printed to standard error, and how many calls the child counted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable

import peft
import torch
import transformers

import unirank
from unirank.cli import main

torch.set_num_threads(1)
# What a command imports late, imported early: a child should spend its time at work.
LATE = (peft.PeftModel, transformers.Trainer, transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast)
LATE += (unirank.finetune, unirank.heal, unirank.quantize, unirank.densify, unirank.evaluate)


def after_calls(count: int, act: Callable[[], object]) -> list[int]:
    """Do `act` once, at the `count`-th call of a Python or C function in the main thread; counts on in the result."""
    seen = [0]

    def profile(_frame: object, event: str, _argument: object) -> None:
        if event in ("call", "c_call"):
            seen[0] += 1
            if seen[0] == count:
                act()

    sys.setprofile(profile)
    return seen


def harmed(directory: str, arguments: list[str], harm: str, when: int) -> tuple[int, str, int]:
    """Exit code, standard error and calls of one command."""
    os.chdir(directory)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seen = [0]
    if harm == "kill":
        seen = after_calls(when, lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif harm == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, Python would ignore it
        # It may come between somebody's open and close, or in a destructor: Python only prints that, and as an error
        # under the tests' -W error. What the command does about the interrupt is judged by code, words and files.
        sys.unraisablehook = lambda _: None
        seen = after_calls(when, lambda: os.kill(os.getpid(), signal.SIGINT))
    elif harm == "count":
        seen = after_calls(0, lambda: None)
    else:  # no file grows beyond `when` bytes: the write ends the process, or fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if harm == "kill in a write" else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (when, when))
    sys.argv = ["unirank", *arguments]
    code, errors = 0, io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main.main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            code = 70
            traceback.print_exc()
    sys.setprofile(None)
    return code, errors.getvalue(), seen[0]


for line in sys.stdin:
    job = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 70
        try:
            status, *rest = harmed(*job)
            os.write(writing, json.dumps(rest).encode())
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors, calls = json.loads(said) if said else ("", 0)
    print(json.dumps({"code": code, "errors": errors, "calls": calls}), flush=True)
