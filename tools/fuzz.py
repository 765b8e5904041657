"""Coverage-guided fuzzing of everything that unirank parses: `make fuzz`, or SECONDS=600 make fuzz for longer.

Each parser runs in a process of its own, from files that unirank wrote as its first inputs. It may return, or raise an
error of unirank; anything else is a crash, whose input libFuzzer writes to `build/fuzz/PARSER`. Afterwards the inputs
that reached something new are run again under coverage, which says what of the parsers' own lines they reach.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["unirank"], enable_loader_override=False):
    import unirank
    from unirank.analysis.store import MANIFEST, open_store
    from unirank.compression.card import EVALUATIONS_FILE, PLAN_FILE, PROVENANCE_FILE
    from unirank.compression.checkpoint import read_record
    from unirank.disk.strictjson import parse_object
    from unirank.disk.tensorfile import read_tensors, write_tensors
    from unirank.evaluation.perplexity import EvalReport
    from unirank.models.quantizer import UniRankConfig
    from unirank.planning.imported_ranks import read_ranks
    from unirank.rank_plan import RankPlan
    from unirank.text.windows import read_text

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "fuzz"
LAYER = "layer-0000.safetensors"
# Where the lines are that read what comes from outside: a module, and the functions in it (all of it without).
PARSERS = {
    "unirank/disk/strictjson.py": (),
    "unirank/disk/tensorfile.py": ("TensorFile", "open_tensors", "_reading", "_sum"),
    "unirank/planning/imported_ranks.py": ("read_ranks",),
    "unirank/types.py": ("from_dict",),
    "unirank/rank_plan.py": ("from_json", "_check"),
    "unirank/analysis/store.py": ("open_store", "_open", "cosines", "damping", "energies"),
    "unirank/analysis/manifest.py": ("read_manifest",),
    "unirank/compression/checkpoint.py": ("read_record", "_evaluations"),
    "unirank/analysis/identity.py": ("_parse", "from_dict"),
    "unirank/compression/card.py": ("check_training",),
}
Parser = Callable[[bytes], object]


def make_inputs(folder: Path) -> None:
    """A store and a checkpoint of a tiny model, in OUT and STORE."""
    sys.path.insert(0, str(ROOT))
    from bench.support import synthetic

    tiny = synthetic.llama(hidden=16, layers=1)
    calibration = unirank.Calibration(text=str(synthetic.text(folder, 1000)), windows=2, window=16, batch=2)
    model = unirank.compress(tiny.model, 0.4, tokenizer=tiny.tokenizer, calibration=calibration, store=folder / "STORE")
    model.save(folder / "OUT")


def decoded(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")


def make_parsers(folder: Path) -> dict[str, tuple[Parser, list[bytes]]]:
    """By name: what is called with the bytes, and the first inputs."""
    store, out = folder / "STORE", folder / "OUT"
    linears = open_store(store).linears
    plan, provenance = (out / PLAN_FILE).read_bytes(), (out / PROVENANCE_FILE).read_bytes()
    report = EvalReport(2.0, 0.7, "a", "b", window=4, windows=2, predicted_tokens=6, bos=False, dtype="x", parameters=9)
    evaluations = json.dumps({"evaluations": [{"report": report.as_dict(), "dense": 1.5}]}).encode()
    keys = ("steps", "batch", "window", "rank", "schedule", "distill", "seed")
    training = {"settings": dict.fromkeys(keys, 1), "data": {"text": "a"}, "log": [{"step": 1}]}
    trained = json.dumps(json.loads(provenance) | {"training": training}).encode()
    ranks = json.dumps({"ranks": dict(RankPlan.from_json(plan.decode()).ranks)}).encode()
    config = json.dumps(json.loads((out / "config.json").read_text())["quantization_config"]).encode()

    def own(source: Path, parser: str) -> Path:
        """A copy for one parser to spoil."""
        return Path(shutil.copytree(source, folder / parser))

    def in_file(file: Path, read: Callable[[], object]) -> Parser:
        def run(content: bytes) -> object:
            file.write_bytes(content)
            return read()

        return run

    def read_all(place: Path) -> object:
        found = open_store(place)
        return found.cosines(), found.damping(), found.energies(), [found.factors(spec, 1) for spec in linears]

    def header(content: bytes) -> object:
        try:
            record = parse_object(decoded(content))
        except ValueError:
            return None
        # With the right checksum, which no mutation of the file would find.
        write_tensors(headed / LAYER, weights, record)
        return read_all(headed)

    def quantization(content: bytes) -> object:
        try:
            return UniRankConfig(**parse_object(decoded(content)))
        except ValueError:
            return None

    lines = folder / "text.jsonl"
    listed, cut, headed = (own(store, parser) for parser in ("manifest", "tensors", "header"))
    made, measured = (own(out, parser) for parser in ("provenance", "evaluations"))
    weights = read_tensors(store / LAYER)
    cosines = {key: asdict(stat) for key, stat in open_store(store).cosines()[0].items()}
    head = json.dumps({"cosines": cosines, "damping": open_store(store).damping()}).encode()
    return {
        "plan": (lambda content: RankPlan.from_json(decoded(content)), [plan]),
        "ranks": (lambda content: read_ranks(linears, decoded(content)), [plan, ranks]),
        "manifest": (
            in_file(listed / MANIFEST, lambda: open_store(listed).layers_done()),
            [(store / MANIFEST).read_bytes()],
        ),
        "tensors": (in_file(cut / LAYER, lambda: read_all(cut)), [(store / LAYER).read_bytes()]),
        "header": (header, [head]),
        "provenance": (in_file(made / PROVENANCE_FILE, lambda: read_record(made)), [provenance, trained]),
        "evaluations": (in_file(measured / EVALUATIONS_FILE, lambda: read_record(measured)), [evaluations]),
        "quantization": (quantization, [config]),
        "text": (in_file(lines, lambda: read_text(str(lines))), [b'{"text": "a b"}\n{"text": "c"}\n']),
    }


@contextmanager
def inputs() -> Iterator[dict[str, tuple[Parser, list[bytes]]]]:
    with tempfile.TemporaryDirectory() as scratch:
        make_inputs(Path(scratch))
        yield make_parsers(Path(scratch))


def survives(parser: Parser) -> Callable[[bytes], None]:
    def one_input(content: bytes) -> None:
        try:
            parser(content)
        except unirank.UnirankError as error:
            if not str(error).strip():
                raise RuntimeError("an error without a sentence") from error

    return one_input


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one parser in this process, which libFuzzer ends."""
    with inputs() as parsers:
        parser, seeds = parsers[name]
        corpus = PLACE / name
        corpus.mkdir(parents=True, exist_ok=True)
        for index, seed in enumerate(seeds):
            (corpus / f"seed-{index}").write_bytes(seed)
        words = corpus.with_suffix(".words")
        found = sorted({word for seed in seeds for word in re.findall(rb'"[\w.]{1,40}"', seed)})
        words.write_bytes(b"\n".join(b'"' + word.replace(b'"', b'\\"') + b'"' for word in found) + b"\n")
        options = [f"-max_total_time={seconds}", "-seed=1", "-max_len=20000", f"-dict={words}", "-timeout=20"]
        options += [f"-artifact_prefix={corpus}-crash-", "-print_final_stats=1", "-verbosity=1"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], survives(parser))
        atheris.Fuzz()


def replay() -> None:
    """Run every kept input of every parser once more."""
    with inputs() as parsers:
        for name, (parser, _) in parsers.items():
            for file in sorted((PLACE / name).iterdir()):
                survives(parser)(file.read_bytes())


def reached(data: Path) -> list[tuple[str, int, int, list[int]]]:
    """Of each module's parsing lines: how many there are, how many the replay reached, and which it did not."""
    import ast

    import coverage

    measured = coverage.Coverage(data_file=str(data))
    measured.load()
    rows = []
    for file, names in PARSERS.items():
        _, statements, _, missing, _ = measured.analysis2(str(ROOT / file))
        inside = set(statements)
        if names:
            tree = ast.parse((ROOT / file).read_text())
            parts = [node for node in ast.walk(tree) if getattr(node, "name", None) in names]
            # The line of a `def` runs at import.
            inside &= {line for node in parts for line in range(node.body[0].lineno, (node.end_lineno or 0) + 1)}  # pyright: ignore[reportAttributeAccessIssue]
        missed = sorted(inside & set(missing))
        rows.append((file, len(inside), len(inside) - len(missed), missed))
    return rows


def main(seconds: int) -> int:
    PLACE.mkdir(parents=True, exist_ok=True)
    crashes = 0
    with inputs() as parsers:
        names = list(parsers)
    for name in names:
        command = [sys.executable, __file__, "--parser", name, str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True)
        runs = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
        crashes += done.returncode != 0
        kept = len(list((PLACE / name).iterdir()))
        print(
            f"{name}: {runs[1] if runs else '?'} inputs in {seconds} s, {kept} kept, code {done.returncode}", flush=True
        )
        if done.returncode != 0:
            print(done.stderr[-3000:])
    data = PLACE / "coverage"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "coverage",
            "run",
            f"--data-file={data}",
            f"--source={ROOT / 'unirank'}",
            __file__,
            "--replay",
        ],
        check=True,
        capture_output=True,
    )
    for file, lines, seen, missed in reached(data):
        print(f"{file}: {seen} of {lines} parsing lines reached; not {missed}")
    print(f"crashes: {crashes}")
    return int(crashes > 0)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--parser", name, seconds]:
            fuzz(name, int(seconds))
        case ["--replay"]:
            replay()
        case [seconds]:
            raise SystemExit(main(int(seconds)))
        case _:
            raise SystemExit(__doc__)
