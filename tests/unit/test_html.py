"""The page about a run: what must be in it is read back out of it by an HTML parser and a JSON parser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from strop.errors import UserError
from strop.obs import curves, html, run_files, timeline
from tests.unit.rank_files import PHASES, TRACE, Made, T
from tests.unit.test_why import DUMP, INDEX, OTHER_TRACE

EVIL = "</script><script>alert(1)</script><!-- & \"quotes\" 'too' \u2028"
VOID = {"meta", "br", "hr", "img", "input", "link", "circle", "line", "polyline"}


class Page(HTMLParser):
    """Text by the innermost element's tag, all attributes, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        while self.open and self.open[-1] != tag and self.open[-1] in ("th", "tr"):  # may be left open
            self.open.pop()
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def data(self):
        return json.loads(next(text for tag, text in self.texts if tag == "script"))


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    monkeypatch.setattr(run_files.shutil, "which", lambda name: None)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """The page of 512 ranks, three attempts: a rank raises, a node is lost, a rank crashes."""
    made = Made(tmp_path_factory.mktemp("big"))
    made.begin()
    made.live(125.0, list(range(1, 21)))
    made.metrics(list(range(1, 21)), 4.0)
    made.commit(15)
    made.verdict(137, 125.0, "exception", f"{INDEX} {EVIL}", "IndexError", OTHER_TRACE)
    made.follow([r for r in range(512) if r != 137], 125.05)
    made.srun("srun: error: gpu017: task 137: Exited with exit code 1")
    made.close(1, 130.0)
    made.begin(200.0)
    made.live(125.0, list(range(16, 36)), silent=dict.fromkeys(range(96, 104), 119.0))
    made.metrics(list(range(16, 36)), 4.0)
    made.follow([r for r in range(512) if not 96 <= r < 104], 125.0)
    made.close(1, 130.0)
    made.begin(20_000.0)
    made.live(125.0, list(range(16, 36)))
    made.stderr(300, DUMP.format(words="Segmentation fault"))
    made.follow([r for r in range(512) if r != 300], 125.0)
    made.close(139, 130.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_files.shutil, "which", lambda name: None)
        return html.report(made.dir)


def test_the_page_holds_the_run_and_nothing_from_elsewhere(big):
    text, page = big, Page(big)
    assert (page.open, page.wrong) == ([], [])
    words = " ".join(text for tag, text in page.texts if tag not in ("script", "style"))
    assert "crashed in native code" in words
    assert "rank 300 on gpu037" in words
    assert "Last failure: attempt 3 of 3" in words
    assert "requeued (failure 3 of 5 without a new checkpoint)" in words
    assert "s3cr3t-value" not in text
    assert "[secret]" in words
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not [a for a in page.attributes if a[1] in ("src", "href") or a[1].startswith("on")]
    assert (
        "meta",
        "content",
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    ) in (page.attributes)
    assert len(text) < 500_000


def test_what_a_rank_wrote_cannot_break_the_page(tmp_path):
    """The failing rank's message closes a script, and so does a value of the configuration."""
    small = Made(tmp_path, ranks=8, per_node=4)
    small.begin()
    small.live(125.0, list(range(1, 21)))
    small.verdict(5, 125.0, "exception", EVIL, "IndexError", OTHER_TRACE)
    small.close(1, 130.0)
    config = small.dir / "config.yaml"
    config.write_text(config.read_text() + f"run: {{name: {json.dumps(EVIL)}}}\n")
    text = html.report(small.dir)
    page = Page(text)
    assert (page.open, page.wrong) == ([], [])
    assert text.count("<script") == 2  # the data and ours
    assert sum("</script><script>alert(1)" in words for _, words in page.texts) >= 3  # as the reader sees it
    page.data()


def test_alike_ranks_are_one_band(big):
    bands = {band["ranks"]: band for band in Page(big).data()["timeline"]["bands"]}
    assert len(bands) < 10
    assert [ranks for ranks, band in bands.items() if band["culprit"]] == ["96", "137", "300"]
    assert sum(band["count"] for band in bands.values()) == 512
    assert bands["97-103"]["lives"][1]["end"] == "silent"
    [lives] = [band["lives"] for band in bands.values() if band["count"] > 400]
    assert [life["end"] for life in lives] == ["followed"] * 3


def test_phases_begin_when_they_were_logged(big):
    """By rank 0's clock, although the nodes' clocks are off by up to 3.1 s."""
    for band in Page(big).data()["timeline"]["bands"]:
        spans = band["lives"][0]["spans"]
        begins = {}
        for phase, begin, *_ in spans:
            begins.setdefault(phase, begin)
        for phase, begin_s in PHASES[1:]:
            assert begins[phase] == pytest.approx(T + begin_s, abs=0.03)
        assert all(a[2] == b[1] for a, b in zip(spans, spans[1:]))  # without a gap


def test_waiting_is_shortened_and_attempts_are_to_scale(big):
    pieces = Page(big).data()["timeline"]["pieces"]
    running = [(b - a, y - x) for a, b, x, y, waiting in pieces if not waiting]
    assert running == [(130.0, pytest.approx(130.0))] * 3
    [_, (long_s, width)] = [(b - a, y - x) for a, b, x, y, waiting in pieces if waiting]
    assert (long_s, width) == (19_670.0, pytest.approx(0.06 * 390))


def test_a_straggler_is_a_band_of_its_own(tmp_path):
    small = Made(tmp_path, ranks=8, per_node=4)
    small.begin()
    small.live(125.0, list(range(1, 21)))
    late = b"".join(
        small.log(6, begin_s + (30.0 if phase in ("resume", "train") else 0.0), phase, f"{phase} ...")
        for phase, begin_s in PHASES
    )
    (small.logs / "rank00006.jsonl").write_bytes(late)
    bands = Page(html.report(small.dir)).data()["timeline"]["bands"]
    assert "6" in [band["ranks"] for band in bands]


def test_one_attempt_of_several(tmp_path):
    """The page of attempt 1 holds its cause, its ranks' lives and its row, and nothing of attempt 2."""
    made = Made(tmp_path, ranks=8)
    for rank, began in ((3, 0.0), (6, 200.0)):
        made.begin(began)
        made.live(125.0, [1, 2, 3])
        made.verdict(rank, 125.0, "exception", f"by rank {rank}", "IndexError", TRACE)
        made.close(1, 130.0)
    text = html.report(made.dir, 1)
    one = Page(text).data()["timeline"]
    assert [a["attempt"] for a in one["attempts"]] == [1]
    assert {life["attempt"] for band in one["bands"] for life in band["lives"]} == {1}
    assert "Attempt 1 of 2" in text
    assert "by rank 3" in text
    assert "by rank 6" not in text
    assert "Last failure: attempt 2 of 2" in html.report(made.dir)
    with pytest.raises(UserError, match="--attempt 99"):
        html.report(made.dir, 99)


def test_a_page_of_a_run_without_anything(tmp_path):
    (tmp_path / "r/attempts").mkdir(parents=True)
    words = " ".join(text for _, text in Page(html.report(tmp_path / "r")).texts)
    for expected in ("nothing has been measured yet", "none has begun", "No attempt has failed"):
        assert expected in words
    with pytest.raises(UserError, match="not a run of strop"):
        html.report(tmp_path)


def test_many_different_ranks_stay_readable(tmp_path):
    """Ranks with nothing in common: at most 24 rows, the culprit's among them."""
    small = Made(tmp_path, ranks=64, per_node=4)
    small.begin()
    for rank in range(64):
        phases = [phase for i, (phase, _) in enumerate(PHASES) if rank >> i & 1]
        lines = [small.log(rank, 2.0 + i, phase, "x") for i, phase in enumerate(phases)]
        (small.logs / f"rank{rank:05d}.jsonl").write_bytes(b"".join(lines))
    small.verdict(63, 50.0, "exception", "x", "ValueError", TRACE.format(place="a", error="x"))
    small.close(1, 60.0)
    bands = Page(html.report(small.dir)).data()["timeline"]["bands"]
    assert len(bands) == timeline.MOST_BANDS
    assert sum(band["count"] for band in bands) == 64
    assert [band["ranks"] for band in bands if band["culprit"]] == ["63"]


def test_a_spike_survives_thinning():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    thin = curves.thin(points)
    assert len(thin) <= 2 * curves.COLUMNS
    assert (54_321.0, 99.0) in thin
    assert thin == sorted(thin)
    assert curves.thin(points[:7]) == points[:7]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 100, [0, 25, 50, 75, 100]),
        (3, 3, [3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert curves.ticks(low, high) == pytest.approx(expected)


def test_a_step_done_again_counts_once():
    """Steps 3 and 4 were lost and repeated: the curve has the later values, and a line at the restart."""
    metrics = [{"step": s, "loss": float(s)} for s in (1, 2, 3, 4)] + [{"step": 3, "loss": 9.0}]
    timing = [{"step": s, "step_s": 1.0, "attempt": a} for s, a in ((1, 1), (2, 1), (3, 1), (3, 2), (4, 2))]
    loss, step_s = curves.curves(metrics, timing)
    assert loss.train == [(1, 1), (2, 2), (3, 9), (4, 4)]
    assert loss.restarts == [2.5]
    assert [p[0] for p in step_s.train] == [1, 2, 3, 4]


def test_nothing_in_the_page_needs_the_network():
    here = Path(html.__file__).parent
    for name in ("report.css", "report.js"):
        text = (here / name).read_text()
        assert not re.search(r"url\(\s*['\"]?(?!#)|@import|fetch\(|XMLHttpRequest|import\(", text)


@pytest.mark.parametrize("num_lines", [0, 1, 3, 20_000])
def test_phases_of_a_file_as_a_json_parser_finds_them(tmp_path, num_lines):
    """20,000 lines are longer than what is read of a file: the middle is left out, and is all `train`."""
    made = Made(tmp_path, ranks=8, per_node=4)
    made.begin()
    phases = ["start", "train", *["train"] * 5, "save", "train"]
    lines = [
        made.log(
            3, i, phases[i] if i < len(phases) else "train", 'a "phase":"save", "x"', step=i, note="y" * 150
        )
        for i in range(num_lines)
    ]
    path = tmp_path / "rank00003.jsonl"
    path.write_bytes(
        b"not a line\n" + b"".join(lines) + b'{"time":"2026-11-18T11:06:40.000000Z","rank":3,"no'
    )
    rows = [json.loads(line) for line in lines]
    expected = [
        (r["phase"], r["step"]) for a, r in zip([None, *rows], rows) if not a or a["phase"] != r["phase"]
    ]
    if rows and expected[-1][1] != rows[-1]["step"]:
        expected.append((rows[-1]["phase"], rows[-1]["step"]))
    assert [(phase, step) for _, phase, step in timeline.phase_marks(path)] == expected
