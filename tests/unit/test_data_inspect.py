"""What is said of a set, against loops over its rows, counts by hand, and defects put there on purpose."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
from data_helpers import CHATML, tiny_tokenizer, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from strop import trainer
from strop.config import Config, DataConfig, TrainConfig
from strop.data import ends, inspect, looking, samples, units
from strop.data.spans import spans
from strop.errors import UserError
from tests.unit.look_helpers import GOOD, dialogue, pair, told, turn

# --- spans


def test_spans_are_the_text():
    """Characters of several bytes, a special token amid text, and every kind of change of the mask."""
    tokenizer = tiny_tokenizer()
    text = "<s>Straße 東京 🙂<|im_end|>\nThe fox.</s>"
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    boundary = len(tokenizer("<s>Straße 東京 🙂<|im_end|>\n", add_special_tokens=False)["input_ids"])
    found = spans(ids, np.arange(len(ids)) >= boundary, tokenizer)
    assert [(s.text, s.trained, s.special) for s in found] == [
        ("<s>", False, True),
        ("Straße 東京 🙂", False, False),
        ("<|im_end|>", False, True),
        ("\n", False, False),
        ("The fox.", True, False),
        ("</s>", True, True),
    ]
    assert sum(s.tokens for s in found) == len(ids)
    assert "".join(s.text for s in spans(ids, ids < 0, tokenizer, begin=boundary)) == "The fox.</s>"


def test_a_decoder_that_drops_the_first_blank():
    """As sentencepiece's: alone, "▁b" would be decoded without the blank that parts it from "a"."""
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([1]) == "b"
    found = spans(np.array([0, 1, 1]), np.array([False, True, True]), tokenizer)
    assert [s.text for s in found] == ["a", " b b"]


def test_a_character_cut_in_two_is_no_error():
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer("ё", add_special_tokens=False)["input_ids"])
    assert len(ids) == 2  # a letter that the tokenizer knows by its bytes only
    found = spans(ids, np.array([False, True]), tokenizer)
    assert [s.text for s in found] == ["\ufffd", "\ufffd"]


# --- ends


def test_ends_by_a_loop():
    """Random sequences of 1 to 6 tokens out of few kinds, so that every case comes up many times."""
    rng = np.random.default_rng(0)
    special = np.array([True, True, False, False, True])  # 0 is BOS
    lengths = rng.integers(1, 7, size=2000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(0, 5, size=offsets[-1]).astype(np.int32)
    trained = rng.random(offsets[-1]) < 0.7
    seen = ends.look(tokens, trained, offsets, special, 0)
    for s, (a, b) in enumerate(zip(offsets, offsets[1:])):
        own, mask = tokens[a:b].tolist(), trained[a:b].tolist()
        marks = [t for t, m in list(zip(own, mask))[-3:] if m and special[t]]
        assert seen.has_bos_S[s] == (own[0] == 0)
        assert seen.double_bos_S[s] == (own[:2] == [0, 0])
        assert seen.last_S[s] == (marks[-1] if marks else -1)
        assert seen.double_end_S[s] == (len(marks) > 1 and marks[-1] == marks[-2])


# --- lengths


def test_bins_hold_every_value_once():
    """Equal widths, one value, doubling where one value is far off; against a count for each bin."""
    rng = np.random.default_rng(1)
    for values in (rng.integers(50, 500, 300), np.array([7]), np.array([3, 3, 4, 5000]), np.array([1, 2])):
        found = inspect.bins(values)
        assert [n for _, _, n in found] == [int(((values >= a) & (values <= b)).sum()) for a, b, _ in found]
        assert sum(n for _, _, n in found) == len(values)
        assert all(b + 1 == c for (_, b, _), (c, _, _) in zip(found, found[1:]))
        assert len(found) <= 14
    assert inspect.bins(np.array([12, 19, 20, 31]))[:2] == [(12, 13, 1), (14, 15, 0)]


def test_steps_by_hand(look_at):
    """5 rows of one length in batches of 2: 3 steps; micro batches of 2 1/2 rows hold 2, 2 and 1 rows."""
    rows = [{"prompt": "a", "completion": f"{i}"} for i in range(5)]
    tokenizer = tiny_tokenizer()
    length = len(tokenizer("a0")["input_ids"]) + 1
    train = TrainConfig(global_batch_size=2, micro_batch_tokens=2 * length + length // 2, max_steps=6)
    report, _ = look_at("sft", {"train": rows}, tokenizer, train)
    s = report.steps
    assert (s.per_epoch, s.total, s.epochs, s.micro_batches) == (3, 6, 2.0, 1.0)
    assert (s.tokens_per_epoch, s.trained_per_epoch) == (5 * length, 5 * 2)  # the digit and EOS
    assert s.filled == pytest.approx(5 * length / (3 * train.micro_batch_tokens))


def test_steps_of_a_blend_and_of_shared_prompts_are_the_trainers(look_at, tmp_path):
    """Against `trainer.step_bins` over whole epochs, with the store that it would train on."""
    short, long = (
        [pair("a", "b", f"{i}") for i in range(6)],
        [pair("a" * 60, "b" * 9, f"{i}") for i in range(3)],
    )
    file = write_jsonl(tmp_path / "more.jsonl", long)
    write_jsonl(tmp_path / "train.jsonl", short)
    train = TrainConfig(global_batch_size=3, micro_batch_tokens=200, max_steps=4, shared_prefix=True)
    data = DataConfig(train=[str(tmp_path / "train.jsonl"), str(file)], weights=[1.0, 2.0])
    config = Config(data=data, train=train)
    report = looking.look(config, "preference", tiny_tokenizer(), tmp_path / "cache", 2, lambda *args: None)
    s, store = report.steps, report.looks["train"].rows
    own = np.diff(store.offsets).reshape(-1, 2).sum(axis=1)
    # 9 slots by shares of 1 and 2: 3 of the six short rows, and the three long ones twice
    assert s.tokens_per_epoch == own[:6].sum() // 2 + 2 * own[6:].sum()
    for seen, rows in (((s.filled, s.micro_batches), store), (s.shared, store.sharing_prompts())):
        policy = types.SimpleNamespace(config=config, dist=types.SimpleNamespace(world_size=1))
        policy.train_store, policy.steps_per_epoch = rows, 3
        bins = [own for step in range(3) for [own] in [trainer.step_bins(policy, step)]]
        tokens = sum(int(rows.row_lengths[own].sum()) for step in bins for own in step)
        num = sum(len(step) for step in bins)
        assert seen == pytest.approx((tokens / (num * 200), num / 3))
    without = dataclasses.replace(config, train=dataclasses.replace(train, shared_prefix=False))
    assert inspect.steps(report.looks["train"], without, 1).shared is None


def test_rows_that_were_to_be_left_out_are_a_note(look_at, tmp_path, monkeypatch):
    (tmp_path / "own_adapter.py").write_text(
        "def ties(row):\n    return None if row['prompt'] == 'tie' else row\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [pair("tie" if i % 3 else "q", "a", f"{i}") for i in range(9)]
    report, _ = look_at("preference", {"train": rows}, adapter="own_adapter:ties")
    [concern] = [c for c in report.concerns["train"] if c.name == "left_out"]
    assert (concern.level, concern.count, concern.advice) == ("note", 6, "")


def test_chunks_change_nothing(look_at, monkeypatch):
    """One row a chunk and all in one: the same numbers, with rows in their place."""
    rows = [pair(f"How many {i}?", "One." * (i % 3 + 1), "None.") for i in range(9)]
    whole, _ = look_at("preference", {"train": rows + rows[:2]})
    monkeypatch.setattr(units, "CHUNK_TOKENS", 1)
    pieces, _ = look_at("preference", {"train": rows + rows[:2]})
    a, b = looking.as_json(whole), looking.as_json(pieces)
    assert a == b
    assert told(pieces, "train")["duplicates"] == 2


def test_nothing_to_warn_of(look_at):
    report, _ = look_at("sft", {"train": GOOD, "validation": [dialogue("And 77?", "It is 77.")]})
    # ChatML ends turns with a token that is not the tokenizer's EOS.
    assert told(report, "train") == {"end_is_not_eos": 0}
    assert report.concerns["all"] == []
    assert report.warnings == []


DEFECTS = [
    # kind, rows, tokenizer, {concern: rows}
    ("sft", GOOD, tiny_tokenizer(chat_template="<s><s>" + CHATML), {"double_bos": 6}),
    ("sft", GOOD, tiny_tokenizer(bos=True), {"no_bos": 6}),
    ("sft", GOOD, tiny_tokenizer(chat_template=CHATML.replace("<|im_end|>", "")), {"missing_eos": 6}),
    (
        "sft",
        GOOD,
        tiny_tokenizer(chat_template=CHATML.replace("<|im_end|>", "<|im_end|><|im_end|>")),
        {"double_eos": 6},
    ),
    ("sft", [*GOOD, GOOD[2], GOOD[2]], None, {"duplicates": 2}),
    ("sft", [*GOOD, dialogue("What is 3?", "Who knows?")], None, {"repeated_prompts": 1}),
    ("sft", [*GOOD, dialogue("Silence?", " \n")], None, {"empty_completion": 1}),
    ("sft", [{"prompt": "A </s> b", "completion": "c"}], None, {"special_inside": 1}),
    ("sft", [{"prompt": "", "completion": "Something."}], None, {"no_prompt": 1}),
    ("sft", [{"prompt": "The quick brown", "completion": " fox"}], None, {}),
    ("sft", [{"prompt": "The quick bro", "completion": "wn fox"}], None, {"merged_boundary": 1}),
    ("preference", [pair("Is it?", "Yes.", "No.")] * 2, None, {"duplicates": 1}),
    (
        "preference",
        [pair(f"Is {i}?", "Yes, it is." if i < 20 else "No", "Never ever.") for i in range(20)],
        None,
        {"length_bias": 20},
    ),
    ("preference", [pair(f"Is {i}?", *("ab"[:: 1 - 2 * (i % 2)])) for i in range(40)], None, {}),
]


@pytest.mark.parametrize(("kind", "rows", "tokenizer", "wanted"), DEFECTS)
def test_defects_are_counted(look_at, kind, rows, tokenizer, wanted):
    report, _ = look_at(kind, {"train": rows}, tokenizer)
    found = told(report, "train")
    found.pop("end_is_not_eos", None)
    assert found == wanted


def test_rows_are_named(look_at, tmp_path):
    report, _ = look_at("sft", {"train": [*GOOD, GOOD[2]], "validation": [GOOD[4], *GOOD[:0]]})
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    [twice] = [c for c in report.concerns["train"] if c.name == "duplicates"]
    assert twice.examples == [f"{train}, line 7 = {train}, line 3"]
    [leak] = [c for c in report.concerns["validation"] if c.name == "leakage"]
    assert (leak.count, leak.share) == (1, 1.0)
    assert leak.examples == [f"{validation}, line 1 = {train}, line 5"]


def test_prompts_of_training_in_validation(look_at):
    other = [dialogue("What is 3?", "Who knows?"), dialogue("What is 30?", "It is 30.")]
    report, _ = look_at("sft", {"train": GOOD, "validation": other})
    assert told(report, "validation") == {"end_is_not_eos": 0, "leaked_prompts": 1}


def test_sets_watched_beside(look_at, tmp_path):
    """They are looked at as the validation set is: what of them is in training is no test of forgetting."""
    old = write_jsonl(tmp_path / "old.jsonl", [GOOD[0], dialogue("Old?", "Very.")])
    report, _ = look_at("sft", {"train": GOOD}, watch={"old": str(old)})
    assert list(report.looks) == ["train", "old"]
    assert told(report, "old") == {"end_is_not_eos": 0, "leakage": 1}
    assert report.looks["old"].ledger.table().startswith("old set\n")
    with pytest.raises(
        UserError, match=r"^validation\.watch\.old: no such file or directory: /nosuch\.jsonl"
    ):
        look_at("sft", {"train": GOOD}, watch={"old": "/nosuch.jsonl"})


def test_bad_rows_are_all_counted_and_training_would_stop(look_at):
    """on_bad_row=error ends training at the first of them; who looks wants to know them all."""
    same = [pair("Is it?", "Yes.", "Yes."), pair("Was it?", "No.", "No.")]
    rows = [*same, pair("Q?", "A" * 400, "B"), *(pair(f"Is {i}?", "Yes.", "No.") for i in range(3))]
    report, _ = look_at("preference", {"train": rows}, max_length=64)
    assert told(report, "train") == {"over_length": 1, "same_pair": 2}
    [stop] = report.concerns["all"]
    assert stop.name == "training_stops"
    assert "train.jsonl, line 1: chosen and rejected are the same" in stop.text
    fine, _ = look_at(
        "preference", {"train": rows}, max_length=64, on_bad_row="skip", max_dropped_fraction=0.5
    )
    assert fine.concerns["all"] == []
    assert [c.level for c in fine.concerns["train"]] == ["note", "warn"]  # too long: as was asked for


def test_a_header_that_is_trained(look_at):
    """A template without a generation prompt: its header of the assistant's turn belongs to the answer."""
    template = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
    report, _ = look_at("sft", {"train": GOOD}, tiny_tokenizer(chat_template=template))
    [header] = report.concerns["all"]
    assert header.name == "trained_header"
    assert "'<|im_start|>assistant\\n'" in header.text


def test_the_same_system_prompt_everywhere(look_at):
    said = "You are a helpful assistant of few words."
    rows = [dialogue(f"What is {i}?", f"It is {i}.") for i in range(20)]
    rows = [{"messages": [turn("system", said), *row["messages"]]} for row in rows]
    report, _ = look_at("sft", {"train": rows})
    [common] = [c for c in report.concerns["train"] if c.name == "common_prompt"]
    assert said in common.text
    assert common.level == "note"


# --- text


@pytest.fixture
def texts(look_at):
    words = [{"text": f"Document {i} speaks of {i} things."} for i in range(7)]
    return look_at("text", {"train": words, "validation": [words[3], {"text": "New."}]}, max_length=16)


def test_documents(texts):
    report, _ = texts
    own = report.looks["train"]
    assert (own.num_rows, own.rows.num_rows) == (7, -(-int(own.lengths_S.sum()) // 15))
    assert int(own.trained_S.sum()) == int(own.lengths_S.sum()) - 7  # all but each first token
    assert told(report, "train") == {}
    assert told(report, "validation") == {"leakage": 1}


def test_bad_documents_are_counted(look_at):
    """A row without text ends the preparation, but not the look at it; the others are all there."""
    rows = [{"text": "Some words."}, {"txt": "x"}, {"text": "Other words."}, {"text": 3}]
    report, _ = look_at("text", {"train": rows}, max_length=16)
    assert told(report, "train") == {"wrong_fields": 2}
    assert [c.name for c in report.concerns["all"]] == ["training_stops"]
    assert report.looks["train"].num_rows == 2


def test_blocks_show_their_documents(texts):
    """The parts of a block are its tokens; all blocks together show every document's text once."""
    report, _ = texts
    tokenizer = tiny_tokenizer()
    shown: dict[str, str] = {}
    for row in range(report.looks["train"].rows.num_rows):
        sample = samples.sample(report.looks["train"].rows, row, tokenizer)
        assert sum(part.tokens for part in sample.parts) == sample.tokens
        for part in sample.parts:
            name, goes_on, _ = part.title.partition(" (goes on)")
            # Its first token is the last one of the block before: context, and so a span of its own.
            assert not part.spans[0].trained
            assert part.spans[0].tokens == 1
            texts = [span.text for span in part.spans[1 if goes_on else 0 :]]
            shown[name] = shown.get(name, "") + "".join(texts)
    assert list(shown.values()) == [f"Document {i} speaks of {i} things.</s>" for i in range(7)]
    [found] = samples.by_name(report.looks["train"].rows, "train.jsonl:7", "train")
    assert "line 7" in samples.sample(report.looks["train"].rows, found, tokenizer).parts[-1].title


def test_documents_of_a_block_whatever_attention_does(texts):
    report, _ = texts
    rows = report.looks["train"].rows
    assert not rows.cross_documents
    crossing = dataclasses.replace(rows, cross_documents=True)
    for row in range(rows.num_rows):
        lengths = [len(ids) for ids, _ in rows.sequences(row)]
        assert [num for _, _, num, _ in rows.documents(row)] == lengths
        assert sum(num for _, _, num, _ in crossing.documents(row)) == len(crossing.sequences(row)[0][0])


def test_labels_out_of_balance_are_told_before_training(look_at):
    def judged(*labels):
        return [{"prompt": f"Is {i}?", "completion": f"{i}.", "label": one} for i, one in enumerate(labels)]

    report, _ = look_at("unpaired", {"train": judged(True, True, True)})
    [concern] = [own for own in report.concerns["train"] if own.name == "label_imbalance"]
    assert concern.text == "all 3 rows are desirable: nothing shows the model the other kind"
    report, _ = look_at("unpaired", {"train": judged(True, False, True, True)})
    [concern] = [own for own in report.concerns["train"] if own.name == "label_imbalance"]
    assert concern.text.startswith("3 desirable and 1 undesirable rows, weighted 3.00 to 1, which should be")
    assert (concern.count, concern.share) == (1, 0.25)
    balanced, _ = look_at("unpaired", {"train": judged(True, False), "validation": judged(True, True)})
    names = [concern.name for own in balanced.concerns.values() for concern in own]
    assert "label_imbalance" not in names


def test_negative_margins_are_told_to_a_reward_model_alone(look_at):
    rows = [pair(f"Is {i}?", "Yes.", "No.") | {"margin": m} for i, m in enumerate((1, -2, None, 0, -0.5))]
    report, _ = look_at("preference", {"train": rows}, algo="rm")
    [concern] = [own for own in report.concerns["train"] if own.name == "negative_margin"]
    assert concern.text.startswith("2 of 5 rows (40%) have a negative margin")
    assert [example[-6:] for example in concern.examples] == ["line 2", "line 5"]
    report, _ = look_at("preference", {"train": rows}, algo="dpo")
    assert "negative_margin" not in told(report, "train")
