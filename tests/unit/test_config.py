"""Configuration: what comes out of a file and a command line, and the exact message for each mistake."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strop import config, config_load
from strop.aliases import ALIASES
from strop.config import ALGOS, Config, dump_yaml, load, to_dict
from strop.errors import UserError
from tests.unit.config_helpers import MINIMAL, loaded, message


def test_defaults_then_file_then_words(file):
    c = loaded(file, "train.seed=3", text=MINIMAL + "train: {seed: 2, global_batch_size: 8}\n")
    assert (c.train.seed, c.train.global_batch_size, c.train.micro_batch_tokens) == (3, 8, 4096)
    assert (c.algo, c.model.path, c.data.train) == ("dpo", "m", "d.jsonl")


def test_a_later_word_wins(file):
    assert loaded(file, "train.seed=3", "seed=4").train.seed == 4


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("optim.lr=1e-5", "optim.lr", 1e-5),  # PyYAML alone reads text
        ("optim.lr=5.e-7", "optim.lr", 5e-7),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.lr=.5", "optim.lr", 0.5),
        ("optim.betas=[0, 0.95]", "optim.betas", [0.0, 0.95]),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("checkpoint.every=", "checkpoint.every", None),
        ("train.max_steps=010", "train.max_steps", 10),  # YAML 1.1 reads octal 8
        ("log.wandb=true", "log.wandb", True),
        ("data.train=[a.jsonl, b]", "data.train", ["a.jsonl", "b"]),
        ("model.revision=1e10", "model.revision", "1e10"),  # a commit, not a number
        ("run.name=007", "run.name", "007"),
        ("model.chat_template={% if x %}", "model.chat_template", "{% if x %}"),
        ("data.split=98,1,1", "data.split", "98,1,1"),
        ("data.prompt_template={input}", "data.prompt_template", "{input}"),  # YAML would see mappings
        ("data.prompt_template=Q: {input}\n", "data.prompt_template", "Q: {input}\n"),
        ("data.system_prompt=Note: be brief", "data.system_prompt", "Note: be brief"),
        ("data.train=[a, b]", "data.train", ["a", "b"]),
        ("run.name=a=b", "run.name", "a=b"),
        ("+metadata.team=x", "metadata.team", "x"),
        ("+metadata.a.b={c: [1, yes]}", "metadata.a.b.c", [1, "yes"]),
    ],
)
def test_words_are_read_as_yaml_1_2(file, word, key, value):
    got = config.flatten(to_dict(loaded(file, word)))[key]
    assert got == value
    assert type(got) is type(value)


def test_interpolation(file):
    c = loaded(file, "run.name=${log.project}-${train.seed}", "train.max_steps=${train.global_batch_size}")
    assert (c.run.name, c.train.max_steps) == ("strop-42", 16)


def test_an_emptied_section_keeps_its_defaults(file):
    assert loaded(file, text=MINIMAL + "optim:\n  # lr: 1\n").optim.lr == Config().optim.lr


WORD_MISTAKES = [
    ("train.max_stpes=1", "unknown key train.max_stpes; did you mean train.max_steps?"),
    ("train.lr=1", "unknown key train.lr; did you mean optim.lr?"),
    ("max_stpes=1", "unknown key max_stpes; did you mean train.max_steps?"),
    ("policy.model_nam=x", "unknown key policy.model_nam; did you mean model.path?"),
    (
        "checkpointing.enabled=true",
        "unknown key checkpointing.enabled; checkpoints are always written: checkpoint.every says how often "
        "(null: at the end, and when the job is stopped)",
    ),
    ("frobnicate=1", "unknown key frobnicate; --help lists all keys"),
    ("train=5", "train is a section; set its keys, such as train.global_batch_size"),
    (
        "+train.sede=1",
        "+train.sede adds a key, which only metadata allows (+metadata.name=value); did you mean train.seed?",
    ),
    ("train.max_steps=abc", "train.max_steps is 'abc', expected a whole number or null"),
    ("train.max_steps=1.5", "train.max_steps is '1.5', expected a whole number or null"),
    ("train.max_steps=true", "train.max_steps is 'true', expected a whole number or null"),
    ("train.seed=null", "train.seed is null, expected a whole number"),
    ("optim.lr=abc", "optim.lr is 'abc', expected a number"),
    ("lr=abc", "optim.lr is 'abc', expected a number"),
    ("optim.betas=0.9", "optim.betas is '0.9', expected a list of numbers"),
    ("optim.betas=[a, b]", "optim.betas is ['a', 'b'], expected a list of numbers"),
    ("log.wandb=maybe", "log.wandb is 'maybe', expected true or false"),
    ("log.wandb=yes", "log.wandb is 'yes', expected true or false"),
    ("log.wandb=1", "log.wandb is '1', expected true or false"),
    ("run.name=[a]", "run.name is ['a'], expected text or null"),
    ("train.seed={%", "train.seed is '{%', expected a whole number"),
    (
        "dpo.loss=kto",
        "dpo.loss is 'kto'; it must be one of sigmoid, hinge, ipo, robust, "
        "exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, sigmoid_norm, simpo, orpo",
    ),
    ("train.precision=bf61", "train.precision is 'bf61'; it must be one of auto, bf16, fp16, fp32"),
    ("data.train=3", "data.train is 3; it must be text or a list of texts"),
    ("data.train={a: 1}", "data.train is {'a': 1}, expected text or a list of texts"),
    ("data.validation=[a, 3]", "data.validation is ['a', 3]; it must be text or a list of texts"),
    ("optim.betas=[0.9]", "optim.betas is [0.9]; it must be two numbers in [0, 1)"),
    ("optim.betas=[0.9, 1]", "optim.betas is [0.9, 1.0]; it must be two numbers in [0, 1)"),
    ("train.max_grad_norm=.inf", "train.max_grad_norm is inf; it must be finite"),
    ("train.max_steps=0", "train.max_steps is 0; it must be greater than 0"),
    (
        "optim.decay_steps=1.5",
        "optim.decay_steps is 1.5; it must be a number of steps, or a share of them above 0 and below 1",
    ),
    ("data.weights=[0]", "data.weights is [0.0]; it must hold numbers above 0 only, below 1e100"),
    ("data.weights=[1e100]", "data.weights is [1e+100]; it must hold numbers above 0 only, below 1e100"),
    (
        "data.weights=[1, 2]",
        "data.weights is [1.0, 2.0]; it must have one number for each entry of data.train",
    ),
    ("cpt.weights=[]", "data.weights is []; it must have one number for each entry of data.train"),
    ("sft.train_on=first", "sft.train_on is 'first'; it must be one of all, last, everything"),
    ("sft.train_on_prompt=1", "sft.train_on_prompt is '1': expected true or false"),
    ("sft.neftune_alpha=0", "sft.neftune_alpha is 0.0; it must be greater than 0"),
    (
        "data.over_length=cut",
        "data.over_length is 'cut'; it must be one of drop, truncate_prompt_left, truncate_completion, error",
    ),
    ("optim.min_lr_ratio=1.1", "optim.min_lr_ratio is 1.1; it must lie in [0, 1]"),
    ("data.max_dropped_fraction=-0.1", "data.max_dropped_fraction is -0.1; it must lie in [0, 1]"),
    ("dpo.label_smoothing=0.5", "dpo.label_smoothing is 0.5; it must lie in [0, 0.5)"),
    (
        "dpo.loss=robust",
        "dpo.label_smoothing is 0.0; it must be greater than 0 for dpo.loss=robust",
    ),
    (
        "checkpoint.keep_last=1",
        "checkpoint.keep_last is 1; it must be at least 2, so that there is one to fall back to",
    ),
    (
        "checkpoint.best_metric=loss",
        "checkpoint.best_metric is 'loss'; it must be one of eval_loss, eval_preference_loss, "
        "eval_rewards/chosen, eval_rewards/rejected, eval_rewards/margins, eval_rewards/accuracies, "
        "eval_logps/chosen, eval_logps/rejected, eval_logits/chosen, eval_logits/rejected, eval_entropy, "
        "eval_mean_token_accuracy",
    ),
    ("validation.patience=2", "validation.patience is 2; it needs checkpoint.best_metric, such as eval_loss"),
    ("run.name=a/b", "run.name is 'a/b'; it must be a plain name, without / and not starting with a dot"),
    ("data.train=a\x1b", "data.train is no YAML text"),
    ("data.train=\udcff.jsonl", "data.train is no YAML text"),
    (f"metadata.x={'[' * 3000}", "metadata.x is nested more than 100 levels deep"),
    ("seed", "'seed' is not key=value"),
    ("=1", "'=1' is not key=value"),
    ("algo=sft", "algo is sft, but this is a dpo run"),
    (
        "policy.dtensor_cfg.activation_checkpointing=on",
        "policy.dtensor_cfg.activation_checkpointing is 'on': expected true or false",
    ),
]


@pytest.mark.parametrize(("word", "expected"), WORD_MISTAKES)
def test_a_mistake_on_the_command_line(file, word, expected):
    assert message(file, word) == f"command line: {expected}"


FILE_MISTAKES = [
    (
        MINIMAL + "train:\n  max_stpes: 1\n",
        "c.yaml:6: unknown key train.max_stpes; did you mean train.max_steps?",
    ),
    (MINIMAL + "lr_rate: 1\n", "c.yaml:5: unknown key lr_rate; --help lists all keys"),
    (MINIMAL + "optim:\n  lr: fast\n", "c.yaml:6: optim.lr is 'fast', expected a number"),
    (MINIMAL + "optim: {lr: {a: 1}}\n", "c.yaml:5: optim.lr is {'a': 1}, expected a number"),
    (MINIMAL + "train:\n  seed: 1\n  seed: 2\n", "c.yaml:7: train.seed is given twice (first in line 6)"),
    (MINIMAL + "metadata:\n  a: {b: 1, b: 2}\n", "c.yaml:6: not valid YAML: b is given twice"),
    (MINIMAL + "dpo: [1]\n", "c.yaml:5: dpo is a section; set its keys, such as dpo.beta"),
    (MINIMAL + "dpo:\n  beta: -1\n", "c.yaml:6: dpo.beta is -1.0; it must be greater than 0"),
    (MINIMAL + "policy:\n  model_name: z\n", "c.yaml:6: model.path is 'z', but c.yaml:2 makes it 'm'"),
    (
        "model:\n  path: a\n",
        "c.yaml: data.train is not set; give a file, directory or hub name there or as data.train=...",
    ),
    (
        "data:\n  train: a\n",
        "c.yaml: model.path is not set; give a directory or hub name there or as model.path=...",
    ),
    ("", "configuration file c.yaml is empty; model.path and data.train are needed"),
    ("# only a comment\n", "configuration file c.yaml is empty; model.path and data.train are needed"),
    ("- a\n", "c.yaml:1: expected `key: value` lines at the top"),
    (MINIMAL + f"x: {'[' * 3000}", "c.yaml:5: not valid YAML: nested more than 100 levels deep"),
    (
        MINIMAL + "x: \x1b",
        "c.yaml: not valid YAML: unacceptable character #x001b: special characters are not allowed",
    ),
    ("a: [\n", "c.yaml:2: not valid YAML: expected the node content, but found '<stream end>'"),
    ("model:\n\tpath: a\n", "c.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
    ("? [a]\n: b\n", "c.yaml:1: a key must be a plain name"),
    (
        MINIMAL + "metadata: &a {x: *a}\n",
        "c.yaml:5: not valid YAML: anchors are not supported; write ${section.key} to repeat a value",
    ),
    ("algo: sft\n" + MINIMAL, "c.yaml:1: algo is sft, but this is a dpo run"),
]


@pytest.mark.parametrize(("text", "expected"), FILE_MISTAKES)
def test_a_mistake_in_the_file(file, text, expected):
    assert message(file, text=text) == expected


@pytest.mark.parametrize(
    "word", ["train.seed=${log.project}", "train.seed=${no.such}", "run.name=${run.name}"]
)
def test_an_interpolation_that_cannot_be_resolved_names_its_key(file, word):
    assert message(file, word).startswith(
        f"command line: {word.split('=')[0]}: ${{...}} cannot be resolved: "
    )


def test_an_interpolation_in_a_file_names_its_line(file):
    text = MINIMAL + "train:\n  seed: ${policy.seed}\n"
    assert message(file, text=text) == (
        "c.yaml:6: train.seed: ${...} cannot be resolved: Interpolation key 'policy.seed' not found"
    )


WORDS = st.text(alphabet="abenul-_+=:${}[]'\"%&*#!|>?~@<, \n\t01", max_size=12)
KEYS = st.sampled_from([*config_load.leaves(Config), *ALIASES, "+metadata.a", "metadata.b.c", "train", "x"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(key=KEYS, value=WORDS)
def test_any_word_either_loads_or_is_the_users_mistake(file, key, value):
    file.write_text(MINIMAL)
    try:
        c = load("dpo", file, [f"{key}={value}"])
    except UserError:
        return
    assert loaded(file, text=dump_yaml(c)) == c


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(KEYS, WORDS), max_size=4), WORDS)
def test_any_file_either_loads_or_is_the_users_mistake(file, settings_, junk):
    text = (
        MINIMAL
        + "".join(f"{k.partition('.')[0]}:\n  {k.partition('.')[2]}: {v}\n" for k, v in settings_)
        + junk
    )
    with contextlib.suppress(UserError):
        loaded(file, text=text)


def test_a_missing_file_names_those_nearby(file):
    Path("configs").mkdir()
    Path("configs/dpo-8b.yaml").touch()
    with pytest.raises(
        UserError, match=r"^no configuration file configs/dpo_8b.yaml; did you mean configs/dpo-8b.yaml\?$"
    ):
        load("dpo", "configs/dpo_8b.yaml", [])


@pytest.mark.parametrize(
    ("make", "reason"),
    [(lambda f: f.mkdir(), "Is a directory"), (lambda f: f.write_bytes(b"a: \xff\n"), "not UTF-8 text")],
)
def test_a_file_that_cannot_be_read(file, make, reason):
    make(file)
    with pytest.raises(UserError, match=f"^configuration file c.yaml cannot be read: {reason}$"):
        load("dpo", file, [])


def test_unknown_algorithm(file):
    assert message(file, algo="dop") == f"unknown algorithm 'dop': expected one of {', '.join(ALGOS)}"


def test_the_default_file_is_configs_algo_yaml_here(file):
    Path("configs").mkdir()
    Path("configs/sft.yaml").write_text(MINIMAL + "seed: 9\n")
    assert load("sft", None, []).train.seed == 9
