"""Prompts and completions from the fields of a row: names in braces, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
from data_helpers import tiny_tokenizer

from strop.config import Config, DataConfig
from strop.data.ledger import BadRow
from strop.data.render import Options, Renderer
from strop.data.sources import Row
from strop.data.templates import parse
from strop.errors import UserError

KEY = "data.prompt_template"
TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Question: {input}\nAnswer: ", "Question: 7 x 12?\nAnswer: "),
        ("{input}{output}", "7 x 12?84"),
        ("{{input}} is {input}", "{input} is 7 x 12?"),
        ("{level} of {share}", "3 of 0.5"),
        ("{a field}|{a.b}|{0}", "with a blank|with a dot|zero"),
        ("{braces}", "{input} {0.__class__}"),  # what a field holds is not read again
    ],
)
def test_fields_by_name(template, text, tmp_path):
    fields = {
        "input": "7 x 12?", "output": "84", "level": 3, "share": 0.5,
        "a field": "with a blank", "a.b": "with a dot", "0": "zero", "braces": "{input} {0.__class__}",
    }  # fmt: skip
    assert parse(template, KEY).fill(fields) == text
    (tmp_path / "t.txt").write_text(template)
    assert parse(str(tmp_path / "t.txt"), KEY).fill(fields) == text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{input",
            "data.prompt_template: expected '}' before end of string; a brace that is meant as one is ",
        ),
        (
            "{input}}",
            "data.prompt_template: Single '}' encountered in format string; a brace that is meant as ",
        ),
        ("{input!r}", "data.prompt_template: between braces stands the name of a field alone, as in {input}"),
        (
            "{input:>9}",
            "data.prompt_template: between braces stands the name of a field alone, as in {input}",
        ),
        ("{}", "data.prompt_template: between braces stands the name of a field alone, as in {input}"),
        ("{{input}}", "data.prompt_template: no {name} of a field in '{{input}}'"),
        (
            "prompt.txt",
            "data.prompt_template: neither a template with {names} of fields nor a UTF-8 file of ",
        ),
        (
            "x" * 5000,
            "data.prompt_template: neither a template with {names} of fields nor a UTF-8 file of one",
        ),
    ],
)
def test_what_is_no_template(template, expected):
    with pytest.raises(UserError) as caught:
        parse(template, KEY)
    assert str(caught.value).startswith(expected)


def rendered(fields, kind="sft", **data):
    options = Options.of(Config(data=DataConfig(**data)), kind)
    row = Renderer(kind, TOKENIZER, TOKENIZER.chat_template, options)(Row("a.jsonl", 1, fields))
    if isinstance(row, BadRow):
        return row.reason, row.message
    return [item.text[: item.trained[0][0]] + "|" + item.text[item.trained[0][0] :] for item in row.texts]


def test_rows_of_plain_fields():
    ours = {
        "prompt_template": "Question: {question}\nAnswer:",
        "completion_template": " {steps} #### {answer}",
    }
    row = {"question": "7 x 12?", "steps": "10 + 2", "answer": 84}
    assert rendered(row, **ours) == ["Question: 7 x 12?\nAnswer:| 10 + 2 #### 84"]
    # without a template for the completion: the field completion or output
    for name in ("completion", "output"):
        one = {"question": "7 x 12?", name: " 84"}
        assert rendered(one, prompt_template=ours["prompt_template"]) == ["Question: 7 x 12?\nAnswer:| 84"]
    assert rendered({"prompt": "P", "answer": 84}, completion_template=" {answer}") == ["P| 84"]
    pair = {"question": "7 x 12?", "chosen": " 84", "rejected": " 12"}
    assert rendered(pair, "preference", **ours) == [
        "Question: 7 x 12?\nAnswer:| 84",
        "Question: 7 x 12?\nAnswer:| 12",
    ]


def test_rows_of_messages_go_their_own_way():
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    head = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n|"
    assert rendered({"messages": talk}) == [head + "A<|im_end|>\n"]
    pair = {"question": "Q", "chosen": talk[1:], "rejected": [{**talk[1], "content": "B"}]}
    assert rendered(pair, "preference", prompt_template="{question}") == [
        head + "A<|im_end|>\n",
        head + "B<|im_end|>\n",
    ]


def test_rows_that_cannot_fill_it_name_key_field_and_fields():
    row = {"input": "x", "output": "y", "none": None, "list": ["z"], "yes": True}
    for name, what in (
        (
            "question",
            "data.prompt_template wants {question}; the row's fields are input, output, none, list, yes",
        ),
        (
            "input.real",
            "data.prompt_template wants {input.real}; the row's fields are input, output, none, list",
        ),
        (
            "input[0]",
            "data.prompt_template wants {input[0]}; the row's fields are input, output, none, list, y",
        ),
        ("none", "data.prompt_template wants {none}, which is null and no text"),
        ("list", "data.prompt_template wants {list}, which is a list and no text"),
        ("yes", "data.prompt_template wants {yes}, which is a bool and no text"),
    ):
        reason, message = rendered(row, prompt_template=f"Q: {{{name}}}")
        assert reason == "wrong_fields"
        assert message.startswith(what)


def test_options_decide_by_kind():
    """Those of SFT change nothing in the address of preference rows."""
    config = Config(data=DataConfig(prompt_template="{a}", completion_template="{b}", system_prompt="S"))
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, train_on="last"))
    sft, pairs = Options.of(config, "sft"), Options.of(config, "preference")
    assert (sft.train_on, sft.completion is None) == ("last", False)
    assert (pairs.train_on, pairs.completion, pairs.prompt, pairs.system_prompt) == (
        "all",
        None,
        sft.prompt,
        "S",
    )
