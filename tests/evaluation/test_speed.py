"""Tokens a second: what is timed, in which order, and what is said of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.tiny import build
from unirank.disk.strictjson import Damaged
from unirank.errors import InputError
from unirank.evaluation import speed as module
from unirank.evaluation.speed import Speed, tokens_per_second


def test_a_rate_is_tokens_over_the_median_of_the_seconds(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that gives the first model 1 s a run, the second 2 s, and one slow turn, which a median ignores."""
    lasting = itertools.cycle([1.0, 1.0, 2.0, 2.0])
    slow = iter([50.0] * 4)
    taken = []

    def clocked(run, device) -> float:
        run()
        taken.append(next(slow, None) or next(lasting))
        return taken[-1]

    monkeypatch.setattr(module, "_seconds", clocked)
    models = [(build("llama"), tokenizer), (build("gemma3"), tokenizer)]
    seen: list[tuple[str, int, int]] = []
    first, second = tokens_per_second(
        models, prompt=12, steps=5, progress=lambda stage, done, total: seen.append((stage, done, total))
    )
    assert len(taken) == 12  # three turns of two phases of two models; the one that warms up has no time
    assert (first.prefill, first.decode) == (12.0, 5.0)
    assert (second.prefill, second.decode) == (6.0, 2.5)
    assert first.rates == {"prefill": 12.0, "decode": 5.0}
    assert (first.spread, second.spread) == (50.0, 25.0)
    assert (first.turns, first.device, first.dtype) == (3, "cpu", "float32")
    assert seen == [("speed", turn, 4) for turn in range(5)]


def test_every_run_writes_as_many_tokens_as_are_counted(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a model that would end its text at once, and within a short table of positions."""
    model = build("llama")
    model.lm_head.weight.data.zero_()  # every token is as likely, so the first one is taken, an end
    generation = model.generation_config
    assert generation is not None
    generation.eos_token_id = 0
    (speed,) = tokens_per_second([(model, tokenizer)], prompt=6, steps=4, turns=1)
    assert (speed.prompt, speed.steps) == (6, 4)
    assert speed.prefill > 0
    short = build("gpt2", n_positions=20)
    (speed,) = tokens_per_second([(short, tokenizer)], turns=1)
    assert (speed.prompt, speed.steps) == (19, 12)
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: input_ids)
    with pytest.raises(InputError, match="LlamaForCausalLM wrote 0 tokens, not 1"):
        tokens_per_second([(model, tokenizer)], turns=1)


@pytest.mark.parametrize("name", ["prompt", "steps", "turns"])
def test_numbers_below_one_are_refused(name: str, tokenizer) -> None:
    more: Any = {name: 0}
    with pytest.raises(InputError, match=f"{name} = 0 is not legal; it is at least 1"):
        tokens_per_second([(build("llama"), tokenizer)], **more)


def test_a_record_is_read_as_it_was_written() -> None:
    speed = Speed(120.5, 11.0, 128, 16, 3, 1.25, "cpu", "float32", 2)
    assert Speed.from_dict(speed.as_dict()) == speed
    for change in ({"decode": 0.0}, {"decode": "fast"}, {"threads": 2.0}, {"device": None}, {"more": 1}):
        with pytest.raises(Damaged):
            Speed.from_dict(speed.as_dict() | change)
