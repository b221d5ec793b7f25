"""Public data sets by their names: where each lies on the hub, and how a row of it becomes one of ours.

`data.train=helpsteer3` (or `nvidia/HelpSteer3`) finds its entry in TABLE, which knows repository, subset and
splits. The entry's form for the kind of rows that the algorithm takes (preference, sft, text) says which
fields a row must have, and its function makes the fields that `render.py` knows out of them. A function gets
the row as it was published and gives fields, a list of them, or `LeftOut` for a sound row that is of no use;
it raises `Refused` for one that is not as it should be. To add a set is to add an entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

from strop.data.fields import Refused

Fields = dict[str, Any]


@dataclass(frozen=True)
class LeftOut:
    """What an adapter gives for a row that is sound but not wanted: the ledger counts it by its reason."""

    reason: str
    """A short constant, such as tie."""
    message: str = "left out by the adapter"


Made = Union[Fields, list[Fields], LeftOut, None]


@dataclass(frozen=True)
class Form:
    """How the rows of a set become rows of one kind."""

    make: Callable[..., Made]
    """Called with the fields of a row, or of all rows of a group."""
    needs: dict[str, tuple[type, ...]]
    """Fields that a row must have, and their types."""
    train: str = "train"
    """Splits on the hub."""
    validation: str | None = None


@dataclass(frozen=True)
class Adapter:
    repository: str
    """On the hub."""
    forms: dict[str, Form]
    """By the kind of rows: preference, sft, text."""
    subset: str | None = None
    group: str | None = None
    """Neighbouring rows that have this field in common are one: the function gets them as a list."""
    version: int = 1
    """Raise it when the same row would become another: token stores are kept by it."""


def _user(text: str) -> Fields:
    return {"role": "user", "content": text}


def _answered(question: str, answer: str) -> Fields:
    return {"messages": [_user(question), {"role": "assistant", "content": answer}]}


def _helpsteer3(row: Fields) -> Made:
    """overall_preference: -3 (response 1 is much better) to 3 (response 2 is)."""
    strength = row["overall_preference"]
    if strength not in range(-3, 4):
        raise Refused("wrong_fields", f"overall_preference is {strength}, not a whole number from -3 to 3")
    if strength == 0:
        return LeftOut("tie", "overall_preference is 0: neither response is the better one")
    context = row["context"]
    prompt = [_user(context)] if isinstance(context, str) else context
    first, second = row["response1"], row["response2"]
    chosen, rejected = (first, second) if strength < 0 else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": float(abs(strength))}


def _conversations(row: Fields) -> Made:
    """Two conversations that share their beginning; `prompt` beside them is only its first message."""
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def _ultrafeedback(row: Fields) -> Made:
    scores = {"chosen_score": row.get("score_chosen"), "rejected_score": row.get("score_rejected")}
    return {"chosen": row["chosen"], "rejected": row["rejected"], **scores}


def _messages(row: Fields) -> Made:
    return {"messages": row["messages"]}


_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def _turns(text: str, name: str) -> list[Fields]:
    """A text of `\\n\\nHuman:` and `\\n\\nAssistant:` turns as messages."""
    before, *rest = _SPEAKER.split(text)
    speakers, contents = rest[0::2], [content.strip() for content in rest[1::2]]
    if before.strip() or not speakers:
        raise Refused("odd_turns", f"{name} does not begin with '\\n\\nHuman:'")
    wanted = ["Human", "Assistant"] * (len(speakers) // 2)
    if speakers != wanted:
        raise Refused(
            "odd_turns", f"in {name} the turns are not Human and Assistant in turn, ending with the latter"
        )
    if "" in contents:
        raise Refused("odd_turns", f"turn {contents.index('') + 1} of {name} is empty")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[s], "content": c} for s, c in zip(speakers, contents)]


def _hh(row: Fields) -> Made:
    chosen, rejected = _turns(row["chosen"], "chosen"), _turns(row["rejected"], "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Refused("odd_turns", "chosen and rejected differ before their last turn")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _squad(row: Fields) -> Made:
    texts = row["answers"].get("text")
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise Refused("wrong_fields", "answers has no list of texts under text")
    if not texts:
        return LeftOut("no_answer", "a question without an answer (version 2 of the set)")
    return _answered(f"{row['context']}\n\n{row['question']}", texts[0])


def _question(asked: str, answered: str) -> dict[str, Form]:
    """Forms of a set of questions and answers, for SFT and as text."""
    needs: dict[str, tuple[type, ...]] = {asked: (str,), answered: (str,)}
    return {
        "sft": Form(lambda row: _answered(row[asked], row[answered]), needs),
        "text": Form(lambda row: {"text": f"{row[asked]}\n\n{row[answered]}"}, needs),
    }


def _held_out(forms: dict[str, Form], split: str) -> dict[str, Form]:
    return {kind: Form(form.make, form.needs, form.train, split) for kind, form in forms.items()}


def _best_path(rows: list[Fields]) -> Made:
    """The messages of one tree -> one conversation: from the prompt on the best-ranked reply (rank 0), and so
    on down to the last answer. A message without a rank comes after those with one."""
    replies: dict[Any, list[Fields]] = {}
    for row in rows:
        if not row.get("deleted"):
            replies.setdefault(row.get("parent_id"), []).append(row)
    path: list[Fields] = []
    while below := replies.pop(path[-1]["message_id"] if path else None, None):
        ranked = [r if isinstance(r := row.get("rank"), (int, float)) else math.inf for row in below]
        path.append(below[ranked.index(min(ranked))])
    roles = {"prompter": "user", "assistant": "assistant"}
    if any(row["role"] not in roles for row in path):
        raise Refused("wrong_fields", "a role that is neither prompter nor assistant")
    messages = [{"role": roles[row["role"]], "content": row["text"]} for row in path]
    while messages and messages[-1]["role"] == "user":
        messages.pop()
    if not messages:
        return LeftOut("no_answer", "a message tree without an answer of the assistant")
    return {"messages": messages}


_PAIR: dict[str, tuple[type, ...]] = {"chosen": (list,), "rejected": (list,)}
_TREE = Form(
    _best_path,
    {"message_id": (str,), "message_tree_id": (str,), "role": (str,), "text": (str,)},
    "train",
    "validation",
)

TABLE: dict[str, Adapter] = {
    "helpsteer3": Adapter(
        "nvidia/HelpSteer3",
        {
            "preference": Form(
                _helpsteer3,
                {
                    "context": (str, list),
                    "response1": (str,),
                    "response2": (str,),
                    "overall_preference": (int, float),
                },
                validation="validation",
            )
        },
        subset="preference",
    ),
    "tulu3-preference": Adapter(
        "allenai/llama-3.1-tulu-3-8b-preference-mixture", {"preference": Form(_conversations, _PAIR)}
    ),
    "tulu3-sft": Adapter("allenai/tulu-3-sft-mixture", {"sft": Form(_messages, {"messages": (list,)})}),
    "ultrafeedback": Adapter(
        "HuggingFaceH4/ultrafeedback_binarized",
        {
            "preference": Form(_ultrafeedback, _PAIR, "train_prefs", "test_prefs"),
            "sft": Form(_messages, {"messages": (list,)}, "train_sft", "test_sft"),
        },
    ),
    "hh": Adapter(
        "Anthropic/hh-rlhf",
        {"preference": Form(_hh, {"chosen": (str,), "rejected": (str,)}, validation="test")},
    ),
    "squad": Adapter(
        "rajpurkar/squad",
        {
            "sft": Form(
                _squad,
                {"context": (str,), "question": (str,), "answers": (dict,)},
                validation="validation",
            )
        },
    ),
    "oasst1": Adapter("OpenAssistant/oasst1", {"sft": _TREE}, group="message_tree_id"),
    "oasst2": Adapter("OpenAssistant/oasst2", {"sft": _TREE}, group="message_tree_id"),
    "openmathinstruct2": Adapter("nvidia/OpenMathInstruct-2", _question("problem", "generated_solution")),
    "gsm8k": Adapter("openai/gsm8k", _held_out(_question("question", "answer"), "test"), subset="main"),
    "math": Adapter(
        "DigitalLearningGmbH/MATH-lighteval", _held_out(_question("problem", "solution"), "test")
    ),
}
"""math: all subjects; other copies of MATH have the same fields (data.adapter=math). oasst1, oasst2: one
conversation a message tree."""
