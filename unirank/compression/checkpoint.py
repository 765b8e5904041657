"""The compressed model as a Hugging Face directory: safetensors, config, rank plan, provenance, model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank.analysis.identity import Identity
from unirank.analysis.manifest import MANIFEST
from unirank.compression import shown
from unirank.compression.card import EVALUATIONS_FILE, PLAN_FILE, PROVENANCE_FILE, is_card, render_card
from unirank.compression.evaluations import evaluation_of, read_evaluations, with_newest
from unirank.compression.quantize_report import QuantizeReport
from unirank.compression.resaved import read_resaved
from unirank.compression.trainings import check_training
from unirank.compression.truncation import TruncateReport
from unirank.disk.files import beside, check_output, staged_directory, write_json, write_text
from unirank.disk.hashing import sha256_files
from unirank.disk.strictjson import Damaged, entry, read_object
from unirank.errors import InputError
from unirank.evaluation.perplexity import EvalReport, evaluate, generate
from unirank.evaluation.speed import Speed
from unirank.models.companions import read_companions, write_companions
from unirank.models.loading import load_paged, load_pretrained
from unirank.models.places import places_of
from unirank.models.shards import save_model
from unirank.models.structure import require_plain
from unirank.progress import Progress
from unirank.rank_plan import RankPlan
from unirank.text.windows import BUILTIN_HELD_OUT
from unirank.types import Companions, LoadedModel, Paging

if TYPE_CHECKING:
    from unirank.analysis.store import AnalysisStore
    from unirank.evaluation.measured_curve import Curve


@dataclass(frozen=True)
class CompressedModel:
    """A compressed model in memory, with how it came about."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: RankPlan
    report: TruncateReport
    identity: Identity | None  # of the analysis; None where another tool saved the checkpoint again without it
    source: str  # the dense model; "" where that is not known
    training: Mapping[str, Any] | None = None  # of `unirank.finetune` or `unirank.heal`
    evaluations: tuple[Mapping[str, Any], ...] = ()  # that `add_evaluation` wrote
    quantized: QuantizeReport | None = None  # of `unirank.quantize`
    pages: Paging | None = None  # of a model that was loaded with `stream`
    companions: Companions | None = field(
        default=None, repr=False, compare=False
    )  # of the dense model, or the checkpoint
    scratch: object = field(default=None, repr=False, compare=False)  # a temporary store that lives as long as this
    store: Path | None = field(default=None, compare=False)  # of the analysis, where it was or may still be

    def __repr__(self) -> str:
        return shown.as_lines(self)

    def _repr_html_(self) -> str:
        return shown.as_html(self)

    def generate(self, prompt: str, *, tokens: int = 40) -> str:
        """Greedy continuation of `prompt` by at most `tokens` tokens: `unirank.generate` of this model."""
        return generate(self.model, self.tokenizer, prompt, tokens=tokens)

    def evaluate(
        self,
        text: str | Path = BUILTIN_HELD_OUT,
        *,
        window: int | None = None,
        limit: int | None = None,
        split: str | None = None,
        progress: Progress = None,
    ) -> EvalReport:
        """Perplexity on `text`: `unirank.evaluate` of this model, with its arguments and errors."""
        asked: dict[str, Any] = {"window": window, "limit": limit, "split": split, "progress": progress}
        return evaluate(self.model, self.tokenizer, text=str(text), **asked)

    def curve(
        self,
        texts: str | Path | Sequence[str | Path] = (BUILTIN_HELD_OUT,),
        *,
        against: str | Path | PreTrainedModel | LoadedModel | None = None,
        store: AnalysisStore | str | Path | None = None,
        presets: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Curve:
        """How the loss grows with what is removed: `unirank.curve` of the dense model, from the same analysis.

        Args:
            texts: of the perplexities.
            against: the dense model, as a path, a name or in memory; None is the one that this was made from.
            store: its analysis; None is the one that this was made from, or of a checkpoint OUT, OUT-analysis.
            presets: None is the one of this model's scheme and allocator.
            options: the others of `unirank.curve`, such as `remove`, `limit` and `place`.

        Raises InputError where model or store is not known, or the store is another one; and like `unirank.curve`.
        """
        from unirank.tradeoff.of_compressed import curve_of

        return curve_of(self, texts, against, store, presets, **options)

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the checkpoint; `AutoModelForCausalLM.from_pretrained(out)` reads it after `import unirank`.

        Raises:
            InputError: `out` exists and is not a unirank checkpoint, or is one and `overwrite` is off.
            WriteError: the disk refused; nothing is left behind and an old checkpoint stays as it was.
        """
        out = Path(out)
        check_output(out, marker=PLAN_FILE, overwrite=overwrite)
        require_plain(self.model, "saved")
        with staged_directory(out) as folder:
            save_model(self.model, self.pages, folder)
            self.tokenizer.save_pretrained(folder)
            write_companions(self.companions, folder, self.tokenizer)
            write_text(folder / PLAN_FILE, self.plan.to_json())
            write_json(folder / PROVENANCE_FILE, self.provenance() | {"files": sha256_files(folder)})
            if self.evaluations:
                write_json(folder / EVALUATIONS_FILE, {"evaluations": list(self.evaluations)})
            write_text(folder / "README.md", _card(self))
        return out

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Save to a temporary directory and upload all of it, plan, provenance and card included; returns the address.

        `model.push_to_hub` of transformers uploads weights and config alone, with a card of its own.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory(prefix="unirank-") as scratch:
            folder = self.save(Path(scratch) / "checkpoint")
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Compressed by unirank"))

    def dense_name(self) -> str:
        """The dense model that it was made from, by name or path. Raises InputError where none is known."""
        if not self.source:
            raise InputError(
                "The checkpoint does not say which dense model it was made from; name that, or give it in memory, with "
                "against=."
            )
        return self.source

    def provenance(self) -> dict[str, Any]:
        """Where the model comes from, for JSON."""
        analysis = None if self.identity is None else self.identity.as_dict()
        record = {"analysis": analysis, "report": self.report.as_dict(), "source": self.source}
        if self.training is not None:
            record["training"] = self.training
        if self.quantized is not None:
            record["quantized"] = self.quantized.as_dict()
        return record


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself, without its weights. Fields as in `CompressedModel`."""

    plan: RankPlan
    report: TruncateReport
    identity: Identity | None
    source: str
    training: Mapping[str, Any] | None
    evaluations: tuple[Mapping[str, Any], ...]
    quantized: QuantizeReport | None
    files: Mapping[str, str]  # SHA-256 of the weights' files, by name


def _card(of: CompressedModel | Record) -> str:
    return render_card(of.source, of.plan, of.report, of.identity, of.training, of.evaluations, of.quantized)


def read_record(path: Path, *, trust_remote_code: bool = False) -> Record:
    """Read the plan and the provenance beside the weights.

    Where another tool saved the checkpoint again, ranks and sizes are those of its config.json, and what only our
    records said is None or "".

    Raises InputError when `path` is no such checkpoint.
    """
    if not path.is_dir():
        raise InputError(f"The compressed checkpoint {path} does not exist; make one with: unirank compress.")
    plan, report, quantized = None, None, None
    if (path / PLAN_FILE).is_file():
        try:
            plan = RankPlan.from_json((path / PLAN_FILE).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path / PLAN_FILE} cannot be read: {error}.") from error
    if plan is None or not (path / PROVENANCE_FILE).is_file():
        plan, report, quantized = read_resaved(path, plan, trust_remote_code=trust_remote_code)
    if not (path / PROVENANCE_FILE).is_file():
        assert report is not None
        return Record(plan, report, None, "", None, read_evaluations(path), quantized, {})
    try:
        known = read_object(path / PROVENANCE_FILE)
        report = TruncateReport.from_dict(entry(known, "report", dict))
        analysis = entry(known, "analysis", dict, type(None))
        identity = None if analysis is None else Identity.from_dict(analysis)
        training = known.get("training")
        if training is not None:
            check_training(training)
        if "quantized" in known:
            quantized = QuantizeReport.from_dict(entry(known, "quantized", dict))
        source = entry(known, "source", str)
        files = entry(known, "files", dict)
        for name in files:
            entry(files, name, str)
    except Damaged as error:
        raise InputError(f"{path / PROVENANCE_FILE} is missing or damaged: {error}.") from error
    return Record(plan, report, identity, source, training, read_evaluations(path), quantized, files)


def check_weights(path: Path, record: Record) -> None:
    """Raise InputError, naming the file, unless the weights in `path` have the bytes that unirank wrote."""
    found = sha256_files(path)
    for name, digest in record.files.items():
        if name not in found:
            raise InputError(f"{path / name} is missing, which {PROVENANCE_FILE} names.")
        if found[name] != digest:
            raise InputError(
                f"{path / name} has other bytes than were written (sha256 {found[name][:12]}, {PROVENANCE_FILE} says "
                f"{digest[:12]}): it is damaged, or was changed since. Where another tool saved the model here, delete "
                f"{PROVENANCE_FILE}, which is not of these weights."
            )


def check_card(path: Path) -> None:
    """Raise InputError where the model card in `path` is not one of ours, which a new one may replace."""
    file = path / "README.md"
    try:
        ours = not file.exists() or is_card(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise InputError(f"{file} is not a card that unirank wrote; move it away, and its text into the new one later.")


def add_evaluation(
    path: Path,
    report: EvalReport,
    *,
    dense: EvalReport | None = None,
    speed: tuple[Speed, Speed] | None = None,
    sample: tuple[str, str, str] | None = None,
    card: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Write what was measured into the checkpoint at `path`; no file of its weights is opened.

    It takes the place of what was measured on the same text before.

    Args:
        report: perplexity of this checkpoint.
        dense: of the model it was made from, on the same windows.
        speed: tokens a second of the dense model and of this one, measured in the same call.
        sample: a prompt, and how the dense model and this one go on.
        card: write the model card again too, with the perplexities.
        trust_remote_code: run modelling code that the checkpoint brings, where its records are gone.

    Raises InputError when `path` is no checkpoint, or has a model card of somebody else that would be replaced;
    WriteError when the disk refuses.
    """
    record = read_record(path, trust_remote_code=trust_remote_code)
    if card:
        check_card(path)
    added = evaluation_of(report, dense=dense, speed=speed, sample=sample)
    record = replace(record, evaluations=with_newest(record.evaluations, added))
    write_json(path / EVALUATIONS_FILE, {"evaluations": list(record.evaluations)})
    if card:
        write_text(path / "README.md", _card(record))


def open_compressed(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
) -> CompressedModel:
    """Read what `CompressedModel.save` wrote, to go on working with it. Arguments as in `unirank.load`.

    Raises InputError when `path` is no such checkpoint, or a file of it has other bytes than were written, or a
    quantised one is to be streamed.
    """
    record = read_record(Path(path), trust_remote_code=trust_remote_code)
    if stream and record.quantized is not None:
        raise InputError(f"The checkpoint {path} is quantised and is read as a whole; leave stream=True out.")
    check_weights(Path(path), record)
    pages = None
    if stream:
        model, tokenizer, pages = load_paged(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    else:
        model, tokenizer = load_pretrained(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return CompressedModel(
        model,
        tokenizer,
        record.plan.renamed(places_of(model, record.plan.ranks)),  # a body was compressed, and has a head now
        record.report,
        record.identity,
        record.source,
        record.training,
        record.evaluations,
        record.quantized,
        pages,
        read_companions(Path(path), tokenizer, trust_remote_code=trust_remote_code),
        store=_analysis_of(Path(path)),
    )


def _analysis_of(path: Path) -> Path | None:
    """The store that `unirank compress` leaves beside a checkpoint, where it is there still."""
    place = beside(path, "-analysis")
    return place if (place / MANIFEST).is_file() else None
