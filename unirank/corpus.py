"""Training text: documents from files or `datasets`, packed into windows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank.data import BUILTIN, BUILTIN_HELD_OUT, bos_of, evaluation_windows, read_text, tokenize
from unirank.data import Text as _Text
from unirank.errors import InputError
from unirank.files import sha256_text

_LINES = (".jsonl", ".ndjson")
_RECORDS = (*_LINES, ".parquet")


@dataclass(frozen=True)
class Corpus:
    """Documents in order, where they came from, and their hash."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of the documents, as a JSON list."""
        return sha256_text(json.dumps(self.documents))


def read_corpus(source: str, tokenizer: PreTrainedTokenizerBase, *, split: str = "train") -> Corpus:
    """Read training text.

    Args:
        source: a UTF-8 text file (one document); records, as JSON lines (`.jsonl`) or `.parquet`; "builtin" (Python's
            documentation); or what `datasets.load_dataset` takes: a directory, or a hub name, with a configuration
            behind a colon (`wikitext:wikitext-2-raw-v1`).
        tokenizer: its chat template writes conversations out.
        split: of a `datasets` source.

    A record is a document by one of: `text`; `messages`, a conversation of `role` and `content`; `prompt` and
    `completion`, or `instruction`, `input` (may be absent) and `output`, which are taken as one turn each. Empty
    documents are left out.

    Raises InputError for what is not there, not such records, a conversation without a chat template, and no text.
    """
    path = Path(source)
    if source in (BUILTIN, BUILTIN_HELD_OUT) or (path.is_file() and path.suffix not in _RECORDS):
        text = read_text(source)
        return Corpus(text.name, (text.content,))
    records = _json_lines(path) if path.is_file() and path.suffix in _LINES else _datasets(source, split)
    documents = []
    for position, record in enumerate(records, start=1):
        try:
            documents.append(_document(record, tokenizer))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"Record {position} of {source} is not usable: {error}.") from error
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"The training text {source} is empty.")
    return Corpus(path.name, tuple(documents))


def _json_lines(path: Path) -> Iterable[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"The training text {path} is not UTF-8: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(f"Line {number} of {path} is not JSON: {error}.") from error


def _datasets(source: str, split: str) -> Iterable[Any]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError:
        raise InputError(
            f"The training text {source!r} is not a file; for a `datasets` source, install the extra: "
            "pip install 'unirank[finetune]'."
        ) from None
    name, _, configuration = source.partition(":")
    try:
        if Path(source).is_file():
            return datasets.load_dataset("parquet", data_files=source, split=split)
        return datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"The training text {source!r} is neither a file nor a dataset that loads: {first}."
        ) from error


def _document(record: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(record, Mapping):
        raise TypeError(f"it is a {type(record).__name__}, not an object")
    if isinstance(record.get("text"), str):
        return record["text"]
    messages = record.get("messages")
    if messages is None:
        messages = _turns(record)
    if tokenizer.chat_template is None:
        raise ValueError("it is a conversation, and the tokenizer has no chat template")
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _turns(record: Mapping[str, Any]) -> list[dict[str, str]]:
    if "prompt" in record and "completion" in record:
        asked, answer = record["prompt"], record["completion"]
    elif "instruction" in record and "output" in record:
        asked, answer = "\n\n".join(filter(None, (record["instruction"], record.get("input")))), record["output"]
    else:
        raise KeyError("it has neither text, nor messages, nor prompt and completion, nor instruction and output")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def pack(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, window: int) -> torch.Tensor:
    """Documents one behind the other, an EOS between them, cut into windows: int64 `[W, window]`, the tail dropped.

    A tokenizer that begins texts with BOS gets it at the start of every window. Raises InputError when there is less
    than one window, or a token without an embedding.
    """
    eos = tokenizer.eos_token_id
    parts: list[torch.Tensor] = []
    for document in corpus.documents:
        if parts and isinstance(eos, int):
            parts.append(torch.tensor([eos]))
        parts.append(tokenize(tokenizer, _Text(corpus.name, document), model))
    return evaluation_windows(torch.cat(parts), window=window, bos=bos_of(tokenizer), name=corpus.name)
