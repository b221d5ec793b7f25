"""Keeps secrets out of what people read: `redact(text)` gives the text with a marker in their place.

Three things count as secret: the values of environment variables with names such as HF_TOKEN or
WANDB_API_KEY (and of configuration keys so named: `redactor`); tokens known by their shape, whoever wrote
them; and what stands behind `password=` and its like, or in a URL before the @. Writers do this before a
line is written: a rank's own log, and the process through which its raw output goes
(`strop.obs.raw_writer`). Readers do it once more, for files of another writer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional
from urllib.parse import quote, quote_plus

from strop.slurm import env

MARKER = "[secret]"
SHORTEST = 6
"""A shorter value is left alone in free text: it would be found inside of innocent words."""

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NAMED = re.compile(
    r"(?:^|_)(?:[a-z]*(?:token|secret|password|passwd|passphrase|credential)"
    r"|(?:api|access|auth|private|secret)?key|pass)s?\d*(?:_|$)"
)
_NO_VALUE = re.compile(r"_(?:path|file|dir|name|type)$|(?:^|_)text_key$")
_NO_SECRET = re.compile(r"\d{1,12}|true|false|none|null", re.IGNORECASE)

_SHAPES = (
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", "-----BEGIN "),
    (r"hf_[A-Za-z0-9]{16,}", "hf_"),
    (r"\bsk-[A-Za-z0-9_-]{16,}", "sk-"),
    (r"\b[rsp]k_(?:live|test)_\w{10,}", "k_live_", "k_test_"),
    (r"gh[a-z]_[A-Za-z0-9]{20,}", "gh"),
    (r"github_pat_\w{20,}", "github_pat_"),
    (r"\bglpat-[\w-]{16,}", "glpat-"),
    (r"\bxox[a-z]-[A-Za-z0-9-]{10,}", "xox"),
    (r"(?:AKIA|ASIA)[0-9A-Z]{16}", "AKIA", "ASIA"),
    (r"\bAIza[\w-]{35}", "AIza"),
    (r"\beyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]+)?", "eyJ"),
)
"""A token's shape, and what must occur in the text for the shape to be looked for at all."""

_BEARER = re.compile(
    r"((?:\b(?:bearer|basic)|authorization[\"']?\s*[:=]\s*[\"']?token)\s+)[A-Za-z0-9._~+/=-]{8,}",
    re.IGNORECASE,
)
_URL = re.compile(r"(://)(?:[^/?#\s:@'\"]{8,}(?::(?:x-oauth-basic)?)?|([^/\s:@'\"]*:)[^/\s@'\"]+)(?=@)")
"""A token alone, which is longer than the name of most users, or what follows the user's name."""
_ASSIGNED = re.compile(
    r"((?:(?<![a-z0-9])(?:api|access|secret|private|auth|signing|encryption|account)[_-]?key"
    r"|(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!special_)(?<!image_)token"
    r"|secret|password|passwd|passphrase|credentials?)[\"']?\s*[=:]\s*)(?!\[secret\])"
    r"(\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[\"']?[^\s\"',;&)\]}]+)",
    re.IGNORECASE,
)
_TOKENS = tuple((hint, re.compile(shape)) for shape, *hints in _SHAPES for hint in hints)
_NAMES = tuple(
    (word, re.compile(word + r"[\"']?\s*[=:]"))
    for word in ("key", "token", "secret", "password", "passwd", "passphrase", "credential", "credentials")
)
"""The words before a value, and what must occur in the lower-case text for `_ASSIGNED`, which is slow, to be
tried: log lines are full of tokens."""


def names_secret(name: str) -> bool:
    """Whether a variable or key of this name holds a secret: HF_TOKEN, api_key, dbPassword.

    Not HF_TOKEN_PATH, TOKENIZERS_PARALLELISM or PWD, nor our own prepare.text_key.
    """
    words = re.sub(r"\W", "_", _CAMEL.sub("_", name)).lower()
    return _NAMED.search(words) is not None and not _NO_VALUE.search(words)


def values_in(tree: Any, secret: bool = False) -> list[str]:
    """The strings below keys that name secrets, in mappings and lists of any depth: a configuration."""
    if isinstance(tree, Mapping):
        return [v for key, below in tree.items() for v in values_in(below, secret or names_secret(str(key)))]
    if isinstance(tree, (list, tuple)):
        return [v for below in tree for v in values_in(below, secret)]
    return [tree] if secret and isinstance(tree, str) else []


def mask(tree: Any, secret: bool = False, of_text: Optional[Callable[[str], str]] = None) -> Any:
    """A configuration for showing: the same tree, with a marker for what is secret. `of_text`: in place of
    `redact`, which texts below other keys go through."""
    if isinstance(tree, Mapping):
        return {key: mask(below, secret or names_secret(str(key)), of_text) for key, below in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [mask(below, secret, of_text) for below in tree]
    if isinstance(tree, str):
        return MARKER if secret and tree else (of_text or redact)(tree)
    return tree


def mask_args(args: Iterable[str]) -> list[str]:
    """A command line for showing: `+metadata.api_key=...` loses its value."""
    shown = []
    for word in args:
        key, equals, value = word.partition("=")
        secret = equals and value and names_secret(key) and not _NO_SECRET.fullmatch(value)
        shown.append(f"{key}={MARKER}" if secret else redact(word))
    return shown


def values_in_args(args: Iterable[str]) -> list[str]:
    """The secrets on a command line, such as that of `+metadata.api_key=...`."""
    pairs = [word.partition("=") for word in args]
    return [value for key, _, value in pairs if value and names_secret(key)]


def known_values(extra_values: Iterable[str] = (), environ: Optional[Mapping[str, str]] = None) -> list[str]:
    """These secrets and those of the environment, in all forms in which they may occur in a text."""
    variables = env.all_variables() if environ is None else environ
    values = [value for name, value in variables.items() if names_secret(name)]
    return _forms([*values, *extra_values])


def redactor(
    extra_values: Iterable[str] = (), environ: Optional[Mapping[str, str]] = None
) -> Callable[[str], str]:
    """A `redact` that knows these values too. `environ`: in place of this process's environment."""
    known = known_values(extra_values, environ)
    # the longest first: one secret may be the beginning of another
    literal = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True)))) if known else None

    def redact_text(text: str) -> str:
        if literal is not None and any(value in text for value in known):
            text = literal.sub(MARKER, text)
        for hint, shape in _TOKENS:
            if hint in text:
                text = shape.sub(MARKER, text)
        if "://" in text and "@" in text:
            text = _URL.sub(rf"\1\2{MARKER}", text)
        lower = text.lower()
        if "bearer" in lower or "basic" in lower or "authorization" in lower:
            text = _BEARER.sub(rf"\1{MARKER}", text)
        for word, assigned in _NAMES:
            if word in lower and assigned.search(lower):
                return _ASSIGNED.sub(_hide, text)
        return text

    return redact_text


_PLAIN_RUN = re.compile(r"[^\"\\\x00-\x1f]{2,}")


def hint_words() -> list[bytes]:
    """What occurs, in lower case, in every line of JSON in which `redact` would find something."""
    return [hint[1:] for hint in hints()]


@functools.cache
def hints() -> list[bytes]:
    """The same with a `=` in front of each that needs a = or : behind it, and a blank in front of the others.

    JSON may write a character as \\uNNNN, and a slash as \\/.
    """
    shapes = [hint for _, *found in _SHAPES for hint in found if hint != "gh"]
    runs = [max(_PLAIN_RUN.findall(value), key=len, default='\\"') for value in known_values(_learnt)]
    plain = [*shapes, *(f"gh{letter}_" for letter in "abcdefghijklmnopqrstuvwxyz"), *runs]
    plain += ["bearer", "basic", "authorization", "://", "\\u", "\\/"]
    words = [" " + word for word in plain] + ["=" + word for word, _ in _NAMES] + ["=pass"]
    return sorted({word.encode("utf-8", "surrogateescape").lower() for word in words})


_learnt: set[str] = set()
_pupils: list[Callable[[list[str]], None]] = []


def learn(values: Iterable[str]) -> None:
    """Let `redact` know these too: the secrets in this process's configuration."""
    _learnt.update(values)
    _default.cache_clear()
    hints.cache_clear()
    for pupil in _pupils:
        pupil(sorted(_learnt))


def teach(pupil: Callable[[list[str]], None]) -> None:
    """Tell somebody all that was learnt, now and whenever it becomes more."""
    _pupils.append(pupil)
    pupil(sorted(_learnt))


def redact(text: str) -> str:
    """The text without secrets, as far as this process knows them: its environment, what it was told to
    `learn`, and all known shapes."""
    return _default()(text)


@functools.cache
def _default() -> Callable[[str], str]:
    return redactor(_learnt)


def _forms(values: Iterable[str]) -> list[str]:
    """The values as they may occur: as they are, line by line, and in a URL."""
    pieces = {piece.strip() for value in values for piece in (value, *value.splitlines())}
    known = {p for p in pieces if len(p) >= SHORTEST and not _NO_SECRET.fullmatch(p)}
    raw = {p: p.encode("utf-8", "surrogateescape") for p in known}
    return sorted({form for p in known for form in (p, quote(raw[p], safe=""), quote_plus(raw[p]))})


def _hide(match: re.Match[str]) -> str:
    value = match[2].strip("\"'")
    if not value or _NO_SECRET.fullmatch(value):
        return match[0]
    return match[1] + MARKER
