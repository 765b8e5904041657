"""Make docs/decoders.md: what becomes of every type of causal language model that the installed transformers knows.

Takes some minutes on one core. Exits 1 at the first type that is neither understood nor refused as it should be.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from rich.progress import track
from transformers.utils import logging

import unirank
from tests.support.decoder_matrix import PAGE, loads, outcome, page
from tests.support.every_decoder import NOT_TINY, TYPES, build
from tests.support.tiny import word_tokenizer, write_words


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", unirank.UnirankWarning)
    tokenizer, found = word_tokenizer(), {}
    with tempfile.TemporaryDirectory() as scratch:
        text = write_words(Path(scratch) / "words.txt")
        calibration = unirank.Calibration(text=str(text), windows=4, window=16, seed=0, batch=2)
        for kind in track([kind for kind in TYPES if kind not in NOT_TINY]):
            try:
                found[kind] = outcome(loads(build(kind), tokenizer, kind), calibration, Path(scratch) / kind)
            except Exception as error:
                print(f"{kind}: {type(error).__name__}: {error}", file=sys.stderr)
                return 1
    PAGE.write_text(page(found, NOT_TINY), encoding="utf-8")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
