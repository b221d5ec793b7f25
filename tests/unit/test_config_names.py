"""Configuration: other names for keys, tables of keys and values, round trips, differences, help."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from strop import config, config_check, config_load, config_schema
from strop.aliases import ALIASES
from strop.config import Config, differences, dump_yaml, load, parse_args, to_dict
from strop.errors import UserError
from tests.unit.config_helpers import MINIMAL, loaded, message

# ------------------------------------------------------------------------------------------- aliases

NEMO_FILE = """
dpo: {max_num_steps: 150, val_period: 25, val_at_start: false, seed: 7, reference_policy_kl_penalty: 0.05,
      preference_average_log_probs: true, preference_loss: dpo, preference_loss_weight: 1, sft_loss_weight: 0}
checkpointing: {checkpoint_dir: results/dpo, metric_name: "val:validation-default_loss",
                higher_is_better: false, keep_top_k: 3, save_period: 50}
policy:
  model_name: org/model
  tokenizer: {name: org/tokenizer}
  train_global_batch_size: 128
  train_micro_batch_size: 2
  max_total_sequence_length: 512
  precision: bfloat16
  max_grad_norm: 2.0
  dtensor_cfg: {activation_checkpointing: true}
  optimizer: {kwargs: {lr: 5.0e-6, weight_decay: 0.1, betas: [0.9, 0.98], eps: 1e-5}}
data: {max_input_seq_length: 512, train: {data_path: t.jsonl}, val_data_path: v.jsonl}
logger: {wandb_enabled: false, tensorboard_enabled: false, wandb: {project: p}}
cluster: {gpus_per_node: 8, num_nodes: 2}
"""


def test_a_file_in_the_names_of_nemo_rl(file):
    c = loaded(file, text=NEMO_FILE)
    assert (c.train.max_steps, c.validation.every, c.validation.at_start, c.train.seed) == (150, 25, False, 7)
    assert (c.dpo.beta, c.dpo.average_log_probs, c.dpo.loss) == (0.05, True, "sigmoid")
    assert (c.run.dir, c.checkpoint.keep_last, c.checkpoint.every) == ("results/dpo", 3, 50)
    assert (c.checkpoint.best_metric, c.checkpoint.best_mode) == ("eval_loss", "min")
    assert (c.model.path, c.model.tokenizer) == ("org/model", "org/tokenizer")
    assert (c.train.global_batch_size, c.train.micro_batch_size, c.data.max_length) == (128, 2, 512)
    assert (c.train.precision, c.train.max_grad_norm) == ("bf16", 2.0)
    assert c.train.activation_checkpointing == "full"
    assert c.optim == config.OptimConfig(lr=5e-6, weight_decay=0.1, betas=[0.9, 0.98], eps=1e-5)
    assert (c.data.train, c.data.validation) == ("t.jsonl", "v.jsonl")
    assert (c.log.wandb, c.log.tensorboard, c.log.project) == (False, False, "p")
    assert (c.cluster.gpus_per_node, c.cluster.nodes) == (8, 2)


def test_notes_are_given_once_each_and_not_for_short_forms(file):
    file.write_text(MINIMAL)
    notes: list[str] = []
    words = ["policy.model_name=a", "policy.model_name=b", "seed=1", "checkpointing.checkpoint_dir=r"]
    load("dpo", file, words, notes)
    assert notes == [
        "policy.model_name is model.path here",
        "checkpointing.checkpoint_dir is run.dir here; each run is a folder in it",
    ]


def test_aliases_lead_to_keys_of_the_schema_and_hide_none():
    known = config_load.leaves(Config)
    assert {alias.key for alias in ALIASES.values()} <= set(known)
    assert not set(ALIASES) & set(known)


def test_tables_name_keys_of_the_schema():
    known = config_load.leaves(Config)
    exact = {k for k in config.MAY_CHANGE if not k.endswith(".")}
    heads = {k for k in config.MAY_CHANGE if k.endswith(".")}
    assert {*config_check.CHOICES, *config_check.RANGES, *config_check.REQUIRED, *exact} <= set(known)
    assert heads <= {k.partition(".")[0] + "." for k in known}


def test_every_key_that_lists_its_values_in_its_docstring_is_checked():
    """The docstring of an enumerated key names each allowed value."""
    known = config_load.leaves(Config)
    for key, allowed in config_check.CHOICES.items():
        for value in allowed:
            assert re.search(rf"\b{value}\b", known[key].doc), (key, value)


# ----------------------------------------------------------------------- round trip, differences, help


def test_dump_is_read_back_equal_also_with_awkward_text(file):
    words = ["model.chat_template={% for m in x %}\n  'a' # \"b\": {{ m }}\n{% endfor %}", "run.name=007",
             "optim.lr=1e-5", "+metadata.note=yes", "+metadata.n={a: [1, null, .5]}"]  # fmt: skip
    c = loaded(file, *words)
    assert loaded(file, text=dump_yaml(c)) == c
    assert yaml.safe_load(dump_yaml(c))["train"] == to_dict(c)["train"]


def test_differences_of_what_matters(file):
    old = yaml.safe_load(dump_yaml(loaded(file)))
    assert differences(old, to_dict(loaded(file))) == []
    allowed = ["max_steps=9", "run.allow_config_change=true", "log.level=debug", "checkpoint.every=1",
               "cluster.nodes=2", "dist.timeout_s=3", "+metadata.a=1", "validation.every=2"]  # fmt: skip
    assert differences(old, to_dict(loaded(file, *allowed))) == []
    changed = loaded(file, "train.seed=43", "model.revision=x", "optim.betas=[0.9, 0.98]")
    assert differences(old, to_dict(changed)) == [
        "model.revision: null -> x",
        "train.seed: 42 -> 43",
        "optim.betas: [0.9, 0.999] -> [0.9, 0.98]",
    ]
    del old["train"]["compile"]
    assert differences(old, to_dict(loaded(file))) == ["train.compile: (not set) -> False"]


def test_parse_args():
    assert parse_args([]) == (None, [])
    assert parse_args(["a.b=c", "--config", "x.yaml", "+metadata.a=-1"]) == (
        Path("x.yaml"), ["a.b=c", "+metadata.a=-1"])  # fmt: skip
    assert parse_args(["--config=x.yaml"])[0] == Path("x.yaml")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["x.yaml"],
            "command line: 'x.yaml' is neither --config FILE nor key=value; did you mean --config x.yaml?",
        ),
        (["--lr=3"], "command line: '--lr=3' is neither --config FILE nor key=value; did you mean lr=3?"),
        (["oops"], "command line: 'oops' is neither --config FILE nor key=value"),
        (["--config"], "command line: --config needs a file"),
    ],
)
def test_words_that_are_neither(argv, expected):
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        parse_args(argv)


def test_help_names_every_key_of_the_algorithm_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        parse_args(["train.seed=1", "-h"], "sft")
    assert e.value.code == 0
    text = capsys.readouterr().out
    source = ast.parse(Path(config_schema.__file__).read_text())
    classes = {c.name: c for c in source.body if isinstance(c, ast.ClassDef)}
    for field in classes["TrainConfig"].body:
        if isinstance(field, ast.AnnAssign):
            assert f"\n  train.{field.target.id} = " in text
    assert "\n  train.seed = 42\n      Order of the rows and every other random draw.\n" in text
    assert "sft.train_on = all" in text
    assert "dpo.beta" not in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["dpo.loss=simpo", "dpo.reference=other"],
            "dpo.reference is 'other'; it must be null for dpo.loss=simpo, which knows no reference model",
        ),
        (
            ["dpo.loss=orpo", "dpo.average_log_probs=true"],
            "dpo.average_log_probs is True; it must be false for dpo.loss=orpo: it always takes the mean",
        ),
        (["dpo.loss=simpo", "dpo.simpo_gamma=-0.1"], "dpo.simpo_gamma is -0.1; it must not be negative"),
        (["kto.loss=dpo"], "kto.loss is 'dpo'; it must be one of kto, apo_zero_unpaired"),
        (["kto.desirable_weight=0"], "kto.desirable_weight is 0.0; it must be greater than 0"),
    ],
)
def test_what_losses_without_reference_or_pairs_do_not_take(file, words, expected):
    assert message(file, *words) == f"command line: {expected}"


@pytest.mark.parametrize(
    ("algo", "word", "owner"),
    [("dpo", "sft.neftune_alpha=5", "sft"), ("cpt", "sft.neftune_alpha=5", "sft"),
     ("kto", "dpo.beta=3", "dpo"), ("rm", "dpo.reference_policy_kl_penalty=3", "dpo"),
     ("sft", "prepare.near_duplicates=0.8", "cpt")],
)  # fmt: skip
def test_a_key_of_another_algorithm_is_refused(file, algo, word, owner):
    assert f"but only {owner} knows it: this is {algo}" in message(file, word, algo=algo)
    assert loaded(file, "dpo.beta=0.1", "sft.max_num_steps=3", algo=algo).train.max_steps == 3


def test_a_file_may_be_shared_by_algorithms(file):
    file.write_text(
        MINIMAL + "sft: {neftune_alpha: 5}\ndpo: {beta: 3}\nprepare: {min_chars: 9, text_key: text}\n"
    )
    notes = []
    assert config.load("dpo", file, [], notes).dpo.beta == 3
    assert notes == [
        "sft.neftune_alpha is for sft, and of no use to dpo",
        "prepare.min_chars is for cpt, and of no use to dpo",
    ]
    assert config.load("dpo", file, ["sft.neftune_alpha=null"]).dpo.beta == 3


@pytest.mark.parametrize("algo", ["sft", "kto", "cpt"])
def test_prompts_are_shared_within_pairs_only(file, algo):
    assert "rows of" in message(file, "train.shared_prefix=true", algo=algo)
    assert loaded(file, "train.shared_prefix=false", algo=algo).train.shared_prefix is False
    assert loaded(file, "train.shared_prefix=true", algo="rm").train.shared_prefix is True


@pytest.mark.parametrize(("algo", "name"), [("dpo", "eval_rewards/accuracies"), ("rm", "eval_accuracy")])
def test_accuracy_has_the_name_that_the_algorithm_gives_it(file, algo, name):
    word = "checkpointing.metric_name=val:validation-default_accuracy"
    assert loaded(file, word, algo=algo).checkpoint.best_metric == name
    assert "as in metrics.jsonl" in message(file, word, algo="sft")


def test_orpo_has_an_sft_loss_to_choose_the_best_by(file):
    words = ["checkpoint.best_metric=eval_sft_loss"]
    assert "must be one of" in message(file, *words)
    assert "must be one of" in message(file, *words, "dpo.loss=orpo", "dpo.sft_loss_weight=0")
    assert loaded(file, *words, "dpo.loss=orpo").dpo.sft_loss_weight is None
