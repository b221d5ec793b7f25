"""The requeue decision against slurm.md's table, row by row, and its budgets against hand-written histories.

Then everything at once: every combination of facts gives a decision that keeps the few rules which hold
always (a cancelled job is never requeued, exit code 0 only for a finished run, ...).
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from strop.slurm import decide
from strop.slurm.decide import Crash, Facts, JobState, Past, Verdict


def said(kind: str, **fields) -> Verdict:
    return Verdict(**{"rank": 3, "node": "n2", "kind": kind, "exit_code": 1, "message": "m", "step": 7,
                      "phase": "TRAIN", "fingerprint": "f", **fields})  # fmt: skip


SCANCEL = JobState(ended=True)
GRACE = JobState(preempted=True)
BY_HAND = JobState(requeued=True, ended=True)
LIMIT = JobState(ended=True, time_limit=True)
CANCELS = JobState(ended=True, preempted=True)
FIXED = JobState(can_requeue=False)
CRASH = Crash(1, "Segmentation fault", "s")

TABLE = [
    # what happened -> action, exit code, cause
    ("done", Facts("DONE", 0), "finished", 0, "done"),
    ("done although a signal came last", Facts("DONE", 0, signals=("USR1",)), "finished", 0, "done"),
    ("done and cancelled at once", Facts("DONE", 0, signals=("TERM",), job=SCANCEL), "finished", 0, "done"),
    ("preempted with grace", Facts("YIELD", 0, job=GRACE), "requeue", 75, "preempted"),
    ("time limit near", Facts("YIELD", 0, signals=("USR1",)), "requeue", 75, "time_limit"),
    ("a stop file by hand", Facts("YIELD", 0, stop_requested=True), "requeue", 75, "stopped"),
    ("--no-requeue", Facts("YIELD", 0, signals=("USR1",), job=FIXED), "stop", 75, "time_limit"),
    ("PreemptMode=CANCEL", Facts("YIELD", 0, job=JobState(preempted=True, can_requeue=False)), "stop", 75,
     "preempted"),
    ("scancel, committed", Facts("YIELD", 143, signals=("TERM",), job=SCANCEL), "stop", 75, "cancelled"),
    ("scancel, no time", Facts("X", 143, signals=("TERM",), job=SCANCEL), "stop", 1, "cancelled"),
    ("scancel during a crash", Facts("X", 139, crash=CRASH, job=SCANCEL), "stop", 1, "cancelled"),
    ("scontrol requeue by hand", Facts("YIELD", 0, signals=("TERM",), job=BY_HAND), "requeue", 75,
     "requeued"),
    ("the same, killed before the commit", Facts("X", 137, signals=("TERM",), job=BY_HAND), "requeue", 1,
     "requeued"),
    ("too late before the limit", Facts("X", 137, signals=("USR1",)), "requeue", 1, "late"),
    ("at the limit itself", Facts("X", 143, signals=("TERM",), job=LIMIT), "requeue", 1, "late"),
    ("grace too short", Facts("X", 137, job=GRACE), "requeue", 1, "late"),
    ("stopped before there was anything", Facts("X", 0, signals=("USR1",)), "requeue", 1, "time_limit"),
    ("rank killed", Facts("X", 137), "requeue", 1, "killed"),
    ("rank killed, and rank 0 yielded to srun's TERM", Facts("YIELD", 137), "requeue", 1, "killed"),
    ("rank killed, the others saw it", Facts("X", 137, verdicts=(said("peer"),)), "requeue", 1, "killed"),
    ("out of memory", Facts("X", 1, verdicts=(said("oom"),)), "requeue", 1, "oom"),
    ("native crash", Facts("X", 139, crash=CRASH), "requeue", 1, "segfault"),
    ("native crash, the others saw it", Facts("X", 139, crash=CRASH, verdicts=(said("peer"),)), "requeue", 1,
     "segfault"),
    ("hang", Facts("X", 1, verdicts=(said("hang"),)), "requeue", 70, "hang"),
    ("exception in training", Facts("X", 1, verdicts=(said("exception"),)), "requeue", 1, "exception"),
    ("exception at start-up", Facts("X", 1, verdicts=(said("exception", step=0),)), "requeue", 1, "startup"),
    ("the same after a resume", Facts("X", 1, verdicts=(said("exception", phase="RESUME"),)), "requeue", 1,
     "startup"),
    ("user's error", Facts("FAIL", 78, verdicts=(said("user"),)), "stop", 78, "user"),
    ("user's error at start-up", Facts("X", 78, verdicts=(said("user", step=None),)), "stop", 78, "user"),
    ("NaN", Facts("X", 79, verdicts=(said("diverged"),)), "stop", 79, "diverged"),
    ("disk full", Facts("X", 74, verdicts=(said("storage"),)), "hold", 74, "storage"),
    ("no outcome, exit code 0", Facts("X", 0), "requeue", 1, "exception"),
    ("--no-requeue, with a successor", Facts("YIELD", 0, signals=("USR1",), job=FIXED, successor="9"),
     "successor", 75, "time_limit"),
    ("preemption that cancels", Facts("YIELD", 0, signals=("TERM",), job=CANCELS, successor="9"),
     "successor", 75, "preempted"),
    ("the same, too late", Facts("X", 137, signals=("TERM",), job=CANCELS, successor="9"), "successor", 1,
     "late"),
    ("scancel in the grace time", Facts("YIELD", 0, signals=("TERM",), job=CANCELS), "stop", 75, "cancelled"),
    ("scancel, with a successor", Facts("YIELD", 0, signals=("TERM",), job=SCANCEL, successor="9"), "stop",
     75, "cancelled"),
    ("requeued, with a successor", Facts("YIELD", 0, job=BY_HAND, successor="9"), "requeue", 75, "requeued"),
    ("rank killed, cannot be requeued", Facts("X", 137, job=FIXED, successor="9"), "successor", 1, "killed"),
    ("disk full, with a successor", Facts("X", 74, verdicts=(said("storage"),), job=FIXED, successor="9"),
     "hold", 74, "storage"),
    ("the controller does not answer", Facts("YIELD", 0, signals=("USR1",), job=JobState(known=False)),
     "requeue", 75, "time_limit"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "action", "code", "cause"), [t[1:] for t in TABLE], ids=[t[0] for t in TABLE]
)
def test_table(facts, action, code, cause):
    decision = decide.decide(facts)
    assert (decision.action, decision.exit_code, decision.cause) == (action, code, cause)


def failing(cause: str, before: list[Past]) -> decide.Decision:
    """This attempt fails by `cause` (fingerprint f, step 7) after those before it."""
    facts = {
        "killed": Facts("X", 137),
        "segfault": Facts("X", 139, crash=Crash(1, "m", "f")),
        "yield": Facts("YIELD", 0, signals=("USR1",)),
    }.get(cause, Facts("X", 1, verdicts=(said(cause),)))
    return decide.decide(dataclasses.replace(facts, history=tuple(before)))


def past(cause: str, number: int, fingerprint="f", step=7) -> list[Past]:
    return [Past(cause, fingerprint, step)] * number


@pytest.mark.parametrize(
    ("cause", "before", "action", "code"),
    [
        # infrastructure: the fifth ends it, whatever the kinds
        ("killed", past("killed", 3), "requeue", 1),
        ("killed", past("killed", 4), "stop", 1),
        ("killed", past("startup", 2) + past("hang", 2, "other"), "stop", 1),
        ("killed", past("killed", 3) + past("preempted", 9), "requeue", 1),  # yields cost nothing
        # the same fingerprint: the third
        ("exception", past("exception", 1), "requeue", 1),
        ("exception", past("exception", 2), "stop", 1),
        ("exception", past("exception", 2, "other"), "requeue", 1),
        ("hang", past("hang", 2), "stop", 70),
        # a native crash at the same place: the second
        ("segfault", past("segfault", 1), "stop", 1),
        ("segfault", past("segfault", 1, "other"), "requeue", 1),
        # out of memory: the second at the same step is the user's
        ("oom", past("oom", 1), "stop", 78),
        ("oom", past("oom", 1, step=3), "requeue", 1),
        # yields that commit nothing new: the tenth
        ("yield", past("time_limit", 8), "requeue", 75),
        ("yield", past("preempted", 4) + past("lost", 5), "stop", 75),
    ],
)
def test_budgets(cause, before, action, code):
    decision = failing(cause, before)
    assert (decision.action, decision.exit_code) == (action, code)


def record(cause, committed, action="requeue"):
    return {"cause": cause, "committed_step": committed, "action": action, "fingerprint": None, "step": None}


@pytest.mark.parametrize(
    ("records", "now", "causes"),
    [
        ([], None, []),
        ([record("killed", None)], None, ["killed"]),
        ([record("killed", None), record("hang", None)], None, ["killed", "hang"]),
        # the first committed step 10 before it died: only what came since that commit counts, itself included
        ([record("killed", None), record("hang", 10)], 10, ["killed", "hang"]),
        ([record("oom", None), record("killed", None), record("hang", 10)], 10, ["killed", "hang"]),
        ([record("killed", None), record("hang", 10)], 20, ["hang"]),
        # a quarantined checkpoint is no progress, nor is reaching the same step again
        ([record("killed", 10), record("hang", 20), record("killed", 10)], 20, ["killed", "hang", "killed"]),
        # left-over X: no cause was written
        ([{"committed_step": None}, record("hang", None)], None, ["lost", "hang"]),
        # somebody looked into it and started it again
        ([record("killed", None, "stop"), record("hang", None)], None, ["hang"]),
    ],
)
def test_history_since_progress(records, now, causes):
    assert [p.cause for p in decide.since_progress(records, now)] == causes


def test_the_cause_among_its_consequences():
    verdicts = [
        said("peer", rank=0, time=1.0),
        said("exception", rank=1, time=3.0, message="connection reset"),
        said("exception", rank=2, time=2.0, message="bad index"),
        said("hang", rank=4, time=9.0),
    ]
    assert decide.first_failure(verdicts).message == "bad index"
    assert decide.first_failure([*verdicts, said("oom", time=8.0)]).kind == "oom"
    assert decide.first_failure([*verdicts, said("user", time=9.0)]).kind == "user"
    assert decide.first_failure(verdicts[:1]) is None


def test_whom_srun_names_first_ended_first():
    """Of two exceptions, and between an exception and a rank that crashed without a word: clocks may differ,
    and an error that nobody knows as a follower's may be one."""
    early, late = said("exception", rank=1, time=1.0), said("exception", rank=2, time=9.0)
    assert decide.first_failure([early, late], (2, 3)) == late
    assert decide.first_failure([early, late], (7,)) == early
    crash = decide.Crash(5, "Segmentation fault", "f")
    for ended_first, cause in [((5,), "segfault"), ((1,), "exception"), ((), "exception")]:
        facts = Facts("X", 139, verdicts=(early,), crash=crash, ended_first=ended_first)
        assert decide.classify(facts).name == cause
    spoken = said("exception", rank=5)
    facts = Facts("X", 139, verdicts=(early, spoken), crash=crash, ended_first=(5,))
    assert (decide.classify(facts).name, decide.classify(facts).rank) == ("exception", 5)


def test_the_users_message_comes_first():
    verdict = said("user", message="optim.lrr: unknown key; did you mean optim.lr?", step=None)
    summary = decide.decide(Facts("X", 78, verdicts=(verdict,))).summary
    assert summary.splitlines()[0] == "optim.lrr: unknown key; did you mean optim.lr?"
    assert "rank 3, n2" in summary


def test_too_late_says_what_to_raise():
    assert "--signal" in decide.decide(Facts("X", 137, signals=("USR1",))).summary


def test_a_node_that_fails_the_preflight_check_is_excluded():
    decision = decide.decide(Facts("X", 1, verdicts=(said("exception", phase="PREFLIGHT", step=None),)))
    assert (decision.action, decision.exclude) == ("requeue", ("n2",))


def all_facts():
    verdicts = [
        (),
        *((said(kind),) for kind in ("user", "diverged", "storage", "oom", "hang", "exception", "peer")),
    ]
    jobs = [JobState(c, r, q, e, t, p) for c, r, q, e, t, p in itertools.product([True, False], repeat=6)]
    signals = [(), ("USR1",), ("TERM",), ("USR1", "TERM")]
    for state, code, v, crash, signal, job in itertools.product(
        ["X", "DONE", "YIELD", "FAIL"], [0, 1, 137], verdicts, [None, CRASH], signals, jobs
    ):
        yield Facts(state, code, verdicts=v, crash=crash, signals=signal, job=job)


def test_rules_that_always_hold():
    """49,152 combinations; the rules are independent of how `classify` orders its witnesses."""
    for facts in all_facts():
        decision = decide.decide(facts)
        kinds = {v.kind for v in facts.verdicts}
        assert decision.action in ("requeue", "stop", "hold", "finished")
        assert decision.summary
        assert (decision.exit_code == 0) == (facts.state == "DONE") == (decision.action == "finished")
        if facts.state == "DONE":
            continue
        if kinds & {"user", "diverged"}:
            assert (decision.action, decision.exit_code) == ("stop", 78 if "user" in kinds else 79)
        elif facts.job.ended and not facts.job.requeued and not facts.job.time_limit:
            assert decision.action == "stop"  # scancel
        if not facts.job.can_requeue:
            assert decision.action != "requeue"
        if decision.exit_code == 75:
            assert facts.state == "YIELD"
