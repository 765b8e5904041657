"""Records of text: local files, and what `datasets` loads, with short names for the field's usual corpora."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirank.errors import InputError
from unirank.text.conversations import messages_of, write_out
from unirank.text.files import LEGAL, holds_records, kind_of, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Named:
    """A corpus with a short name.

    Attributes:
        path, configuration, revision: of `datasets.load_dataset`.
        held_out: the split for perplexity; "train" calibrates.
        column: of the text.
        separator: between documents. Two line ends for wikitext are the field's convention (GPTQ, SVD-LLM).
        limit: documents that are read, in order; None reads all (**choice** for c4, whose first shard is far more than
            any calibration takes).
    """

    path: str
    configuration: str | None
    held_out: str
    column: str = "text"
    separator: str = "\n\n"
    revision: str | None = None
    limit: int | None = None


NAMED = {
    "wikitext2": Named("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": Named("allenai/c4", "en", "validation", limit=20_000),
    # The hub's own parquet conversion: the repository holds a script, which would be remote code.
    "ptb": Named("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence", " ", "refs/convert/parquet"),
}


def is_records(source: str) -> bool:
    """Whether `source` names records, not plain text: a short name, a directory, a file of records, a hub name."""
    path = Path(source)
    if source in NAMED or path.is_dir():
        return True
    if path.is_file():
        return holds_records(path)
    name = source.partition(":")[0]
    return not path.exists() and not path.suffix and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def read_documents(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    held_out: bool = False,
) -> tuple[tuple[str, ...], str]:
    """The documents of `source`, in order, empty ones left out, and what stands between two of them.

    Args:
        source: "wikitext2", "c4", "ptb"; a file: JSON lines (`.jsonl`, `.ndjson`), a JSON array (`.json`), a table with
            a header (`.csv`, `.tsv`), each also as `.gz`, or `.parquet`; or what `datasets.load_dataset` takes: a
            directory, or a hub name, with a configuration behind a colon (`Salesforce/wikitext:wikitext-2-raw-v1`).
        tokenizer: its chat template writes conversations out. A template that prints the date prints the same one
            always (see `conversations.CLOCK`), so that the same records are the same text tomorrow.
        split: of a dataset; None is "train", or with `held_out` the corpus's own split for perplexity ("test" where
            nothing else is known). A file has none.
        revision: of a dataset on the hub. A file and a directory have none.

    A record is a document by one of: `text`; `messages`, a conversation of `role` and `content`; `prompt` and
    `completion`, or `instruction`, `input` (may be absent) and `output`, which are taken as one turn each; `prompt` and
    `completion` that are both lists of messages are one conversation.

    Raises InputError for what is not there, not such records, a conversation without a chat template or that the
    template refuses, a split or revision of what has none, and no text.
    """
    require_dataset(source, split, revision)
    named = NAMED.get(source)
    path = Path(source)
    if path.is_file() and kind_of(path) == "text":
        raise InputError(f"The text {source} is plain text and holds no records; legal are {LEGAL}.")
    if path.is_file() and kind_of(path) != "parquet":
        records = read_records(path)
    else:
        records = _dataset(source, named, split, revision, held_out)
    column = named.column if named is not None else "text"
    documents = []
    for position, record in enumerate(records, start=1):
        try:
            documents.append(_document(record, tokenizer, column))
        except (KeyError, TypeError, ValueError) as error:
            reason = error.args[0] if error.args else error
            raise InputError(f"Record {position} of {source} is not usable: {reason}.") from error
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"The text {source} is empty.")
    return tuple(documents), named.separator if named is not None else "\n\n"


def require_dataset(source: str, split: str | None, revision: str | None) -> None:
    """Raise InputError for a split or a revision of what has none: they would be ignored, yet recorded."""
    got = ", ".join(
        f"{name}={value!r}" for name, value in (("split", split), ("revision", revision)) if value is not None
    )
    if not got:
        return
    if Path(source).is_file() or not is_records(source):
        raise InputError(f"The text {source!r} is no dataset, so it has no split and no revision; got {got}.")
    if revision is not None and Path(source).is_dir():
        raise InputError(f"The text {source!r} is a directory, so it has no revision; got {got}.")


def _dataset(
    source: str, named: Named | None, split: str | None, revision: str | None, held_out: bool
) -> Iterable[Any]:
    try:
        from datasets import disable_progress_bars, load_dataset
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError:
        raise InputError(
            f"The text {source!r} is read by `datasets`, which is not installed: pip install 'unirank[data]'."
        ) from None
    if named is None:
        path, _, configuration = source.partition(":")
        named = Named(path, configuration or None, "test")
    chosen = split or (named.held_out if held_out else "train")
    if not sys.stderr.isatty():
        disable_progress_bars()  # in a pipe or a log they are noise
    options: dict[str, Any] = {"revision": revision or named.revision}
    try:
        if Path(source).is_file():
            return load_dataset("parquet", data_files=source, split="train")  # what `datasets` calls the only one
        if named.limit is not None:
            stream = load_dataset(named.path, named.configuration, split=chosen, streaming=True, **options)
            return list(itertools.islice(stream, named.limit))
        return load_dataset(named.path, named.configuration, split=chosen, **options)
    except (OSError, ValueError, DatasetsError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"The text {source!r} is neither a file nor a dataset that loads: {first}.") from error


def _document(record: Any, tokenizer: PreTrainedTokenizerBase | None, column: str) -> str:
    if not isinstance(record, Mapping):
        raise TypeError(f"it is a {type(record).__name__}, not an object")
    if isinstance(record.get(column), str):
        return record[column]
    if record.get(column) is not None:
        raise TypeError(f"its {column} is a {type(record[column]).__name__}, not a string")
    return write_out(messages_of(record), tokenizer)
