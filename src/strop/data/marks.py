"""Chat templates that mark what the assistant says: {% generation %} ... {% endgeneration %}.

transformers gives the marks away only as a mask of tokens, and misplaces those that stand in a macro. So the
template is rewritten to print a sign at each mark; the signs are taken out of the rendered text again, and
what is left is compared, by the caller, with the text that the untouched template gives.
"""

from __future__ import annotations

import re

BEGIN, END = "\uf8ffbegin\uf8fe", "\uf8ffend\uf8fe"
"""Private characters; a row that holds one of these is found out by the comparison."""
OPENING = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
CLOSING = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")


def with_signs(template: str | None) -> str | None:
    """The template with a sign at each mark; None where it has no marks. White space is trimmed around a tag
    as around the tags that it becomes: what stands outermost is a block tag with the same dashes."""
    if template is None or not OPENING.search(template):
        return None
    opened = OPENING.sub(
        lambda tag: f"{{%{tag[1]} generation %}}{{{{ '{BEGIN}' }}}}{{% set strop = 0 {tag[2]}%}}", template
    )
    return CLOSING.sub(
        lambda tag: f"{{%{tag[1]} set strop = 0 %}}{{{{ '{END}' }}}}{{% endgeneration {tag[2]}%}}", opened
    )


def read(signed: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without signs, and the characters [(begin, end)] that stand between them."""
    text, spans = "", []
    for i, piece in enumerate(re.split(f"{BEGIN}|{END}", signed)):
        if i % 2:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans
