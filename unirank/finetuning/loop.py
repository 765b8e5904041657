"""The loop of fine-tuning and distillation: transformers' Trainer. It stops as soon as a number is not finite."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from unirank.disk.files import explained
from unirank.errors import NonFiniteError, WriteError
from unirank.finetuning.losses import NOTHING, token_loss
from unirank.progress import OnProgress

_STATE = "trainer_state.json"  # the last file of a Trainer checkpoint: without it, the write was cut off
_LOGGED = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")


@dataclass(frozen=True)
class Loop:
    """One run of the Trainer: see `unirank.Finetune` for what the numbers mean.

    `judged_by_teacher`: held-out windows are judged by the loss that is trained, and not by the cross-entropy alone.
    """

    steps: int
    batch: int
    micro_batch: int
    lr: float
    warmup: float
    weight_decay: float
    evaluate_every: int
    patience: int
    distill: float
    temperature: float
    gradient_checkpointing: bool
    bf16: bool
    seed: int
    judged_by_teacher: bool = False


def run(
    model: Any,
    train: torch.Tensor,
    held_out: torch.Tensor,
    folder: Path,
    loop: Loop,
    *,
    teacher: PreTrainedModel | None,
    stage: str,
    progress: OnProgress,
) -> list[dict[str, float]]:
    """Train what takes gradients in `model`, in place; it ends with the weights of least held-out loss.

    Args:
        model: a peft model, of which checkpoints hold the adapters; or a model of transformers, which they hold whole.
        train, held_out: windows, int64 `[W, T]`.
        folder: of the Trainer's checkpoints; the newest whole one is resumed. They hold the Trainer's own pickled
            optimizer state, which is read back as plain tensors (`weights_only`).

    Returns the log: `step` with `loss` (mean since the last entry), or with `eval_loss` (held out), nats a token.

    Raises NonFiniteError when a loss or gradient is NaN or infinity; names the step. The weights as before that step
    are then in `folder`/last-good. Raises WriteError when the disk refuses a checkpoint.
    """
    device = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=loop.steps,
        per_device_train_batch_size=loop.micro_batch,
        per_device_eval_batch_size=loop.micro_batch,
        gradient_accumulation_steps=loop.batch // loop.micro_batch,
        learning_rate=loop.lr,
        warmup_steps=math.ceil(loop.warmup * loop.steps),
        lr_scheduler_type="cosine",
        weight_decay=loop.weight_decay,
        eval_strategy="steps",
        eval_steps=loop.evaluate_every,
        save_strategy="steps",
        save_steps=loop.evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        logging_steps=max(1, min(10, loop.evaluate_every)),
        logging_nan_inf_filter=False,
        bf16=loop.bf16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        seed=loop.seed,
        report_to=[],
        disable_tqdm=True,
        **(_checkpointing() if loop.gradient_checkpointing else {}),
    )
    # If there are several GPUs, the Trainer would split every batch over all of them; the model is on one.
    setattr(arguments, "_n_gpu", min(arguments.n_gpu, 1))  # noqa: B010 - no public name sets it
    # The Trainer switches it off, and the model would be saved that way. With towers, only the text's part has it.
    cached = getattr(model.config, "use_cache", None)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_Windows(train),
        eval_dataset=_Windows(held_out),
        data_collator=_collate,
        callbacks=[_Watch(stage, progress)],
    )
    trainer.remove_callback(PrinterCallback)  # progress is ours to show
    trainer.prepare(loop, teacher)
    if loop.patience:
        trainer.add_callback(EarlyStoppingCallback(loop.patience))
    try:
        with explained(folder):
            trainer.train(resume_from_checkpoint=_newest(folder, loop.steps))
    except WriteError:
        _newest(folder, loop.steps)  # deletes the checkpoint that was cut off
        raise
    finally:
        if cached is not None:
            model.config.use_cache = cached
        elif "use_cache" in vars(model.config):
            del model.config.use_cache
    # With bf16, accelerate puts its autocast around the model's forward; what follows is measured without.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    progress(stage, loop.steps, loop.steps)  # also when it ended early
    entries = [{key: entry[key] for key in _LOGGED if key in entry} for entry in trainer.state.log_history]
    return [entry for entry in entries if len(entry) > 1]


def _checkpointing() -> dict[str, Any]:
    """Gradient checkpointing, under the name that this transformers 5 has for it."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _newest(folder: Path, steps: int) -> str | None:
    """The newest whole checkpoint from which steps are to be made; those that a killed run left otherwise are deleted.

    A checkpoint at the end of a run is not resumed, because the Trainer would make one more step. The run resumes at
    the one before, and makes the last steps again, to the same bits.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / _STATE).read_text())
            control = state["stateful_callbacks"]["TrainerControl"]["args"]
            step, ended = int(state["global_step"]), bool(control["should_training_stop"])
        except (OSError, ValueError, KeyError):
            step, ended = 0, True
        if ended or step >= steps:
            shutil.rmtree(path)
        else:
            found.append((step, str(path)))
    return max(found)[1] if found else None


class _Windows(torch.utils.data.Dataset):  # pyright: ignore[reportMissingTypeArgument]
    def __init__(self, windows: torch.Tensor) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._windows[index]


def _collate(windows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(list(windows))
    return {"input_ids": ids, "labels": ids}  # without labels the Trainer evaluates no loss


class _Watch(TrainerCallback):
    """Shows progress, and stops before an optimizer step on a gradient that is not finite."""

    def __init__(self, stage: str, progress: OnProgress) -> None:
        self._stage, self._progress = stage, progress

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self._progress(self._stage, state.global_step, state.max_steps)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self._progress(self._stage, state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise _stopped(model, args.output_dir, f"The gradient of {name} is NaN or infinity", state.global_step)


def _stopped(model: Any, folder: str, what: str, step: int) -> NonFiniteError:
    """Save the weights, which no step has changed since they were good, and say where they are."""
    kept = Path(folder) / "last-good"
    model.save_pretrained(kept)
    return NonFiniteError(
        f"{what} at step {step + 1}; a lower learning rate may help. "
        f"The weights as they were before that step are in {kept}."
    )


class _Trainer(Trainer):
    """Cross-entropy, mixed with the divergence from a teacher."""

    def prepare(self, loop: Loop, teacher: PreTrainedModel | None) -> None:
        self._loop, self._teacher = loop, teacher
        self.model_accepts_loss_kwargs = False  # our loss is a mean; the Trainer divides it when it accumulates

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean token loss in float32, nats; in evaluation usually the cross-entropy alone."""
        del num_items_in_batch
        ids = inputs["input_ids"]
        # Every position, the last with nothing to predict: cutting it off would copy logits as wide as the vocabulary.
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        labels = F.pad(ids[:, 1:], (0, 1), value=NOTHING).flatten()
        options: dict[str, Any] = {}
        if self._teacher is not None and (model.training or self._loop.judged_by_teacher):
            # The Trainer's autocast is around the student alone.
            with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=self._loop.bf16):
                teacher = self._teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            options = {"teacher": teacher, "distill": self._loop.distill, "temperature": self._loop.temperature}
        loss = token_loss(logits, labels, **options)
        if not bool(loss.isfinite()):
            what = f"The loss is {float(loss.detach())}"
            raise _stopped(self.model, str(self.args.output_dir), what, self.state.global_step)
        return (loss, {"logits": logits}) if return_outputs else loss
