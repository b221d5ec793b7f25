"""Progress lines and their estimate of the time left; logging of a rank."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from strop.obs.progress import Progress, phase, seconds, summary

ROOT = str(Path(__file__).resolve().parents[2])
SRC = f"{ROOT}/src"


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="strop.progress")
    return caplog


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("s", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1m00s"),
        (192, "3m12s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (90061, "25h01m"),
    ],
)
def test_seconds(s, text):
    assert seconds(s) == text


def test_a_line_for_each_step(lines):
    clock = Clock()
    progress = Progress(100, done_steps=3, terminal=False, clock=clock)
    clock.now += 2.0
    record = {
        "loss": 0.693147,
        "rewards/accuracies": 0.53125,
        "learning_rate": 1e-6,
        "grad_norm": 1.2345,
        "step": 4,
    }
    progress.step(4, record, tokens_per_s=4124.4)
    progress.step(5, {})
    progress.evaluation(
        5, {"step": 5, "eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.1}
    )
    progress.evaluation(6, {"step": 6, "eval_loss": 0.4, "eval_accuracy": 0.8, "eval_margin": 1.25})  # rm
    assert lines.messages == [
        "step 4/100  loss 0.6931  acc 0.53  lr 1.0e-06  grad 1.23  4,124 tok/s  eta 3m12s",
        "step 5/100  eta 1m35s",
        "validation at step 5  loss 0.5000  acc 0.75  margin 0.100",
        "validation at step 6  loss 0.4000  acc 0.80  margin 1.250",
    ]


def test_the_estimate_counts_steps_that_were_not_shown():
    clock = Clock()
    progress = Progress(100, done_steps=10, terminal=False, clock=clock)
    clock.now += 20  # log.every=10, 2 s a step
    progress.step(20, {})
    assert progress.eta_s(20) == 160


def test_what_a_record_lacks_or_could_not_say_is_left_out():
    assert summary({"loss": None, "mean_token_accuracy": 0.5}) == ["acc 0.50"]


def test_the_estimate_is_not_shaken_by_slow_steps():
    """99 steps of 1 s, a first one of 60 s and a validation of 300 s every ten steps."""
    clock = Clock()
    progress = Progress(200, terminal=False, clock=clock)
    for step in range(1, 101):
        clock.now += 60 if step == 1 else 301 if step % 10 == 0 else 1
        progress.step(step, {})
        if step > 2:
            assert progress.eta_s(step) == pytest.approx(200 - step)


def test_phases_are_announced_and_timed(lines):
    with phase("tokenising"):
        assert lines.messages == ["tokenising ..."]
    assert lines.messages[1].startswith("tokenising: 0.")
    with pytest.raises(KeyError), phase("saving"):
        raise KeyError
    assert lines.messages[2:] == ["saving ..."]


def child(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": SRC}, check=True
    )


def test_a_bar_on_a_terminal_shows_the_numbers(tmp_path):
    """A pseudo-terminal made by the standard library; log lines appear beside the bar."""
    code = (
        "import pty, sys\n"
        "program = '''\n"
        "import logging\n"
        f"import sys; sys.path.insert(0, {ROOT!r})\n"
        "from strop.obs import progress\n"
        "from tests.log_lines import setup\n"
        f"setup({str(tmp_path)!r}, level='info')\n"
        "p = progress.Progress(4)\n"
        "p.step(1, {'loss': 0.5}, 99)\n"
        "logging.getLogger('x').info('hello')\n"
        "p.step(4, {'loss': 0.25}, 99)\n"
        "p.close()\n"
        "'''\n"
        "sys.exit(pty.spawn([sys.executable, '-c', program]))\n"
    )
    out = child(code).stdout
    assert "loss 0.2500  99 tok/s  eta 0.0 s" in out
    assert "4/4" in out
    assert "hello" in out


LOGGING = """
import logging, warnings, sys
sys.path.insert(0, {root!r})
from tests.log_lines import setup
setup({logs!r}, level='warning', rank={rank})
setup({logs!r}, level='info', rank={rank})
logging.getLogger('strop.x').info('one %d', 1)
logging.getLogger('strop.x').debug('never')
logging.getLogger('strop.x').warning('two')
logging.getLogger('datasets.builder').info('chatter')
warnings.warn('three')
assert not any(name.split('.')[0] in ('torch', 'transformers', 'datasets') for name in sys.modules)
"""


@pytest.mark.parametrize(("rank", "prefix"), [(0, ""), (3, "rank 3 ")])
def test_logging_of_a_rank_whose_stderr_nobody_captures(tmp_path, rank, prefix):
    done = child(LOGGING.format(rank=rank, root=ROOT, logs=str(tmp_path)))
    mine, other = (done.stdout, done.stderr) if rank == 0 else (done.stderr, done.stdout)
    assert other == ""
    got = mine.splitlines()
    assert [line[8:] for line in got[:2]] == [f" {prefix}one 1", f" {prefix}WARNING: two"]
    assert got[2][8:].startswith(f" {prefix}WARNING: <string>:")
    assert "UserWarning: three" in got[2]
    assert len([line for line in got if line[2:3] == ":"]) == 3


def test_obs_does_not_import_torch():
    modules = ", ".join(f"strop.obs.{m}" for m in ("sinks", "progress", "device", "metrics", "logs"))
    code = f"import sys, {modules}\n"
    child(code + "assert 'torch' not in sys.modules and 'tensorflow' not in sys.modules")
