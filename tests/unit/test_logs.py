"""All that a process says ends in its rank's log: a launched rank as `strop.slurm.launch` leaves it."""

import os

import pytest

from tests import log_lines
from tests.log_lines import read

TOKEN = "hf_" + "aBcD1234" * 4

HEAD = """
import logging, os, sys, threading, warnings
from tests.log_lines import setup
setup({folder!r}, rank={rank})
log = logging.getLogger("strop.x")
"""


def launched(folder, code, rank=0, check=True, **variables):
    """Run `code` in a process with its raw descriptors in rankNNNNN.err. (stdout of the job, code)"""
    with open(folder / "job.out", "a") as out:
        head = HEAD.format(folder=str(folder), rank=rank)
        done = log_lines.launched(folder, head + code, rank, stdout=out, **variables)
    assert not check or done.returncode == 0, (folder / f"rank{rank:05d}.err").read_text()
    return (folder / "job.out").read_text(), done.returncode


SPEAK = """
log.info("one %d", 1)
log.warning("two\\nlines")
log.debug("never")
log.log(35, "a level of its own")
warnings.warn("three")
print("printed", 4)
print("begun ", end="")
sys.stdout.flush()
print("and ended")
os.write(1, b"native\\n")
log.info("wrong %d", "format")
print("no line end", end="")
"""
SPOKEN = [
    ("INFO", "strop.x", "one 1"),
    ("WARNING", "strop.x", "two\nlines"),
    ("WARNING", "strop.x", "a level of its own"),
    ("WARNING", "py.warnings", "UserWarning: three"),
    ("INFO", "stdout", "printed 4"),
    ("INFO", "stdout", "begun and ended"),
    ("INFO", "strop.x", "'wrong %d' % 1 arguments: TypeError"),
    ("INFO", "stdout", "no line end"),
]


@pytest.mark.parametrize("rank", [0, 3])
def test_logging_warnings_and_prints(tmp_path, rank):
    out, _ = launched(tmp_path, SPEAK, rank)
    got = [line for line in read(tmp_path, rank) if line["logger"] != "raw"]  # a mark, in time or not
    assert len(got) == len(SPOKEN), got
    for line, (level, logger, message) in zip(got, SPOKEN):
        assert (line["level"], line["logger"]) == (level, logger)
        assert message in line["message"]
    raw = (tmp_path / f"rank{rank:05d}.err").read_text()
    assert raw.startswith("native\n")
    if rank:
        assert out == ""
        return
    assert "printed 4\nbegun and ended\n" in out
    assert out.endswith("no line end\n")
    assert "WARNING: two\nlines\n" in out
    assert "native" not in out


def test_uncaught_exceptions_of_every_thread(tmp_path):
    code = """
def work():
    raise KeyError("in the thread")
thread = threading.Thread(target=work, name="loader")
thread.start()
thread.join()
def main():
    raise ValueError("in main")
main()
"""
    out, exit_code = launched(tmp_path, code, check=False)
    thread, main = read(tmp_path)
    assert exit_code == 1
    assert (thread["level"], main["level"]) == ("ERROR", "CRITICAL")
    assert thread["message"] == "in thread loader: KeyError: 'in the thread'"
    assert main["message"] == "ValueError: in main"
    assert thread["traceback"].splitlines()[0] == "Traceback (most recent call last):"
    assert "in work" in thread["traceback"]
    assert "in main" in main["traceback"]
    assert main["traceback"].splitlines()[-1] == "ValueError: in main"
    assert "ValueError: in main" in out


def test_exceptions_that_are_logged_have_their_traceback_apart(tmp_path):
    code = "try:\n    1 / 0\nexcept ZeroDivisionError:\n    log.exception('failed')\n"
    launched(tmp_path, code)
    (line,) = read(tmp_path)
    assert line["message"] == "failed"
    assert line["traceback"].splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_the_loggers_of_transformers_and_datasets(tmp_path):
    """The real libraries: on import they put handlers of their own in place and end the propagation."""
    code = """
import transformers, datasets, huggingface_hub
transformers.utils.logging.get_logger("transformers.models.x").warning("from transformers")
datasets.utils.logging.get_logger("datasets.builder").warning("from datasets")
huggingface_hub.logging.get_logger("huggingface_hub.x").warning("from the hub")
transformers.utils.logging.get_logger("transformers.models.x").info("chatter")
"""
    launched(tmp_path, code, rank=1, HF_HUB_OFFLINE="1", HOME=str(tmp_path))
    said = [(line["logger"], line["message"]) for line in read(tmp_path, 1)]
    for name, text in [
        ("transformers.models.x", "from transformers"),
        ("datasets.builder", "from datasets"),
        ("huggingface_hub.x", "from the hub"),
    ]:
        assert said.count((name, text)) == 1
    raw = (tmp_path / "rank00001.err").read_text()
    assert "from" not in raw  # once is enough
    assert "chatter" not in str(said)


def test_secrets_reach_neither_the_log_nor_the_jobs_output(tmp_path):
    code = """
log.info("token %s", os.environ["DB_PASSWORD"])
print("print", os.environ["DB_PASSWORD"], "and more")
print("begun", os.environ["DB_PASSWORD"], end="", flush=True)
print(" ended")
def login(token):
    raise RuntimeError(f"401 for {token}")
try:
    login(sys.argv[0] + "TOKEN")
except RuntimeError:
    log.exception("no")
warnings.warn("https://me:hunter2hunter@host")
"""
    out, _ = launched(tmp_path, code.replace("TOKEN", TOKEN), DB_PASSWORD="correct horse/1")
    text = (tmp_path / "rank00000.jsonl").read_text() + out
    assert text.count("[secret]") >= 10
    for secret in ("correct horse", TOKEN, "hunter2hunter"):
        assert secret not in text
    assert "print [secret] and more\nbegun [secret] ended\n" in out


def test_a_terminal_keeps_its_stdout(tmp_path):
    """Rank 0 of the local launcher in a terminal: a progress bar must be able to draw there."""
    main, terminal = os.openpty()
    code = HEAD.format(folder=str(tmp_path), rank=0)
    code += "print('shown', sys.stdout.isatty())\nlog.info('said')\n"
    assert log_lines.launched(tmp_path, code, stdout=terminal).returncode == 0
    shown = os.read(main, 4096).decode()
    assert "shown True" in shown
    assert "said" in shown
    assert [line["message"] for line in read(tmp_path)] == ["said"]
