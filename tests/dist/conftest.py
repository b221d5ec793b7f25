"""One process with torch loaded, from which all tests of this folder fork their ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    server = Ranks(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def untied(toy, tmp_path_factory):
    """The toy with a head of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests import toy as t

    directory = tmp_path_factory.mktemp("untied")
    t.make(directory)
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    model.config.tie_word_embeddings = False
    torch.manual_seed(5)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    model.save_pretrained(directory / "model")
    return directory
