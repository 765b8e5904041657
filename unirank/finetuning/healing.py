"""Healing: a compressed model is refined by gradient, layer by layer, on what the dense layers make (method 10).

Two streams go through the layers in order, as in the second pass: `x` of the dense model, and `x'` of the layers that
are compressed and healed. One dense and one compressed layer are at work at a time, so models that are streamed are
healed too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from unirank.analysis.calibration import Calibration, calibration_of
from unirank.analysis.identity import weights_hash
from unirank.analysis.redraw import check_model
from unirank.analysis.store import AnalysisStore, open_store
from unirank.compression.checkpoint import CompressedModel, open_compressed
from unirank.costs import Sizes, distillation, healing, sampling
from unirank.disk.files import locked
from unirank.disk.strictjson import Damaged
from unirank.disk.tensorfile import open_tensors, write_tensors
from unirank.display import shows_progress, told
from unirank.errors import InputError, UnirankError
from unirank.finetuning.adapters import adapted
from unirank.finetuning.block import Block, Healed, Look
from unirank.finetuning.distilling import distill
from unirank.finetuning.healing_streams import Group, place_for, read_streams, start, write_streams
from unirank.finetuning.healing_text import Drawn, draw
from unirank.finetuning.output_metric import OutputMetric
from unirank.finetuning.sampling import check_can_sample, sample
from unirank.finetuning.settings import Heal
from unirank.finetuning.work import check_work, claim
from unirank.layerwise.lending import lent
from unirank.layerwise.recording import layers_of
from unirank.models.loading import describe, load
from unirank.models.low_rank import align_weights, count_target
from unirank.models.targets import refuse_expert_targets
from unirank.progress import OnProgress, Progress, expect
from unirank.provenance import device_name, versions
from unirank.types import LoadedModel

_RECIPE = "heal.json"
_TRAIN = "train"


@shows_progress
def heal(
    compressed: CompressedModel | str | Path,
    calibration: Calibration | str | Path | None = None,
    settings: Heal | None = None,
    *,
    work: str | Path,
    against: LoadedModel | PreTrainedModel | str | Path | None = None,
    second_text: str | None = None,
    store: AnalysisStore | str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = None,
) -> CompressedModel:
    """Refine a compressed model by gradient, layer by layer; ranks and parameter count stay exactly as they are.

    All parameters of a layer (factors, biases, norms, matrices that stayed dense) are trained so that its output, on
    the stream that really enters it, comes close to what the dense layer makes. Memory holds one dense layer and one
    compressed layer with its float32 copy and two moments of AdamW, beside the hidden states; where the models are
    streamed, or memory is short, these are in mapped files of `work`, and beside a GPU in the host's memory first.

    Args:
        compressed: a checkpoint of ours, or such a model in memory or opened with `stream`, which is changed in place.
        calibration: which tokens train, or their text alone; None is the default `Calibration`. Its seed is that of the
            order too. `batch`, `gradient_windows` and `clip`, which are about an analysis, play no part.
        settings: None is the default `Heal`.
        work: directory of what is finished, layer by layer. A run that was interrupted resumes there when everything
            else is the same, and ends with the same weights for the same number of threads. It may be deleted when the
            result is saved.
        against: the dense model; None takes the one that the checkpoint names as its source. A name is loaded, streamed
            where the compressed model is.
        second_text: another text; a layer's best state is then the one with the least mean of the two relative errors,
            on held-out windows and on as many of this text, none of which is trained on.
        store: an analysis of the dense model with gradients: a layer's errors then count by what the loss feels of
            them, `Heal.metric_damping`. None counts every direction alike.
        device: where to load a checkpoint; None takes the GPU when there is one.
        trust_remote_code: run modelling code that the checkpoint or the dense model brings, where one is loaded here.

    Returns the model with `training`: `kind` is "heal"; settings, hashes, and `layers`, of each the mean squared
    relative error on held-out windows before and after, the passes made, and which of them was best (0: none);
    `distilled`, where `Heal.distill_steps` were made, has the divergence from the dense model on held-out windows
    before and after them, nats a token.

    Raises:
        InputError: the model is not compressed, the dense model does not fit it, a text is unusable or too short,
            `store` is of another model, `work` belongs to another run.
        StoreError: `store` has no gradients.
        NonFiniteError: a loss or gradient is NaN or infinity; names the layer and the step.
        WriteError: the disk refuses what is kept in `work`.
    """
    settings = settings or Heal()
    calibration = calibration_of(calibration)
    work = Path(work)
    if isinstance(compressed, str | Path):
        compressed = open_compressed(compressed, device=device, trust_remote_code=trust_remote_code)
    refuse_expert_targets(compressed.model, compressed.plan.ranks, "Healing")
    adapted(compressed.model)  # refuses a model that is not compressed
    dense = _dense(compressed, against, trust_remote_code)
    own = dataclasses.replace(
        dense, model=compressed.model, tokenizer=compressed.tokenizer, source="", pages=compressed.pages
    )
    if settings.distill_steps:
        for loaded in (own, dense):
            loaded.require_whole("Heal.distill_steps")
    metric = None
    if store is not None:
        store = store if isinstance(store, AnalysisStore) else open_store(store)
        store.require_gradients()
        check_model(dense, store)
        metric = OutputMetric(store, dense.layers, settings.metric_damping)
    whole = max(settings.distill_steps * settings.batch, calibration.windows) if settings.distill_steps else 0
    written = settings.sampled(whole)
    if settings.samples:
        check_can_sample(dense.model, dense.tokenizer)
    drawn = draw(own, calibration, second_text, settings.held_out, whole - written)
    if written and drawn.whole is not None:
        written = whole - len(drawn.whole)  # more than asked for, where the text gives fewer
    recipe = _identity(own, dense, drawn, written, calibration, settings, store)
    check_work(work, _RECIPE)
    sizes, stages = Sizes.of(dense), []
    if settings.passes:
        stages.append(healing(sizes, calibration.windows * calibration.window, settings.passes))
    if settings.distill_steps:
        stages += [sampling(sizes, written * calibration.window)] * (written > 0)
        stages.append(distillation(sizes, settings.distill_steps, settings.batch * calibration.window))
    expect(told(progress), stages)
    with locked(work), lent(dense.model), lent(own.model):
        claim(work, _RECIPE, recipe, "healing")
        layers = []
        if settings.passes:
            layers = _Run(dense, own, drawn, calibration, settings, work, metric, told(progress)).heal()
        distilled = None
        if settings.distill_steps:

            def windows(folder: Path) -> torch.Tensor:
                parts = [] if drawn.whole is None else [drawn.whole]
                if written:
                    parts.append(
                        sample(
                            dense.model,
                            dense.tokenizer,
                            windows=written,
                            window=calibration.window,
                            seed=calibration.seed,
                            folder=folder,
                            progress=told(progress),
                        )
                    )
                return torch.cat(parts)

            held_out, seed, bf16 = torch.cat(drawn.looks), calibration.seed, _computes_in_bf16(settings, own.device)
            asked: dict[str, Any] = {"seed": seed, "bf16": bf16, "progress": told(progress)}
            distilled = distill(own.model, dense.model, windows, held_out, settings, work, **asked)
    targets = sum(count_target(own.model.get_submodule(name)) for name in compressed.plan.ranks)
    if targets != compressed.plan.used:
        raise UnirankError(f"The modules hold {targets} target parameters, the plan says {compressed.plan.used}.")
    training: dict[str, Any] = {"kind": "heal"} | recipe | {"layers": [asdict(layer) for layer in layers]}
    training["distilled"] = distilled
    if compressed.training is not None:
        training["before_that"] = compressed.training
    return dataclasses.replace(compressed, training=training, evaluations=())


class _Run:
    """The layers in order, and what is kept of them in `work`."""

    def __init__(
        self,
        dense: LoadedModel,
        own: LoadedModel,
        drawn: Drawn,
        calibration: Calibration,
        settings: Heal,
        work: Path,
        metric: OutputMetric | None,
        progress: OnProgress,
    ) -> None:
        self._dense, self._own, self._settings, self._work, self._progress = dense, own, settings, work, progress
        self._metric = metric
        self._seed, self._count = calibration.seed, len(layers_of(own))
        self._bf16 = _computes_in_bf16(settings, own.device)
        self._batch = settings.batch
        self._windows = {_TRAIN: drawn.train} | {f"look{i}": windows for i, windows in enumerate(drawn.looks)}
        self._steps = settings.passes * -(-len(drawn.train) // settings.batch)  # of a layer
        self._trained = _trained(own)

    def heal(self) -> list[Healed]:
        """Heal what is not healed yet."""
        healed = self._finished()
        first = len(healed)
        self._tell(first)
        if first < self._count:
            streamed = self._dense.pages is not None or self._own.pages is not None
            place = place_for(self._dense, self._windows, self._work, streamed=streamed)
            groups = start(self._dense, self._own, self._windows, batch=self._batch, place=place)
            for index in range(self._enter(first, groups), self._count):
                if index < first:  # only reached where the streams were lost
                    self._pass(index, groups)
                else:
                    healed.append(self._layer(index, groups))
                    self._tell(index + 1)
        return healed

    def _tell(self, layers: int, steps: int = 0) -> None:
        self._progress("heal", layers * self._steps + steps, self._count * self._steps)

    def _layer_file(self, index: int) -> Path:
        return self._work / f"layer-{index:05d}.safetensors"

    def _stream_file(self, index: int) -> Path:
        return self._work / f"stream-{index:05d}.safetensors"

    def _finished(self) -> list[Healed]:
        """The layers that an earlier run finished, whose parameters are put into the model."""
        healed = []
        for index in range(self._count):
            try:
                with open_tensors(self._layer_file(index)) as file:
                    healed.append(Healed(**file.header))
                    for name in file.names():
                        self._put(index, name, file[name])
            except Damaged:
                break
        return healed

    def _put(self, index: int, name: str, tensor: torch.Tensor) -> None:
        """A finished layer's parameter goes into the model, or to where the streamed model is read from."""
        pages, path, device = self._own.pages, f"{self._own.layers}.{index}.{name}", self._own.device
        parameter = self._own.model.get_parameter(path)
        if pages is None or not parameter.is_meta:
            parameter.data.copy_(tensor)
            return
        where = self._layer_file(index)

        def read() -> torch.Tensor:
            with open_tensors(where) as file:
                return file[name].to(device, copy=True)

        pages.put(path, read)

    def _enter(self, first: int, groups: dict[str, Group]) -> int:
        """Put the streams of the last layer that they are kept of into `groups`; its number, at most `first`."""
        for index in range(first, 0, -1):
            if read_streams(self._stream_file(index), groups):
                return index
        return 0

    def _pass(self, index: int, groups: dict[str, Group]) -> None:
        """Only run a layer that is healed."""
        with self._dense.resident(index, then=index + 1):
            for group in groups.values():
                group.aims(layers_of(self._dense)[index], index, 1.0)
        with self._own.resident(index, then=index + 1):
            for group in groups.values():
                group.advance(layers_of(self._own)[index], index)

    def _layer(self, index: int, groups: dict[str, Group]) -> Healed:
        with self._dense.resident(index, then=index + 1):
            layer = layers_of(self._dense)[index]
            metric = None
            if self._metric is not None:
                train = groups[_TRAIN]
                metric = self._metric.of(layer, index, train.calls[0][index], train.dense.at(0))
            aims = {name: group.aims(layer, index, self._settings.mix, metric) for name, group in groups.items()}
        looks = [Look(group, aims[name]) for name, group in groups.items() if name != _TRAIN]
        with self._own.resident(index, then=index + 1):
            layer = layers_of(self._own)[index]
            block = Block(layer, index, self._trained[index], bf16=self._bf16)
            healed = block.train(
                groups[_TRAIN],
                aims[_TRAIN],
                looks,
                self._settings,
                seed=self._seed + index,
                step=lambda done: self._tell(index, done),
            )
            del aims, looks
            for group in groups.values():
                group.advance(layer, index)
            state = block.state()
        # The streams go first: a layer counts as finished only where the next one can begin.
        if index + 1 < self._count:
            write_streams(self._stream_file(index + 1), groups)
        write_tensors(self._layer_file(index), state, asdict(healed))
        self._stream_file(index).unlink(missing_ok=True)
        if self._own.pages is not None:
            for name, tensor in state.items():
                self._put(index, name, tensor)
        return healed


def _computes_in_bf16(settings: Heal, device: torch.device) -> bool:
    if settings.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return settings.precision == "bfloat16"


def _trained(own: LoadedModel) -> list[list[str]]:
    """Names of each layer's parameters that may change: floating, and no other part of the model has them too."""
    owners = Counter(id(parameter) for _, parameter in own.model.named_parameters(remove_duplicate=False))
    return [
        [
            name
            for name, parameter in layer.named_parameters()
            if parameter.is_floating_point() and owners[id(parameter)] == 1
        ]
        for layer in layers_of(own)
    ]


def _dense(
    compressed: CompressedModel, against: LoadedModel | PreTrainedModel | str | Path | None, trust_remote_code: bool
) -> LoadedModel:
    """The dense model, which fits the compressed one."""
    if isinstance(against, LoadedModel):
        dense = against
    elif not (against is None or isinstance(against, str | Path)):
        dense = describe(against, compressed.tokenizer)
    else:
        name = compressed.dense_name() if against is None else against
        dtype = str(compressed.model.dtype).removeprefix("torch.")
        where = str(next(p.device for p in compressed.model.parameters() if not p.is_meta))
        try:
            stream = compressed.pages is not None
            dense = load(name, dtype=dtype, device=where, trust_remote_code=trust_remote_code, stream=stream)
        except InputError as error:
            raise InputError(f"The dense model cannot be loaded; name it with against=: {error}") from error
        align_weights(dense.model)
    dense.require_dense()
    _check_fit(dense, compressed)
    return dense


def _check_fit(dense: LoadedModel, compressed: CompressedModel) -> None:
    shapes = {spec.name: (spec.m, spec.n) for spec in dense.linears}
    if shapes != {name: tuple(shape) for name, shape in compressed.plan.shapes.items()}:
        raise InputError(
            f"The dense model {dense.source} does not fit: its linears have other names or shapes than those that were "
            "compressed; against= is the model that the checkpoint was made from."
        )
    sizes = [model.config.get_text_config().vocab_size for model in (dense.model, compressed.model)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"The dense model has {sizes[0]} tokens and the compressed one {sizes[1]}; they must be the same."
        )
    if dense.model.dtype != compressed.model.dtype or dense.device != compressed.model.device:
        found = [f"{str(m.dtype).removeprefix('torch.')} on {m.device}" for m in (dense.model, compressed.model)]
        raise InputError(f"The dense model is {found[0]} and the compressed one {found[1]}; they must be the same.")


def _asked(calibration: Calibration) -> dict[str, Any]:
    """What else a user would have to say to draw the windows again."""
    shares = None if calibration.shares is None else list(calibration.shares)
    return {"shares": shares, "split": calibration.split, "revision": calibration.revision}


def _identity(
    own: LoadedModel,
    dense: LoadedModel,
    drawn: Drawn,
    written: int,
    calibration: Calibration,
    settings: Heal,
    store: AnalysisStore | None,
) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        "settings": asdict(settings),
        "data": drawn.as_dict() | {"sampled_windows": written, "seed": calibration.seed} | _asked(calibration),
        "model_sha256": weights_hash(own),
        "dense_sha256": weights_hash(dense),
        "gradients": None if store is None else store.digest,
        "device": device_name(own.device),
        "versions": versions(),
    }
