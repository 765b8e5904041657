"""Local files of text: which of them hold records, and what is in them. What is not recognised is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from unirank.errors import InputError

Kind = Literal["lines", "json", "table", "parquet", "text"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
}
_GZIP = ".gz"
# Data that is not prose, and that is not read.
_REFUSED = frozenset((
    ".json5", ".jsonc", ".yaml", ".yml", ".toml", ".xml", ".html", ".htm",
    ".arrow", ".feather", ".orc", ".avro",
    ".xls", ".xlsx", ".ods", ".db", ".sqlite", ".sqlite3", ".duckdb",
    ".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors", ".gguf",
    ".h5", ".hdf5", ".msgpack", ".tfrecord",
    ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar",
    ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub",
))  # fmt: skip
LEGAL = (
    "UTF-8 text, JSON lines (.jsonl, .ndjson), a JSON array (.json), a table with a header (.csv, .tsv), each of "
    "these also as .gz, and .parquet"
)


def kind_of(path: Path) -> Kind:
    """What a file holds, by the end of its name in whatever case, ".gz" apart.

    Raises InputError for structured data that is not read.
    """
    suffix, packed = _ending(path)
    kind = _KINDS.get(suffix, "text")
    if suffix in _REFUSED or (packed and kind == "parquet"):
        shown = suffix + (_GZIP if packed else "")
        raise InputError(f"The text {path} is a {shown} file, which is not read; legal are {LEGAL}.")
    return kind


def holds_records(path: Path) -> bool:
    """Whether a file is of records by its name."""
    return _KINDS.get(_ending(path)[0], "text") != "text"


def read_prose(path: Path) -> str:
    """The content of a text file, with universal newlines: a CR is no token of its own.

    Raises InputError for a file that cannot be read, is not UTF-8, is empty, or holds JSON records.
    """
    content = _content(path, encoding="utf-8", newline=None)
    if not content.strip():
        raise InputError(f"The text {path} is empty.")
    if _is_json(content):
        raise InputError(
            f"The text {path} holds JSON, not prose; as a .jsonl file (a record a line) or a .json file (an array of "
            "records) it is read as records."
        )
    return content


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file of kind "lines", "json" or "table", in order, whatever they are.

    Raises InputError for a file that cannot be read, is not UTF-8, or is not of its format.
    """
    kind = kind_of(path)
    content = _content(path, encoding="utf-8-sig", newline="")  # Excel writes a byte order mark
    if kind == "table":
        return _table(path, content, "\t" if _ending(path)[0] == ".tsv" else ",")
    return _json_lines(path, content) if kind == "lines" else iter(_json(path, content))


def _ending(path: Path) -> tuple[str, bool]:
    """The end of the name in lower case, and whether ".gz" stood behind it."""
    packed = path.suffix.lower() == _GZIP
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def _content(path: Path, *, encoding: str, newline: str | None) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if _ending(path)[1] else path.read_bytes()
        with io.TextIOWrapper(io.BytesIO(data), encoding=encoding, newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"The text {path} is not UTF-8: {error}.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"The text {path} cannot be read: {error}.") from error


def _is_json(content: str) -> bool:
    """Whether a text is JSON lines (its first line is an object with a name in it), or one array or object."""
    start = content.lstrip("\ufeff \t\r\n")
    if start[:1] not in ("{", "["):
        return False
    for part, legal in ((start.partition("\n")[0], dict), (start, dict | list)):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if value and isinstance(value, legal):
            return True
    return False


def _json_lines(path: Path, content: str) -> Iterator[Any]:
    # Lines end in LF alone. `str.splitlines` would also cut at U+2028 and others, which are legal inside a string.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip(" \t\r"):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"Line {number} of {path} is not JSON: {error}.") from error


def _json(path: Path, content: str) -> Iterable[Any]:
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise InputError(f"The text {path} is not JSON: {error}.") from error
        return _json_lines(path, content)  # a common name for JSON lines, too
    except (ValueError, RecursionError) as error:
        raise InputError(f"The text {path} is not JSON: {error}.") from error
    return value if isinstance(value, list) else [value]


def _table(path: Path, content: str, delimiter: str) -> Iterator[dict[str, str]]:
    limit = csv.field_size_limit(max(len(content), csv.field_size_limit()))  # a document is longer than its 128 KiB
    try:
        rows = list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(f"The table {path} cannot be read: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    header, *rest = rows or [[]]
    for number, row in enumerate(rest, start=1):
        if row and len(row) != len(header):
            raise InputError(f"Record {number} of {path} has {len(row)} columns and the header {len(header)}.")
        if row:
            yield dict(zip(header, row, strict=True))
