"""unirank: smaller language models by low-rank decomposition, with one global ranking of all components.

Importing it teaches transformers to load compressed checkpoints. The stages, in order: `load`, `analyze`, `plan`,
`truncate` (or all in one: `compress`), `evaluate`. `remove` is always the fraction of the decoder linears' weights that
is removed.
"""

from importlib.metadata import version as _version

from unirank import hf as _hf  # registers the checkpoint format with transformers
from unirank import ops, reference
from unirank.allocate import plan
from unirank.allocators import allocators
from unirank.analyze import Calibration, analyze
from unirank.api import apply, compress
from unirank.checkpoint import CompressedModel, open_compressed
from unirank.correlation import effective_rank, spearman
from unirank.densify import densify
from unirank.diagnose import Diagnosis, diagnose
from unirank.errors import InputError, NonFiniteError, StoreError, UnirankError, WriteError
from unirank.evaluate import EvalReport, evaluate, generate
from unirank.finetune import Finetune, finetune
from unirank.fuse import fuse
from unirank.harness import TaskReport, Tasks, run_tasks
from unirank.imported import import_plan
from unirank.models import describe, load
from unirank.modules import LowRankLinear
from unirank.presets import presets
from unirank.refine import Refine
from unirank.schemes import schemes
from unirank.score import ScoreSettings
from unirank.store import AnalysisStore, open_store
from unirank.truncate import TruncateReport, truncate
from unirank.types import Factors, LinearSpec, LoadedModel, RankPlan
from unirank.workbench import make_workbench

__version__ = _version("unirank")
UniRankConfig = _hf.UniRankConfig

__all__ = [
    "AnalysisStore",
    "Calibration",
    "CompressedModel",
    "Diagnosis",
    "EvalReport",
    "Factors",
    "Finetune",
    "InputError",
    "LinearSpec",
    "LoadedModel",
    "LowRankLinear",
    "NonFiniteError",
    "RankPlan",
    "Refine",
    "ScoreSettings",
    "StoreError",
    "TaskReport",
    "Tasks",
    "TruncateReport",
    "UniRankConfig",
    "UnirankError",
    "WriteError",
    "__version__",
    "allocators",
    "analyze",
    "apply",
    "compress",
    "densify",
    "describe",
    "diagnose",
    "effective_rank",
    "evaluate",
    "finetune",
    "fuse",
    "generate",
    "import_plan",
    "load",
    "make_workbench",
    "open_compressed",
    "open_store",
    "ops",
    "plan",
    "presets",
    "reference",
    "run_tasks",
    "schemes",
    "spearman",
    "truncate",
]
