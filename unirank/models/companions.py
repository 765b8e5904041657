"""What lies beside the weights of a checkpoint and belongs to it: files of processors, tokenizers, templates, licences.

Of a directory only what is known to be such a file is taken, by its name, and read when the model is: what is made of
the model later does not depend on the directory. Never weights or pickles, and code only where it is trusted.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from unirank.errors import InputError, first_line
from unirank.models.sources import Source
from unirank.types import Companions

_LARGEST = 2**26  # bytes; what is larger is data
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
# Files that only some tokenizer classes save again, and servers and converters (llama.cpp) ask for.
_TOKENIZER = re.compile(
    r"(tokenizer|spiece|sentencepiece|source|target|[\w.-]*bpe|vocab)[\w.-]*\.(model|spm|model\.v\d+)|[\w.-]+\.tiktoken"
    r"|(vocab|merges)[\w.-]*\.(txt|json|bpe)|special_tokens_map\.json|added_tokens\.json|tekken\.json"
    r"|chat_template\.(json|jinja)|[\w.-]+\.jinja",
    re.ASCII,
)
_LEGAL = ("licence", "license", "notice", "copying", "patents", "use_policy", "acceptable_use")
_TEXT = ("", ".txt", ".md", ".rst")
# Settings: of processors, generation, modules behind the model. Any other JSON may be somebody's data, or a secret.
_SETTINGS = re.compile(r"[\w.-]+_config\.json|config_\w+\.json|[\w.-]*processor[\w.-]*\.json|modules\.json", re.ASCII)
# Of these, what is written anew, or is about how the weights' files were made.
_NOT = re.compile(r"(tokenizer|adapter|quantize|quant|hf_quant)_config\.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".npy")
# Folders of configurations: of modules behind the model (sentence-transformers), of further templates.
_FOLDER = re.compile(r"\d+_\w+|additional_chat_templates", re.ASCII)
_MODULES = "modules.json"  # names all of the former
_BINARY = (b"\x80", b"PK")  # how pickles begin, and the archives that torch writes them into


def companions_of(source: Source) -> Companions:
    """The companions of a model that was found; on the hub they are downloaded, without a network as many as are there.

    Raises InputError where the hub breaks off.
    """
    trusted = bool(source.common["trust_remote_code"])
    folder = Path(source.path)
    if not folder.is_dir():
        try:
            folder = _download(source, trusted)
        except (OSError, ValueError) as error:  # what huggingface_hub raises
            raise InputError(
                f"The files beside the weights of {source.name!r} cannot be downloaded: {first_line(error)}."
            ) from error
    return read_companions(folder, source.tokenizer, trust_remote_code=trusted)


def read_companions(folder: Path, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> Companions:
    """The companions of the checkpoint in `folder`, whose tokenizer `tokenizer` is.

    Args:
        trust_remote_code: code (`*.py`) goes along too.
    """
    files: dict[str, bytes] = {}
    own: dict[str, bytes] = {}
    for file in _files(folder, _root(folder)):
        if _TOKENIZER.fullmatch(file.name):
            _take(file, file.name, own)
        elif (trust_remote_code and file.suffix == ".py") or _is_other(file):
            _take(file, file.name, files)
    for inner in sorted(folder.iterdir()):
        if not (_FOLDER.fullmatch(inner.name) and inner.is_dir()):
            continue
        if any(file.suffix in _WEIGHTS for file in inner.iterdir()):
            files.pop(_MODULES, None)  # a part of what it names would be missing
            continue
        for file in _files(inner, _root(folder)):
            if file.suffix in (".json", ".jinja"):
                _take(file, f"{inner.name}/{file.name}", files)
    return Companions(files, own, str(tokenizer.name_or_path))


def companions_in_memory(model: Any, tokenizer: PreTrainedTokenizerBase) -> Companions | None:
    """Those of the directory that a model in memory says it was loaded from; None where it says none."""
    folder = Path(str(getattr(model.config, "name_or_path", "") or "."))
    if not (folder / "config.json").is_file() or folder == Path("."):
        return None
    return replace(read_companions(folder, tokenizer), origin=str(folder))


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer that a processor holds. Raises InputError where it holds none."""
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"The processor {type(processor).__name__} holds no tokenizer; give one as tokenizer=.")
    return tokenizer


def companions_of_processor(
    processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase, beside: Companions | None
) -> Companions:
    """What `processor` saves, before the companions `beside` the model."""
    with tempfile.TemporaryDirectory(prefix="unirank-") as scratch:
        processor.save_pretrained(scratch)
        own = read_companions(Path(scratch), tokenizer)
    if beside is None:
        return own
    return replace(beside, files={**beside.files, **own.files}, tokenizer={**beside.tokenizer, **own.tokenizer})


def write_companions(companions: Companions | None, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into `folder` what is not there yet; the tokenizer's files only where `tokenizer` is theirs."""
    if companions is None:
        return
    same = str(tokenizer.name_or_path) == companions.origin
    for name, content in {**companions.files, **(companions.tokenizer if same else {})}.items():
        file = folder / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)


def _download(source: Source, trusted: bool) -> Path:
    """The folder of the hub's cache, with all companions."""
    wanted = [
        "*.json",
        "*.jinja",
        "*.model*",
        "*.spm",
        "*.tiktoken",
        "vocab*",
        "merges*",
        *(["*.py"] if trusted else []),
    ]
    for word in _LEGAL:
        wanted += [f"{word.upper()}*", f"{word.capitalize()}*", f"{word}*"]
    unwanted = [*(f"*{end}" for end in _WEIGHTS), "*/*/*"]
    commit = getattr(source.config, "_commit_hash", None) or source.common["revision"]
    return Path(snapshot_download(source.path, revision=commit, allow_patterns=wanted, ignore_patterns=unwanted))


def _root(folder: Path) -> Path:
    """Where links in `folder` may lead; in the hub's cache all files are links, to the same model's other files."""
    whole = folder.resolve()
    return whole.parents[1] if whole.parent.name == "snapshots" else whole


def _files(folder: Path, root: Path) -> Iterator[Path]:
    """Files that may be taken. A link out of the checkpoint is none: what a repository points to may be private."""
    for file in sorted(folder.iterdir()):
        named = _NAME.fullmatch(file.name) and file.is_file() and file.resolve().is_relative_to(root)
        if named and file.stat().st_size <= _LARGEST:
            yield file


def _is_other(file: Path) -> bool:
    if file.suffix == ".json":
        return bool(_SETTINGS.fullmatch(file.name)) and not _NOT.fullmatch(file.name)
    return file.suffix in _TEXT and file.name.lower().startswith(_LEGAL)


def _take(file: Path, name: str, into: dict[str, bytes]) -> None:
    content = file.read_bytes()
    if not content.startswith(_BINARY):
        into[name] = content
