"""Several texts: which names a string holds, how many windows each gives, and that every beginning holds all texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unirank.errors import InputError
from unirank.text.mixture import interleaved, shared_out, sources_of


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a.txt", ("a.txt",)),
        ("a.txt,b.txt", ("a.txt", "b.txt")),
        ("a.txt, b.txt ,builtin", ("a.txt", "b.txt", "builtin")),
        ("owner/name:configuration,wikitext2", ("owner/name:configuration", "wikitext2")),
        (",".join(f"/somewhere/{i:040}.txt" for i in range(200)), tuple(f"/somewhere/{i:040}.txt" for i in range(200))),
    ],
)
def test_names_stand_between_commas(text: str, sources: tuple[str, ...]) -> None:
    assert sources_of(text) == sources


def test_what_exists_under_a_name_with_a_comma_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt,b.txt").write_text("w1")
    (tmp_path / "c,d").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("w2")
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt,b.txt", str(tmp_path / "a.txt,b.txt"), "c,d"):
        assert sources_of(name) == (name,)
    assert sources_of("b.txt,a.txt") == ("b.txt", "a.txt")


@pytest.mark.parametrize("text", ["a.txt,", ",a.txt", "a.txt,,b.txt", "a.txt, ,b.txt", ","])
def test_nothing_between_two_commas_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="one of them is empty"):
        sources_of(text)


def test_a_name_that_stands_twice_is_an_error() -> None:
    with pytest.raises(InputError, match=r"'a\.txt, a\.txt' are not legal; one of them is named twice"):
        sources_of("a.txt, a.txt")


@pytest.mark.parametrize(
    ("windows", "shares", "counts"),
    [
        (64, [1, 1], [32, 32]),
        (64, [3, 1], [48, 16]),
        (64, [0.75, 0.25], [48, 16]),
        (7, [1, 1], [4, 3]),
        (10, [1, 1, 1], [4, 3, 3]),
        (8, [0.5, 0.3, 0.2], [4, 2, 2]),
        (3, [1e9, 1e9, 1e9], [1, 1, 1]),
        (5, [7], [5]),
    ],
)
def test_windows_are_shared_out_by_largest_remainders(windows: int, shares: list[float], counts: list[int]) -> None:
    found = shared_out(windows, shares, ["t"] * len(shares))
    assert found == counts
    assert shared_out(windows, counts, ["t"] * len(shares)) == counts  # what was given is a way to ask for it again


def test_a_text_without_a_window_is_an_error_that_names_it() -> None:
    for windows, shares in ((1, [1, 1]), (64, [1000, 1])):
        with pytest.raises(InputError, match=rf"The text second would give none of {windows} windows"):
            shared_out(windows, shares, ["first", "second"])


@pytest.mark.parametrize("counts", [[32, 32], [48, 16], [3, 10, 2], [1, 5], [4]])
def test_every_beginning_holds_the_texts_as_near_to_their_shares_as_can_be(counts: list[int]) -> None:
    parts = [torch.tensor([[i, row] for row in range(count)]) for i, count in enumerate(counts)]
    mixed = interleaved(parts)
    for i, part in enumerate(parts):
        assert mixed[mixed[:, 0] == i].equal(part)  # each in its own order, and whole
        seen = (mixed[:, 0] == i).cumsum(0)
        share = len(part) / len(mixed)
        wanted = share * torch.arange(1, len(mixed) + 1)
        assert float((seen - wanted).abs().max()) <= 1
    assert mixed.dtype == torch.int64


def test_the_first_windows_are_of_both() -> None:
    parts = [torch.full((48, 2), 7), torch.full((16, 2), 8)]
    assert [int(row[0]) for row in interleaved(parts)[:8]] == [7, 7, 8, 7, 7, 7, 8, 7]
    equal = [torch.full((4, 2), 7), torch.full((4, 2), 8)]
    assert [int(row[0]) for row in interleaved(equal)] == [7, 8, 7, 8, 7, 8, 7, 8]
