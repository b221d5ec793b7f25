"""The fields of a raw row, checked: texts, conversations, tools, labels and numbers, or why they are none."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

Message = dict[str, Any]

MAX_FP32 = 3.4e38
"""Numbers are kept in fp32."""
MAX_MARGIN = 65536
"""Beside a larger one fp32 would not see scores that differ by 0.004, and the loss would be the margin."""

NEEDED = {
    "preference": "chosen and rejected, with prompt unless they are message lists that share their beginning",
    "sft": "messages, or prompt and completion, or input and output",
    "unpaired": "prompt, completion and label (true or false), or prompt, chosen and rejected",
}


class Refused(Exception):
    """Why a row cannot be used; becomes a BadRow with the row's place."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


def weight(message: Message) -> bool:
    """OpenAI's field: whether a turn of the assistant is trained."""
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise Refused("wrong_fields", f"the weight of a message is 0 or 1, not {short(weight)}")
    return bool(weight)


def known(value: Any) -> str | list[Message] | None:
    """A string, a checked message list, or None where the field is missing."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise Refused("wrong_fields", f"neither text nor a list of messages: {short(value)}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(
                "wrong_fields", f'a message is not {{"role": ..., "content": ...}}: {short(message)}'
            )
        messages.append(_checked(message))
    return messages


def _checked(message: dict[str, Any]) -> Message:
    """A message without its nulls, and with its content as text. A list of parts (OpenAI's form) is put
    together as templates for such lists do it; others would write Python's spelling of the list."""
    own: Message = without_nulls(message)
    content = own.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"type": None} for part in content]
        texts = [str(part["text"]) for part in parts if isinstance(part.get("text"), str)]
        if not texts or len(texts) < len(parts) or any(part.get("type", "text") != "text" for part in parts):
            raise Refused("wrong_fields", f"the content of a message is not all text: {short(content)}")
        own["content"] = "".join(texts)
    elif content is None and own.keys() <= {"role", "name", "weight"}:
        raise Refused("wrong_fields", f"a message has no content: {short(message)}")
    elif content is not None and not isinstance(content, str):
        raise Refused("wrong_fields", f"the content of a message is not text: {short(content)}")
    return own


def without_nulls(value: Any) -> Any:
    """Without the fields that are null, at any depth: Arrow (Parquet, hub sets) gives every object the fields
    of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def with_arguments(messages: list[Message], as_text: bool) -> list[Message]:
    """The arguments of tool calls as JSON text, or as the object that such a text holds."""
    out = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message = {**message, "tool_calls": [_with_arguments(call, as_text) for call in calls]}
        out.append(message)
    return out


def _with_arguments(call: Any, as_text: bool) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, dict):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(arguments)
            return {**call, "arguments": found} if isinstance(found, dict) else call
    return call


def label_of(fields: dict[str, Any]) -> float:
    """1.0 of a desirable row, 0.0 of an undesirable one. Text is refused: "false" would count as true."""
    label = fields.get("label")
    if label is None:
        raise wrong_fields("unpaired", fields)
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise Refused("wrong_fields", f"label is {short(label)}; it must be true or false (or 1 or 0)")
    return float(label)


def conversation(
    prompt: str | list[Message] | None, completions: list[str | list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Prompt messages and the messages of each completion, in whichever form the row has them.

    Completions may repeat the prompt (as hub sets do) or, without a prompt, share their beginning.
    """
    tails = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
    head = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if head is None:
        shared = 0
        while shared < min(map(len, tails)) and all(tail[shared] == tails[0][shared] for tail in tails):
            shared += 1
        # Equal halves share everything; they are told apart later, as what they are.
        shared = min(shared, min(map(len, tails)) - 1)
        head = tails[0][:shared]
    if all(tail[: len(head)] == head for tail in tails):
        tails = [tail[len(head) :] for tail in tails]
    if not head:
        raise Refused("wrong_fields", "there is no prompt, and the completions share no first message")
    for tail in tails:
        if not tail or tail[0]["role"] != "assistant":
            raise Refused("wrong_fields", "the completion does not begin with a message of the assistant")
    return head, tails


def tools_of(fields: dict[str, Any]) -> Any:
    """The tools field, which data sets often keep as JSON in a string."""
    tools = fields.get("tools")
    if not isinstance(tools, str):
        return without_nulls(tools) or None
    try:
        return json.loads(tools) or None if tools.strip() else None
    except json.JSONDecodeError as error:
        raise Refused("wrong_fields", f"tools is not JSON: {error.msg}") from None


def number(fields: dict[str, Any], name: str) -> float:
    """A field as a number that fp32 holds; NaN where the row has none. Raises Refused."""
    value = fields.get(name)
    if value is None:
        return math.nan
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_FP32:
        raise Refused("wrong_fields", f"{name} is {short(value)}, not a finite number")
    return float(value)


def margin_of(fields: dict[str, Any]) -> float:
    """By how much the chosen completion is better; NaN where the row does not say. Raises Refused."""
    margin = number(fields, "margin")
    if abs(margin) > MAX_MARGIN:
        raise Refused(
            "wrong_fields", f"margin is {margin:g}; scores would not count beside more than {MAX_MARGIN:,}"
        )
    return margin


def wrong_fields(kind: str, fields: dict[str, Any]) -> Refused:
    return Refused("wrong_fields", f"it has the fields {listed(fields)}; needed: {NEEDED[kind]}")


def listed(fields: dict[str, Any]) -> str:
    """The names of a row's fields, for a message."""
    return (
        ", ".join(key if value is not None else f"{key} (null)" for key, value in fields.items()) or "(none)"
    )


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
