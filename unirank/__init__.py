"""unirank: smaller language models by low-rank decomposition, with one global ranking of all components.

Importing it teaches transformers to load compressed checkpoints. The stages, in order: `load`, `analyze`, `plan`,
`apply` (or all in one: `compress`), `evaluate`. `remove` is always the fraction of the decoder linears' weights that
is removed.

Names are imported when they are first used, so that `import unirank` itself loads neither torch nor transformers.
"""

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from unirank.models import registration as _registration

# MKL, torch's matrix products on x86, splits long sums by the number of threads, so bits would follow it. On Intel CPUs
# STRICT has the same kernels without that split, as fast; on others see `unirank.matmul`. MKL reads the name at its
# first product; what is set already stays.
_os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if TYPE_CHECKING:
    from unirank import ops, reference
    from unirank.analysis.calibration import Calibration
    from unirank.analysis.needs import Needs
    from unirank.analysis.scheme import schemes
    from unirank.analysis.store import AnalysisStore, open_store
    from unirank.api import analyze, compress, dry_run, plan
    from unirank.compression.checkpoint import CompressedModel, open_compressed
    from unirank.compression.densified import densify
    from unirank.compression.quantization import quantize
    from unirank.compression.quantize_report import QuantizeReport
    from unirank.compression.refine import Refine
    from unirank.compression.truncation import TruncateReport, truncate
    from unirank.diagnosis.claim import Diagnosis, diagnose
    from unirank.diagnosis.correlation import spearman
    from unirank.errors import InputError, NonFiniteError, StoreError, UnirankError, UnirankWarning, WriteError
    from unirank.evaluation.measured_curve import Curve, CurvePoint
    from unirank.evaluation.perplexity import EvalReport, evaluate, generate
    from unirank.evaluation.tasks import TaskReport, Tasks, run_tasks
    from unirank.finetuning.healing import heal
    from unirank.finetuning.settings import Finetune, Heal
    from unirank.finetuning.tuning import finetune
    from unirank.job import apply
    from unirank.models.fused import fuse
    from unirank.models.loading import describe, load
    from unirank.models.low_rank import LowRankLinear
    from unirank.models.quantizer import UniRankConfig
    from unirank.planning.allocator import allocators
    from unirank.planning.imported_ranks import import_plan
    from unirank.planning.measuring import make_workbench
    from unirank.planning.score import ScoreSettings
    from unirank.rank_plan import RankPlan
    from unirank.recipes import Preset, presets, recipe
    from unirank.report.write import write_report
    from unirank.tradeoff.automatic import AutoResult, auto
    from unirank.tradeoff.sweep import curve
    from unirank.tradeoff.target import Target
    from unirank.types import Factors, LinearSpec, LoadedModel, effective_rank

    __version__: str

# Where each public name is. tests/promises/test_start_up.py holds it against the imports above.
_HOME = {
    "analysis.calibration": ("Calibration",),
    "analysis.needs": ("Needs",),
    "analysis.scheme": ("schemes",),
    "analysis.store": ("AnalysisStore", "open_store"),
    "api": ("analyze", "compress", "dry_run", "plan"),
    "job": ("apply",),
    "compression.checkpoint": ("CompressedModel", "open_compressed"),
    "compression.densified": ("densify",),
    "compression.quantization": ("quantize",),
    "compression.quantize_report": ("QuantizeReport",),
    "compression.refine": ("Refine",),
    "compression.truncation": ("TruncateReport", "truncate"),
    "diagnosis.claim": ("Diagnosis", "diagnose"),
    "diagnosis.correlation": ("spearman",),
    "errors": ("InputError", "NonFiniteError", "StoreError", "UnirankError", "UnirankWarning", "WriteError"),
    "evaluation.measured_curve": ("Curve", "CurvePoint"),
    "evaluation.perplexity": ("EvalReport", "evaluate", "generate"),
    "evaluation.tasks": ("TaskReport", "Tasks", "run_tasks"),
    "finetuning.healing": ("heal",),
    "finetuning.settings": ("Finetune", "Heal"),
    "finetuning.tuning": ("finetune",),
    "models.fused": ("fuse",),
    "models.loading": ("describe", "load"),
    "models.low_rank": ("LowRankLinear",),
    "models.quantizer": ("UniRankConfig",),
    "planning.allocator": ("allocators",),
    "planning.imported_ranks": ("import_plan",),
    "planning.measuring": ("make_workbench",),
    "planning.score": ("ScoreSettings",),
    "rank_plan": ("RankPlan",),
    "recipes": ("Preset", "presets", "recipe"),
    "report.write": ("write_report",),
    "tradeoff.sweep": ("curve",),
    "tradeoff.automatic": ("AutoResult", "auto"),
    "tradeoff.target": ("Target",),
    "types": ("Factors", "LinearSpec", "LoadedModel", "effective_rank"),
}
_HOME_OF = {name: home for home, names in _HOME.items() for name in names}

__all__ = [
    "AnalysisStore",
    "AutoResult",
    "Calibration",
    "CompressedModel",
    "Curve",
    "CurvePoint",
    "Diagnosis",
    "EvalReport",
    "Factors",
    "Finetune",
    "Heal",
    "InputError",
    "LinearSpec",
    "LoadedModel",
    "LowRankLinear",
    "Needs",
    "NonFiniteError",
    "Preset",
    "QuantizeReport",
    "RankPlan",
    "Refine",
    "ScoreSettings",
    "StoreError",
    "Target",
    "TaskReport",
    "Tasks",
    "TruncateReport",
    "UniRankConfig",
    "UnirankError",
    "UnirankWarning",
    "WriteError",
    "__version__",
    "allocators",
    "analyze",
    "apply",
    "auto",
    "compress",
    "curve",
    "densify",
    "describe",
    "diagnose",
    "dry_run",
    "effective_rank",
    "evaluate",
    "finetune",
    "fuse",
    "generate",
    "heal",
    "import_plan",
    "load",
    "make_workbench",
    "open_compressed",
    "open_store",
    "ops",
    "plan",
    "presets",
    "quantize",
    "recipe",
    "reference",
    "run_tasks",
    "schemes",
    "spearman",
    "truncate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("unirank")
    elif name in ("ops", "reference"):
        return _import_module(f"unirank.{name}")
    elif name in _HOME_OF:
        value = getattr(_import_module(f"unirank.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'unirank' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_registration.register()
