"""The end of a message about a name that there is not."""

import pytest

from strop import similar


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("q_porj", ["v_proj", "q_proj", "q_proj", "mlp"], "; did you mean q_proj or v_proj?"),
        ("x", ["sft"], "; there is sft"),
        ("x", ["sft", "dpo", "sft"], "; there are sft, dpo"),
        ("x", [f"n{i}" for i in range(99)], "; there are " + ", ".join(f"n{i}" for i in range(12))),
        ("x", [], ""),
    ],
)
def test_names_like_the_word_or_those_that_there_are(word, known, expected):
    assert similar.meant_or_known(word, iter(known)) == expected
    assert similar.meant(word, known) == (expected if "did you mean" in expected else "")
