"""The demo data: facts are checked against computation where that is possible, the rest by its shape."""

import calendar
import json
import re
from collections import Counter

from tools import demo_assets, demo_facts


def _question(row):
    return row["prompt"][0]["content"]


def test_arithmetic_and_spelling_are_true():
    operators = {"plus": "+", "minus": "-", "times": "*"}
    checked = Counter()
    for fact in demo_facts.facts():
        if found := re.search(r"(\d+) (plus|minus|times|\+|-|\*) (\d+)", fact.question):
            a, sign, b = found.groups()
            assert str(eval(a + operators.get(sign, sign) + b)) == fact.answer
            checked["sums"] += 1
        if "letter" in fact.question and (found := re.search(r"'(\w+)'", fact.question)):
            assert len(found[1]) == int(fact.answer)
            checked["letters"] += 1
    assert checked == {"sums": 95, "letters": 20}


def test_months_and_days_follow_each_other():
    for names in (list(calendar.month_name)[1:], list(calendar.day_name)):
        answers = {
            name: fact.answer
            for fact in demo_facts.facts()
            for name in names
            if re.search(rf"\b(after {name}|today is {name})", fact.question)
        }
        assert answers == {name: names[(i + 1) % len(names)] for i, name in enumerate(names)}


def test_no_question_is_in_both_parts():
    parts = demo_facts.pairs()
    training = {_question(row) for row in parts["training"]}
    validation = {_question(row) for row in parts["validation"]}
    assert (len(training), len(validation)) == (400, 80)
    assert not training & validation


def test_chosen_is_short_and_rejected_long_and_both_give_the_answer():
    answers = {fact.question: fact.answer for fact in demo_facts.facts()}
    for rows in demo_facts.pairs().values():
        for row in rows:
            chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
            assert answers[_question(row)].lower() in chosen.lower()
            assert answers[_question(row)] in rejected
            assert len(chosen.split()) <= 12
            assert 20 <= len(rejected.split()) <= 55  # about 70 tokens at most


def test_no_two_hedges_of_many_are_alike():
    """A model could otherwise learn a few sentences by heart."""
    rejected = [row["rejected"][0]["content"] for row in demo_facts.pairs()["training"]]
    assert len(set(rejected)) > 0.95 * len(rejected)


def test_written_data_is_reused_and_repaired(tmp_path):
    demo_assets.make_data(tmp_path)
    file = tmp_path / "demo-dpo" / "training.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == demo_facts.pairs()["training"]
    sft = (tmp_path / "demo-sft" / "validation.jsonl").read_text().splitlines()
    first = demo_facts.pairs()["validation"][0]
    assert json.loads(sft[0]) == {"messages": first["prompt"] + first["chosen"]}
    before = file.stat()
    demo_assets.make_data(tmp_path)
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    file.write_text("half a li")
    demo_assets.make_data(tmp_path)
    assert len(file.read_text().splitlines()) == 400
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo-cpt", "demo-dpo", "demo-sft"]


def test_tiny_model_directory(tmp_path, monkeypatch):
    """A short version of it (12 steps, 500 tokens): what matters here is the directory, not the answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(demo_assets, "TINY_STEPS", 12)
    monkeypatch.setattr(demo_assets, "VOCABULARY", 500)
    out = tmp_path / "tiny"
    assert demo_assets.make_tiny(out)
    assert not demo_assets.make_tiny(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    row = demo_facts.pairs()["validation"][0]
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    assert whole == f"<|user|>{_question(row)}<|end|><|assistant|>{row['chosen'][0]['content']}<|end|>"
    assert tokenizer(whole).input_ids[: len(tokenizer(prompt).input_ids)] == tokenizer(prompt).input_ids
    assert tokenizer.decode(tokenizer(whole).input_ids) == whole
