"""tools.eval_rm: numbers worked by hand, scores against each sequence alone, rows, mistakes."""

from __future__ import annotations

import json
import math
import tracemalloc

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from strop.errors import UserError
from strop.eval import agreement, rewards, text
from strop.models import reward
from tests.unit.data_helpers import tiny_tokenizer, write_jsonl
from tests.unit.test_policy import SIZES
from tools import eval_rm

CPU = torch.device("cpu")
NAN = math.nan

# ------------------------------------------------------------------------------------- numbers by hand

MARGINS = np.array([2.0, -1.0, 0.0, 0.5, 3.0])


def test_accuracy_margins_and_ties():
    found = agreement.of_margins(MARGINS)
    assert (found["pairs"], found["accuracy"], found["ties"]) == (5, 0.6, 1)
    assert found["margin"] == {"mean": pytest.approx(0.9), "median": 0.5}
    assert found["accuracy_95"] == pytest.approx([0.230724, 0.882379], abs=1e-6)


@pytest.mark.parametrize(
    ("successes", "num", "low", "high"),
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (5, 10, 0.236593, 0.763407), (1, 1, 0.206549, 1.0),
     (81, 263, 0.255289, 0.366210)],
)  # fmt: skip
def test_wilson_against_published_values(successes, num, low, high):
    """The last one is of Newcombe (1998), table I: 0.2553 to 0.3662."""
    assert agreement.wilson(successes, num) == pytest.approx((low, high), abs=1e-6)


def test_calibration_by_hand():
    """Each pair of MARGINS has a bin of its own; confidences σ(2), σ(1), 1/2, σ(0.5), σ(3)."""
    found = agreement.calibration(MARGINS)
    assert [(b["from"], b["to"], b["pairs"], b["right"]) for b in found["bins"]] == [
        (0.5, 0.55, 1, 0.5), (0.6, 0.65, 1, 1.0), (0.7, 0.75, 1, 0.0), (0.85, 0.9, 1, 1.0),
        (0.95, 1.0, 1, 1.0),
    ]  # fmt: skip
    assert [b["confidence"] for b in found["bins"]] == pytest.approx(
        [0.5, 0.622459, 0.731059, 0.880797, 0.952574], abs=1e-6
    )
    gaps = [0.0, 1 - 0.622459, 0.731059, 1 - 0.880797, 1 - 0.952574]
    assert found["error"] == pytest.approx(sum(gaps) / 5, abs=1e-6)


def test_calibration_of_a_bin_with_several_pairs_and_of_huge_margins():
    """Three of four right at a confidence of σ(1); a margin of ±1000 is sure, and half of those are wrong."""
    found = agreement.calibration(np.array([1.0, 1.0, 1.0, -1.0]))
    assert [(b["pairs"], b["right"]) for b in found["bins"]] == [(4, 0.75)]
    assert found["error"] == pytest.approx(0.75 - 0.731059, abs=1e-6)
    assert agreement.calibration(np.array([1000.0, -1000.0]))["error"] == pytest.approx(0.5)


def test_ranks_and_correlations_by_hand():
    """Ranks of 1, 2, 2, 3 are 1, 2.5, 2.5, 4: with 1 to 4 that is 4.5 / sqrt(4.5 * 5)."""
    assert agreement.ranks(np.array([3.0, 1.0, 2.0, 2.0])).tolist() == [4.0, 1.0, 2.5, 2.5]
    found = agreement.correlations(
        np.array([1.0, 2.0, 9.0, 2.0, 3.0]), np.array([10.0, 20.0, NAN, 30.0, 80.0])
    )
    assert found["number"] == 4
    assert found["spearman"] == pytest.approx(4.5 / math.sqrt(22.5))
    # deviations -1, 0, 0, 1 and -25, -15, -5, 45
    assert found["pearson"] == pytest.approx(70 / math.sqrt(2 * (625 + 225 + 25 + 2025)))
    assert agreement.correlations(np.array([1.0]), np.array([NAN])) is None
    assert agreement.correlations(np.array([1.0, 2.0]), np.array([5.0, 5.0]))["pearson"] is None


# -------------------------------------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A reward model as the export writes one: a pad token that no sequence ends with."""
    folder = tmp_path_factory.mktemp("rm") / "m"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = reward.scoring_config(AutoConfig.for_model("llama", **SIZES | {"vocab_size": 448}), "x")
    reward.set_pad_token(config, tokenizer)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ROWS = [
    {"prompt": "How many?", "chosen": " 84 apples", "rejected": " twelve", "category": "maths", "margin": 2},
    {
        "prompt": "Who sells?",
        "chosen": " She",
        "rejected": " the lazy dog sells",
        "category": "chat",
        "margin": 1,
    },
    {"prompt": "What?", "chosen": " Sea shells.", "rejected": " A fox.", "category": "chat"},
    {"prompt": "And?", "chosen": " 7 trees", "rejected": " Straße", "margin": 0.5},
]


def read(rows, path, tokenizer=None, **settings):
    file = str(write_jsonl(path / "rows.jsonl", rows))
    settings = {"max_length": 128, "by": None, "template": None} | settings
    return rewards.read_pairs([file], tokenizer or tiny_tokenizer(), **settings)


def alone(model, pairs):
    """fp32 scores [P, 2] of each sequence by itself."""
    with torch.no_grad():
        scores = [
            float(model(torch.from_numpy(ids).long()[None]).logits[0, 0])
            for p in pairs
            for ids in p.sequences
        ]
    return np.array(scores).reshape(-1, 2)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_scores_of_any_batches_are_those_of_each_sequence_alone(model_dir, tmp_path, batch_tokens):
    model = rewards.load_model(str(model_dir), torch.float32, CPU)
    pairs, _, _ = read(ROWS, tmp_path)
    told = []
    scores = rewards.score_pairs(model, pairs, batch_tokens, lambda done, total: told.append((done, total)))
    assert scores == pytest.approx(alone(model, pairs), abs=1e-5)
    assert scores.std() > 0.1
    assert told[-1] == (8, 8)
    assert len(told) == {1: 8, 10_000: 1}.get(batch_tokens, len(told))


def test_a_model_without_a_pad_token_takes_one_sequence_at_a_time(model_dir, tmp_path):
    model = rewards.load_model(str(model_dir), torch.float32, CPU)
    pairs, _, _ = read(ROWS, tmp_path)
    expected = rewards.score_pairs(model, pairs, 10_000)
    model.config.pad_token_id = None
    assert rewards.score_pairs(model, pairs, 10_000) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_of_others(tmp_path):
    """It has no head of ours, pools its first token, and needs the attention mask."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
             "initializer_range": 0.3}  # fmt: skip
    config = AutoConfig.for_model("bert", vocab_size=448, num_labels=1, pad_token_id=3, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "m")
    model = rewards.load_model(str(tmp_path / "m"), torch.float32, CPU)
    pairs, _, _ = read(ROWS, tmp_path)
    assert rewards.score_pairs(model, pairs, 10_000) == pytest.approx(alone(model, pairs), abs=1e-5)


def test_the_head_runs_in_fp32_whatever_the_type_of_the_rest(model_dir):
    model = rewards.load_model(str(model_dir), torch.bfloat16, CPU)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    score = model(torch.arange(5)[None]).logits
    assert score.dtype == torch.float32
    assert not torch.equal(score, score.bfloat16().float())


# ---------------------------------------------------------------------------------------------- rows


def test_rows_ratings_and_categories(tmp_path):
    rows = [
        ROWS[0],
        ROWS[1] | {"chosen_rating": 5, "rejected_rating": 1.5},
        ROWS[2] | {"score_chosen": 3.0, "score_rejected": None},
        {"prompt": "a", "chosen": " b", "rejected": " b"},
        ROWS[3] | {"chosen_score": "good", "rejected_score": 1},
        ROWS[3] | {"margin": "large"},
        ROWS[0] | {"chosen": " 84" * 200},
        {"prompt": "a"},
    ]
    pairs, ledger, by = read(rows, tmp_path)
    assert [(p.line, p.category) for p in pairs] == [(1, "maths"), (2, "chat"), (3, "chat")]
    assert by == "category"
    assert [p.ratings for p in pairs][1] == (5.0, 1.5)
    assert np.isnan([pairs[0].ratings, pairs[2].ratings]).all()
    assert (pairs[0].human_margin, pairs[1].human_margin) == (2.0, 3.5)
    assert math.isnan(pairs[2].human_margin)
    [entry] = ledger.sources.values()
    assert (entry.read, entry.used) == (8, 3)
    messages = {reason: [e["message"] for e in d.examples] for reason, d in entry.dropped.items()}
    assert messages["same_pair"] == ["chosen and rejected are the same"]
    assert messages["wrong_fields"][:2] == [
        "chosen_score is 'good', not a finite number",
        "margin is 'large', not a finite number",
    ]
    assert messages["over_length"][0].endswith("more than --max-length 128")


def test_categories_by_any_field(tmp_path):
    rows = [row | {"level": i % 2} for i, row in enumerate(ROWS)]
    pairs, _, by = read(rows, tmp_path, by="level")
    assert ([p.category for p in pairs], by) == (["0", "1", "0", "1"], "level")
    pairs, _, by = read([{k: v for k, v in row.items() if k != "category"} for row in ROWS], tmp_path)
    assert ({p.category for p in pairs}, by) == ({"(none)"}, None)
    with pytest.raises(
        UserError, match=r"--by levl: no usable row has that field; there are category, chosen"
    ):
        read(rows, tmp_path, by="levl")


# ---------------------------------------------------------------------------------------------- tool


def test_the_tool_end_to_end(model_dir, tmp_path, capsys, monkeypatch):
    """Its JSON against the model run alone, and the same numbers in the text."""
    file = write_jsonl(tmp_path / "five.jsonl", [*ROWS, {"prompt": "a", "chosen": " b", "rejected": " b"}])
    out = tmp_path / "report.json"
    words = ["--model", str(model_dir), "--data", str(file), "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["eval_rm", *words])
    eval_rm.main()
    told = capsys.readouterr()
    report = json.loads(out.read_text())
    model = rewards.load_model(str(model_dir), torch.float32, CPU)
    pairs, _, _ = read(ROWS, tmp_path)
    scores = alone(model, pairs)
    margins = scores[:, 0] - scores[:, 1]
    assert report["accuracy"] == np.mean(margins > 0)
    assert report["margin"]["mean"] == pytest.approx(margins.mean(), abs=1e-5)
    assert report["reward"]["max"] == pytest.approx(scores.max(), abs=1e-5)
    human = np.array([2.0, 1.0, 0.5])
    assert report["human"]["margins"]["pearson"] == pytest.approx(
        np.corrcoef(margins[[0, 1, 3]], human)[0, 1], abs=1e-5
    )
    assert report["human"]["ratings"] is None
    assert {name: c["pairs"] for name, c in report["categories"].items()} == {
        "chat": 2,
        "maths": 1,
        "(none)": 1,
    }
    assert report["categories"]["chat"]["accuracy"] == np.mean(margins[1:3] > 0)
    assert (report["rows"]["read"], report["rows"]["dropped"], report["dtype"]) == (5, 1, "fp32")
    low, high = report["accuracy_95"]
    assert (
        f"accuracy     {report['accuracy']:.4f}  (95 %: {low:.4f} to {high:.4f}; 4 pairs, 0 ties" in told.out
    )
    assert "same_pair" in told.err
    monkeypatch.setattr("sys.argv", ["eval_rm", *words[:-1], "-"])
    eval_rm.main()
    told = capsys.readouterr()
    assert json.loads(told.out) == report
    assert "accuracy  " in told.err


def test_the_text_of_many_categories():
    names = [str(i) for i in range(40)]
    none = np.full(40, NAN)
    found = agreement.report(np.arange(80.0).reshape(40, 2), np.full((40, 2), NAN), none, names)
    lines = text.describe(found, "topic").splitlines()
    assert lines[-1] == "and 10 more (--json has them all)"
    assert not any(line.startswith("correlation") for line in lines)


def fail(model, file, *words):
    try:
        eval_rm.evaluate(eval_rm.parse(["--model", str(model), "--data", str(file), *words]))
    except UserError as error:
        return rewards.for_the_tool(str(error))
    raise AssertionError("no error")


def test_mistakes_are_named(model_dir, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    nowhere = tmp_path / "nowhere" / "report.json"
    assert fail(model_dir, file, "--json", str(nowhere)).endswith(f"no directory {nowhere.parent}")
    lm = tmp_path / "lm"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(lm)
    assert fail(lm, file).startswith(f"--model: {lm} is no reward model but LlamaForCausalLM. Train one")
    three = tmp_path / "three"
    config = AutoConfig.for_model("llama", **SIZES, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(three)
    assert fail(three, file) == f"--model: {three} sorts into 3 classes; a reward model has one"
    assert fail("/no/model", file) == "--model: /no/model does not exist"
    assert fail(model_dir, tmp_path / "rowz.jsonl").startswith("--data: no such file or directory")
    sft = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    assert fail(model_dir, sft).splitlines() == [
        "--data: none of 2 rows can be used",
        f"  2 wrong_fields, the first at {sft}, line 1: it has the fields prompt, completion; needed: chosen "
        "and rejected, with prompt unless they are message lists that share their beginning",
    ]
    assert fail(model_dir, file, "--batch-tokens", "0") == "--batch-tokens 0: must be greater than 0"


def test_sets_of_several_splits(model_dir, tmp_path):
    """--split chooses; without it the message names the option, not a key of the trainer."""
    saved = tmp_path / "saved"
    splits = {name: datasets.Dataset.from_list(ROWS[:n]) for name, n in (("train", 1), ("check", 3))}
    datasets.DatasetDict(splits).save_to_disk(saved)
    words = ["--model", str(model_dir), "--data", str(saved)]
    report, _ = eval_rm.evaluate(eval_rm.parse([*words, "--split", "check"]))
    assert report["rows"]["read"] == 3
    assert fail(model_dir, "tulu3-preference").startswith("--split is not set: which split of allenai/")
    assert "data." not in fail(model_dir, "tulu3-preference")
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for option in ("--split", "--subset"):
        assert fail(model_dir, file, option, "check") == f"{option}: {file} is no hub set, which has such"


def test_many_categories_cost_no_more_than_their_pairs():
    """20,000 of one pair each: a mask of all pairs for each would be 400 MB; order by size, then by place."""
    num = 20_000
    names = [f"c{i}" for i in range(num)] + ["c7", "c3", "c7"]
    scores = np.stack([np.arange(num + 3.0), np.full(num + 3, 5.0)], axis=1)
    none = np.full(num + 3, NAN)
    tracemalloc.start()
    found = agreement.report(scores, np.stack([none, none], axis=1), none, names)["categories"]
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    assert list(found)[:4] == ["c7", "c3", "c0", "c1"]
    assert found["c7"]["margin"]["mean"] == pytest.approx((2 + (num - 5) + (num - 3)) / 3)
    assert (found["c3"]["pairs"], found["c3"]["accuracy"], found["c5"]["ties"]) == (2, 0.5, 1)


def test_damaged_models_are_named(model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    folder = tmp_path / "m"
    model = AutoModelForSequenceClassification.from_pretrained(model_dir)
    with torch.no_grad():
        model.score.weight[0, 3] = NAN
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert fail(folder, file).startswith(
        f"--model: the score of {file}, line 1 (chosen) is nan, and 7 more are not finite: damaged weights"
    )
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fail(folder, file) == f"--model: {folder} lacks 1 weights, such as score.weight"
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "t")
    messages = write_jsonl(
        tmp_path / "messages.jsonl",
        [{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}],
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "t" / name).read_bytes())
    (folder / "chat_template.jinja").unlink()
    save_file(
        {**weights, "score.weight": torch.zeros(1, 32)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "has no chat template: set --chat-template" in fail(folder, messages)
