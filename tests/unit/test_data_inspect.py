"""What is said of a set, against loops over its rows, counts by hand, and defects put there on purpose."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
from data_helpers import CHATML, tiny_tokenizer, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from strop import trainer
from strop.config import Config, DataConfig, TrainConfig, ValidationConfig
from strop.data import concerns, ends, inspect, inspect_text, looking, repeats, samples, units
from strop.data.repeats import Hashes, Repeats
from strop.data.spans import Span, spans, special_mask
from strop.errors import UserError


def turn(role, content):
    return {"role": role, "content": content}


def dialogue(question, answer):
    return {"messages": [turn("user", question), turn("assistant", answer)]}


def pair(question, chosen, rejected):
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


@pytest.fixture
def look_at(tmp_path):
    """look_at(kind, {train: rows, validation: rows}, tokenizer, data keys ...) -> (report, config)."""

    def look(kind, rows, tokenizer=None, train=None, watch=None, **keys):
        for name, own in rows.items():
            write_jsonl(tmp_path / f"{name}.jsonl", own)
        paths = {name: str(tmp_path / f"{name}.jsonl") for name in rows}
        config = Config(
            data=DataConfig(**paths, **keys),
            train=train or TrainConfig(),
            validation=ValidationConfig(watch=watch or {}),
        )
        tokenizer = tokenizer or tiny_tokenizer()
        report = looking.look(config, kind, tokenizer, tmp_path / "cache", 1, lambda what, done, total: None)
        return report, config

    return look


def told(report, name):
    """{name of a concern: how many rows} of a set."""
    return {concern.name: concern.count for concern in report.concerns[name]}


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


# --- repeats


def test_repeats_by_hand():
    hashes = Hashes(
        rows_R=np.array([5, 7, 5, 9, 5, 8], dtype=np.uint64),
        prompts_R=np.array([1, 1, 1, 0, 1, 0], dtype=np.uint64),
    )
    assert repeats.repeated_rows(hashes) == Repeats(2, [(2, 0), (4, 0)])
    # Row 1 has row 0's prompt; rows 2 and 4 are row 0 again; 3 and 5 have no prompt.
    assert repeats.repeated_prompts(hashes) == Repeats(1, [(1, 0)])


def test_leakage_by_hand():
    """3 is no training row; 7 is one, at row 1 first; 4 has the prompt of row 2, 6 has none."""
    train = Hashes(np.array([9, 7, 2, 7], dtype=np.uint64), np.array([30, 20, 10, 20], dtype=np.uint64))
    other = Hashes(np.array([3, 7, 4, 6], dtype=np.uint64), np.array([40, 20, 10, 0], dtype=np.uint64))
    assert repeats.leakage(train, other) == (Repeats(1, [(1, 1)]), Repeats(1, [(2, 2)]))
    empty = Hashes(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint64))
    assert repeats.leakage(empty, other) == (Repeats(0, []), Repeats(0, []))


def test_halves_of_a_pair_are_told_apart():
    a, b, c = (np.array(ids, dtype=np.int32) for ids in ([1, 2], [3], [2, 3]))
    assert repeats.row_hash([a, b]) != repeats.row_hash([a[:1], c])
    assert repeats.prompt_hash(b) == repeats.NO_PROMPT != repeats.prompt_hash(a)


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
    for told, rows in (((s.filled, s.micro_batches), store), (s.shared, store.sharing_prompts())):
        policy = types.SimpleNamespace(config=config, dist=types.SimpleNamespace(world_size=1))
        policy.train_store, policy.steps_per_epoch = rows, 3
        bins = [own for step in range(3) for [own] in [trainer.step_bins(policy, step)]]
        tokens = sum(int(rows.row_lengths[own].sum()) for step in bins for own in step)
        num = sum(len(step) for step in bins)
        assert told == pytest.approx((tokens / (num * 200), num / 3))
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


# --- defects put there on purpose

GOOD = [dialogue(f"What is {i}?", f"It is {i}, as you see.") for i in range(6)]


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


# --- which rows


def test_a_row_is_found_by_whole_parts_of_its_path(tmp_path):
    """hard-training.jsonl is another file than training.jsonl, and two of that name must be told apart."""
    files = [tmp_path / name for name in ("hard-training.jsonl", "a/training.jsonl", "b/training.jsonl")]
    for i, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        write_jsonl(file, [dialogue(f"{n}?", f"{i}.") for n in range(3 if i < 2 else 5)] + [{"messages": []}])
    data = {"on_bad_row": "skip", "max_dropped_fraction": 0.5}
    config = Config(data=DataConfig(train=[str(file) for file in files[:2]], **data))
    tokenizer = tiny_tokenizer()

    def pick(config, name):
        report = looking.look(config, "sft", tokenizer, tmp_path / "cache", 1, lambda *args: None)
        return looking.pick(report, config, "sft", tokenizer, "train", n=1, rows=[name])[0].place

    assert pick(config, "training.jsonl:3") == f"{files[1]}, line 3"
    assert pick(config, "hard-training.jsonl:3") == f"{files[0]}, line 3"
    with pytest.raises(UserError, match=f"{files[1]}, line 4 is not used"):
        pick(config, "training.jsonl:4")
    config = Config(data=DataConfig(train=[str(file) for file in files], **data))
    for line in (3, 4, 5, 6):  # used in both, used in one, not used in the other
        with pytest.raises(UserError) as raised:
            pick(config, f"training.jsonl:{line}")
        assert f"{files[1]} and {files[2]} end so: name more" in str(raised.value)
    assert pick(config, "b/training.jsonl:5") == f"{files[2]}, line 5"
    assert pick(config, f"{files[1]}:2") == f"{files[1]}, line 2"


def test_rows_by_name(look_at, tmp_path):
    rows = [GOOD[0], {"messages": []}, GOOD[1]]
    report, config = look_at("sft", {"train": rows}, on_bad_row="skip", max_dropped_fraction=0.5)
    own, tokenizer = report.looks["train"].rows, tiny_tokenizer()
    assert samples.by_name(own, "2", "train") == samples.by_name(own, "train.jsonl:3", "train") == [1]
    with pytest.raises(UserError, match="the train set has the rows 1 to 2"):
        samples.by_name(own, "3", "train")
    with pytest.raises(UserError, match=r"train.jsonl, line 2 is not used: wrong_fields: neither text"):
        looking.pick(report, config, "sft", tokenizer, "train", n=1, rows=["train.jsonl:2"])
    with pytest.raises(UserError, match=r"the train set has no line 9 of train.jsonl"):
        looking.pick(report, config, "sft", tokenizer, "train", n=1, rows=["train.jsonl:9"])
    with pytest.raises(UserError, match="expected a row's number, or SOURCE:LINE"):
        looking.pick(report, config, "sft", tokenizer, "train", n=1, rows=["train.jsonl"])
    with pytest.raises(UserError, match="the sets of this run are train"):
        looking.pick(report, config, "sft", tokenizer, "test", n=1)


def test_spread_and_longest(look_at):
    assert samples.spread(9, 3, None) == [0, 4, 8]
    assert samples.spread(2, 5, None) == [0, 1]
    assert samples.spread(5, 0, None) == []
    drawn = samples.spread(1000, 5, 7)
    assert drawn == samples.spread(1000, 5, 7) == sorted(set(drawn)) != samples.spread(1000, 5, 8)
    report, _ = look_at("sft", {"train": [dialogue("Q", "a" * n) for n in (1, 9, 5)]})
    assert samples.longest(report.looks["train"].rows, 2) == [1, 2]


def test_a_pair_shows_its_prompt_once(look_at):
    report, _ = look_at("preference", {"train": [pair("Is it? ", "Yes, it is.", "Yes, no.")]})
    sample = samples.sample(report.looks["train"].rows, 0, tiny_tokenizer())
    texts = {part.title: "".join(s.text for s in part.spans) for part in sample.parts}
    assert texts == {"prompt": "Is it? ", "chosen": "Yes, it is.</s>", "rejected": "Yes, no.</s>"}
    assert [part.trained for part in sample.parts] == [0, sample.parts[1].tokens, sample.parts[2].tokens]
    assert sample.value is None


# --- text of it

PLAIN = inspect_text.Paper(colour=False)
COLOUR = inspect_text.Paper(colour=True)


def test_what_cannot_be_seen():
    assert inspect_text.visible("  a  b \n\tc\r ") == "··a  b·⏎\n→\tc␍·"
    assert inspect_text.visible("a\x1b[31m\u200b\u00a0é🙂") == "a\\x1b[31m‹U+200B›‹U+00A0›é🙂"


def test_marks_and_colours():
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer("Ask:\nOne\ntwo.</s>", add_special_tokens=False)["input_ids"])
    boundary = len(tokenizer("Ask:\n", add_special_tokens=False)["input_ids"])
    found = spans(ids, np.arange(len(ids)) >= boundary, tokenizer)
    assert inspect_text.spans_text(found, PLAIN) == "Ask:⏎\n⟦One⏎\ntwo.</s>⟧"
    text = inspect_text.spans_text(found, COLOUR)
    assert text == "Ask:⏎\n\x1b[32mOne⏎\x1b[0m\n\x1b[32mtwo.\x1b[0m\x1b[1;7;32m</s>\x1b[0m"


def test_long_spans_are_shortened():
    long = [Span("a" * 1000 + "b" * 700, False, False, 9)]
    text = inspect_text.spans_text(long, PLAIN)
    assert (
        text == "a" * 1000 + "b" * 200 + " [... 100 characters left out, --full shows them ...] " + "b" * 400
    )
    assert len(inspect_text.spans_text(long, dataclasses.replace(PLAIN, full=True))) == 1700


def test_everything_but_data_fits_the_width(look_at):
    """With what makes lines long: names, messages, numbers."""
    report, config = look_at("sft", {"train": [*GOOD * 2, {"messages": []}], "validation": GOOD[:1]})
    for width in (80, 120):
        paper = dataclasses.replace(PLAIN, width=width)
        lines = "\n".join(inspect_text.report_text(report, config, "train", paper)).split("\n")
        paths = [line for line in lines if len(line) > width and "/" in line]
        assert [line for line in lines if len(line) > width and line not in paths] == []
        assert all(len(line.split()) <= 3 for line in paths)  # a path that is too long stands alone


def test_special_mask_covers_the_vocabulary():
    tokenizer = tiny_tokenizer()
    marked = np.flatnonzero(special_mask(tokenizer)).tolist()
    assert tokenizer.convert_ids_to_tokens(marked) == ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def test_shares_in_few_digits():
    told = {0.0: "0%", 0.00034: "0.03%", 0.05: "5.0%", 0.5: "50%", 1.0: "100%"}
    assert {share: concerns.percent(share) for share in told} == told


def test_the_ledger_is_in_the_text(look_at, tmp_path: Path):
    report, config = look_at("sft", {"train": [*GOOD, {"x": 1}]})
    text = "\n".join(inspect_text.report_text(report, config, "train", PLAIN))
    row = next(line for line in text.split("\n") if "wrong_fields" in line).split()
    assert row == ["wrong_fields", "1", "0"]


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


def test_all_rows_of_a_line(look_at):
    """A pair is two rows where answers are judged alone."""
    report, config = look_at(
        "unpaired", {"train": [pair("Is it?", "Yes.", "No."), pair("Was it?", "So.", "Never.")]}
    )
    shown = looking.pick(report, config, "unpaired", tiny_tokenizer(), "train", n=1, rows=["train.jsonl:2"])
    assert [(sample.row, sample.value) for sample in shown] == [(3, 1.0), (4, 0.0)]
