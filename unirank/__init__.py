"""unirank: smaller language models by low-rank decomposition, with one global ranking of all components.

Importing it teaches transformers to load compressed checkpoints. The stages, in order: `load`, `analyze`, `plan`,
`truncate` (or all in one: `compress`), `evaluate`. `remove` is always the fraction of the decoder linears' weights that
is removed.
"""

from importlib.metadata import version as _version

from unirank import ops, reference
from unirank.analysis.calibration import Calibration
from unirank.analysis.fill_store import analyze
from unirank.analysis.scheme import schemes
from unirank.analysis.store import AnalysisStore, open_store
from unirank.api import apply, compress
from unirank.compression.checkpoint import CompressedModel, open_compressed
from unirank.compression.densified import densify
from unirank.compression.refine import Refine
from unirank.compression.truncation import TruncateReport, truncate
from unirank.diagnosis.claim import Diagnosis, diagnose
from unirank.diagnosis.correlation import spearman
from unirank.errors import InputError, NonFiniteError, StoreError, UnirankError, WriteError
from unirank.evaluation.perplexity import EvalReport, evaluate, generate
from unirank.evaluation.tasks import TaskReport, Tasks, run_tasks
from unirank.finetuning.tuning import Finetune, finetune
from unirank.models import quantizer as _hf  # registers the checkpoint format with transformers
from unirank.models.fused import fuse
from unirank.models.loading import describe, load
from unirank.models.low_rank import LowRankLinear
from unirank.planning.allocator import allocators
from unirank.planning.imported_ranks import import_plan
from unirank.planning.measuring import make_workbench
from unirank.planning.ranks import plan
from unirank.planning.score import ScoreSettings
from unirank.rank_plan import RankPlan
from unirank.recipes import presets
from unirank.types import Factors, LinearSpec, LoadedModel, effective_rank

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
