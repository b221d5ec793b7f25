"""Rows to look at, a look at them, and what it tells."""

from __future__ import annotations

from strop.config import Config, DataConfig, TrainConfig, ValidationConfig
from strop.data import looking
from tests.unit.data_helpers import tiny_tokenizer, write_jsonl


def turn(role, content):
    return {"role": role, "content": content}


def dialogue(question, answer):
    return {"messages": [turn("user", question), turn("assistant", answer)]}


def pair(question, chosen, rejected):
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


GOOD = [dialogue(f"What is {i}?", f"It is {i}, as you see.") for i in range(6)]


def look(directory, kind, rows, tokenizer=None, train=None, watch=None, algo="sft", **keys):
    """Look at {train: rows, validation: rows} -> (report, config). keys: of data."""
    for name, own in rows.items():
        write_jsonl(directory / f"{name}.jsonl", own)
    paths = {name: str(directory / f"{name}.jsonl") for name in rows}
    config = Config(
        algo=algo,
        data=DataConfig(**paths, **keys),
        train=train or TrainConfig(),
        validation=ValidationConfig(watch=watch or {}),
    )
    tokenizer = tokenizer or tiny_tokenizer()
    report = looking.look(config, kind, tokenizer, directory / "cache", 1, lambda what, done, total: None)
    return report, config


def told(report, name):
    """{name of a concern: how many rows} of a set."""
    return {concern.name: concern.count for concern in report.concerns[name]}
