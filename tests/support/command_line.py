"""The command line, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from unirank.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(name="run_unirank")
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run_unirank(*arguments) -> (exit code, stdout, stderr)`, in this process."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # main would set it for good

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unirank", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run
