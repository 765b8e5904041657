"""Does a high cosine go with a low effective rank? Statistics, readings, and what is said when one is missing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import unirank
from tests.support.tiny import WORDS
from unirank import AnalysisStore, Calibration, InputError, LoadedModel, effective_rank, spearman
from unirank.cli.main import main
from unirank.diagnosis.claim import GROUPS, Damping, Diagnosis, diagnose
from unirank.diagnosis.plots import draw, save
from unirank.models.structure import weight_of

WINDOWS = 6


@pytest.fixture(scope="module")
def counting_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words that count upwards, with a random start now and then: something that a tiny model can learn."""
    generator = torch.Generator().manual_seed(3)
    words, at = [], 0
    for jump in torch.rand(3000, generator=generator).tolist():
        at = int(jump * 1e6) % 94 if jump < 0.1 else (at + 1) % 94
        words.append(WORDS[2 + at])
    path = tmp_path_factory.mktemp("text") / "counting.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture
def trained(make_model, counting_text: Path) -> LoadedModel:
    """A tiny Llama of 6 layers after 30 steps on the text, so that its spectra are no longer those of noise."""
    loaded = make_model("llama", num_hidden_layers=6)
    ids = torch.tensor(loaded.tokenizer(counting_text.read_text())["input_ids"])[: 48 * 60].view(-1, 48)
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        batch = ids[(8 * step) % 56 :][:8]
        loss = loaded.model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    return loaded


@pytest.fixture
def calibration(counting_text: Path) -> Calibration:
    # Without clipping: moments of the store are compared with those of the outputs as they are.
    return Calibration(text=str(counting_text), windows=WINDOWS, window=48, batch=2, clip=0)


@pytest.fixture
def store(trained: LoadedModel, calibration: Calibration, tmp_path: Path) -> AnalysisStore:
    return unirank.analyze(trained, tmp_path / "store", calibration=calibration)


@pytest.fixture
def whole(store: AnalysisStore, trained: LoadedModel, counting_text: Path) -> Diagnosis:
    return diagnose(store, trained, text=str(counting_text), windows=WINDOWS, permutations=200)


def reading(diagnosis: Diagnosis, group: str, name: str):
    (found,) = [r for r in diagnosis.readings if (r.group, r.name) == (group, name)]
    return found


# -- statistics -------------------------------------------------------------------------------------------------------


def test_effective_rank_of_spectra_that_can_be_done_by_hand() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 2.0])) == pytest.approx(4)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)  # exp(ln 4 - 3/4 ln 3)
    assert effective_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize(
    ("x", "y", "rho"),
    [
        ([1, 2, 3, 4, 5], [2, 4, 6, 8, 99], 1.0),
        ([1, 2, 3, 4], [9, 7, 3, 1], -1.0),
        # d = (1, -1, 0, 1, -1): 1 - 6 * 4 / (5 * 24)
        ([1, 2, 3, 4, 5], [2, 1, 3, 5, 4], 0.8),
        # ranks (1.5, 1.5, 3) and (1, 2, 3): Pearson's 1.5 / sqrt(1.5 * 2)
        ([7, 7, 8], [1, 2, 3], 1.5 / math.sqrt(3)),
    ],
)
def test_spearman_by_hand(x, y, rho: float) -> None:
    assert spearman(x, y).rho == pytest.approx(rho)


def test_small_samples_get_the_exact_two_sided_p() -> None:
    # Of n! orders only the identity and its reverse reach |rho| = 1.
    for n in (3, 4, 5, 7):
        assert spearman(range(n), range(n)).p == pytest.approx(2 / math.factorial(n))
    # rho = 0.8 for n = 4: |rho| >= 0.8 needs sum d² <= 2 or >= 18: 1 + 3 orders on either side.
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]).rho == pytest.approx(0.8)
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]).p == pytest.approx(8 / 24)


def test_sampled_p_agrees_with_all_orders_and_depends_on_the_seed_alone() -> None:
    x, y = list(range(8)), [2, 0, 1, 5, 3, 7, 4, 6]
    seen = 1 - 6 * sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (8 * 63)
    orders = list(itertools.permutations(range(8)))
    hits = sum(
        abs(1 - 6 * sum((a - b) ** 2 for a, b in zip(x, order, strict=True)) / (8 * 63)) >= abs(seen) - 1e-9
        for order in orders
    )
    sampled = spearman(x, y, permutations=20_000)
    assert sampled.rho == pytest.approx(seen)
    assert sampled.p == pytest.approx(hits / len(orders), abs=5 * math.sqrt(0.01 / 20_000))
    assert sampled == spearman(x, y, permutations=20_000)
    assert sampled.p != spearman(x, y, permutations=20_000, seed=1).p


def test_the_least_sampled_p_is_never_0() -> None:
    assert spearman(range(40), range(40), permutations=99).p == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([1, 2], [1, 2], "at least 3"),
        ([1, 2, 3], [1, 2], "3 and 2"),
        ([1, 1, 1], [1, 2, 3], "all values are equal"),
        ([1, 2, math.nan], [1, 2, 3], "finite"),
    ],
)
def test_what_cannot_be_correlated_is_refused(x, y, words: str) -> None:
    with pytest.raises(InputError, match=words):
        spearman(x, y)


# -- readings ---------------------------------------------------------------------------------------------------------


def test_every_reading_is_made_from_store_model_and_text(whole: Diagnosis, store: AnalysisStore) -> None:
    assert whole.missing == ()
    assert {r.group for r in whole.readings} == set(GROUPS)
    cosines = store.cosines()
    for found in whole.readings:
        assert len(found.points) in (6, 12)
        assert found.mixed == (len(found.points) == 12)
        assert -1 <= found.energy.rho <= 1
        assert 0 < found.energy.p <= 1
        for point in found.points:
            assert point.cosine == cosines[point.layer][point.sublayer].mean
            assert 0 < point.energy <= point.sigma <= (1 if found.of_k else 48) + 1e-9


def test_weights_are_read_by_their_own_singular_values(whole: Diagnosis, trained: LoadedModel) -> None:
    for point in reading(whole, "weights", "mlp.up_proj").points:
        weight = weight_of(trained.model.get_submodule(f"model.layers.{point.layer}.mlp.up_proj")).detach().double()
        s = torch.linalg.svdvals(weight)
        assert point.energy == pytest.approx(effective_rank(s.square()), rel=1e-9)
        assert point.sigma == pytest.approx(effective_rank(s), rel=1e-6)


def test_the_measured_outputs_have_the_whitened_spectrum_of_the_output_projection(whole: Diagnosis) -> None:
    """Without bias and closing norm f(x) = W h, so its second moment is W C Wᵀ: two ways to one number."""
    measured = {(p.layer, p.sublayer): p for p in reading(whole, "outputs", "second moment, all").points}
    whitened = reading(whole, "scheme", "output projections").points
    assert len(whitened) == len(measured) == 12
    for point in whitened:
        assert measured[point.layer, point.sublayer].energy == pytest.approx(point.energy, rel=1e-4)


def test_a_cosine_near_1_keeps_the_streams_effective_rank(whole: Diagnosis) -> None:
    """docs/method.md: |ln erank(out) - ln erank(in)| <= T ln(D - 1) + h(T), T = sqrt(1 - c²), of directions."""
    points = reading(whole, "stream", "second moment of directions, all").points
    cosines = {(g.layer, g.sublayer): g.cosine for g in whole.geometry}
    binding = 0
    for before, after in itertools.pairwise(points):
        t = math.sqrt(1 - cosines[after.layer, after.sublayer] ** 2)
        if t < 1 - 1 / 32:  # beyond, the bound says nothing
            entropy = -t * math.log(t) - (1 - t) * math.log(1 - t)
            assert abs(math.log(after.energy / before.energy)) <= t * math.log(31) + entropy
            binding += 1
    assert binding >= 3


def test_the_geometry_explains_the_cosines_of_the_store(whole: Diagnosis, store: AnalysisStore) -> None:
    assert len(whole.geometry) == 12
    for row in whole.geometry:
        assert row.cosine == pytest.approx(store.cosines()[row.layer][row.sublayer].mean, rel=1e-6)
        assert row.size > 0
        assert 0 <= row.parallel <= 1


def test_without_the_model_its_readings_are_listed_as_missing(store: AnalysisStore) -> None:
    found = diagnose(store, permutations=50)  # the store has fewer windows than are taken by default
    assert {r.group for r in found.readings} == {"scheme"}
    assert [m.group for m in found.missing] == ["weights", "outputs", "stream"]
    assert all("needs the model that was analyzed" in m.reason for m in found.missing)
    assert found.geometry == ()


def test_without_the_text_only_the_streams_are_missing(store: AnalysisStore, trained: LoadedModel) -> None:
    found = diagnose(store, trained, permutations=50, windows=1)
    assert {r.group for r in found.readings} == {"weights", "scheme"}
    assert all(re.search(r"counting\.txt', a file .*text=", m.reason) for m in found.missing)


def test_an_svd_store_holds_the_weights_spectra_itself(trained, calibration, tmp_path, whole: Diagnosis) -> None:
    store = unirank.analyze(trained, tmp_path / "svd", scheme="svd", calibration=calibration)
    found = diagnose(store, permutations=50, windows=1)
    assert {r.group for r in found.readings} == {"weights"}
    assert any(m.group == "scheme" and "whiten" in m.reason for m in found.missing)
    ours, theirs = (reading(d, "weights", "self_attn.q_proj").points for d in (found, whole))
    assert [p.energy for p in ours] == pytest.approx([p.energy for p in theirs], rel=1e-6)


def test_two_layers_are_too_few_for_a_correlation(make_model, text_file: Path, tmp_path: Path) -> None:
    calibration = Calibration(text=str(text_file), windows=8, window=16, batch=1)
    store = unirank.analyze(make_model("gpt2", n_layer=2), tmp_path / "s", calibration=calibration)
    found = diagnose(store, permutations=50, windows=1)
    assert any("attn.c_proj: 2 sublayers are too few" in m.reason for m in found.missing)
    assert {r.name for r in found.readings} == {"output projections", "mean over the sublayer, of K, all"}


@pytest.mark.parametrize("name", ["gpt-neox", "gemma3", "opt"])
def test_parallel_blocks_closing_norms_and_biases(name: str, make_model, text_file: Path, tmp_path: Path) -> None:
    loaded = make_model(name)
    calibration = Calibration(text=str(text_file), windows=3, window=24, batch=2)
    store = unirank.analyze(loaded, tmp_path / "s", calibration=calibration)
    found = diagnose(store, loaded, text=str(text_file), windows=3, permutations=50)
    assert found.missing == ()
    for row in found.geometry:
        assert row.cosine == pytest.approx(store.cosines()[row.layer][row.sublayer].mean, rel=1e-5)


def test_damping_and_spectra_are_summed_up(whole: Diagnosis, store: AnalysisStore, monkeypatch) -> None:
    assert whole.damping == Damping(0, 42, 0.0, None)
    for row in whole.spectra:
        assert 1 <= row.least <= row.median <= row.most <= row.k
    known = {spec.name: torch.zeros(spec.k, dtype=torch.float64) for spec in store.linears}
    for position, energy in enumerate(known.values()):
        energy[:3] = torch.tensor([0.9, 0.08 + 1e-3 * position, 0.02 - 1e-3 * (position % 7)])
    damping = {spec.name: 1e-4 * (spec.layer == 2) for spec in store.linears}
    monkeypatch.setattr(AnalysisStore, "energies", lambda _: known)
    monkeypatch.setattr(AnalysisStore, "damping", lambda _: damping)
    found = diagnose(store, windows=1, permutations=50)
    assert found.damping == Damping(7, 42, 1e-4, "model.layers.2.self_attn.q_proj")
    assert {row.rank_99 for row in found.spectra} <= {2, 3}
    assert all(0.85 < row.first_share <= 0.9 for row in found.spectra)


def test_inputs_that_do_not_fit_the_store_are_refused(store, trained, make_model, text_file: Path) -> None:
    for options, words in (
        ({"windows": 7}, "windows = 7"),
        ({"windows": 1, "permutations": 0}, "permutations = 0"),
        ({"windows": 1, "text": str(text_file)}, r"text= .*only together with the model"),
        ({"windows": 1, "loaded": trained, "text": str(text_file)}, "not the one that the store was made from"),
        ({"windows": 1, "loaded": make_model("llama", num_hidden_layers=6)}, "another model"),
    ):
        with pytest.raises(InputError, match=words):
            diagnose(store, **options)


# -- what the user sees -----------------------------------------------------------------------------------------------


def test_the_summary_counts_readings_over_one_kind_and_over_both_apart(whole: Diagnosis) -> None:
    inside = [r for r in whole.readings if not r.mixed]
    confirm = sum(r.energy.rho < 0 and r.energy.p < 0.05 for r in inside)
    assert f"of {len(inside)} readings {confirm} confirm it" in whole.summary()
    assert f"Of {len(whole.readings) - len(inside)} readings" in whole.summary()
    forced = dataclasses.replace(inside[0], energy=dataclasses.replace(inside[0].energy, rho=-0.9, p=0.001))
    assert forced.energy.verdict.startswith("confirmed")
    assert "of 1 readings 1 confirm it, 0 deny it" in dataclasses.replace(whole, readings=(forced,)).summary()


def test_pictures_and_json_appear_together(whole: Diagnosis, tmp_path: Path) -> None:
    few = tuple(next(r for r in whole.readings if r.group == group) for group in ("scheme", "stream"))
    diagnosis = dataclasses.replace(whole, readings=few)
    files = save(diagnosis, tmp_path / "out")
    assert [f.name for f in files] == ["diagnose.json", "diagnose-scheme.png", "diagnose-stream.png"]
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in files}
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files[1:])
    assert json.loads(files[0].read_text())["readings"][0]["name"] == few[0].name
    with pytest.raises(InputError, match="--overwrite"):
        save(diagnosis, tmp_path / "out")
    (tmp_path / "out" / "diagnose-weights.png").touch()  # of an older run
    save(diagnosis, tmp_path / "out", overwrite=True)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in files}


def test_without_matplotlib_pictures_are_refused_in_one_sentence(whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("unirank.diagnosis.plots.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'unirank\[plot\]'"):
        draw(whole, tmp_path)


def test_the_command_prints_a_table_or_json(store, trained, counting_text, tmp_path, monkeypatch, capsys) -> None:
    trained.model.save_pretrained(tmp_path / "model")
    trained.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unirank", "diagnose", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    code, out, err = run(store.path, "--windows", 2, "--permutations", 50)
    assert (code, err) == (0, "")
    assert "Not read, (a) weights: needs the model" in out
    assert "Damping: none of 42 matrices." in out

    model = ["--model", tmp_path / "model", "--device", "cpu"]
    code, out, err = run(store.path, *model, "--windows", 2, "--permutations", 50)
    assert (code, err) == (0, "")
    assert re.search(r"Not read, \(c\) .*: .*'counting\.txt', a file .* --calib\.", " ".join(out.split()))

    with_model = ["--model", tmp_path / "model", "--calib", counting_text, "--device", "cpu"]
    monkeypatch.setattr("unirank.diagnosis.plots.draw", lambda *_: [])
    code, out, err = run(store.path, *with_model, "--windows", 2, "--permutations", 50, "--json", "-o", tmp_path / "o")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "o" / "diagnose.json").read_text())
    assert json.loads(out)["missing"] == []
    assert run(store.path, "-o", store.path)[0] == 2
