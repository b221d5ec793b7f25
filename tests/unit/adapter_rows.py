"""Rows as the known data sets have them (true schemas, content made up), and what becomes of them."""

from __future__ import annotations

from strop.data import adapt
from strop.data.sources import Row


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def helpsteer3(preference, **changes):
    judged = {"score": preference, "reasoning": "r", "feedback1": "f", "feedback2": "g"}
    return {
        "domain": "general",
        "language": "english",
        "context": [user("Name a bird."), assistant("Owl."), user("Another?")],
        "response1": "Wren.",
        "response2": "Trout.",
        "overall_preference": preference,
        "individual_preference": [judged],
    } | changes


ULTRA = {
    "prompt": "Name a bird.",
    "prompt_id": "a1",
    "chosen": [user("Name a bird."), assistant("Wren.")],
    "rejected": [user("Name a bird."), assistant("Trout.")],
    "messages": [user("Name a bird."), assistant("Wren.")],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
TULU_TURNS = [user("Name a bird."), assistant("Owl."), user("Another?")]
TULU = {
    "id": "x1",
    "prompt": "Name a bird.",
    "chosen": [*TULU_TURNS, assistant("Wren.")],
    "rejected": [*TULU_TURNS, assistant("Trout.")],
    "source": "made-up",
}
HH_PROMPT = "\n\nHuman: Name a bird.\n\nAssistant: Owl.\n\nHuman: Another?"
HH = {
    "chosen": f"{HH_PROMPT}\n\nAssistant: Wren.\n\nA small one.",
    "rejected": f"{HH_PROMPT}\n\nAssistant: Trout.",
}
SQUAD = {
    "id": "q1",
    "title": "Wren",
    "context": "The wren is a small bird.",
    "question": "What is the wren?",
    "answers": {"text": ["a small bird", "bird"], "answer_start": [12, 20]},
}
MATH = {"problem": "$1+1$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2}$."}
OPENMATH = {
    "problem": "1+1?",
    "generated_solution": "It is \\boxed{2}.",
    "expected_answer": "2",
    "problem_source": "gsm8k",
}
GSM8K = {"question": "One and one?", "answer": "1+1=<<1+1=2>>2\n#### 2"}

ONE_TO_ONE = [
    (
        "helpsteer3",
        "preference",
        helpsteer3(-2),
        {"prompt": TULU_TURNS, "chosen": "Wren.", "rejected": "Trout.", "margin": 2.0},
    ),
    (  # the other direction, and a context that is one text
        "helpsteer3",
        "preference",
        helpsteer3(3, context="Name a fish."),
        {"prompt": [user("Name a fish.")], "chosen": "Trout.", "rejected": "Wren.", "margin": 3.0},
    ),
    (
        "tulu3-preference",
        "preference",
        TULU,
        {"chosen": [*TULU_TURNS, assistant("Wren.")], "rejected": [*TULU_TURNS, assistant("Trout.")]},
    ),
    (
        "tulu3-sft",
        "sft",
        {"id": "x1", "messages": ULTRA["messages"], "source": "made-up"},
        {"messages": [user("Name a bird."), assistant("Wren.")]},
    ),
    (
        "ultrafeedback",
        "preference",
        ULTRA,
        {
            "chosen": [user("Name a bird."), assistant("Wren.")],
            "rejected": [user("Name a bird."), assistant("Trout.")],
            "chosen_score": 8.5,
            "rejected_score": 3.0,
        },
    ),
    ("ultrafeedback", "sft", ULTRA, {"messages": [user("Name a bird."), assistant("Wren.")]}),
    (
        "hh",
        "preference",
        HH,
        {
            "prompt": TULU_TURNS,
            "chosen": [assistant("Wren.\n\nA small one.")],
            "rejected": [assistant("Trout.")],
        },
    ),
    (
        "squad",
        "sft",
        SQUAD,
        {"messages": [user("The wren is a small bird.\n\nWhat is the wren?"), assistant("a small bird")]},
    ),
    ("openmathinstruct2", "sft", OPENMATH, {"messages": [user("1+1?"), assistant("It is \\boxed{2}.")]}),
    ("openmathinstruct2", "text", OPENMATH, {"text": "1+1?\n\nIt is \\boxed{2}."}),
    (
        "gsm8k",
        "sft",
        GSM8K,
        {"messages": [user("One and one?"), assistant("1+1=<<1+1=2>>2\n#### 2")]},
    ),
    ("gsm8k", "text", GSM8K, {"text": "One and one?\n\n1+1=<<1+1=2>>2\n#### 2"}),
    ("math", "sft", MATH, {"messages": [user("$1+1$?"), assistant("It is $\\boxed{2}$.")]}),
    ("math", "text", MATH, {"text": "$1+1$?\n\nIt is $\\boxed{2}$."}),
]


def adapted(name, kind, fields, **args):
    rows = [Row("s.jsonl", line, item) for line, item in enumerate(fields, start=1)]
    return list(adapt.rows(rows, adapt.Use(name, kind, args)))


def message(tree, own, parent, role, text, rank=None, **more):
    return {
        "message_id": own,
        "parent_id": parent,
        "text": text,
        "role": role,
        "lang": "en",
        "deleted": False,
        "rank": rank,
        "message_tree_id": tree,
    } | more


TREES = [
    message("t1", "a", None, "prompter", "Name a bird."),
    message("t1", "b", "a", "assistant", "Trout.", 1),
    message("t1", "c", "b", "prompter", "No."),
    message("t1", "d", "a", "assistant", "Wren.", 0),
    message("t1", "e", "d", "prompter", "Another?"),  # no rank: the first of them
    message("t1", "f", "d", "prompter", "Thanks."),
    message("t1", "g", "e", "assistant", "Deleted.", 0, deleted=True),
    message("t1", "h", "e", "assistant", "No rank."),
    message("t1", "i", "e", "assistant", "Owl.", 2),
    message("t1", "j", "i", "prompter", "A last word without an answer."),
    message("t2", "k", None, "prompter", "Nobody answered."),
    message("t3", "l", None, "prompter", "Hello."),
    message("t3", "m", "l", "assistant", "Hi."),
]
