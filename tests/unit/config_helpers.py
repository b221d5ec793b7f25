"""A configuration of a few lines, loaded."""

import pytest

from strop.config import load
from strop.errors import UserError

MINIMAL = "model:\n  path: m\ndata:\n  train: d.jsonl\n"


def loaded(file, *words, text=MINIMAL, algo="dpo"):
    file.write_text(text)
    return load(algo, file, words)


def message(file, *words, text=MINIMAL, algo="dpo"):
    with pytest.raises(UserError) as e:
        loaded(file, *words, text=text, algo=algo)
    return str(e.value)
