"""Which exports and stores of a pipeline count as done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strop.pipeline import exports, standing
from strop.slurm import attempts
from tests.unit.pipeline_helpers import commit
from tools import convert_dcp_to_hf

pytestmark = pytest.mark.usefixtures("pipeline_place")


def test_an_export_is_done_when_it_is_of_the_checkpoint_that_is_wanted():
    run, out = Path("run"), Path("out")
    out.mkdir()
    first = commit(run, 2)
    assert not exports.is_done(out, run, "latest", None)
    exports.mark(out, first, None)
    assert exports.is_done(out, run, "latest", None)
    assert not exports.is_done(out, run, "latest", "bf16")
    (run / "checkpoints" / "BEST.json").write_text('{"step": 2}')
    commit(run, 4)
    assert not exports.is_done(out, run, "latest", None)
    assert exports.is_done(out, run, "best", None)
    assert exports.is_done(out, run, "2", None)
    (first / "manifest.json").write_text("written anew")
    assert not exports.is_done(out, run, "best", None)


def test_a_best_step_that_nothing_names():
    """Checkpoints and no BEST.json: there is nothing to export; what was exported stands, as without them."""
    run, out = Path("run"), Path("out")
    out.mkdir()
    first = commit(run, 2)
    assert attempts.find_checkpoint(run, "best") is None
    assert not exports.is_done(out, run, "best", None)
    exports.mark(out, first, None)
    assert exports.is_done(out, run, "best", None)


def test_adapters_are_not_the_merged_model():
    out = Path("out")
    out.mkdir()
    first = commit(Path("run"), 2)
    exports.mark(out, first, None)
    assert not exports.is_of(out, first, None, adapter=True)
    exports.mark(out, first, None, adapter=True)
    assert exports.is_of(out, first, None, adapter=True)
    assert not exports.is_of(out, first, None)


@pytest.mark.parametrize("word", ["--finished", "--update"])
def test_what_is_asked_of_a_run_needs_one(monkeypatch, capsys, word):
    words = ["--config", "c.yaml", "--dcp-ckpt-path", "step", "--hf-ckpt-path", "out", word]
    monkeypatch.setattr("sys.argv", ["convert", *words])
    with pytest.raises(SystemExit):
        convert_dcp_to_hf.main()
    assert "--finished and --update need --run" in capsys.readouterr().err


def test_stores_are_those_of_the_configuration(tmp_path):
    config, store, record = Path("c.yaml"), Path("store"), Path("r.json")
    config.write_text("a")
    store.mkdir()
    sha = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of "a"
    record.write_text(json.dumps({"config": str(config), "config_sha256": sha, "stores": [str(store)]}))
    assert standing.stores_are_there(record)
    config.write_text("b")
    assert not standing.stores_are_there(record)
    config.write_text("a")
    store.rmdir()
    assert not standing.stores_are_there(record)
    assert not standing.stores_are_there(Path("nosuch.json"))
