"""Preparing text end to end: what is kept, what is left out and why, bad input."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.config import Config, DataConfig, PrepareConfig
from strop.data import documents, near, noise, parts, prepare_text, sets
from strop.data.corpus import Corpus
from strop.data.ledger import Ledger
from strop.errors import UserError
from tests.unit.text_helpers import TOKENIZER, reasons, rows, text


def test_documents_of_every_format_in_their_order(make_text, tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    texts = [text(i) for i in range(14)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts[8:12]}), tmp_path / "e.parquet", row_group_size=3
    )
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[7]}).encode()))
    files = {
        "a.txt": "\ufeff" + texts[0],
        "b.jsonl": rows(texts[1:4]),
        "c/two.md": texts[5],
        "c/one.txt": texts[4],
        "c/sub/three.json": json.dumps(rows([texts[6]])),
        "c/ignored.csv": "x",
    }
    datasets.Dataset.from_list(rows(texts[12:])).save_to_disk(tmp_path / "f")
    entries = ["a.txt", "b.jsonl", "c", "d.jsonl.gz", "e.parquet", "f"]
    got, ledger, made = make_text(files, entries)
    order = [0, 1, 2, 3, 4, 6, 5, *range(7, 14)]  # c/one.txt, c/sub/three.json, c/two.md
    assert got == [texts[i] for i in order]
    assert [made.row_id(i)[1] for i in range(14)] == [1, 1, 2, 3, 1, 1, 1, 1, 1, 2, 3, 4, 1, 2]
    assert made.row_id(5)[0] == str(tmp_path / "c" / "sub" / "three.json")
    assert [entry.used for entry in ledger.sources.values()] == [1, 3, 3, 1, 4, 2]
    tokens = sum(len(TOKENIZER(t, add_special_tokens=False)["input_ids"]) + 1 for t in got)
    assert sum(entry.tokens for entry in ledger.sources.values()) == tokens == int(made.offsets[-1])


@pytest.mark.parametrize(
    ("how", "expected", "lines"),
    [
        ("file", ["one\ntwo\n\n\nthree é\n"], [1]),
        ("paragraph", ["one\ntwo", "three é"], [1, 5]),
        ("line", ["one", "two", "three é"], [1, 2, 5]),
    ],
)
def test_what_a_document_is_in_a_text_file(make_text, how, expected, lines):
    got, _, made = make_text({"a.txt": "one\ntwo\n\n\nthree é\n"}, documents=how)
    assert got == expected
    assert made.rows[:, 1].tolist() == lines


@given(content=st.text(st.sampled_from("ab\n\r "), max_size=120), size=st.integers(1, 40))
def test_pieces_cut_nothing(tmp_path_factory, content, size):
    """Any size of pieces gives the documents and lines of the whole file, read here line by line."""
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(content.encode())
    for how in ("line", "paragraph"):
        config = PrepareConfig(documents=how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "PIECE_BYTES", size)
            patch.setattr(documents, "STEP_BYTES", 3)
            [source] = documents.find(str(path), "data.train", "train", DataConfig())
            found = documents.pieces(0, source, config)
            got = [(d.line, d.text) for piece in found for d in documents.read(source, piece, config)]
        lines = content.encode().split(b"\n")
        if how == "line":
            expected = [(i, x.rstrip(b"\r").decode()) for i, x in enumerate(lines, 1) if x.strip()]
        else:
            expected, block = [], []
            for i, line in enumerate([*lines, b""], 1):
                if line.strip():
                    block.append((i, line))
                elif block:
                    joined = b"\n".join(x for _, x in block).rstrip(b"\r\n").decode()
                    expected.append((block[0][0], joined))
                    block = []
        assert got == expected


def test_equal_and_nearly_equal_documents(make_text):
    """One word of 200 changed: about 0.95 of the shingles are shared; a half: a third of them."""
    base = text(1, 200)
    words = base.split()
    near_one = " ".join([*words[:100], "changed", *words[101:]])
    half = " ".join([*words[:100], *text(2, 100).split()])
    files = {"a.jsonl": rows([base, text(3), base, near_one]), "b.jsonl": rows([half, text(3), ""])}
    got, ledger, _ = make_text(files, near_duplicates=0.8)
    assert got == [base, text(3), half]
    assert reasons(ledger) == {"duplicate": 1, "near_duplicate": 1, "empty": 1}
    a, b = ledger.sources.values()
    assert a.dropped["near_duplicate"].examples[0]["line"] == 4
    assert a.dropped["near_duplicate"].examples[0]["message"].endswith("a.jsonl, line 1")
    assert b.dropped["duplicate"].examples[0]["message"].endswith("a.jsonl, line 2")
    assert (a.read, a.used, b.read, b.used) == (4, 2, 3, 1)
    assert make_text(files, exact_duplicates=False)[0] == [base, text(3), base, near_one, half, text(3)]


@given(data=st.data())
def test_sketches_estimate_the_share_of_common_shingles(data):
    """Against the sets themselves: within five standard deviations of 128 draws."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    base = [draw.randrange(1000) for _ in range(data.draw(st.integers(5, 300)))]
    other = list(base)
    for _ in range(data.draw(st.integers(0, 30))):
        other[draw.randrange(len(other))] = draw.randrange(1000)
    sets_ = [{tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (base, other)]
    jaccard = len(sets_[0] & sets_[1]) / len(sets_[0] | sets_[1])
    a, b = near.sketch(np.array(base + other, dtype=np.int32), np.array([len(base), len(other)]))
    assert abs((a == b).mean() - jaccard) <= 5 * np.sqrt(max(jaccard * (1 - jaccard), 0) / 128) + 1e-9


def test_a_sketch_belongs_to_its_document_alone():
    """Short documents of one to five tokens among others, and whatever stands behind."""
    docs = [[1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5], [2, 1], list(range(50)), [1]]
    together = near.sketch(np.concatenate(docs).astype(np.int32), np.array([len(d) for d in docs]))
    for row, doc in zip(together, docs):
        assert (row == near.sketch(np.array(doc, dtype=np.int32), np.array([len(doc)]))[0]).all()
    assert [(together[i] == together[j]).all() for i, j in ((0, 6), (0, 1), (1, 4), (2, 3))] == [
        True, False, False, False,
    ]  # fmt: skip


def test_noise_is_measured_as_defined(make_text):
    assert noise.repetition("a b c " * 10) == pytest.approx(1 - 3 / 28)
    assert noise.repetition(" ".join(map(str, range(40)))) == 0
    assert noise.symbols("ab #!") == pytest.approx(2 / 5)
    texts = ["x", text(1), "spam and eggs " * 30, "#!?% " * 40, text(2, 2000)]
    got, ledger, _ = make_text(
        {"a.jsonl": rows(texts)}, min_chars=2, max_chars=5000, max_repetition=0.5, max_symbols=0.5
    )
    assert got == [text(1)]
    assert reasons(ledger) == {"short": 1, "repetition": 1, "symbols": 1, "long": 1}


def test_languages(make_text):
    german = "Das ist ein Satz, der ganz und gar auf Deutsch geschrieben wurde, und noch einer dazu."
    english = "This is a sentence that was written in English from the first word to the last."
    got, ledger, _ = make_text({"a.jsonl": rows([german, english])}, language="fr,en")
    assert got == [english]
    assert reasons(ledger) == {"language": 1}


def test_splits_by_content_and_ranges(make_text, tmp_path):
    texts = [text(i, 5) for i in range(400)]
    make_text({"a.jsonl": rows(texts[:300]), "b.jsonl": rows(texts[300:])}, data={"split": "80,15,5"})
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    config = Config(data=DataConfig(train=names, split="80,15,5"))
    maker = sets.Maker(config, "text", TOKENIZER, "t", tmp_path / "cache")
    assert maker.names() == ["train", "validation"]
    seen = {}
    for name in maker.names():
        place, ledger = maker.prepare(name)
        made = Corpus.open(place[0][0])
        seen[name] = [TOKENIZER.decode(made.document(i)[:-1]) for _, a, b in place for i in range(a, b)]
        assert ledger.used == len(seen[name])
        assert sum(e.other_split for e in ledger.sources.values()) == 400 - len(seen[name])
        assert len(place) == 2
    assert not set(seen["train"]) & set(seen["validation"])
    assert set(seen["train"]) | set(seen["validation"]) < set(texts)
    assert 290 < len(seen["train"]) < 350
    assert 40 < len(seen["validation"]) < 80


def test_workers_and_pieces_change_nothing(make_text, monkeypatch):
    files = {"a.jsonl": rows([text(i % 90) for i in range(120)]), "b.txt": text(200)}
    whole = make_text(files, cache="one", near_duplicates=0.8)
    monkeypatch.setattr(documents, "PIECE_BYTES", 900)
    parted = make_text(files, cache="many", workers=2, near_duplicates=0.8)
    assert whole[0] == parted[0]
    assert [vars(e) for e in whole[1].sources.values()] == [vars(e) for e in parted[1].sources.values()]
    assert len(whole[0]) == 91


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo \xff\n", "a.txt, line 2: not UTF-8 (byte 5 of the line is 0xff)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: no text, where a text is needed"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2: text is null, where a text is needed"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: character 1 of the text is half"),
        ("a.jsonl", b'{"text": "a"}\n["text"]\n', "line 2: a list, not an object of fields"),
    ],
)
def test_a_document_that_cannot_be_read(make_text, name, content, message):
    """Stops with the line named; data.on_bad_row=skip leaves it out and counts it."""
    with pytest.raises(UserError) as raised:
        make_text({name: content})
    assert message in str(raised.value)
    assert "data.on_bad_row=skip" in str(raised.value)
    good = {"good.jsonl": rows([text(1)])}
    skip = {"on_bad_row": "skip", "max_dropped_fraction": 0.9}
    got, ledger, _ = make_text({**good, name: content}, data=skip)
    assert got[0] == text(1)
    assert sum(reasons(ledger).values()) == 1
    with pytest.raises(UserError, match=r"data\.max_dropped_fraction=0\.1"):
        make_text({**good, name: content}, data={**skip, "max_dropped_fraction": 0.1})


def test_a_line_of_50_mb(make_text):
    """As a document of words it is kept whole; without a blank in it, it is noise and counted."""
    words = "sea shells and apples "
    whole = words * (50_000_000 // len(words))
    got, ledger, made = make_text({"a.jsonl": rows([text(1), whole, "x" * 50_000_000])})
    assert [len(one) for one in got] == [len(text(1)), len(whole)]
    assert reasons(ledger) == {"unbroken": 1}
    unit = [len(TOKENIZER(t, add_special_tokens=False)["input_ids"]) for t in (words, words * 2, words * 3)]
    assert unit[2] - unit[1] == unit[1] - unit[0]
    expected = unit[0] + (50_000_000 // len(words) - 1) * (unit[1] - unit[0])
    assert len(made.document(1)) == expected + 1


def test_a_document_too_large_for_memory(make_text, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(UserError, match=r"prepare\.documents=paragraph or line"):
        make_text({"a.txt": text(1, 100)})


@pytest.mark.parametrize(
    ("files", "entries", "message"),
    [
        ({"a.txt": ""}, ["a.txt"], "all 1 rows of the train set were dropped"),
        ({"d/x.csv": "x"}, ["d"], "holds no file that ends in .txt, .md"),
        ({"a.csv": "x"}, ["a.csv"], "has none of the endings .txt, .md"),
        ({"a.txt": "x"}, ["b.txt"], "no such file or directory"),
        ({"a.txt": "x"}, ["a.txt", "a.txt"], "twice"),
    ],
)
def test_entries_that_give_nothing(make_text, files, entries, message):
    with pytest.raises(UserError) as raised:
        make_text(files, entries)
    assert message in str(raised.value)


def test_a_blend_with_nothing_left_of_a_source(tmp_path):
    """b is a duplicate of a."""
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for name in names:
        Path(name).write_text("x")
    config = Config(data=DataConfig(train=names, weights=[1, 1]))
    with pytest.raises(UserError, match=r"no document of .*b\.txt is left"):
        sets.Maker(config, "text", TOKENIZER, "t", tmp_path / "cache").prepare("train")


def test_the_ledger_beside_the_store_is_the_one_printed(make_text):
    _, ledger, made = make_text({"a.jsonl": rows([text(1), text(1), text(2)])})
    kept = Ledger.load(made.path / "ledger-train.json")
    assert kept.as_json() == ledger.as_json()
    assert "duplicate" in ledger.table()
    assert prepare_text.PIPELINE == 1


@pytest.mark.parametrize("near_duplicates", [None, 0.8])
def test_nothing_to_prepare_is_said(make_text, near_duplicates):
    with pytest.raises(UserError, match=r"a\.jsonl: the data set is empty"):
        make_text({"a.jsonl": ""}, near_duplicates=near_duplicates)
    with pytest.raises(UserError, match="all 2 rows of the train set were dropped"):
        make_text({"b.jsonl": rows(["", " "])}, near_duplicates=near_duplicates)


def test_a_part_without_documents_beside_others(make_text, monkeypatch):
    """Parts are cut by size: one can hold nothing but noise."""
    monkeypatch.setattr(parts, "group", lambda pieces: [[piece] for piece in pieces])
    files = {"a.jsonl": rows(["short"] * 3), "b.jsonl": rows([text(1), text(2)])}
    got, ledger, _ = make_text(files, near_duplicates=0.8, min_chars=20, data={"max_dropped_fraction": 1.0})
    assert got == [text(1), text(2)]
    assert reasons(ledger) == {"short": 3}
