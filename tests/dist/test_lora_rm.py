"""A reward model by adapters: its new head is trained whole beside them and goes with them."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from strop.data import plan
from strop.models.export import export_checkpoint, find_checkpoint
from tests import toy as t
from tests.dist.lora_helpers import LAYERS, LORA, OPTIM, Truth, weights_of
from tools.convert_dcp_to_hf import read_config


@pytest.fixture(scope="module")
def trained(ranks, toy, tmp_path_factory):
    work = tmp_path_factory.mktemp("lora-rm")
    config = t.config(toy, "rm", work / "c.yaml", lora=LORA, optim=OPTIM, checkpoint={"every": 1},
                      train={"max_steps": 2, "max_grad_norm": None})  # fmt: skip
    return ranks.run("rm", config, f"{work.name}-run", world_size=2).run_dir


def scores(model, head, tokens):
    """fp64 score of one sequence by its last hidden state."""
    hidden = model.model(input_ids=torch.tensor(tokens, dtype=torch.int64)[None]).last_hidden_state
    return (hidden[0, -1] * head).sum()


def test_second_step_equals_fp64(toy, trained):
    before, after = t.checkpoint(trained, 1), t.checkpoint(trained, 2)
    names = [f"{layer}.lora_{x}.weight" for layer in LAYERS for x in "AB"] + ["score.weight"]
    assert sorted(n for n in before if n.startswith("model.")) == sorted(f"model.{n}" for n in names)
    truth = Truth(toy / "model", weights_of(before))
    head = before["model.score.weight"][0].double().requires_grad_()
    store = t.stores(trained)["train"]
    losses = []
    for row in plan.step_rows(store.num_rows, 6, 42, 1):
        chosen, rejected = (scores(truth.model, head, tokens) for tokens, _ in store.sequences(row))
        losses.append(-torch.nn.functional.logsigmoid(chosen - rejected))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert t.metrics(trained)[1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, grad in [("score.weight", head.grad[None])] + [(n, w.grad) for n, w in truth.weights.items()]:
        key = f"optim.{name}.exp_avg"
        ours = (after[key].double() - 0.9 * before[key].double()) / 0.1
        assert torch.allclose(ours, grad, rtol=1e-3, atol=2e-5 * float(grad.abs().max())), name


def test_export_as_a_classifier(toy, trained, tmp_path):
    config, step = read_config(trained / "config.yaml"), find_checkpoint(trained, "latest")
    export_checkpoint(step, config.model, tmp_path / "adapter", lora=config.lora, adapter=True)
    export_checkpoint(step, config.model, tmp_path / "merged", lora=config.lora, dtype="fp32")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["task_type"], saved["modules_to_save"]) == ("SEQ_CLS", ["score"])
    ids = torch.tensor([[5, 9, 120, 33, 7, 300, 2, 18]])
    weights = weights_of(t.checkpoint(trained, 2))
    with torch.no_grad():
        expected = float(
            scores(Truth(toy / "model", weights).model, weights["score.weight"][0].double(), ids[0])
        )
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert float(merged(ids).logits) == pytest.approx(expected, abs=1e-5)
        base = AutoModelForSequenceClassification.from_pretrained(
            toy / "model", num_labels=1, dtype=torch.float32
        )
        base.config.pad_token_id = AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token_id
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert float(loaded(ids).logits) == pytest.approx(expected, abs=1e-5)
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in file
