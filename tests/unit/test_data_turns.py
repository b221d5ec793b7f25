"""Which turns of a conversation are trained, in templates as models ship them; the truth by hand."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import CHATML, SENTENCES, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.ledger import BadRow
from strop.data.render import Options, Renderer
from strop.data.sources import Row
from strop.data.tokenise import Tokeniser

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>"
    "\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{%- for message in messages %}\n    {%- if message.role == 'assistant' %}\n"
    "        {{- '<|im_start|>assistant\n' }}\n"
    "        {%- generation -%}\n            {{- message.content + '<|im_end|>' -}}\n"
    "        {%- endgeneration -%}\n        {{- '\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"
)
IN_MACRO = (
    "{% macro say(m) %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}"
)
TWO_MARKS = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}"
    "{% if m.thought %}{% generation %}({{ m.thought }}){% endgeneration %}|{% endif %}"
    "{% generation %}{{ m.content }}.{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many apples?"},
    {"role": "assistant", "content": "84"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def tokenizer_of(template, trim_offsets=True):
    tokenizer = tiny_tokenizer(chat_template=template, trim_offsets=trim_offsets)
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    return tokenizer


def render(fields, template, kind="sft", **options):
    tokenizer = tokenizer_of(template)
    [row] = Tokeniser(tokenizer, 1000)(
        [Renderer(kind, tokenizer, template, Options(**options))(Row("a.jsonl", 1, fields))]
    )
    return row if isinstance(row, BadRow) else [marked(tokenizer, *one) for one in row.sequences]


def marked(tokenizer, ids, trained):
    """The text with the trained part in ⟦⟧."""
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    pieces = [(tokenizer.decode(ids[a:b]), bool(trained[a])) for a, b in zip(edges, edges[1:])]
    return "".join(f"⟦{text}⟧" if on else text for text, on in pieces)


def with_weight(weight, turn):
    return [{**m, "weight": weight} if i == turn else m for i, m in enumerate(TALK)]


def expected(template, first, last):
    """TALK in each template with the given turns trained."""

    def on(text, yes):
        return f"⟦{text}⟧" if yes else text

    if template == LLAMA3:
        head, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
        bodies = [head.format(m["role"]) + "{}" for m in TALK]
        a, b = on("84" + end, first), on("Yes." + end, last)
        rest = ["Be brief." + end, "How many apples?" + end, a, "Sure?" + end, b]
        return "<s>" + "".join(body.format(text) for body, text in zip(bodies, rest))
    if template in (MARKED, IN_MACRO):  # the line feed after the end of a turn is outside the marks
        a, b = on("84<|im_end|>", first) + "\n", on("Yes.<|im_end|>", last) + "\n"
    else:
        a, b = on("84<|im_end|>\n", first), on("Yes.<|im_end|>\n", last)
    return (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many apples?<|im_end|>\n"
        f"<|im_start|>assistant\n{a}<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n{b}"
    )


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, LLAMA3, MARKED, IN_MACRO])
def test_all_turns_the_last_one_and_those_with_a_weight(template):
    assert render({"messages": TALK}, template) == [expected(template, True, True)]
    assert render({"messages": TALK}, template, train_on="last") == [expected(template, False, True)]
    assert render({"messages": with_weight(0, 2)}, template) == [expected(template, False, True)]
    assert render({"messages": with_weight(0, 4)}, template) == [expected(template, True, False)]
    assert render({"messages": with_weight(1, 4)}, template) == [expected(template, True, True)]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MARKED])
def test_prompt_and_completion_give_what_messages_give(template):
    """A completion of several messages is one completion unless its turns are told apart."""
    one = {"prompt": TALK[:4], "completion": TALK[4:]}
    assert render(one, template) == [expected(template, False, True)]
    assert render(one, template, train_on="last") == [expected(template, False, True)]
    two = {"prompt": TALK[:2], "completion": TALK[2:]}
    assert render(two, template, train_on="last") == [expected(template, False, True)]
    weighed = {"prompt": TALK[:2], "completion": with_weight(0, 4)[2:]}
    assert render(weighed, template) == [expected(template, True, False)]
    if template == MARKED:
        assert render(two, template) == [expected(template, True, True)]
    else:
        [text] = render(two, template)
        assert text.count("⟦") == 1
        assert text.endswith("Yes.<|im_end|>\n⟧" if template == CHATML else "Yes.<|eot_id|>⟧")


TEXT = st.text(alphabet=st.sampled_from(list(" \n\tae.,s1ß東🙂é")), max_size=20) | st.sampled_from(SENTENCES)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT.filter(str.strip), min_size=2, max_size=6))
def test_marks_are_those_of_transformers(texts):
    """Where no macro is in between, transformers' own mask of tokens is the truth (of a tokenizer that keeps
    white space in its offsets: transformers does not find a blank otherwise)."""
    tokenizer = tokenizer_of(MARKED, trim_offsets=False)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    renderer = Renderer("sft", tokenizer, MARKED)
    [row] = Tokeniser(tokenizer, 1000)([renderer(Row("a", 1, {"messages": messages}))])
    ids, trained = row.sequences[0]
    assert ids.tolist() == out["input_ids"]
    assert trained.tolist() == [bool(m) for m in out["assistant_masks"]]


def test_tools_reach_a_template_with_marks():
    template = "[{{ tools | length }}]" + MARKED
    row = {"messages": TALK, "tools": [{"name": "a"}, {"name": "b"}]}
    assert render(row, template) == ["[2]" + expected(MARKED, True, True)]


def test_several_marks_in_a_turn_belong_to_it():
    thinking = [{**m, "thought": "12 x 7"} if m["content"] == "84" else m for m in TALK]
    head = "s:Be brief.\nu:How many apples?\na:"
    assert render({"messages": thinking}, TWO_MARKS) == [f"{head}⟦(12 x 7)⟧|⟦84.⟧\nu:Sure?\na:⟦Yes..⟧\n"]
    assert render({"messages": thinking}, TWO_MARKS, train_on="last") == [
        f"{head}(12 x 7)|84.\nu:Sure?\na:⟦Yes..⟧\n"
    ]
    thinking[4] = {**thinking[4], "weight": 0}
    assert render({"messages": thinking}, TWO_MARKS) == [f"{head}⟦(12 x 7)⟧|⟦84.⟧\nu:Sure?\na:Yes..\n"]


def test_pairs_train_the_whole_completion_whatever_is_marked():
    """Log-probs of a preference pair are those of the completion with its end, in every template."""
    row = {"prompt": TALK[:2], "chosen": "84", "rejected": "12"}
    chosen, rejected = render(row, MARKED, "preference")
    assert chosen.endswith("<|im_start|>assistant\n⟦84<|im_end|>\n⟧")
    assert rejected.endswith("<|im_start|>assistant\n⟦12<|im_end|>\n⟧")


def test_what_cannot_be_trained_is_refused():
    def why(messages, template=CHATML, **options):
        bad = render({"messages": messages}, template, **options)
        return bad.reason, bad.message

    nothing = ("no_trained_token", 'all that would be trained has "weight": 0')
    assert why(with_weight(0, 4), train_on="last") == nothing
    assert why([*TALK[:2], {**TALK[2], "weight": 0}]) == nothing
    assert why(with_weight(0.5, 2)) == ("wrong_fields", "the weight of a message is 0 or 1, not 0.5")
    unmarked = (
        MARKED.replace("message.role == 'assistant'", "message.role == 'bot'")
        + "{% generation %}{% endgeneration %}"
    )
    assert why(TALK, unmarked) == (
        "no_trained_token",
        "the chat template marks nothing with {% generation %}",
    )
    trimmed = (
        "{% set x %}{% generation %} {{ messages[-1].content }} {% endgeneration %}{% endset %}{{ x | trim }}"
    )
    assert why(TALK, trimmed) == (
        "template",
        "what the chat template marks with {% generation %} cannot be told from the rest",
    )


def test_a_system_prompt_goes_before_conversations_without_one():
    ours = "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\nHow many apples?<|im_end|>\n"
    answer = "<|im_start|>assistant\n⟦84<|im_end|>\n⟧"
    no_system = TALK[1:3]
    for fields in ({"messages": no_system}, {"prompt": no_system[:1], "completion": "84"}):
        assert render(fields, SMOLLM2, system_prompt="Answer.") == [ours + answer]
    pair = {"prompt": no_system[:1], "chosen": "84", "rejected": "12"}
    assert render(pair, SMOLLM2, "preference", system_prompt="Answer.") == [
        ours + answer,
        ours + answer.replace("84", "12"),
    ]
    assert render({"messages": TALK}, CHATML, system_prompt="Answer.") == [expected(CHATML, True, True)]
    bad = render({"prompt": "a", "completion": "b"}, CHATML, system_prompt="Answer.")
    assert bad.message.startswith("data.system_prompt is for messages, this is plain text")
