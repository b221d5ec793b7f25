"""Masks: exactly the completion is trained, its end included. The truth is counted in bytes of the tokens."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import CHATML, SENTENCES, WITH_BOS, num_bytes, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data import tokenise
from strop.data.ledger import BadRow
from strop.data.render import Options, Renderer, chat_template
from strop.data.sources import Row
from strop.data.tokenise import Tokeniser, tokenizer_digest
from strop.errors import UserError

PLAIN = tiny_tokenizer()
PLAIN_BOS = tiny_tokenizer(bos=True)
CHAT_BOS = tiny_tokenizer(chat_template=WITH_BOS, bos=True)
USER = {"role": "user", "content": "How many apples?"}
EOS = PLAIN.eos_token_id


def run(fields, kind, tokenizer=PLAIN, template="own", max_length=10_000, **options):
    template = tokenizer.chat_template if template == "own" else template
    rows = fields if isinstance(fields, list) else [fields]
    renderer = Renderer(kind, tokenizer, template, Options(**options))
    rendered = [renderer(Row("a.jsonl", line, row)) for line, row in enumerate(rows, start=1)]
    results = list(Tokeniser(tokenizer, max_length)(rendered))
    assert len(results) == len(rows)
    return results if isinstance(fields, list) else results[0]


def marked(tokenizer, sequence):
    """The text with the trained part in ⟦⟧."""
    ids, trained = sequence
    pieces, inside = [], False
    for i in range(len(ids) + 1):
        now = i < len(ids) and bool(trained[i])
        if now != inside:
            pieces.append("⟦" if now else "⟧")
        inside = now
        if i < len(ids):
            pieces.append(tokenizer.decode([int(ids[i])]))
    return "".join(pieces)


def assistant(text):
    return {"role": "assistant", "content": text}


def test_prompt_and_completion_as_plain_text():
    row = run({"prompt": "How many apples?", "completion": " 84 apples."}, "sft")
    assert marked(PLAIN, row.sequences[0]) == "How many apples?⟦ 84 apples.</s>⟧"
    row = run({"input": "How many apples?", "output": " 84 apples."}, "sft", PLAIN_BOS)
    assert marked(PLAIN, row.sequences[0]) == "<s>How many apples?⟦ 84 apples.</s>⟧"


def test_bos_and_eos_are_never_doubled():
    row = run({"prompt": "<s>The dog", "completion": " jumps</s>"}, "sft", PLAIN_BOS)
    assert marked(PLAIN, row.sequences[0]) == "<s>The dog⟦ jumps</s>⟧"


def test_pad_equal_to_eos_changes_nothing():
    """The end is trained although it has the pad id, and so is one in the middle of the completion."""
    assert PLAIN.pad_token_id == EOS
    row = run({"prompt": "a", "completion": "b</s>c"}, "sft")
    assert marked(PLAIN, row.sequences[0]) == "a⟦b</s>c</s>⟧"


def test_messages_go_through_the_template_and_end_of_turn_is_trained():
    fields = {"prompt": [USER], "chosen": [assistant("84")], "rejected": [assistant("12 apples")]}
    row = run(fields, "preference")
    head = "<|im_start|>user\nHow many apples?<|im_end|>\n<|im_start|>assistant\n"
    assert [marked(PLAIN, s) for s in row.sequences] == [
        head + "⟦84<|im_end|>\n⟧",
        head + "⟦12 apples<|im_end|>\n⟧",
    ]
    row = run(fields, "preference", CHAT_BOS)
    assert [marked(PLAIN, s) for s in row.sequences] == [
        "<s>" + head + "⟦84<|im_end|>\n⟧",
        "<s>" + head + "⟦12 apples<|im_end|>\n⟧",
    ]


def same(*rows):
    """All rows give the same sequences."""
    for row in rows[1:]:
        for (ids, trained), (other_ids, other_trained) in zip(row.sequences, rows[0].sequences):
            assert ids.tolist() == other_ids.tolist()
            assert trained.tolist() == other_trained.tolist()


def test_all_forms_of_a_conversational_pair_are_the_same_pair():
    """Explicit prompt, implicit prompt, prompt repeated in the halves, prompt or halves as strings, nulls."""
    full_a, full_b = [USER, assistant("84")], [USER, assistant("12")]
    null = [{**USER, "tool_calls": None}]
    same(
        *run(
            [
                {"prompt": [USER], "chosen": full_a[1:], "rejected": full_b[1:]},
                {"chosen": full_a, "rejected": full_b},
                {"prompt": USER["content"], "chosen": full_a, "rejected": full_b},
                {"prompt": [USER], "chosen": full_a, "rejected": full_b},
                {"prompt": USER["content"], "chosen": full_a[1:], "rejected": full_b[1:]},
                {"prompt": [USER], "chosen": "84", "rejected": "12"},
                {"prompt": null, "chosen": full_a[1:], "rejected": full_b[1:], "margin": 1.5},
                {"chosen": full_a, "rejected": [*null, assistant("12")]},
            ],
            "preference",
        )
    )


def test_implicit_prompt_is_the_longest_common_prefix():
    head = [USER, assistant("84"), {"role": "user", "content": "Sure?"}]
    row = run({"chosen": [*head, assistant("Yes")], "rejected": [*head, assistant("No"), USER]}, "preference")
    assert marked(PLAIN, row.sequences[0]).endswith(
        "user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>\n⟧"
    )
    assert "assistant\n84<|im_end|>" in marked(PLAIN, row.sequences[0])


def test_every_turn_of_the_assistant_is_trained():
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        assistant("84"),
        {"role": "user", "content": "Sure?"},
        assistant("Yes."),
        {"role": "user", "content": "Thanks"},
    ]
    for tokenizer, bos in ((PLAIN, ""), (CHAT_BOS, "<s>")):
        row = run({"messages": messages}, "sft", tokenizer)
        assert marked(PLAIN, row.sequences[0]) == (
            bos + "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many apples?<|im_end|>\n"
            "<|im_start|>assistant\n⟦84<|im_end|>\n⟧<|im_start|>user\nSure?<|im_end|>\n"
            "<|im_start|>assistant\n⟦Yes.<|im_end|>\n⟧<|im_start|>user\nThanks<|im_end|>\n"
        )


def test_a_first_turn_of_the_assistant_is_context():
    row = run({"messages": [assistant("Hello"), USER, assistant("84")]}, "sft")
    assert marked(PLAIN, row.sequences[0]) == (
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nHow many apples?<|im_end|>\n"
        "<|im_start|>assistant\n⟦84<|im_end|>\n⟧"
    )


def test_messages_and_prompt_with_completion_agree():
    same(*run([{"messages": [USER, assistant("84")]}, {"prompt": [USER], "completion": "84"}], "sft"))


def test_tools_reach_the_template():
    fields = {"messages": [USER, assistant("84")], "tools": [{"name": "a"}, {"name": "b"}]}
    text = marked(PLAIN, run(fields, "sft", CHAT_BOS).sequences[0])
    assert text.startswith("<s>[2 tools]<|im_start|>user")
    fields["tools"] = '[{"name": "a"}]'  # as hub sets keep it
    assert marked(PLAIN, run(fields, "sft", CHAT_BOS).sequences[0]).startswith("<s>[1 tools]")


def test_everything_trains_all_but_the_first_token():
    for fields in ({"prompt": "a b", "completion": " c"}, {"messages": [USER, assistant("84")]}):
        for tokenizer in (PLAIN, CHAT_BOS):
            _, trained = run(fields, "sft", tokenizer, train_on="everything").sequences[0]
            assert not trained[0]
            assert trained[1:].all()


def test_a_thinking_mark_in_the_generation_prompt_only():
    """The turn then begins where both renderings part, not inside the completion."""
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    row = run({"messages": [USER, assistant("84")]}, "sft", template=template)
    assert marked(PLAIN, row.sequences[0]).endswith("<|im_start|>assistant\n⟦84<|im_end|>\n⟧")


def test_a_template_that_rewrites_history_is_refused():
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '...' }}")
    bad = run({"messages": [USER, assistant("84")]}, "sft", template=template)
    assert (bad.reason, bad.line) == ("template", 1)
    assert bad.message.startswith("the chat template renders the first 1 message differently once others")


TEXT = st.text(
    alphabet=st.one_of(st.sampled_from(list(" \n\tae.,s1ß東🙂é")), st.characters(codec="utf-8")), max_size=30
) | st.sampled_from(SENTENCES)


@settings(max_examples=200, deadline=None)
@given(prompt=TEXT, completion=TEXT.filter(bool), trim=st.booleans(), bos=st.booleans())
def test_mask_by_bytes(prompt, completion, trim, bos):
    """A token is trained if it ends beyond the last byte of the prompt, whatever was merged."""
    tokenizer = tiny_tokenizer(bos=bos, trim_offsets=trim)
    row = run({"prompt": prompt, "completion": completion}, "sft", tokenizer)
    ids, trained = row.sequences[0]
    sizes = [num_bytes(tokenizer, i) for i in ids]
    if bos:
        assert ids[0] == tokenizer.bos_token_id
        sizes[0] = 0
    assert ids[-1] == EOS
    assert sum(sizes) == len((prompt + completion + "</s>").encode())
    expected = np.cumsum(sizes) > len(prompt.encode())
    expected[0] = False
    assert trained.tolist() == expected.tolist()


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT.filter(str.strip), min_size=2, max_size=6), trim=st.booleans())
def test_mask_of_turns_by_bytes(texts, trim):
    """Several turns, by character offsets, against the bytes of a text put together by hand."""
    tokenizer = tiny_tokenizer(trim_offsets=trim)
    messages, trained_bytes = [], []
    for i, text in enumerate(texts):
        role = ("user", "assistant")[i % 2]
        messages.append({"role": role, "content": text})
        opening, body = f"<|im_start|>{role}\n".encode(), f"{text}<|im_end|>\n".encode()
        trained_bytes += [False] * len(opening) + [role == "assistant"] * len(body)
    ids, trained = run({"messages": messages}, "sft", tokenizer).sequences[0]
    ends = np.cumsum([num_bytes(tokenizer, i) for i in ids])
    assert ends[-1] == len(trained_bytes)
    starts = ends - [num_bytes(tokenizer, i) for i in ids]
    assert trained.tolist() == [any(trained_bytes[a:b]) for a, b in zip(starts, ends)]


def test_a_turn_that_ends_in_a_blank():
    """No special tokens here: the blank at the end of a turn is a token of its own, its offsets trimmed to
    nothing; the turn after it begins where it ends."""
    template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    messages = [USER, assistant("84 "), {"role": "user", "content": "Sure?"}, assistant("Yes ")]
    row = run({"messages": [*messages, USER]}, "sft", template=template)
    assert marked(PLAIN, row.sequences[0]) == "u:How many apples?a:⟦84 ⟧u:Sure?a:⟦Yes ⟧u:How many apples?"


def test_a_merge_across_the_boundary_is_counted():
    """The tokenizer makes one token of the blank and the word after it."""
    row = run({"prompt": "The dog ", "completion": "jumps"}, "sft")
    assert marked(PLAIN, row.sequences[0]) == "The dog⟦ jumps</s>⟧"
    assert row.merged_boundary
    assert not run({"prompt": "The dog", "completion": " jumps"}, "sft").merged_boundary


def test_a_tokenizer_without_offsets():
    """Slow tokenizers: the prefix is enough for one completion; what needs offsets is refused."""

    class Slow:
        is_fast, eos_token_id = False, EOS

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": PLAIN(text, add_special_tokens=False)["input_ids"]}

        apply_chat_template = staticmethod(PLAIN.apply_chat_template)
        chat_template = CHATML

    row = run({"prompt": "The dog", "completion": " jumps"}, "sft", Slow())
    assert marked(PLAIN, row.sequences[0]) == "The dog⟦ jumps</s>⟧"
    assert run({"prompt": "The dog ", "completion": "jumps"}, "sft", Slow()).reason == "boundary"


def test_leftover_truncation_and_padding_of_the_tokenizer_are_not_applied():
    tokenizer = tiny_tokenizer()
    tokeniser = Tokeniser(tokenizer, 100)
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    rendered = Renderer("sft", tokenizer, None)(Row("a", 1, {"prompt": "The dog", "completion": " jumps"}))
    (row,) = tokeniser([rendered])
    assert marked(PLAIN, row.sequences[0]) == "The dog⟦ jumps</s>⟧"


def test_content_in_parts_is_the_text_of_its_parts():
    """As a template puts it together that knows such lists; CHATML would write the list as Python does."""
    parts = [{"type": "text", "text": "How many"}, {"text": " apples?", "type": "text"}]
    in_parts = [{"role": "user", "content": parts}, assistant([{"type": "text", "text": "84"}])]
    same(*run([{"messages": in_parts}, {"messages": [USER, assistant("84")]}], "sft"))
    pair = {"prompt": [USER], "chosen": [assistant("84")], "rejected": [assistant("85")]}
    other = {"prompt": in_parts[:1], "chosen": in_parts[1:], "rejected": [assistant("85")]}
    same(*run([pair, other], "preference"))


def test_a_message_without_content_may_call_a_tool():
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['name'] }}(){% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "count", "of": None}]}
    row = run({"messages": [USER, call]}, "sft", template=template)
    assert marked(PLAIN, row.sequences[0]).endswith("<|im_start|>assistant\n⟦count()<|im_end|>\n⟧")


TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AS_OBJECT = TOOLS.replace("CALL", "{{ c['function']['arguments'] | tojson }}")
AS_TEXT = TOOLS.replace("CALL", "{{ '' + c['function']['arguments'] }}")
EITHER = TOOLS.replace(
    "CALL",
    "{% set a = c['function']['arguments'] %}{{ a if a is string else a | tojson }}",
)


@pytest.mark.parametrize("template", [AS_OBJECT, AS_TEXT, EITHER])
@pytest.mark.parametrize("arguments", ['{"city": "Bern", "n": 2}', {"city": "Bern", "n": 2}])
def test_arguments_of_tool_calls_are_written_once(template, arguments):
    """Rows keep them as OpenAI's JSON text or as an object; templates for both are about (Qwen, DeepSeek). A
    text that goes through tojson would be a quoted text."""
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = run({"messages": messages}, "sft", template=template)
    assert marked(PLAIN, row.sequences[0]).endswith(
        '<|im_start|>assistant\n⟦{"city": "Bern", "n": 2}<|im_end|>\n⟧'
    )


def test_arguments_that_are_no_object_stay_as_they_are():
    for arguments in ("not JSON", "[1]", "3"):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        messages = [USER, {"role": "assistant", "tool_calls": [call]}]
        row = run({"messages": messages}, "sft", template=AS_TEXT)
        assert marked(PLAIN, row.sequences[0]).endswith(f"⟦{arguments}<|im_end|>\n⟧")


def test_fields_that_arrow_fills_up_with_nulls_are_not_there():
    """Of calls and tools as they come from Parquet: every object has the fields of all others."""
    call = {"function": {"name": "f", "arguments": {"city": "x", "n": None, "in": {"deep": None}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"city": {"type": "str"}, "n": None}}}
    messages = [{**USER, "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = run({"messages": messages, "tools": [tool]}, "sft", template=AS_OBJECT)
    text = marked(PLAIN, row.sequences[0])
    assert text.startswith(
        '{"type": "function", "function": {"name": "f", "parameters": {"city": {"type": "str"}}}}'
    )
    assert text.endswith('⟦{"city": "x", "in": {}}<|im_end|>\n⟧')


NO_CONTENT = [
    (3, "is not text: 3"),
    (True, "is not text: True"),
    ({"text": "a"}, "is not text: {'text': 'a'}"),
    ([], "is not all text: []"),
    (["84"], "is not all text: ['84']"),
    ([{"type": "text", "text": None}], "is not all text: [{'type': 'text'}]"),
    (
        [{"type": "text", "text": "a"}, {"type": "image"}],
        "is not all text: [{'type': 'text', 'text': 'a'}, {'type': 'image'}]",
    ),
]


@pytest.mark.parametrize(("content", "message"), NO_CONTENT)
def test_content_that_a_template_would_spell_as_python_does_is_refused(content, message):
    for messages in ([USER, assistant(content)], [{"role": "user", "content": content}, assistant("x")]):
        bad = run({"messages": messages}, "sft")
        assert (bad.reason, bad.message) == ("wrong_fields", f"the content of a message {message}")
    bad = run({"messages": [USER, assistant(None)]}, "sft")
    assert bad.message == "a message has no content: {'role': 'assistant', 'content': None}"


@pytest.mark.parametrize(
    "expression", ["1 // 0", "{}.pop('a')", "'a'.index('b')", "[1, 2].index(3)", "1 + 'a'", "''.join([1])"]
)
def test_whatever_a_template_raises_is_the_rows_error(expression):
    template = "{% if messages[0]['content'] == 'odd' %}{{ " + expression + " }}{% endif %}" + CHATML
    good = {"messages": [USER, assistant("x")]}
    odd = {"messages": [{"role": "user", "content": "odd"}, assistant("x")]}
    before, bad, after = run([good, odd, good], "sft", template=template)
    same(before, after)
    assert bad.reason == "template"
    assert bad.message.startswith("the chat template refuses it: ")


BAD_PREFERENCE = [
    ({"prompt": "a", "chosen": "b"}, "wrong_fields", "it has the fields prompt, chosen; needed: chosen and"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty", "chosen is empty"),
    ({"prompt": [USER], "chosen": "", "rejected": "b"}, "empty", "chosen is empty"),
    ({"question": "a"}, "wrong_fields", "it has the fields question; needed: chosen and rejected"),
    ({}, "wrong_fields", "it has the fields (none); needed:"),
    (
        {"prompt": None, "chosen": "a", "rejected": "b"},
        "wrong_fields",
        "it has the fields prompt (null), chosen",
    ),
    ({"prompt": "a", "chosen": " b", "rejected": " b"}, "same_pair", "chosen and rejected are the same"),
    (
        {"chosen": [USER, assistant("x")], "rejected": [USER, assistant("x")]},
        "same_pair",
        "chosen and rejected",
    ),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "wrong_fields", "neither text nor a list of messages: 3"),
    (
        {"prompt": "a", "chosen": [], "rejected": []},
        "wrong_fields",
        "neither text nor a list of messages: []",
    ),
    (
        {"chosen": [assistant("x")], "rejected": [assistant("y")]},
        "wrong_fields",
        "there is no prompt, and the",
    ),
    ({"prompt": "a", "chosen": ["x"], "rejected": ["y"]}, "wrong_fields", "a message is not {"),
    (
        {"prompt": [USER], "chosen": [USER], "rejected": [USER]},
        "wrong_fields",
        "the completion does not begin",
    ),
]
BAD_SFT = [
    (
        {"prompt": "a"},
        "wrong_fields",
        "it has the fields prompt; needed: messages, or prompt and completion, or",
    ),
    ({"messages": "hello"}, "wrong_fields", "messages is a string, not a list of messages"),
    ({"messages": [USER]}, "no_trained_token", "no message of the assistant follows another one"),
    ({"messages": [{"content": "x"}]}, "wrong_fields", 'a message is not {"role": ..., "content": ...}: {'),
    ({"messages": [USER, assistant("x")], "tools": "{"}, "wrong_fields", "tools is not JSON: Expecting"),
    ({"prompt": "\ud83d", "completion": "x"}, "not_unicode", "character 1 of the text (\\ud83d) is half a"),
    ({"prompt": "", "completion": ""}, "no_trained_token", "the completion has no token to train on"),
]


@pytest.mark.parametrize(
    ("kind", "fields", "reason", "message"),
    [("preference", *case) for case in BAD_PREFERENCE] + [("sft", *case) for case in BAD_SFT],
)
def test_bad_rows_between_good_ones(kind, fields, reason, message):
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    before, bad, after = run([good, fields, good], kind)
    assert isinstance(bad, BadRow)
    assert (bad.source, bad.line, bad.reason) == ("a.jsonl", 2, reason)
    assert bad.message.startswith(message)
    same(before, after)


def test_what_the_template_raises_is_told():
    template = "{{ raise_exception('roles must alternate') }}"
    bad = run({"messages": [USER, assistant("x")]}, "sft", template=template)
    assert bad.message == "the chat template refuses it: roles must alternate"


def test_a_template_that_prints_the_date_prints_the_same_one_every_day():
    """As Llama 3 asks for it. The line before it stays as it is: a line feed and two blanks."""
    template = (
        "\n  {% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ '  ' + today + ' ' }}" + CHATML
    )
    row = run({"messages": [USER, assistant("x")]}, "sft", template=template)
    assert marked(PLAIN, row.sequences[0]).startswith("\n  26 Jul 2024 <|im_start|>user")


def test_length_limit_counts_every_special_token():
    """'a' + 'b' + EOS are 3 tokens: 3 are allowed by 3, not by 2."""
    fields = {"prompt": "a", "completion": "b"}
    assert len(run(fields, "sft", max_length=3).sequences[0][0]) == 3
    bad = run(fields, "sft", max_length=2)
    assert (bad.reason, bad.message, bad.tokens) == (
        "over_length",
        "3 tokens, more than data.max_length=2",
        3,
    )


@pytest.mark.parametrize("policy", ["drop", "error"])
@pytest.mark.parametrize("kind", ["sft", "preference", "unpaired"])
def test_a_row_that_is_far_too_long_is_found_out_by_its_beginning(monkeypatch, kind, policy):
    """Three million characters, of which the tokenizer must not see more than a few thousand; in one half of
    a pair, as it may be. The rows around it are as ever."""
    encoded = []

    def encode(tokenizer, texts):
        encoded.extend(map(len, texts))
        return real(tokenizer, texts)

    real = tokenise.encode
    monkeypatch.setattr(tokenise, "encode", encode)
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d", "label": True}
    many = "so it is " * 333_333
    long = {"prompt": "The dog", "completion": many, "chosen": "c", "rejected": many, "label": True}
    renderer = Renderer(kind, PLAIN, None)
    rows = [renderer(Row("a.jsonl", line, row)) for line, row in enumerate([good, long, good], start=1)]
    before, bad, after = Tokeniser(PLAIN, 100, policy)(rows)
    same(before, after)
    assert (bad.reason, bad.line, bad.tokens) == ("over_length", 2, 101)
    assert bad.message == f"{7 + len(many):,} characters, more than data.max_length=100 tokens"
    assert sum(encoded) < 10_000


def test_half_of_a_pair_taken_apart_is_a_half_when_it_is_far_too_long():
    rows = Renderer("unpaired", PLAIN, None).rows(
        Row("a.jsonl", 1, {"prompt": "a", "chosen": "b", "rejected": " c" * 50_000})
    )
    used, bad = Tokeniser(PLAIN, 100)(rows)
    assert (used.half, bad.half, bad.reason) == (True, True, "over_length")


def test_a_text_of_few_long_tokens_fits_however_many_characters_it_has():
    """100 tokens of 60 characters and EOS: its beginning is looked at, and decides nothing."""
    tokenizer = tiny_tokenizer()
    word = "<" + "long" * 15 + ">"
    tokenizer.add_tokens([word])
    fields = {"prompt": word * 40, "completion": word * 60}
    row = run(fields, "sft", tokenizer, max_length=101)
    ids, trained = row.sequences[0]
    assert ids.tolist() == [tokenizer.convert_tokens_to_ids(word)] * 100 + [EOS]
    assert trained.tolist() == [False] * 40 + [True] * 61
    assert run(fields, "sft", tokenizer, max_length=100).message.startswith("101 tokens, more than")


@settings(max_examples=100, deadline=None)
@given(text=TEXT.filter(str.strip), times=st.integers(400, 900), limit=st.integers(1, 40))
def test_no_row_that_fits_is_found_too_long_by_its_beginning(text, times, limit):
    """The truth is the text encoded as a whole, here of up to 27,000 characters."""
    whole = len(PLAIN(text * times, add_special_tokens=False)["input_ids"]) + 1
    for max_length in (limit, whole // 2, whole - 1, whole):
        row = run({"prompt": "", "completion": text * times}, "sft", max_length=max_length)
        assert isinstance(row, BadRow) == (whole > max_length)


def test_configuration_errors_name_the_key(tmp_path):
    with pytest.raises(UserError, match=r"no chat template: set model\.chat_template"):
        run({"messages": [USER, assistant("x")]}, "sft", template=None)
    with pytest.raises(UserError, match=r"model\.chat_template: line 1: "):
        run({"messages": [USER, assistant("x")]}, "sft", template="{% for %}")
    with pytest.raises(
        UserError, match=r"model\.chat_template: neither a Jinja template nor a file: x\.jinja"
    ):
        chat_template("x.jinja", PLAIN)
    (tmp_path / "t.jinja").write_text(CHATML)
    assert chat_template(str(tmp_path / "t.jinja"), PLAIN) == CHATML
    assert chat_template(None, CHAT_BOS) == WITH_BOS
    without_eos = tiny_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(UserError, match=r"model\.tokenizer has no EOS token"):
        run({"prompt": "a", "completion": "b"}, "sft", without_eos)


def test_tokenizer_digest_ignores_leftovers_and_sees_changes():
    used = tiny_tokenizer()
    used(["a", "b c d"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(used) == tokenizer_digest(tiny_tokenizer())
    assert tokenizer_digest(tiny_tokenizer(bos=True)) != tokenizer_digest(used)
    used.eos_token = "<|im_end|>"
    assert tokenizer_digest(tiny_tokenizer()) != tokenizer_digest(used)
