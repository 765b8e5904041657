"""Files and arguments from outside: whatever they hold, one of our errors in one sentence, and nothing else happens."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import unirank
from tests.support.tiny import build
from unirank import InputError, RankPlan, StoreError, UnirankError
from unirank.analysis.store import MANIFEST, open_store
from unirank.cli.main import app
from unirank.compression.card import EVALUATIONS_FILE, PLAN_FILE, PROVENANCE_FILE
from unirank.compression.checkpoint import add_evaluation, read_record
from unirank.evaluation.perplexity import EvalReport
from unirank.planning.imported_ranks import read_ranks
from unirank.report.gather import gather
from unirank.report.page import page

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../x", "/etc/passwd", "dense", "\x00", "a" * 500])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a checkpoint made from it, and the text: OUT, STORE."""
    folder = tmp_path_factory.mktemp("made")
    from tests.support.tiny import WORDS

    (folder / "words.txt").write_text(" ".join(WORDS[2 + 7 * i % 94] for i in range(1000)))
    build("llama").save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    calibration = unirank.Calibration(text=str(folder / "words.txt"), windows=4, window=16, batch=2)
    model = unirank.compress(folder / "dense", 0.4, calibration=calibration, store=folder / "STORE", device="cpu")
    model.save(folder / "OUT")
    return folder


def changed(draw: Any, record: Any) -> Any:
    """The JSON record with one to three of its values replaced, or names lost, anywhere inside."""
    record = json.loads(json.dumps(record))
    for _ in range(draw(st.integers(1, 3))):
        place = record
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            deeper = isinstance(place[key], dict | list) and place[key] and draw(st.booleans())
            if deeper:
                place = place[key]
                continue
            if draw(st.integers(0, 3)) == 0:
                del place[key]
            else:
                place[key] = draw(values)
            break
    return record


@FUZZ
@given(data=st.data())
def test_rank_plans(data: st.DataObject, made: Path) -> None:
    record = changed(data.draw, json.loads((made / "OUT" / PLAN_FILE).read_text()))
    store = open_store(made / "STORE")
    for read in (RankPlan.from_json, lambda text: read_ranks(store.linears, text)):
        try:
            found = read(json.dumps(record))
        except InputError:
            continue
        assert found


@FUZZ
@given(text=st.text(max_size=40) | values.map(json.dumps))
def test_texts_that_are_no_plan(text: str, made: Path) -> None:
    with pytest.raises(InputError):
        RankPlan.from_json(text)
    with pytest.raises(InputError):
        read_ranks(open_store(made / "STORE").linears, text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_texts_that_parsers_choke_on(text: str, made: Path) -> None:
    for read in (RankPlan.from_json, lambda text: read_ranks(open_store(made / "STORE").linears, text)):
        with pytest.raises(InputError):
            read(text)


@FUZZ
@given(data=st.data())
def test_manifests(data: st.DataObject, made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("store")
    record = changed(data.draw, json.loads((made / "STORE" / MANIFEST).read_text()))
    (folder / MANIFEST).write_text(json.dumps(record))
    try:
        store = open_store(folder)
    except StoreError:
        return
    assert store.layers_done() == 0
    assert store.layer_count <= 3


@FUZZ
@given(data=st.data())
def test_checkpoint_records(data: st.DataObject, made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What can be read can also be shown."""
    folder = tmp_path_factory.mktemp("out")
    for name in (PLAN_FILE, PROVENANCE_FILE):
        text = (made / "OUT" / name).read_text()
        if data.draw(st.booleans()):
            text = json.dumps(changed(data.draw, json.loads(text)))
        (folder / name).write_text(text)
    if data.draw(st.booleans()):
        entry = {"report": {"perplexity": 1.0}, "dense": None}
        (folder / EVALUATIONS_FILE).write_text(json.dumps(changed(data.draw, {"evaluations": [entry]})))
    try:
        record = read_record(folder)
    except InputError:
        return
    assert record.report.targets_before > 0
    with suppress(InputError):  # a plan may name linears that are in no layer
        page(gather(folder, None, None))


def load(path: Path) -> Any:
    return unirank.load(path, device="cpu")


def with_config(made: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(made / "dense", folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_config_that_asks_for_remote_code_is_refused_and_not_run(made: Path, tmp_path: Path) -> None:
    folder = with_config(
        made,
        tmp_path / "remote",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(InputError, match=r"trust_remote_code|custom code"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -5},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"vocab_size": 3},
        {"model_type": "../../etc"},
        {"model_type": None},
        {"intermediate_size": 10**4},
        {"quantization_config": {"quant_method": "unirank", "ranks": {"model.layers.0.mlp.up_proj": 10**30}}},
        {"quantization_config": {"quant_method": "unirank", "ranks": {"__class__": 3}}},
        {"quantization_config": {"quant_method": "unirank", "ranks": [1, 2]}},
        {"quantization_config": {"quant_method": "magic"}},
    ],
    ids=str,
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], made: Path, tmp_path: Path) -> None:
    with pytest.raises(UnirankError) as error:
        load(with_config(made, tmp_path / "model", **changes))
    assert str(error.value)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a/../../x.safetensors"])
def test_an_index_that_leaves_its_directory_is_refused(place: str, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "dense", tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    weights = {"model.embed_tokens.weight": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with pytest.raises(InputError, match=r"index\.json names .*, which is no file of its directory"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{" * 1000,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 65) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'[:65],
        struct.pack("<Q", 72) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999999999999999]}}'[:72],
    ],
    ids=range(8),
)
@pytest.mark.parametrize("stream", [False, True])
def test_weights_with_hostile_headers_are_refused(content: bytes, stream: bool, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "dense", tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"Cannot load the weights|lacks the weights"):
        unirank.load(folder, device="cpu", stream=stream)


def test_links_of_a_store_are_not_written_through(made: Path, tmp_path: Path) -> None:
    """A layer file that is a link to something else is replaced, and what it points at is left alone."""
    store = Path(shutil.copytree(made / "STORE", tmp_path / "store"))
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"years of work")
    (store / "layer-0001.safetensors").unlink()
    os.symlink(theirs, store / "layer-0001.safetensors")
    with pytest.raises(StoreError, match=r"layer-0001\.safetensors is missing or damaged"):
        unirank.plan(open_store(store), 0.3)
    (store / "layer-0001.safetensors").unlink()
    os.symlink(theirs, store / "layer-0001.safetensors.tmp")
    calibration = unirank.Calibration(text=str(made / "words.txt"), windows=4, window=16, batch=2)
    unirank.analyze(load(made / "dense"), store, calibration=calibration)
    assert theirs.read_bytes() == b"years of work"


COMMANDS = ("analyze", "plan", "compress", "finetune", "quantize", "densify", "report", "diagnose", "eval", "info")
words = st.sampled_from(
    [
        "--remove",
        "-r",
        "--scheme",
        "--windows",
        "-o",
        "--json",
        "--set",
        "--stream",
        "--dry-run",
        "--help",
        "--",
        "-",
        "",
    ]
) | st.text(max_size=6).filter(lambda text: "\x00" not in text)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(command=st.sampled_from(COMMANDS), arguments=st.lists(words | st.integers().map(str), max_size=5))
def test_arguments(command: str, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Usage errors and our own errors only; no file appears."""
    place = tmp_path_factory.mktemp("arguments")
    before = os.getcwd()
    os.chdir(place)
    try:
        result = CliRunner().invoke(app, [command, *arguments])
    finally:
        os.chdir(before)
    assert result.exit_code in (0, 1, 2)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, UnirankError), result.exception
    assert list(place.iterdir()) == []


def test_the_fuzzers_would_find_a_crash(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that lets an error through fails the test above."""
    monkeypatch.setattr("unirank.rank_plan.parse_object", json.loads)
    with pytest.raises(RecursionError):
        RankPlan.from_json("[" * 100_000)


def grid_of(place: Path) -> Path:
    row = {"scheme": "svd", "allocator": "uniform", "remove": 0.2, "text": "t", "perplexity": 2.0}
    (place / "grid.json").write_text(json.dumps({"rows": [row]}))
    return place / "grid.json"


def measured_of(place: Path) -> dict[str, float]:
    store = open_store(place / "STORE")
    return store.measured("lems", {}, lambda: {spec.name: 1.0 for spec in store.linears})


def with_index(place: Path) -> Path:
    folder = Path(shutil.copytree(place / "dense", place / "indexed", dirs_exist_ok=True))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    return folder


# A function of ours on the way of each reader, in which a slip is planted.
SLIPS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "manifest": ("unirank.analysis.manifest.entry", lambda place: open_store(place / "STORE")),
    "identity": ("unirank.analysis.identity.Identity.from_dict", lambda place: open_store(place / "STORE")),
    "linears": ("unirank.types.LinearSpec.from_dict", lambda place: open_store(place / "STORE")),
    "layer file": (
        "unirank.disk.tensorfile.TensorFile.__getitem__",
        lambda place: open_store(place / "STORE").energies(),
    ),
    "layer file's sums": ("unirank.disk.tensorfile._sum", lambda place: open_store(place / "STORE").energies()),
    "layer file's header": ("unirank.disk.tensorfile._dumped", lambda place: open_store(place / "STORE").energies()),
    "cosines": ("unirank.types.CosineStat.from_dict", lambda place: open_store(place / "STORE").cosines()),
    "damping": ("unirank.analysis.layer_file.number", lambda place: open_store(place / "STORE").damping()),
    "all tensors of a file": ("unirank.disk.tensorfile._sum", lambda place: open_store(place / "STORE").gradients(0)),
    "measured": ("unirank.analysis.kept_numbers.number", measured_of),
    "provenance": ("unirank.compression.truncation.TruncateReport.from_dict", lambda place: read_record(place / "OUT")),
    "provenance's identity": ("unirank.analysis.identity.Identity._parse", lambda place: read_record(place / "OUT")),
    "evaluations": ("unirank.evaluation.perplexity.EvalReport.from_dict", lambda place: read_record(place / "OUT")),
    "plan": ("unirank.rank_plan.RankPlan._check", lambda place: read_record(place / "OUT")),
    "plan's cost": ("unirank.rank_plan.RankPlan.rank_cost", lambda place: read_record(place / "OUT")),
    "ranks": (
        "unirank.planning.imported_ranks.canonical",
        lambda place: read_ranks(open_store(place / "STORE").linears, (place / "OUT" / PLAN_FILE).read_text()),
    ),
    "grid": ("unirank.report.gather.number", lambda place: gather(place / "OUT", None, grid_of(place))),
    "index": ("unirank.models.folder.entry", lambda place: load(with_index(place))),
}


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, ValueError])
@pytest.mark.parametrize("reader", SLIPS)
def test_a_slip_of_ours_is_no_damage(
    reader: str, error: type[Exception], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes through as it is; called damage, it would make people delete good files."""
    for name in ("OUT", "STORE", "dense"):
        shutil.copytree(made / name, tmp_path / name)
    calibration = unirank.Calibration(text=str(made / "words.txt"), windows=4, window=16, batch=2, gradient_windows=1)
    if reader == "all tensors of a file":
        unirank.analyze(load(made / "dense"), tmp_path / "STORE", calibration=calibration, overwrite=True)
    report = EvalReport(2.0, 0.7, "a", "b", window=4, windows=2, predicted_tokens=6, bos=False, dtype="x", parameters=9)
    add_evaluation(tmp_path / "OUT", report)
    measured_of(tmp_path)
    target, read = SLIPS[reader]
    assert read(tmp_path)

    def slip(*_: object, **__: object) -> None:
        raise error("planted")

    monkeypatch.setattr(target, slip)
    with pytest.raises(error, match="planted") as caught:
        read(tmp_path)
    assert caught.type is error


def test_zero_and_huge_ranks_of_a_plan(made: Path) -> None:
    record = json.loads((made / "OUT" / PLAN_FILE).read_text())
    name = next(iter(record["ranks"]))
    for rank in (0, -1, 10**30, 1.0, True):
        with pytest.raises(InputError, match="is not a unirank rank plan: rank of"):
            RankPlan.from_json(json.dumps(record | {"ranks": record["ranks"] | {name: rank}}))
