"""Looked-up words against the tokenizer itself: equal ids or none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from strop.data.encode import LONG_CHARS, TextEncoder
from strop.data.words import WordEncoder
from tests.unit.data_helpers import tiny_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3():
    tokenizer = tiny_tokenizer()
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


TOKENIZERS = {"gpt2": tiny_tokenizer(), "llama3": llama3()}
LETTERS = st.sampled_from(
    list("aZé漢٣7²'’sSTl.,!-_ \t\n\r\x0b\x1c\x1f\x85\xa0\u2003\u200b\u3000🙂\u0301ǅ\x00")
)
TEXTS = st.text(LETTERS | st.characters(exclude_categories=("Cs",)), max_size=40)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_the_same_ids_as_the_tokenizer_or_none(name, texts):
    """White space of all kinds, letters and digits of several scripts, contractions in both cases."""
    words = WordEncoder.of(TOKENIZERS[name])
    for text in texts * 2:  # the second time from the table
        ids = words(text)
        if ids is not None:
            assert ids.tolist() == TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ordinary_text_is_looked_up(name):
    words = WordEncoder.of(TOKENIZERS[name])
    for text in ("The fox's 12 apples,\n\n  and more.", "Straße, naïve, 東京, “so” – 🙂"):
        assert words(text) is not None
    assert words("a text with </s> in it") is None


def test_characters_of_another_unicode_version_are_not_trusted():
    """U+10940 is a letter since Unicode 16, which Python's tables know and the tokenizer's may not."""
    tokenizer = TOKENIZERS["gpt2"]
    encoder = TextEncoder(tokenizer)
    for code in (0x558, 0xC5C, 0x208F, 0xA7CE, 0x10940):
        text = f"a{chr(code)}b {chr(code)}1"
        assert encoder([text])[0].tolist()[:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokenizers_of_another_form_are_left_alone():
    other = tiny_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert WordEncoder.of(other) is None
    [ids] = TextEncoder(other)(["12 apples"])
    assert ids.tolist() == [*other("12 apples", add_special_tokens=False)["input_ids"], other.eos_token_id]


@pytest.mark.parametrize("bos", [False, True])
def test_exactly_one_bos_and_eos(bos):
    """Where the text has its own already, too; the empty text is its end alone."""
    tokenizer = tiny_tokenizer(bos=bos)
    first, last = ([tokenizer.bos_token_id] if bos else []), tokenizer.eos_token_id
    plain = tokenizer("so it is", add_special_tokens=False)["input_ids"]
    whole = [*first, *plain, last]
    got = TextEncoder(tokenizer)(["so it is", "so it is</s>", "<s>so it is" if bos else "so it is", ""])
    assert [ids.tolist() for ids in got] == [whole, whole, whole, [*first, last]]


def test_a_long_document_in_stretches_is_the_same():
    """Beyond two stretches, with the cuts only where a blank stands between letters."""
    tokenizer = tiny_tokenizer()
    text = "apples are 12, and the sea shells. " * (2 * LONG_CHARS // 34)
    encoder = TextEncoder(tokenizer)
    assert len(encoder._stretches(text)) == 3
    assert encoder.cuts
    [ids] = encoder([text])
    unit = tokenizer("apples are 12, and the sea shells.", add_special_tokens=False)["input_ids"]
    again = tokenizer(" apples are 12, and the sea shells.", add_special_tokens=False)["input_ids"]
    end = tokenizer(" ", add_special_tokens=False)["input_ids"]
    times = 2 * LONG_CHARS // 34
    assert ids.tolist() == [*unit, *again * (times - 1), *end, tokenizer.eos_token_id]
