"""Tasks of the Language Model Evaluation Harness (lm-eval, the extra `eval`) on dense and compressed models."""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank import looks
from unirank.display import shows_progress, told
from unirank.errors import InputError, NonFiniteError
from unirank.models.embeddings import embedding_rows
from unirank.models.wrappers import runnable
from unirank.progress import OnProgress, Progress
from unirank.text.windows import check_tokens

# Where lm-eval draws its own bars. They would overwrite ours, and no argument turns them off.
_DRAWS_BARS = ("api.task", "api.model", "models.huggingface")


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task or group.

    Attributes:
        filter: lm-eval's name of how answers were read from outputs; "none" for likelihoods.
        stderr: standard error of the mean; None where lm-eval has none.
        n: documents; None for a group that does not count them.
        fewshot: examples that were in the prompt, which may be fewer than were asked for; None for a group.
        task_version: of the task's definition.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int | None
    fewshot: int | None
    task_version: str | None


@dataclass(frozen=True)
class TaskReport:
    """All metrics of a run, and the version of lm-eval: numbers of two versions are not comparable."""

    results: tuple[TaskResult, ...]
    lm_eval: str
    batch: int
    limit: int | None
    dtype: str

    def __repr__(self) -> str:
        rows = [f"{one.task} {one.metric}: {one.value:.4f}" for one in self.results]
        more = [f"and {len(rows) - 5} more"] if len(rows) > 6 else []
        some = "" if self.limit is None else f", the first {self.limit} documents"
        return looks.lines(
            f"TaskReport: {len(rows)} metrics of lm-eval {self.lm_eval}, {self.dtype}{some}",
            *(rows[:5] + more if more else rows),
            "next: .results, .as_dict()",
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_lm_eval() -> None:
    """Raise InputError when lm-eval is not installed; cheap, to be called before a model is loaded."""
    if find_spec("lm_eval") is None:
        raise InputError("Tasks need lm-eval, which is not installed: pip install 'unirank[eval]'.")


class Tasks:
    """Tasks by name, found before any model is loaded.

    Args:
        names: tasks, groups or tags of lm-eval.
        include: a directory of further task definitions (YAML), which come before lm-eval's own.

    Raises InputError: lm-eval is not installed, no name, an unknown name (says which are similar), no such directory.
    """

    def __init__(self, names: Sequence[str], *, include: str | Path | None = None) -> None:
        require_lm_eval()
        if not names or not all(names):
            raise InputError("No task is given; tasks= needs at least one name, such as arc_easy.")
        if include is not None and not Path(include).is_dir():
            raise InputError(f"The task directory {include} does not exist.")
        self.names = list(dict.fromkeys(names))
        place = None if include is None else str(include)
        with _quiet():
            # Reading lm-eval's own 14,000 definitions takes seconds; not needed when all are in the directory.
            task_manager = _lm_eval("tasks").TaskManager
            manager = task_manager(include_path=place, include_defaults=False) if place else None
            if manager is None or not set(self.names) <= set(manager.all_tasks):
                manager = task_manager(include_path=place)
        self._manager = manager
        known = manager.all_tasks
        for name in self.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
                near += [task for task in known if name.lower() in task.lower() and task not in near][: 5 - len(near)]
                hint = f"similar names are {', '.join(near)}" if near else "no name is similar"
                raise InputError(f"The task {name!r} does not exist in lm-eval {version('lm-eval')}; {hint}.")

    def load(self, fewshot: int | None) -> list[Any]:
        """lm-eval's objects, with documents. Raises InputError when they cannot be read, or a task has no examples."""
        objects: list[Any] = []
        for name in self.names:
            try:
                found = self._manager.load([name])
            except (OSError, ValueError) as error:  # what datasets raises without a network, or for a bad file
                raise InputError(f"The documents of the task {name!r} cannot be read: {_first_line(error)}.") from error
            for task, definition in found["tasks"].items():
                if fewshot and definition.get_config("num_fewshot") == 0:
                    raise InputError(f"The task {task} is defined without few-shot examples; leave fewshot= out.")
            groups = found.get("groups", {})
            objects += [groups[name]] if name in groups else list(found["tasks"].values())
        return objects


@shows_progress
def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks | Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress = None,
) -> TaskReport:
    """Run tasks of lm-eval on `model`, dense or compressed, with lm-eval's own conventions and seeds.

    Args:
        tasks: a `Tasks`, or names.
        fewshot: examples in the prompt; None takes each task's own number.
        limit: only the first `limit` documents of each task; None takes all. For trials: such numbers are no results.
        batch: requests that run together; another batch rounds differently.

    Raises:
        InputError: see `Tasks`; a number is not legal; a document has a token without an embedding.
        NonFiniteError: a log likelihood or a metric is NaN or infinity; names the task.
    """
    for name, value, least in (("fewshot", fewshot, 0), ("limit", limit, 1), ("batch", batch, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} = {value} is not legal; it is at least {least}.")
    model = runnable(model)
    chosen = tasks if isinstance(tasks, Tasks) else Tasks(tasks)
    with _quiet(), _bars(told(progress)):
        objects = chosen.load(fewshot)
        padded = padding_tokenizer(tokenizer, model)
        network = _model_class()(pretrained=model, tokenizer=padded, batch_size=batch)
        found = _lm_eval("evaluator").simple_evaluate(
            model=network,
            tasks=objects,
            task_manager=chosen._manager,
            num_fewshot=fewshot,
            limit=limit,
            log_samples=False,
        )
    assert found is not None  # only ranks other than 0 get none
    return TaskReport(tuple(_results(found)), version("lm-eval"), batch, limit, str(model.dtype).removeprefix("torch."))


def padding_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer; where its padding has no embedding in `model`, a copy that pads with EOS (**choice**)."""
    pad, eos, rows = tokenizer.pad_token_id, tokenizer.eos_token_id, embedding_rows(model)
    if not (isinstance(pad, int) and pad >= rows and isinstance(eos, int) and eos < rows):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _lm_eval(module: str) -> Any:
    """A module of lm-eval, untyped: the type checker need not have it installed."""
    return import_module(f"lm_eval.{module}")


def _model_class() -> Any:
    class Model(_lm_eval("models.huggingface").HFLM):
        """lm-eval compares NaN likelihoods as if they were numbers; here they stop the run.

        So does a token without an embedding, by its name: on a GPU it would be a failed assertion.
        """

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            check_tokens(inps, self.tokenizer, self.model, "A document of the tasks")
            return super()._model_call(inps, *arguments, **options)

        def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
            check_tokens(context, self.tokenizer, self.model, "A document of the tasks")
            return super()._model_generate(context, *arguments, **options)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            found = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return _checked(requests, found, [value for value, _ in found])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            found = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            return _checked(requests, found, found)

    return Model


def _checked(requests: Any, found: Any, values: Sequence[float]) -> Any:
    for request, value in zip(requests, values, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"A log likelihood in the task {request.task_name} (document {request.doc_id}) is {value}; "
                "the model is damaged or overflows in its dtype."
            )
    return found


def _results(found: dict[str, Any]) -> Iterator[TaskResult]:
    for task, row in {**found["results"], **found.get("groups", {})}.items():
        for key, value in row.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            if not math.isfinite(value):
                raise NonFiniteError(f"The metric {metric} of the task {task} is {value}.")
            stderr = row.get(f"{metric}_stderr,{name}")
            count = found["n-samples"].get(task, {}).get("effective")
            of_task = found["versions"].get(task)
            yield TaskResult(
                task,
                metric,
                name,
                float(value),
                float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                count,
                found["n-shot"].get(task),
                None if of_task is None else str(of_task),
            )


# -- lm-eval writes to the terminal as a program would; here it is a library ------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's log messages below errors, and the progress bars of datasets."""
    datasets: Any = import_module("datasets")
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _bars(progress: OnProgress) -> Iterator[None]:
    """What lm-eval would draw with tqdm goes to `progress`, while it runs."""

    class Bar:
        def __init__(
            self, iterable: Iterable[Any] | None = None, desc: str = "", total: int | None = None, **_: Any
        ) -> None:
            self._items = iterable
            known = len(iterable) if isinstance(iterable, Sized) else 0
            self._total, self._done, self._stage = total or known, 0, desc or "documents"

        def __iter__(self) -> Iterator[Any]:
            for item in self._items or ():
                yield item
                self.update(1)

        def update(self, steps: int = 1) -> None:
            self._done += steps
            progress(self._stage.lower(), self._done, max(self._total, self._done))

        def close(self) -> None:
            """tqdm's; there is nothing to close."""

    before = {}
    for name in _DRAWS_BARS:
        module = _lm_eval(name)
        if hasattr(module, "tqdm"):  # another version may draw elsewhere; its bars then stay as they are
            before[module] = module.tqdm
            module.tqdm = Bar
    try:
        yield
    finally:
        for module, original in before.items():
            module.tqdm = original


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
