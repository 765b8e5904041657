"""What a directory holds that is given as a model, looked at before anything of it is read."""

from __future__ import annotations

from pathlib import Path

from unirank.disk.strictjson import Damaged, entry, read_object
from unirank.errors import InputError

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024  # the most that Git LFS writes into one
# Weights that are not read, by the ends of their names, and what they are.
_OTHERS = {
    "a pickle": (".bin", ".pt", ".pth", ".ckpt", ".pkl"),
    "GGUF": (".gguf",),
    "TensorFlow's": (".h5",),
    "Flax's": (".msgpack",),
    "ONNX": (".onnx",),
}
# transformers 5 reads GGUF, and refuses to save what it read while it counts as quantised.
_FROM_GGUF = (
    "model = AutoModelForCausalLM.from_pretrained(DIRECTORY, gguf_file=NAME), del model.config.quantization_config, "
    "model.hf_quantizer = None, model.save_pretrained(NEW), and the same for the tokenizer, convert it"
)
RESAVE = "where you trust it, AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW) writes safetensors"
_ARGUMENTS = "training_args.bin"  # of the Trainer: no weights


def check_folder(folder: Path) -> None:
    """Raise InputError unless `folder` holds a model whose weights are safetensors; says what it holds instead."""
    if folder.is_file():
        more = f"; {_FROM_GGUF}" if folder.suffix == ".gguf" else ""
        raise InputError(f"{folder} is a file, and a model is a directory with {CONFIG} and safetensors{more}.")
    if (folder / ADAPTER).is_file():
        raise InputError(adapter_message(str(folder), alone=not (folder / CONFIG).is_file()))
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"The model directory {folder} holds no config.json, so it is not a Hugging Face checkpoint"
            f"{_instead(folder)}."
        )
    for file in sorted(folder.iterdir()):
        if is_pointer(file):
            raise InputError(
                f"{file} is a Git LFS pointer, not the file itself; run git lfs pull in {folder}, or download it again."
            )
    _check_index(folder)
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"The model directory {folder} holds no weights in safetensors{_others(folder)}.")


def adapter_message(name: str, *, alone: bool) -> str:
    """Why an adapter is refused, `alone` or beside a model, and what to do."""
    merge = "peft.AutoPeftModelForCausalLM.from_pretrained(DIRECTORY).merge_and_unload().save_pretrained(NEW)"
    if alone:
        return f"{name} is an adapter ({ADAPTER}), not a model; merge it into its model and give that: {merge}."
    return (
        f"{name} holds a model and an adapter ({ADAPTER}) that is not merged into it; merge it first: {merge}, or move "
        "the adapter's files away to take the model without it."
    )


def is_pointer(file: Path) -> bool:
    """Whether Git LFS left its pointer in the place of the file."""
    if not file.is_file() or file.stat().st_size > _POINTER_BYTES:
        return False
    with file.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def _instead(folder: Path) -> str:
    """Where below `folder` a model is: a training run's checkpoints, a snapshot of the hub's cache."""
    inside = sorted({file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{CONFIG}")})
    if inside:
        return f"; give one of the directories in it that do, such as {inside[-1]}"
    return f": it holds GGUF; {_FROM_GGUF}" if any(folder.glob("*.gguf")) else ""


def _others(folder: Path) -> str:
    for what, ends in _OTHERS.items():
        found = sorted(file.name for file in folder.iterdir() if file.suffix in ends and file.name != _ARGUMENTS)
        if found:
            how = _FROM_GGUF if what == "GGUF" else RESAVE
            return f": {found[0]} is {what}, which unirank does not read; {how}"
    return "; download them too, or give the model's hub name"


def _check_index(folder: Path) -> None:
    """Refuse an index that names files outside its directory, or files that are not there."""
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        places = entry(read_object(index), "weight_map", dict)
    except Damaged as error:
        raise InputError(f"{index} is damaged: {error}.") from error
    for place in places.values():
        if not isinstance(place, str) or Path(place).name != place:
            raise InputError(f"{index} names {place!r}, which is no file of its directory.")
    if (folder / WEIGHTS).is_file():  # which transformers reads instead: the index is of an earlier save
        return
    for place in sorted(set(places.values())):
        if not (folder / place).is_file():
            raise InputError(f"{index} names {place}, which is not there; download the model again, or the rest of it.")
