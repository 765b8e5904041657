"""Conversations are what the chat template writes, on the same day always; what it refuses is said with its record."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers.utils.chat_template_utils as chat_templates
from transformers import PreTrainedTokenizerFast

from unirank.errors import InputError
from unirank.text.conversations import CLOCK
from unirank.text.records import read_documents
from unirank.text.windows import read_text

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
USER, ASSISTANT = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", unk_token="<unk>")
    made.chat_template = PLAIN
    return made


def read(folder: Path, record: Any, tokenizer: PreTrainedTokenizerFast, *, before: int = 0) -> str:
    """The document of one record, which stands behind `before` others."""
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [{"text": "w0"}] * before + [record]))
    return read_documents(str(file), tokenizer)[0][-1]


def test_lists_of_messages_in_prompt_and_completion_are_one_conversation(
    tmp_path: Path, chat: PreTrainedTokenizerFast
) -> None:
    system = {"role": "system", "content": "w0"}
    record = {"prompt": [system, USER], "completion": [ASSISTANT]}
    assert read(tmp_path, record, chat) == "system: w0\nuser: w1\nassistant: w2\n"
    datasets.Dataset.from_list([record]).to_parquet(str(tmp_path / "chat.parquet"))
    assert read_text(str(tmp_path / "chat.parquet"), chat).content == "system: w0\nuser: w1\nassistant: w2\n"


def test_content_in_parts_of_text_is_that_text(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    assert read(tmp_path, {"messages": [{"role": "user", "content": parts}]}, chat) == "user: w1 w2\n"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": [USER], "completion": "w2"}, "its completion is a str, not a list of messages"),
        ({"prompt": "w1", "completion": [ASSISTANT]}, "its prompt is a str, not a list of messages"),
        ({"prompt": {"role": "user"}, "completion": "w2"}, "its prompt is a dict, not a list of messages"),
        ({"prompt": 1, "completion": 2}, "its prompt is a int, not a list of messages"),
        ({"prompt": [], "completion": [ASSISTANT]}, "its prompt is an empty list"),
        ({"messages": []}, "its messages is an empty list"),
        ({"messages": "w1"}, "its messages is a str, not a list of messages"),
        ({"messages": [[USER], [ASSISTANT]]}, "message 1 of its messages is a list, not an object"),
        ({"messages": [USER, "w2"]}, "message 2 of its messages is a str, not an object"),
        ({"messages": [{"content": "w1"}]}, "message 1 of its messages has no role"),
        ({"messages": [{"role": 1, "content": "w1"}]}, "message 1 of its messages has no role that is a string"),
        ({"messages": [{"role": "user"}]}, "message 1 of its messages has content that is a NoneType"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "message 1 of its messages has content that is a dict"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has content with a part that is no text"),
        ({"messages": [{"role": "user", "content": ["w1"]}]}, "has content with a part that is no text"),
        ({"instruction": ["w1"], "output": "w2"}, "its instruction is a list, not a string"),
        ({"instruction": "w1", "input": {}, "output": "w2"}, "its input is a dict, not a string"),
        ({"instruction": "w1", "output": 2}, "its output is a int, not a string"),
        ({"prompt": "w1", "completion": None}, "it has neither text"),
        ({"conversations": [{"from": "human", "value": "w1"}]}, "it has neither text"),
    ],
)
def test_nothing_but_text_is_written_out(
    record: dict[str, Any], reason: str, tmp_path: Path, chat: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match=rf"^Record 3 of .*chat\.jsonl is not usable: .*{reason}.*\.$"):
        read(tmp_path, record, chat, before=2)


def test_a_call_of_a_tool_needs_no_content(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    chat.chat_template = "{% for m in messages %}{{ m.content or (m.tool_calls | tojson) }}{% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w3"}}]}
    assert read(tmp_path, {"messages": [USER, call]}, chat) == 'w1[{"function": {"name": "w3"}}]'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('No system turns here.') }}", "the chat template refuses it: No system turns here"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses it: .*str"),
        ("{{ messages[9].content }}", "the chat template refuses it: .*has no element 9"),
        ("{{ 1 // 0 }}", "the chat template refuses it: .*zero"),
        ("{% if %}", "the chat template refuses it: "),
        ("{{ messages.__class__.__mro__ }}", "the chat template refuses it: "),
    ],
)
def test_what_a_template_refuses_is_said_with_the_record(
    template: str, reason: str, tmp_path: Path, chat: PreTrainedTokenizerFast
) -> None:
    chat.chat_template = template
    with pytest.raises(InputError, match=rf"^Record 2 of .* is not usable: {reason}[^\n]*\.$"):
        read(tmp_path, {"messages": [USER, ASSISTANT]}, chat, before=1)
    with pytest.raises(InputError, match=rf"^Record 2 of .* is not usable: {reason}[^\n]*\.$"):
        read(tmp_path, {"prompt": "w1", "completion": "w2"}, chat, before=1)


def test_several_templates_without_a_default_are_refused(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    chat.chat_template = {"default": PLAIN, "other": ""}  # pyright: ignore[reportAttributeAccessIssue]
    assert read(tmp_path, {"messages": [USER]}, chat) == "user: w1\n"
    chat.chat_template = {"one": PLAIN, "other": ""}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match=r"Record 1 of .*multiple chat templates"):
        read(tmp_path, {"messages": [USER]}, chat)


LLAMA = "{%- if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}: "
MACRO = "{% macro head() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}: "


@pytest.mark.parametrize(
    ("start", "written"),
    [
        (LLAMA, "26 Jul 2024: "),
        (MACRO, "2024-07-26: "),
        ("{{ strftime_now('%H:%M:%S.%f, 100 %%, %%d') }}: ", "00:00:00.000000, 100 %, %d: "),
        ("\n  {{ strftime_now('%d %B %Y') }}: ", "\n  26 July 2024: "),
    ],
)
def test_the_date_in_a_template_is_always_the_same(
    start: str, written: str, tmp_path: Path, chat: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.chat_template = start + PLAIN
    found = [read(tmp_path, {"messages": [USER]}, chat)]

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2031, 1, 2, 3, 4, 5, 6)

    chat_templates._compile_jinja_template.cache_clear()
    monkeypatch.setattr(chat_templates, "datetime", Later)
    found.append(read(tmp_path, {"messages": [USER]}, chat))
    assert found == [f"{written}user: w1\n"] * 2


def test_the_clock_is_that_of_one_moment() -> None:
    moment = datetime(2024, 7, 26)
    assert {key: moment.strftime(key) for key in CLOCK} == CLOCK
