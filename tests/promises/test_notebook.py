"""The notebook runs from top to bottom in a process of its own, and is kept without outputs.

Its cells are executed as a notebook does it, the last expression of each looked at in both ways. No Jupyter is needed:
nbclient and ipykernel would be 30 packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "walkthrough.ipynb"
RUN = """
import ast, json, sys
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))):
    tree = ast.parse(cell, f"cell {number}")
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    if last is not None:
        shown = eval(compile(last, f"cell {number}", "eval"), names)
        html = getattr(shown, "_repr_html_", lambda: "")()
        if shown is not None:
            print("SHOWN", json.dumps({"text": repr(shown), "html": html}))
"""


def cells(kind: str) -> list[str]:
    record: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in record["cells"] if cell["cell_type"] == kind]


def test_it_is_a_notebook_without_outputs() -> None:
    record = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (record["nbformat"], record["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in record["cells"]}) == len(record["cells"])
    for cell in record["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert len(cells("markdown")) >= len(cells("code"))  # every cell is explained


@pytest.mark.slow
@pytest.mark.smollm2
def test_it_runs_from_top_to_bottom(smollm2: str, tmp_path: Path) -> None:
    (tmp_path / "cells.json").write_text(json.dumps(cells("code")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::unirank.errors.UnirankWarning", "-c", RUN, "cells.json"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("SHOWN ")]
    assert all(len(one["text"].splitlines()) <= 8 for one in shown)
    kinds = [one["text"].partition(":")[0] for one in shown]
    assert kinds[:6] == ["LoadedModel", "AnalysisStore", "RankPlan", "CompressedModel", "EvalReport", "Curve"]
    tables = {kind for kind, one in zip(kinds, shown, strict=True) if "<table" in one["html"]}
    assert tables == {"AnalysisStore", "RankPlan", "CompressedModel", "Curve"}
    assert "compressed: " in done.stdout
    saved = json.loads((tmp_path / "walkthrough" / "model" / "rank_plan.json").read_text())
    assert saved["remove"] == 0.2
    assert int(shown[-1]["text"]) == 134_515_008 - 106_168_320 + saved["used"]  # parameters of what was loaded again
