"""What the stages of a pipeline read must be there, but for what earlier ones make."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.errors import UserError
from strop.pipeline import inputs
from tests.unit.pipeline_helpers import load

pytestmark = pytest.mark.usefixtures("pipeline_place")


def lacking(body: str, *names: str) -> str:
    p = load(body)
    with pytest.raises(UserError) as error:
        inputs.check(p, names or [stage.name for stage in p.stages])
    return str(error.value)


def model(path: str) -> None:
    Path(path).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (Path(path) / name).write_text("{}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{data.train: rows/nosuch.jsonl}", "stage dpo: data.train: no such file or directory: rows/nosuch"),
        ("{data.train: [there, rows/no]}", "stage dpo: data.train: no such file or directory: rows/no"),
        ("{data.train: /no/such}", "stage dpo: data.train: no such file or directory: /no/such"),
        ("{data.train: empty}", "stage dpo: data.train: empty has none of training.jsonl"),
        ("{data.validation: no.jsonl}", "stage dpo: data.validation: no such file or directory: no.jsonl"),
        (
            "{validation.watch: {a: no.jsonl}}",
            "stage dpo: validation.watch.a: no such file or directory: no.",
        ),
        ("{model.tokenizer: ./nosuch}", "stage dpo: model.tokenizer: no such directory: ./nosuch"),
        ("{dpo.reference: ./nosuch}", "stage dpo: dpo.reference: ./nosuch does not exist"),
        (
            "{model.chat_template: no.jinja}",
            "stage dpo: model.chat_template: neither a Jinja template nor a f",
        ),
        (
            "{data.prompt_template: no.txt}",
            "stage dpo: data.prompt_template: neither a template with {names}",
        ),
    ],
)
def test_missing_inputs_of_a_later_stage(settings, message):
    for name in ("rows", "there", "empty"):
        Path(name).mkdir()
    for name in ("rows", "there"):
        Path(f"{name}/training.jsonl").write_text("{}\n")
    model("base")
    body = "stages: {sft: {}, dpo: {}}\n"
    inputs.check(load(body), ["sft", "dpo"])
    body = f"stages: {{sft: {{}}, dpo: {{set: {settings}}}}}\n"
    assert lacking(body).startswith(message)
    inputs.check(load(body), ["sft"])  # of stages that are done nothing is needed any more


def test_missing_models():
    body = "stages: {sft: {model: ./nosuch}}\n"
    assert lacking(body) == "stage sft: model.path: ./nosuch does not exist"
    Path("half").mkdir()
    assert lacking("stages: {sft: {model: half}}\n").startswith(
        "stage sft: model.path: half has no config.json"
    )
    body = "stages: {sft: {}, rm: {}, dpo: {after: sft, set: {dpo.reference: ./nosuch}}}\n"
    assert lacking(body, "dpo") == "stage dpo: dpo.reference: ./nosuch does not exist"


def test_texts_and_stores_are_found_as_the_job_finds_them():
    """Text files are for cpt alone; a preparation reads what its run is configured with."""
    Path("texts").mkdir()
    Path("texts/a.md").write_text("a")
    body = "stages: {t: {algo: prepare}, cpt: {set: {data.train: texts}}}\n"
    inputs.check(load(body), ["t", "cpt"])
    assert lacking(body.replace("texts}", "texts/b.md}"), "t").startswith(
        "stage cpt: data.train: no such file"
    )
    assert "has none of" in lacking("stages: {sft: {set: {data.train: texts}}}\n")


def test_what_an_earlier_stage_makes_need_not_be_there():
    """Its exports, its other files, the stores of a preparation; but not those of a stage beside it."""
    body = (
        "stages:\n  t: {algo: prepare}\n  cpt: {}\n  sft: {}\n"
        "  dpo: {set: {dpo.reference: runs/p-cpt/export/latest, data.train: runs/.cache/text-1/x.jsonl}}\n"
    )
    inputs.check(load(body), ["dpo"])
    beside = (
        "stages:\n  sft: {}\n  a: {algo: sft}\n  b: {algo: sft, after: sft, model: runs/p-a/export/latest}\n"
    )
    told = lacking(beside, "b").splitlines()
    assert told[0].startswith("stage b: model.path: runs/p-a/export/latest does not exist")
    assert told[1] == "  stage a makes it: name it in `after` (or in `model`)"
