"""Conversations: the messages of a record, written out by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ASKED, _ANSWER = "user", "assistant"
# What a template reads on its clock, always (**choice**: the date that Llama's own template falls back to, midnight).
CLOCK = {
    "%Y": "2024", "%y": "24", "%G": "2024", "%m": "07", "%-m": "7", "%b": "Jul", "%h": "Jul", "%B": "July",
    "%d": "26", "%-d": "26", "%e": "26", "%j": "208", "%-j": "208", "%a": "Fri", "%A": "Friday", "%u": "5", "%w": "5",
    "%U": "29", "%W": "30", "%V": "30", "%H": "00", "%-H": "0", "%I": "12", "%-I": "12", "%p": "AM", "%M": "00",
    "%-M": "0", "%S": "00", "%-S": "0", "%f": "000000", "%z": "", "%Z": "", "%F": "2024-07-26", "%D": "07/26/24",
    "%x": "07/26/24", "%T": "00:00:00", "%X": "00:00:00", "%R": "00:00", "%c": "Fri Jul 26 00:00:00 2024",
}  # fmt: skip


def messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a record, checked, so that a template prints text and nothing else.

    Raises KeyError where there are none, TypeError and ValueError for what is not such messages; the first argument
    is the reason.
    """
    if record.get("messages") is not None:
        return _conversation("messages", record["messages"])
    if record.get("prompt") is not None and record.get("completion") is not None:
        asked, answer = record["prompt"], record["completion"]
        if isinstance(asked, str) and isinstance(answer, str):
            return _exchange(asked, answer)
        return _conversation("prompt", asked) + _conversation("completion", answer)
    if record.get("instruction") is not None and record.get("output") is not None:
        parts = [record["instruction"], record.get("input"), record["output"]]
        for name, part in zip(("instruction", "input", "output"), parts, strict=True):
            if not isinstance(part, str | None):
                raise TypeError(f"its {name} is a {type(part).__name__}, not a string")
        return _exchange("\n\n".join(filter(None, parts[:2])), parts[2])
    raise KeyError("it has neither text, nor messages, nor prompt and completion, nor instruction and output")


def write_out(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The conversation as the tokenizer's chat template writes it, on the same day always: its clock stands (`CLOCK`).

    Raises ValueError where there is no chat template, or where it refuses: a role, or the order of the turns.
    """
    from jinja2 import TemplateError

    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError("it is a conversation, and the tokenizer has no chat template")
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _clock_macro() + template
        written = tokenizer.apply_chat_template(list(map(dict, messages)), chat_template=template, tokenize=False)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A template is a program: it may also add None to a string, or ask for a field that is not there.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"the chat template refuses it: {first}") from error
    return str(written)


def _clock_macro() -> str:
    """Jinja's `strftime_now` for the fixed date: the name that a template finds in the place of transformers' own.

    A value of that name cannot be handed over: transformers replaces functions among a template's values.
    """
    # Longer directives first: "%-d" holds no "%d", but the order must not matter.
    fixed = "".join(f"|replace('{key}', '{CLOCK[key]}')" for key in sorted(CLOCK, key=len, reverse=True))
    # "%%" is a percent sign. The line end is trimmed (`trim_blocks`), so that the template begins where it began.
    return (
        "{% macro strftime_now(format) %}{% for part in format.split('%%') %}"
        f"{{{{ part{fixed} }}}}{{{{ '' if loop.last else '%' }}}}"
        "{% endfor %}{% endmacro %}\n"
    )


def _exchange(asked: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": _ASKED, "content": asked}, {"role": _ANSWER, "content": answer}]


def _conversation(name: str, turns: Any) -> list[dict[str, Any]]:
    if isinstance(turns, str | Mapping) or not isinstance(turns, Sequence):
        raise TypeError(f"its {name} is a {type(turns).__name__}, not a list of messages")
    if not turns:
        raise ValueError(f"its {name} is an empty list")
    return [_message(f"message {number} of its {name}", turn) for number, turn in enumerate(turns, start=1)]


def _message(name: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise TypeError(f"{name} is a {type(turn).__name__}, not an object of role and content")
    if not isinstance(turn.get("role"), str):
        raise TypeError(f"{name} has no role that is a string")
    message = {key: value for key, value in turn.items() if value is not None}  # tables have all keys in all rows
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        message["content"] = "".join(_part(name, part) for part in content)
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise TypeError(f"{name} has content that is a {type(content).__name__}, not a string")
    return message


def _part(name: str, part: Any) -> str:
    """Of content that comes in parts, `{"type": "text", "text": ...}`."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise TypeError(f"{name} has content with a part that is no text")
