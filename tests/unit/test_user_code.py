"""A user's own function or class for the rows, by dotted path: what it may give, what its errors say, and
that a change of it never serves what the old one made."""

from __future__ import annotations

import sys

import pytest
from data_helpers import tiny_tokenizer, write_jsonl

from strop.config import Config, DataConfig
from strop.data import sets
from strop.data.corpus import Corpus
from strop.data.prepare import prepare
from strop.errors import UserError
from strop.user_code import digest, load

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def run(tmp_path):
    def run(rows, adapter, **settings):
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        config = Config(data=DataConfig(train=str(path), adapter=adapter, **settings))
        return prepare(config, TOKENIZER, "t", tmp_path / "cache", "sft")

    run.path = tmp_path / "a.jsonl"
    return run


def error_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


OWN = """
from strop.data.adapters import LeftOut
from strop.data.fields import Refused
from own_words import ending

def pair(row, loud=False):
    end = "!" if loud else ending()
    return {"prompt": row["q"], "completion": row["a"] + end}

def every(row):
    return [{"prompt": row["q"], "completion": a} for a in row["answers"]]

def some(row):
    if row["a"] == "none":
        return None
    if row["a"] == "dull":
        return LeftOut("dull", "an answer like all others")
    if row["a"] == "odd":
        raise Refused("odd", "an answer that cannot be")
    return pair(row)

def wrong(row):
    return row["q"]

class Rows:
    def __init__(self, key):
        self.key = key

    def __call__(self, row):
        return {"prompt": row["q"], "completion": row[self.key]}

class NotCallable:
    pass

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Modules in the working directory; own(name, text) writes one and forgets what was imported."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))

    def write(name, text):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        for module in [m for m in sys.modules if m.partition(".")[0].startswith("own_")]:
            del sys.modules[module]

    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    write("own_words.py", "def ending():\n    return '.'\n")
    write("own_rows.py", OWN)
    yield write
    write("own_rows.py", "")
    sys.dont_write_bytecode = before


QA = [{"q": "1 + 1?", "a": " 2"}, {"q": "2 + 2?", "a": " 4"}]


def texts(store):
    return [TOKENIZER.decode(store.sequences(row)[0][0]) for row in range(store.num_rows)]


def test_a_users_function_and_class(own, run):
    assert texts(run(QA, "own_rows:pair")[0]) == ["1 + 1? 2.</s>", "2 + 2? 4.</s>"]
    assert texts(run(QA, "own_rows.pair", adapter_args={"loud": True})[0])[0] == "1 + 1? 2!</s>"
    assert texts(run(QA, "own_rows:Rows", adapter_args={"key": "a"})[0])[0] == "1 + 1? 2</s>"


def test_one_row_into_several_and_none(own, run):
    many = [{"q": "n?", "answers": [" 1", " 2"]}, {"q": "m?", "answers": []}, {"q": "k?", "answers": [" 3"]}]
    store, ledger = run(many, "own_rows:every")
    assert [store.row_id(row)[1] for row in range(3)] == [1, 1, 3]
    assert ledger.sources[str(run.path)].dropped["left_out"].rows == 1
    rows = [{"q": "n?", "a": a} for a in (" 1", "none", "dull", "odd")]
    store, ledger = run(rows, "own_rows:some", on_bad_row="skip", max_dropped_fraction=0.5)
    dropped = ledger.sources[str(run.path)].dropped
    assert {reason: (d.rows, d.wanted) for reason, d in dropped.items()} == {
        "left_out": (1, True),
        "dull": (1, True),
        "odd": (1, False),
    }


def test_documents_of_text(own, tmp_path):
    """In parts; what is left out on purpose is no loss, and the code is part of the address."""
    own("own_rows.py", "def text(row):\n    return [{'text': t} for t in row['texts']]\n")
    rows = [{"texts": [f"The first {n}.", f"The second {n}."] if n % 2 else []} for n in range(40)]
    path = str(write_jsonl(tmp_path / "t.jsonl", rows))
    config = Config(algo="cpt", data=DataConfig(train=path, adapter="own_rows:text", max_length=16))

    def make():
        place, ledger = sets.Maker(config, "text", TOKENIZER, "t", tmp_path / "cache", 2).prepare("train")
        [(store, begin, end)] = place
        return store, [Corpus.open(store).document(row) for row in range(begin, end)], ledger

    store, documents, ledger = make()
    assert [TOKENIZER.decode(d) for d in documents[:3]] == [
        "The first 1.</s>",
        "The second 1.</s>",
        "The first 3.</s>",
    ]
    dropped = ledger.sources[path].dropped["left_out"]
    assert (len(documents), dropped.rows, dropped.wanted) == (40, 20, True)
    own("own_rows.py", "def text(row):\n    return [{'text': t} for t in row['texts'][:1]]\n")
    changed, documents, _ = make()
    assert (changed != store, len(documents)) == (True, 20)


def test_rows_of_one_line_stay_on_one_side_of_a_split(own, run):
    many = [{"q": f"{n}?", "answers": [" 1", " 2"]} for n in range(50)]
    path = write_jsonl(run.path, many)
    config = Config(data=DataConfig(train=str(path), adapter="own_rows:every", split="50,50,0"))
    stores = [
        prepare(config, TOKENIZER, "t", run.path.parent / "c", "sft", s)[0] for s in ("train", "validation")
    ]
    lines = [{store.row_id(row)[1] for row in range(store.num_rows)} for store in stores]
    assert lines[0] & lines[1] == set()
    assert sum(store.num_rows for store in stores) == 100


def test_errors_of_a_users_function_name_row_and_line(own, run):
    lacking = [*QA, {"q": "3?"}]
    line = 1 + OWN.splitlines().index('    return {"prompt": row["q"], "completion": row["a"] + end}')
    assert error_of(run, lacking, "own_rows:pair") == (
        f"{run.path}, line 3: own_rows:pair failed: KeyError: 'a'\n"
        f"  {run.path.parent}/work/own_rows.py:{line}, in pair: "
        'return {"prompt": row["q"], "completion": row["a"] + end}'
    )
    assert error_of(run, QA, "own_rows:wrong") == (
        f"{run.path}, line 1: own_rows:wrong gave '1 + 1?', not fields (a dict), a list of them, or None"
    )
    assert error_of(run, QA, "own_rows:Rows").startswith(
        "data.adapter: making own_rows:Rows failed: TypeError: Rows.__init__() missing 1 required"
    )
    assert error_of(run, QA, "own_rows:NotCallable") == (
        "data.adapter: own_rows:NotCallable is a class without __call__(self, row)"
    )


def test_code_that_cannot_be_had(own, run):
    assert error_of(run, QA, "own_row:pair").startswith(
        f"data.adapter: there is no module own_row, neither in {run.path.parent}/work nor among"
    )
    assert error_of(run, QA, "own_rows:pairs").endswith("own_rows.py) has no pairs; did you mean pair?")
    assert error_of(run, QA, "own_rows:number") == (
        "data.adapter: own_rows:number is int, not a function or a class"
    )
    own("own_broken.py", "x = 1\nimport own_missing\n")
    assert "importing own_broken failed: ModuleNotFoundError: No module named 'own_missing'\n  " in error_of(
        run, QA, "own_broken:f"
    )
    own("own_broken.py", "def f(:\n")
    assert "own_broken.py:1: def f(:" in error_of(run, QA, "own_broken:f")


def test_changed_code_never_serves_a_stale_store(own, run):
    first, _ = run(QA, "own_rows:pair")
    own("own_rows.py", OWN + "# a note\n")
    second, _ = run(QA, "own_rows:pair")
    own("own_words.py", "def ending():\n    return '?'\n")  # a module that the function's module uses
    third, _ = run(QA, "own_rows:pair")
    assert texts(third)[0] == "1 + 1? 2?</s>"
    fourth, _ = run(QA, "own_rows:pair", adapter_args={"loud": True})
    assert len({store.path for store in (first, second, third, fourth)}) == 4
    own("own_words.py", "def ending():\n    return '.'\n")
    own("own_rows.py", OWN)
    back, _ = run(QA, "own_rows:pair")
    assert back.path == first.path


@pytest.mark.parametrize("depth", ["import own_lazy.words as w", "from own_lazy import words as w"])
def test_a_helper_that_is_imported_within_a_function_counts(own, depth):
    """It may not have been imported yet when the digest is taken, nor what it imports itself."""
    own("own_lazy/__init__.py", "")
    own("own_lazy/words.py", "def f():\n    from .deep import g\n    return g()\n")
    own("own_lazy/deep.py", "def g():\n    return 1\n")
    own("own_rows.py", f"def rows(row):\n    {depth}\n    return w.f()\n")
    seen = {digest("own_rows:rows", "k")}
    for name, text in (("own_lazy/deep.py", "def g():\n    return 2\n"), ("own_lazy/__init__.py", "a = 1\n")):
        own(name, text)
        seen.add(digest("own_rows:rows", "k"))
    assert len(seen) == 3
    own("own_lazy/other.py", "unused = 1\n")
    assert digest("own_rows:rows", "k") in seen
    seen = {digest("own_lazy.words:f", "k")}  # from within a package
    own("own_lazy/deep.py", "def g():\n    return 3\n")
    assert digest("own_lazy.words:f", "k") not in seen


def test_a_package_in_the_working_directory(own, run):
    own("own_package/__init__.py", "")
    own("own_package/deep.py", "from .words import pair\n")
    own("own_package/words.py", "def pair(row):\n    return {'prompt': row['q'], 'completion': row['a']}\n")
    first, _ = run(QA, "own_package.deep:pair")
    own(
        "own_package/words.py",
        "def pair(row):\n    return {'prompt': row['q'], 'completion': row['a'] * 2}\n",
    )
    second, _ = run(QA, "own_package.deep:pair")
    assert (texts(first)[0], texts(second)[0]) == ("1 + 1? 2</s>", "1 + 1? 2 2</s>")


@pytest.mark.parametrize("module", ["own_package.deep", "own_package"])
def test_what_lies_beside_a_package_counts_if_it_is_imported(own, module):
    own("own_words.py", "def ending():\n    import own_other.last\n    return own_other.last.text\n")
    own("own_other/__init__.py", "")
    own("own_other/last.py", "text = '.'\n")
    for name in ("__init__", "deep"):
        own(f"own_package/{name}.py", "from own_words import ending\n\ndef f(row):\n    return ending()\n")
    first = digest(f"{module}:f", "k")
    own("own_unused.py", "text = '?'\n")
    assert digest(f"{module}:f", "k") == first
    own("own_other/last.py", "text = '!'\n")
    second = digest(f"{module}:f", "k")
    own("own_words.py", "def ending():\n    return '!'\n")
    assert len({first, second, digest(f"{module}:f", "k")}) == 3


def test_a_script_that_leaves_while_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "leaving_script.py").write_text("import sys\n\nsys.exit('usage: leaving_script.py FILE')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = error_of(load, "leaving_script:pair", "data.adapter")
    assert text.startswith(
        "data.adapter: importing leaving_script failed: SystemExit: usage: leaving_script.py"
    )
    assert "leaving_script.py:3" in text


def test_code_that_leaves_and_arguments_that_nobody_takes(run, tmp_path, monkeypatch):
    (tmp_path / "leaving_rows.py").write_text("def rows(row):\n    raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = error_of(run, [{"q": "a", "a": "b"}], "leaving_rows:rows")
    assert "a.jsonl, line 1: leaving_rows:rows failed: SystemExit: 3" in text
    for adapter in (None, "none"):
        text = error_of(run, [{"prompt": "a", "completion": "b"}], adapter, adapter_args={"n": 1})
        assert text == "data.adapter_args: there is no data.adapter to take them"
