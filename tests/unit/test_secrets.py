"""No secret is shown, whether told by its name, by its shape or by what stands before it."""

import pytest

from strop.obs import secrets

HF = "hf_" + "aBcD1234" * 4
CASES = [
    (f"401 for {HF} at the hub", "401 for [secret] at the hub"),
    ("key sk-proj-abc_DEF-123456789012345", "key [secret]"),
    ("ghp_" + "a1B2" * 9 + " and github_pat_" + "x_9" * 10, "[secret] and [secret]"),
    ("AKIAIOSFODNN7EXAMPLE", "[secret]"),
    ("Authorization: Bearer abc.def-123456", "Authorization: Bearer [secret]"),
    ("git clone https://me:pa55@host/x.git", "git clone https://me:[secret]@host/x.git"),
    (
        "git clone https://s3cr3tdeploytoken@git.example.com/x.git",
        "git clone https://[secret]@git.example.com/x.git",
    ),
    (
        "https://s3cr3tdeploytoken:@host/ https://s3cr3tdeploytoken:x-oauth-basic@host/",
        "https://[secret]@host/ https://[secret]@host/",
    ),
    ("Authorization: token abcdefghijklmnop", "Authorization: token [secret]"),
    ("{'authorization': 'Token abcdefghijklmnop'}", "{'authorization': 'Token [secret]'}"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-_1", "[secret]"),
    ("{'api_key': 'two words', 'lr': 0.1}", "{'api_key': [secret], 'lr': 0.1}"),
    ('{"password": "a\\"b", "lr": 0.1}', '{"password": [secret], "lr": 0.1}'),
    ("+metadata.db_password=hunter2 lr=1", "+metadata.db_password=[secret] lr=1"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nafter", "[secret]\nafter"),
]


@pytest.mark.parametrize(("text", "shown"), CASES)
def test_a_known_shape_is_masked_and_nothing_around_it(text, shown):
    redact = secrets.redactor(environ={})
    assert redact(text) == shown
    assert redact(shown) == shown  # what a writer has masked, a reader leaves as it is


@pytest.mark.parametrize(
    "text",
    [
        "step 12/100  loss 0.6931  412 tok/s  eta 3m12s",
        "unknown key: train.foo; nearest: train.seed",
        "pad_token='<pad>', eos_token=</s>, num_tokens=4096, token: 5",
        "https://host:8080/a@b and user@host:/path",
        "ssh://git@example.com/x.git https://example.com?of=me@example.com https://example.com#me@home",
        "authorization: a token is needed for model-00001.safetensors",
        "rank 3: Connection closed by peer [127.0.0.1]:29500",
    ],
)
def test_ordinary_lines_stay_as_they_are(text):
    assert secrets.redactor(environ={})(text) == text


def test_values_of_the_environment_are_masked_wherever_they_occur():
    environ = {
        "WANDB_API_KEY": "0123456789abcdef0123",
        "DB_PASSWORD": "p/w d+1!",
        "DEPLOY_KEY": "first line\nsecond line\n",
        "TOKENIZERS_PARALLELISM": "sometimes",
        "MY_TOKEN": "on",  # too short to be told from a word
        "HF_TOKEN_PATH": "/home/me/token",
    }
    redact = secrets.redactor(["given one"], environ)
    assert redact("a0123456789abcdef0123b") == "a[secret]b"
    assert redact("p/w d+1! p%2Fw%20d%2B1%21 p%2Fw+d%2B1%21") == "[secret] [secret] [secret]"
    assert redact("x\nsecond line") == "x\n[secret]"
    assert redact("given one") == "[secret]"
    assert redact("sometimes on /home/me/token") == "sometimes on /home/me/token"


def test_a_secret_that_begins_another_one_hides_all_of_it():
    assert secrets.redactor(["abcdef", "abcdefghi"], {})("abcdefghi") == "[secret]"


def test_configurations_and_command_lines_for_showing():
    tree = {"train": {"micro_batch_tokens": 4096}, "metadata": {"apiKey": "k", "note": f"with {HF}"}}
    assert secrets.mask(tree) == {
        "train": {"micro_batch_tokens": 4096},
        "metadata": {"apiKey": "[secret]", "note": "with [secret]"},
    }
    assert secrets.values_in({"a": {"hub_token": ["x", {"deep": "y"}]}, "token_count": 3}) == ["x", "y"]
    args = ["--config", "a.yaml", "+metadata.api_key=x", "train.max_steps=3", f"+metadata.n={HF}"]
    shown = ["--config", "a.yaml", "+metadata.api_key=[secret]", "train.max_steps=3", "+metadata.n=[secret]"]
    assert secrets.mask_args(args) == shown


def test_a_column_of_text_is_no_secret():
    """prepare.text_key names a field of the rows."""
    tree = {"prepare": {"text_key": "content_body"}, "metadata": {"api_key": "0123456789abcdef"}}
    assert secrets.values_in(tree) == ["0123456789abcdef"]
    assert secrets.mask(tree)["prepare"] == {"text_key": "content_body"}
