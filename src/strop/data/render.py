"""From a raw row to the texts that are tokenised, and the characters of them that are trained.

A row of strings is plain text: prompt + completion, to which the tokeniser adds BOS (where it wants one)
and EOS. A row of messages goes through a chat template, which writes all special tokens itself. Both
halves of a preference pair share one prompt. What counts as completion is everything that the template
writes from the end of its generation prompt on, the end-of-turn token included; in `messages`, each turn
of the assistant likewise. (TRL has the same reading of rows: losses can be compared.) SFT takes the turns
from a template that marks them (strop.data.marks); `sft.train_on` or a message's weight chooses among them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.config import Config
from strop.data import marks, templates
from strop.data.fields import (
    Message,
    Refused,
    conversation,
    known,
    label_of,
    listed,
    margin_of,
    tools_of,
    weight,
    with_arguments,
    wrong_fields,
)
from strop.data.ledger import BadRow
from strop.data.sources import Row
from strop.errors import UserError, first_line

FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format.replace('%d', '26').replace('%m', '07').replace('%Y', '2024')"
    ".replace('%b', 'Jul').replace('%B', 'July') }}{% endmacro %}\n"
)
"""Put before templates that print the date (Llama 3): the same rows must give the same tokens tomorrow. It
shadows the clock that transformers gives them; the day is the one that Llama's template has of its own."""

TEMPLATE_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What a template, which is a program, may raise beside Jinja's own errors."""


@dataclass(frozen=True)
class Text:
    """One sequence before it is tokenised."""

    text: str
    trained: list[tuple[int, int]]
    """[(begin, end)] of characters."""


@dataclass(frozen=True)
class Rendered:
    source: str
    line: int
    texts: list[Text]
    """chosen and rejected, or the only one."""
    templated: bool
    """The template wrote BOS and end-of-turn tokens; plain text still needs BOS and EOS."""
    value: float = math.nan
    """See `TokenisedRow.value`; of unpaired rows the label: 1 desirable, 0 undesirable."""
    half: bool = False
    """As `TokenisedRow.half`."""


@dataclass(frozen=True)
class Options:
    """What the configuration says about rendering one kind of rows. Part of a store's address."""

    train_on: str = "all"
    """As sft.train_on."""
    system_prompt: str | None = None
    prompt: templates.Template | None = None
    completion: templates.Template | None = None

    @classmethod
    def of(cls, config: Config, kind: str) -> Options:
        """UserError for a template that is none."""
        data, is_sft = config.data, kind == "sft"
        return cls(
            config.sft.train_on if is_sft else "all",
            data.system_prompt,
            templates.parse(data.prompt_template, "data.prompt_template"),
            templates.parse(data.completion_template, "data.completion_template") if is_sft else None,
        )


def chat_template(setting: str | None, tokenizer: Any) -> str | None:
    """The Jinja text in force: `model.chat_template` (a template or a file of it), else the tokenizer's."""
    if setting is None:
        own = getattr(tokenizer, "chat_template", None)
        return own.get("default") if isinstance(own, dict) else own
    if "{%" in setting or "{{" in setting:
        return setting
    path = Path(setting).expanduser()
    if not path.is_file():
        raise UserError(f"model.chat_template: neither a Jinja template nor a file: {setting}")
    return path.read_text(encoding="utf-8")


class Renderer:
    """Renders rows of one kind with one tokenizer and template."""

    def __init__(
        self, kind: str, tokenizer: Any, template: str | None, options: Options | None = None
    ) -> None:
        self.kind = kind
        self.tokenizer = tokenizer
        self.template = FIXED_DATE + template if template and "strftime_now" in template else template
        self.signed = marks.with_signs(self.template)
        """The template with signs at its marks; None where it has none."""
        self.options = options or Options()

    def __call__(self, row: Row) -> Rendered | BadRow:
        value = math.nan
        try:
            tools = tools_of(row.fields)
            if self.kind == "preference":
                texts, templated = self._preference(row.fields, tools)
                value = margin_of(row.fields)
            elif self.kind == "unpaired":
                texts, templated, value = self._unpaired(row.fields, tools)
            else:
                texts, templated = self._sft(row.fields, tools)
            for item in texts:
                _check_unicode(item.text)
        except Refused as refused:
            return BadRow(row.source, row.line, refused.reason, refused.message)
        if self.options.train_on == "everything":
            texts = [Text(item.text, [(0, len(item.text))]) for item in texts]
        return Rendered(row.source, row.line, texts, templated, value)

    def rows(self, row: Row) -> list[Rendered | BadRow]:
        """What a row of the data gives: itself, or the two halves of a pair where rows are unpaired."""
        rendered = self(row)
        if self.kind != "unpaired" or isinstance(rendered, BadRow) or len(rendered.texts) == 1:
            return [rendered]
        return [
            dataclasses.replace(rendered, texts=[text], value=label, half=True)
            for text, label in zip(rendered.texts, (1.0, 0.0))
        ]

    def _preference(self, fields: dict[str, Any], tools: Any) -> tuple[list[Text], bool]:
        prompt = self._field(self.options.prompt, fields, "prompt")
        chosen, rejected = known(fields.get("chosen")), known(fields.get("rejected"))
        if chosen is None or rejected is None or (prompt is None and isinstance(chosen, str)):
            raise wrong_fields("preference", fields)
        if chosen == "":
            raise Refused("empty", "chosen is empty")
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            return [self._plain(prompt, chosen), self._plain(prompt, rejected)], False
        head, tails = conversation(prompt, [chosen, rejected])
        return self._templated(self._with_system(head), tails, tools), True

    def _unpaired(self, fields: dict[str, Any], tools: Any) -> tuple[list[Text], bool, float]:
        """One text with its label, or the two of a pair without."""
        if fields.get("completion") is None and fields.get("chosen") is not None:
            texts, templated = self._preference(fields, tools)
            if texts[0] == texts[1]:
                raise Refused("same_pair", "chosen and rejected are the same")
            return texts, templated, math.nan
        prompt = self._field(self.options.prompt, fields, "prompt")
        completion = known(fields.get("completion"))
        if prompt is None or completion is None:
            raise wrong_fields("unpaired", fields)
        label = label_of(fields)
        if isinstance(prompt, str) and isinstance(completion, str):
            return [self._plain(prompt, completion)], False, label
        head, tails = conversation(prompt, [completion])
        return self._templated(self._with_system(head), tails, tools), True, label

    def _sft(self, fields: dict[str, Any], tools: Any) -> tuple[list[Text], bool]:
        messages = known(fields.get("messages"))
        filled = {"prompt": self.options.prompt, "completion": self.options.completion}
        keys = [f"data.{name}_template" for name, own in filled.items() if own is not None]
        if messages is not None and not keys:
            if isinstance(messages, str):
                raise Refused("wrong_fields", "messages is a string, not a list of messages")
            return [self._dialogue(self._with_system(messages), tools)], True
        for names in (("prompt", "completion"), ("input", "output")):
            prompt = self._field(self.options.prompt, fields, names[0])
            completion = self._field(self.options.completion, fields, names[1])
            if prompt is None or completion is None:
                continue
            if isinstance(prompt, str) and isinstance(completion, str):
                return [self._plain(prompt, completion)], False
            head, [tail] = conversation(prompt, [completion])
            return [self._answer(self._with_system(head), tail, tools)], True
        if messages is not None:
            text = f"{' and '.join(keys)} goes before its messages, but the other half is not there"
            raise Refused("wrong_fields", f"{text}; it has the fields {listed(fields)}")
        raise wrong_fields("sft", fields)

    def _field(
        self, template: templates.Template | None, fields: dict[str, Any], name: str
    ) -> str | list[Message] | None:
        """What the template makes of the row, else the field of that name."""
        if template is None:
            return known(fields.get(name))
        try:
            return template.fill(fields)
        except templates.Unfilled as unfilled:
            raise Refused("wrong_fields", str(unfilled)) from None

    def _plain(self, prompt: str, completion: str) -> Text:
        if self.options.system_prompt is not None:
            raise Refused(
                "wrong_fields",
                "data.system_prompt is for messages, this is plain text: data.prompt_template can hold it",
            )
        text = prompt + completion
        return Text(text, [(len(prompt), len(text))])

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """The conversation, with data.system_prompt before it where it has no system message."""
        prompt = self.options.system_prompt
        if prompt is None or any(message["role"] in ("system", "developer") for message in messages):
            return messages
        return [{"role": "system", "content": prompt}, *messages]

    def _answer(self, prompt: list[Message], tail: list[Message], tools: Any) -> Text:
        """Prompt and completion of SFT: the completion as a whole, unless its turns are told apart."""
        chosen = any("weight" in message for message in tail)
        chosen = chosen or (self.options.train_on == "last" and len(tail) > 1)
        if chosen or self.signed is not None:
            return self._dialogue(prompt + tail, tools, len(prompt))
        return self._templated(prompt, [tail], tools)[0]

    def _templated(self, prompt: list[Message], tails: list[list[Message]], tools: Any) -> list[Text]:
        """The prompt with each completion, which begins at the same character in all of them."""
        fulls = [self._render(prompt + tail, tools) for tail in tails]
        begin = self._end_of_prompt(prompt, fulls, tools)
        return [Text(full, [(begin, len(full))]) for full in fulls]

    def _dialogue(self, messages: list[Message], tools: Any, num_context: int = 1) -> Text:
        """A whole conversation; the assistant's turns are trained, but for those among the first messages
        and those with a weight of 0. Without marks each is found by rendering up to it.

        A conversation that the assistant opens has no prompt for that first turn: it is context.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [i for i in turns if i >= num_context]
        if not turns:
            raise Refused("no_trained_token", "no message of the assistant follows another one")
        turns = turns[-1:] if self.options.train_on == "last" else turns
        turns = [i for i in turns if weight(messages[i])]
        if not turns:
            raise Refused("no_trained_token", 'all that would be trained has "weight": 0')
        if self.signed is not None:
            return self._marked(messages, turns, tools)
        full = self._render(messages, tools)
        spans = []
        for turn in turns:
            begin = self._end_of_prompt(messages[:turn], [full], tools)
            upto = full if turn == len(messages) - 1 else self._render(messages[: turn + 1], tools)
            if not full.startswith(upto):
                raise _unstable(turn + 1)
            spans.append((begin, len(upto)))
        return Text(full, spans)

    def _marked(self, messages: list[Message], turns: list[int], tools: Any) -> Text:
        """What the template marks in these turns. Where it does not mark each message of the assistant once,
        a turn's marks are those that it adds to the messages before it."""
        text, spans = self._read_marks(messages, tools)
        all_turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) == len(all_turns):
            own = [spans[all_turns.index(i)] for i in turns]
        else:
            own = []
            for i in turns:
                first, end = (len(self._read_marks(messages[:n], tools)[1]) for n in (i, i + 1))
                own += spans[first:end]
        own = [(begin, end) for begin, end in own if begin < end]
        if not own:
            raise Refused("no_trained_token", "the chat template marks nothing with {% generation %}")
        return Text(text, own)

    def _read_marks(self, messages: list[Message], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        if not messages:
            return "", []
        text, spans = marks.read(self._render(messages, tools, template=self.signed))
        if text != self._render(messages, tools):
            raise Refused(
                "template", "what the chat template marks with {% generation %} cannot be told from the rest"
            )
        return text, spans

    def _end_of_prompt(self, prompt: list[Message], fulls: list[str], tools: Any) -> int:
        """The character at which the completion begins: where the generation prompt ends.

        Templates exist that open a turn otherwise once it is there (a thinking mark in the generation
        prompt only): then it is where the two differ, but never before the prompt's messages end.
        """
        opening = self._render(prompt, tools, generate=True)
        begin = min(_shared(opening, full) for full in fulls)
        if begin < len(opening) and begin < len(self._render(prompt, tools)):
            raise _unstable(len(prompt))
        return begin

    def _render(
        self, messages: list[Message], tools: Any, *, generate: bool = False, template: str | None = None
    ) -> str:
        import jinja2

        if any("tool_calls" in message for message in messages):
            messages = with_arguments(messages, self._wants_text)
        if self.template is None:
            raise UserError(
                "the data has messages, but the tokenizer has no chat template: set model.chat_template "
                "(a Jinja template or the path of one)"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template or self.template,
                add_generation_prompt=generate,
                tokenize=False,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"model.chat_template: line {error.lineno}: {error.message}") from None
        except (*TEMPLATE_ERRORS, jinja2.TemplateError) as error:
            raise Refused("template", f"the chat template refuses it: {first_line(error)}") from None

    @functools.cached_property
    def _wants_text(self) -> bool:
        """Whether the template puts the arguments of a tool call into the text as they are (DeepSeek), where
        others write an object as JSON, and a text as a quoted one (Qwen). Rows have them in either form."""
        import jinja2

        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        except TypeError:
            return True
        except (*TEMPLATE_ERRORS, jinja2.TemplateError):  # the rows will say so
            return False
        return False


def _check_unicode(text: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise Refused(
            "not_unicode",
            f"character {error.start + 1} of the text ({half}) is half a surrogate pair",
        ) from None


def _shared(a: str, b: str) -> int:
    """Length of the beginning that two strings have in common."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _unstable(count: int) -> Refused:
    return Refused(
        "template",
        f"the chat template renders the first {count} message{'s' * (count > 1)} differently once others "
        "follow, so the completion cannot be told from the prompt",
    )
