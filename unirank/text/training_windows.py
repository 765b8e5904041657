"""Training text: documents packed into windows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank.disk.hashing import sha256_text
from unirank.text.records import is_records, read_documents
from unirank.text.windows import Text, bos_of, check_tokens, check_window, evaluation_windows, read_text, tokenize


@dataclass(frozen=True)
class Corpus:
    """Documents in order, where they came from, and their hash."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of the documents, as a JSON list."""
        return sha256_text(json.dumps(self.documents))


def read_corpus(source: str, tokenizer: PreTrainedTokenizerBase, *, split: str | None = None) -> Corpus:
    """Read training text: a text file or builtin text as one document, anything else as `read_documents` does.

    Raises InputError like `read_text` and `read_documents`.
    """
    if not is_records(source):
        text = read_text(source, split=split)
        return Corpus(text.name, (text.content,))
    documents, _ = read_documents(source, tokenizer, split=split)
    return Corpus(Path(source).name if Path(source).exists() else source, documents)


def pack(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, window: int) -> torch.Tensor:
    """Documents one behind the other, an EOS between them, cut into windows: int64 `[W, window]`, the tail dropped.

    A tokenizer that begins texts with BOS gets it at the start of every window. Raises InputError when there is less
    than one window, a window longer than the model's positions, or a token without an embedding.
    """
    check_window(model, window, "Finetune.window")
    eos = tokenizer.eos_token_id
    if isinstance(eos, int) and len(corpus.documents) > 1:
        check_tokens(torch.tensor([eos]), tokenizer, model, "The end of a document")
    parts: list[torch.Tensor] = []
    for document in corpus.documents:
        if parts and isinstance(eos, int):
            parts.append(torch.tensor([eos]))
        parts.append(tokenize(tokenizer, Text(corpus.name, document), model))
    return evaluation_windows(torch.cat(parts), window=window, bos=bos_of(tokenizer, model), name=corpus.name)
