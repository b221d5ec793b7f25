"""Rows longer than data.max_length under each policy, by hand: a character is a token where it can be."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_helpers import CHATML, WITH_BOS, tiny_tokenizer, write_jsonl

from strop.config import Config, DataConfig
from strop.data.cut import completion
from strop.data.ledger import BadRow, Ledger
from strop.data.prepare import prepare
from strop.data.render import Renderer
from strop.data.sources import Row
from strop.data.tokenise import Tokeniser
from strop.errors import UserError

PLAIN = tiny_tokenizer()
BOS = tiny_tokenizer(bos=True)
CHAT_BOS = tiny_tokenizer(chat_template=WITH_BOS)
LEFT, RIGHT = "truncate_prompt_left", "truncate_completion"


def cut(fields, policy, max_length, tokenizer=PLAIN, kind="sft"):
    """What is left of each sequence, trained tokens behind a |; or the row that is dropped."""
    rendered = Renderer(kind, tokenizer, tokenizer.chat_template)(Row("a.jsonl", 1, fields))
    [row] = Tokeniser(tokenizer, max_length, policy)([rendered])
    if isinstance(row, BadRow):
        return row
    texts = []
    for ids, trained in row.sequences:
        assert not trained[0]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        first = trained.tolist().index(True)
        texts.append(" ".join(pieces[:first]) + " | " + " ".join(pieces[first:]))
    return row.num_cut, *texts


LETTERS = {"prompt": "1 2 3 4", "completion": "?7?8"}
"""Tokens: 1 Ġ 2 Ġ 3 Ġ 4 | ? 7 ? 8 </s>, twelve of them."""


@pytest.mark.parametrize(
    ("max_length", "plain", "with_bos"),
    [
        (13, 0, 0),
        (12, 0, 1),  # with BOS one too many
        (11, 1, 2),
        (7, 5, 6),
        (6, 6, 7),  # what is left of the prompt: its last token; BOS alone
        (5, None, None),  # the completion would have no context
    ],
)
def test_the_oldest_tokens_of_the_prompt_go_behind_bos(max_length, plain, with_bos):
    prompt, completion = ["1", "Ġ", "2", "Ġ", "3", "Ġ", "4"], "? 7 ? 8 </s>"
    assert len(PLAIN("1 2 3 4")["input_ids"]) == 7
    for tokenizer, gone, head in ((PLAIN, plain, ""), (BOS, with_bos, "<s> ")):
        found = cut(LETTERS, LEFT, max_length, tokenizer)
        if gone is None:
            assert (found.reason, found.tokens) == ("over_length", 12 + bool(head))
        else:
            left = " ".join(prompt[gone:])
            expected = f"{head}{left}".strip() + f" | {completion}"
            assert found == (gone, expected)


@pytest.mark.parametrize(
    ("max_length", "gone", "left"),
    [
        (12, 0, "1 Ġ 2 Ġ 3 Ġ 4 | ? 7 ? 8 </s>"),
        (11, 1, "1 Ġ 2 Ġ 3 Ġ 4 | ? 7 ? 8"),  # no EOS where the completion was cut
        (8, 4, "1 Ġ 2 Ġ 3 Ġ 4 | ?"),
        (7, None, ""),  # nothing of the completion is left
        (2, None, ""),
    ],
)
def test_the_end_of_the_completion_goes(max_length, gone, left):
    found = cut(LETTERS, RIGHT, max_length)
    if gone is None:
        assert (found.reason, found.tokens) == ("over_length", 12)
        assert (
            found.message
            == f"12 tokens, more than data.max_length={max_length}, and no completion is left by then"
        )
    else:
        assert found == (gone, left)


def test_both_halves_of_a_pair_keep_one_prompt():
    """Rejected is the longer one: its 14 tokens decide, and chosen loses the same three of the prompt."""
    pair = {"prompt": "1 2 3 4", "chosen": "?7", "rejected": "?7?8?9"}
    assert cut(pair, LEFT, 14, kind="preference")[0] == 0
    assert cut(pair, LEFT, 11, kind="preference") == (
        6,
        "Ġ 3 Ġ 4 | ? 7 </s>",
        "Ġ 3 Ġ 4 | ? 7 ? 8 ? 9 </s>",
    )
    assert cut(pair, LEFT, 8, kind="preference") == (12, "4 | ? 7 </s>", "4 | ? 7 ? 8 ? 9 </s>")
    assert cut(pair, LEFT, 7, kind="preference").reason == "over_length"


def test_the_ends_of_both_completions_go():
    pair = {"prompt": "1 2 3 4", "chosen": "?7", "rejected": "?7?8?9"}
    prompt = "1 Ġ 2 Ġ 3 Ġ 4"
    assert cut(pair, RIGHT, 10, kind="preference") == (4, f"{prompt} | ? 7 </s>", f"{prompt} | ? 7 ?")
    # At 9 both are `? 7`: the pair says nothing any more.
    bad = cut(pair, RIGHT, 9, kind="preference")
    assert (bad.reason, bad.tokens) == ("over_length", 24)


def test_a_half_without_a_trained_token_drops_the_pair():
    """Where a token spans the boundary in one half only, its completion begins earlier than the other's."""
    tokens = np.arange(5)
    halves = [(tokens, tokens >= 2), (tokens + 1, tokens >= 3)]
    assert completion(halves, 3) is None
    short = completion(halves, 4)
    assert short is not None
    assert [trained.tolist() for _, trained in short] == [[False] * 2 + [True] * 2, [False] * 3 + [True]]


def test_a_rendered_prompt_is_cut_as_it_is():
    """The oldest tokens behind BOS go, the template's own among them; the generation prompt stays."""
    row = {"messages": [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "7"}]}
    whole = cut(row, LEFT, 100, CHAT_BOS)[1].split()
    assert whole[:2] == ["<s>", "<|im_start|>"]
    n = len(whole) - 1  # the bar
    assert cut(row, LEFT, n - 3, CHAT_BOS) == (3, " ".join(["<s>", *whole[4:]]))
    # without BOS in the template the very first tokens go
    whole = cut(row, LEFT, 100, tiny_tokenizer(chat_template=CHATML))[1].split()
    assert cut(row, LEFT, n - 4) == (3, " ".join(whole[3:]))


def test_what_comes_before_a_first_turn_only():
    """Of a longer conversation nothing behind the first trained token is touched."""
    talk = [
        {"role": role, "content": text}
        for role, text in (("user", "1 2 3"), ("assistant", "7"), ("user", "8"), ("assistant", "9"))
    ]
    full = cut({"messages": talk}, LEFT, 1000)[1]
    prompt, rest = full.split(" | ")
    lengths = len(prompt.split()), len(rest.split())
    assert cut({"messages": talk}, LEFT, lengths[1] + 1)[1] == f"{prompt.split()[-1]} | {rest}"
    assert cut({"messages": talk}, LEFT, lengths[1]).reason == "over_length"


def test_the_ledger_tells_of_cut_and_dropped_rows(tmp_path):
    short = {"prompt": "1", "completion": "?"}
    hopeless = {"prompt": "1", "completion": "?7?8?9?7?8?9"}
    path = write_jsonl(tmp_path / "a.jsonl", [short, LETTERS, short, LETTERS, hopeless])
    data = DataConfig(train=str(path), max_length=10, over_length=LEFT, max_dropped_fraction=0.2)
    store, ledger = prepare(Config(data=data), PLAIN, "t", tmp_path / "cache", "sft")
    entry = ledger.sources[str(path)]
    assert (entry.read, entry.used, entry.num_dropped, ledger.truncated) == (5, 4, 1, 2)
    assert entry.tokens == len(store.tokens) == 3 + 10 + 3 + 10
    record = json.loads((store.path / "ledger.json").read_text())
    assert (record["truncated"], record["dropped"]) == (2, 1)
    assert record["sources"][0]["truncated"] == {
        LEFT: {
            "rows": 2,
            "tokens": 4,
            "examples": [
                {"line": 2, "message": "2 of 12 tokens cut"},
                {"line": 4, "message": "2 of 12 tokens cut"},
            ],
            "wanted": False,
            "halves": 0,
        }
    }
    assert Ledger.load(store.path / "ledger.json") == ledger
    assert ["truncate_prompt_left", "(2)", "(-4)"] in [line.split() for line in ledger.table().splitlines()]
    drop = DataConfig(train=str(path), max_length=10, over_length="drop", max_dropped_fraction=0.6)
    other, _ = prepare(Config(data=drop), PLAIN, "t", tmp_path / "cache", "sft")
    assert (other.num_rows, other.path != store.path) == (2, True)
    error = DataConfig(train=str(path), max_length=10, over_length="error")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: 12 tokens, more than data\.max_length=10\n"):
        prepare(Config(data=error), PLAIN, "t", tmp_path / "cache", "sft")
