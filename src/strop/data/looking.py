"""All that tools.look_at_data knows of a run's data: sets prepared as the trainer prepares them, then read.

A row that would stop training must not stop the one who looks for such rows. So a set that the policies of
the configuration refuse is prepared anew with lenient ones, and the refusal becomes a concern.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strop.config import Config
from strop.data import concerns, inspect, prepare, samples, sets
from strop.data.concerns import Concern
from strop.data.inspect import Look, Steps
from strop.data.ledger import Ledger
from strop.data.render import Rendered
from strop.data.samples import Sample
from strop.data.sets import Maker
from strop.data.tokenise import tokenizer_digest
from strop.errors import UserError

Progress = Callable[[str, int, int], None]
"""(what, done, in all or 0)."""
GENERAL = "all"
"""Concerns that are of no single set."""


@dataclass
class Report:
    looks: dict[str, Look]
    """By set; the training set first."""
    steps: Steps
    concerns: dict[str, list[Concern]]
    """By set, and GENERAL."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def warnings(self) -> list[Concern]:
        return [c for own in self.concerns.values() for c in own if c.level == "warn"]


def look(
    config: Config, kind: str, tokenizer: Any, cache_dir: Path, workers: int, progress: Progress
) -> Report:
    """Prepare and read all sets of a configuration. kind: text, preference, sft. UserError, StorageError."""
    looks: dict[str, Look] = {}
    problems = []
    for name, rows, ledger, refused in _prepared(config, kind, tokenizer, cache_dir, workers, progress):
        looks[name] = inspect.inspect(
            name, rows, ledger, tokenizer, lambda done, total: progress("looking at", done, total)
        )
        if refused is not None:
            problems.append((name, str(refused)))
    templated = kind != "text" and _is_templated(config, kind, tokenizer)
    found = {GENERAL: concerns.of_policies(problems)}
    if templated:
        found[GENERAL] += concerns.of_template(config, tokenizer)
    for name, own in looks.items():
        found[name] = concerns.of_set(own, config, tokenizer, templated)
        if name != "train":
            found[name] += concerns.leaks(looks["train"], own)
    world_size = (config.cluster.nodes or 1) * (config.cluster.gpus_per_node or 1)
    return Report(looks, inspect.steps(looks["train"], config, world_size), found)


def _prepared(
    config: Config, kind: str, tokenizer: Any, cache_dir: Path, workers: int, progress: Progress
) -> Iterator[tuple[str, sets.RowSet, Ledger, UserError | None]]:
    """(set, its rows, its ledger, the error that training would end with)."""
    digest = tokenizer_digest(tokenizer)
    keep = "drop" if config.data.over_length == "error" else config.data.over_length
    data = dataclasses.replace(config.data, on_bad_row="skip", over_length=keep, max_dropped_fraction=1.0)
    lenient = dataclasses.replace(config, data=data)
    makers = [
        Maker(c, kind, tokenizer, digest, cache_dir, workers, lambda a, b: progress("preparing", a, b))
        for c in (config, lenient)
    ]
    for name in makers[0].names():
        refused = None
        try:
            place, ledger = makers[0].prepare(name)
        except UserError as error:
            refused = error
            place, ledger = makers[1].prepare(name)
        yield name, sets.open_set(place, config, name), ledger, refused


def _is_templated(config: Config, kind: str, tokenizer: Any) -> bool:
    """Whether the first usable row of the training set goes through the chat template."""
    rows = prepare.rendered(config, tokenizer, kind, "train", Ledger("train"))
    return next((row.templated for row in rows if isinstance(row, Rendered)), False)


def pick(
    report: Report,
    config: Config,
    kind: str,
    tokenizer: Any,
    name: str,
    *,
    n: int,
    rows: Sequence[str] = (),
    longest: bool = False,
    seed: int | None = None,
) -> list[Sample]:
    """Rows of a set to show. UserError for a set or a row that there is not, saying what became of it."""
    if name not in report.looks:
        raise UserError(f"--set {name}: the sets of this run are {', '.join(report.looks)}")
    own = report.looks[name].rows
    chosen = samples.longest(own, n) if longest else samples.spread(own.num_rows, n, seed)
    if rows:
        chosen = []
        for row in rows:
            found = samples.by_name(own, row, name)
            if not found:
                why = f"the {name} set has no {row}"
                if kind != "text" and name not in config.validation.watch:
                    why = samples.why_not(config, kind, tokenizer, name, row)
                raise UserError(f"--row {row}: {why}")
            chosen += found
    return [samples.sample(own, row, tokenizer) for row in chosen]


def as_json(report: Report) -> dict[str, Any]:
    """For programs: see the help of tools.look_at_data."""
    return {
        "sets": {name: _set_as_json(own) for name, own in report.looks.items()},
        "steps": dataclasses.asdict(report.steps),
        "concerns": {
            name: [dataclasses.asdict(concern) for concern in own] for name, own in report.concerns.items()
        },
        "samples": [dataclasses.asdict(sample) for sample in report.samples],
    }


def _set_as_json(own: Look) -> dict[str, Any]:
    return {
        "ledger": own.ledger.as_json(),
        "rows": own.rows.num_rows,
        concerns.unit(own): own.num_rows,
        "sequences": len(own.lengths_S),
        "tokens": int(own.lengths_S.sum()),
        "trained_tokens": int(own.trained_S.sum()),
        "lengths": inspect.summary(own.lengths_S),
        "prompts": inspect.summary(own.prompts_S),
        "trained": inspect.summary(own.trained_S),
        "histogram": inspect.bins(own.lengths_S),
    }
