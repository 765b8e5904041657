"""Run by test_store.py and test_gradients.py: one process loads torch once and forks a child a job;
each child analyses and comes to harm.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import signal
import sys

import unirank

model, text, jobs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
scheme = sys.argv[4] if len(sys.argv) > 4 else "whiten"
calibration = unirank.Calibration(text=text, windows=6, window=24, seed=0, batch=2)


def die_at_replace(count, *, before):
    original, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if before and len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*paths)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def work(kind, count, store):
    loaded = unirank.load(model, device="cpu")

    def progress(stage, done, total):
        if kind == "layer" and done == count:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and done == count:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))

    if kind in ("half-written", "renamed"):
        die_at_replace(count, before=kind == "half-written")
    try:
        unirank.analyze(loaded, store, scheme=scheme, calibration=calibration, progress=progress)
    except unirank.WriteError as error:
        print(error, flush=True)
        os._exit(5)
    os._exit(0)


status = {}
for kind, count, store in jobs:
    child = os.fork()
    if child == 0:
        work(kind, count, store)
    status[pathlib.Path(store).name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(status))
