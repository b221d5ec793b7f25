"""The demo data: short direct answers preferred to long hedging ones, made from tables of true facts.

A fact is a question with one short answer. Every fact is used once, in one phrasing, either for training
or for validation, so a model that does well on the validation pairs has learnt the style and not the
answers. `pairs()` and `conversations()` are pure functions: the same rows on every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NUM_TRAIN, NUM_VALIDATION = 400, 80
NUM_PASSAGES = 12
"""For validation."""


@dataclass(frozen=True)
class Fact:
    question: str
    answer: str
    """As it stands in the middle of a sentence: "a kitten", "Paris"."""
    sentence: str
    """The answer as a whole sentence."""


# Each line: phrasings of the question (one is drawn), the sentence, then the table "subject=answer".
TABLES: list[tuple[list[str], str, str]] = [
    (
        [
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "Can you name the capital city of {s}?",
            "I am looking at a map of {s}. What is its capital?",
        ],
        "The capital of {s} is {a}.",
        "Albania=Tirana; Algeria=Algiers; Argentina=Buenos Aires; Armenia=Yerevan; Australia=Canberra; "
        "Austria=Vienna; Bangladesh=Dhaka; Belgium=Brussels; Botswana=Gaborone; Brazil=Brasilia; "
        "Bulgaria=Sofia; Cambodia=Phnom Penh; Canada=Ottawa; Chile=Santiago; China=Beijing; "
        "Colombia=Bogota; Croatia=Zagreb; Cuba=Havana; Denmark=Copenhagen; Ecuador=Quito; Egypt=Cairo; "
        "Estonia=Tallinn; Ethiopia=Addis Ababa; Finland=Helsinki; France=Paris; Malaysia=Kuala Lumpur; "
        "Germany=Berlin; Ghana=Accra; Greece=Athens; Hungary=Budapest; Iceland=Reykjavik; "
        "India=New Delhi; Iran=Tehran; Iraq=Baghdad; Ireland=Dublin; Italy=Rome; Jamaica=Kingston; "
        "Japan=Tokyo; Jordan=Amman; Kenya=Nairobi; Latvia=Riga; Lebanon=Beirut; Lithuania=Vilnius; "
        "Malta=Valletta; Mexico=Mexico City; Mongolia=Ulaanbaatar; Morocco=Rabat; Mozambique=Maputo; "
        "Namibia=Windhoek; Nepal=Kathmandu; New Zealand=Wellington; Nigeria=Abuja; Norway=Oslo; "
        "Oman=Muscat; Pakistan=Islamabad; Paraguay=Asuncion; Peru=Lima; Poland=Warsaw; Portugal=Lisbon; "
        "Qatar=Doha; Romania=Bucharest; Rwanda=Kigali; Saudi Arabia=Riyadh; Senegal=Dakar; "
        "Serbia=Belgrade; Slovakia=Bratislava; Slovenia=Ljubljana; South Korea=Seoul; Spain=Madrid; "
        "Sudan=Khartoum; Sweden=Stockholm; Switzerland=Bern; Syria=Damascus; Thailand=Bangkok; "
        "Tunisia=Tunis; Turkey=Ankara; Uganda=Kampala; Ukraine=Kyiv; Uruguay=Montevideo; "
        "Venezuela=Caracas; Vietnam=Hanoi; Zambia=Lusaka; Zimbabwe=Harare",
    ),
    (
        [
            "What is the opposite of {s}?",
            "Which word means the opposite of {s}?",
            "Give me a word that is the opposite of {s}.",
        ],
        "The opposite of {s} is {a}.",
        "hot=cold; big=small; fast=slow; up=down; light=dark; early=late; empty=full; old=new; wet=dry; "
        "high=low; hard=soft; open=closed; rich=poor; strong=weak; long=short; loud=quiet; thick=thin; "
        "wide=narrow; left=right; true=false; first=last; win=lose; push=pull; buy=sell; always=never; "
        "inside=outside; north=south; east=west; day=night; summer=winter; love=hate; heavy=light; "
        "happy=sad; clean=dirty; begin=end; arrive=leave; remember=forget; laugh=cry; deep=shallow; "
        "sweet=bitter",
    ),
    (
        [
            "What is the chemical symbol of {s}?",
            "Which symbol does {s} have in the periodic table?",
            "How do chemists abbreviate {s}?",
        ],
        "The chemical symbol of {s} is {a}.",
        "hydrogen=H; helium=He; lithium=Li; carbon=C; nitrogen=N; oxygen=O; fluorine=F; neon=Ne; "
        "sodium=Na; magnesium=Mg; aluminium=Al; silicon=Si; phosphorus=P; sulfur=S; chlorine=Cl; argon=Ar; "
        "potassium=K; calcium=Ca; iron=Fe; nickel=Ni; copper=Cu; zinc=Zn; silver=Ag; tin=Sn; iodine=I; "
        "tungsten=W; platinum=Pt; gold=Au; mercury=Hg; lead=Pb; uranium=U",
    ),
    (
        ["Which month comes right after {s}?", "What is the month after {s}?"],
        "The month after {s} is {a}.",
        "January=February; February=March; March=April; April=May; May=June; June=July; July=August; "
        "August=September; September=October; October=November; November=December; December=January",
    ),
    (
        ["Which day comes right after {s}?", "If today is {s}, what day is tomorrow?"],
        "The day after {s} is {a}.",
        "Monday=Tuesday; Tuesday=Wednesday; Wednesday=Thursday; Thursday=Friday; Friday=Saturday; "
        "Saturday=Sunday; Sunday=Monday",
    ),
    (
        ["How many {s}?", "Tell me, how many {s}?", "I keep forgetting: how many {s}?"],
        "The number is {a}.",
        "metres are in a kilometre=1,000; centimetres are in a metre=100; millimetres are in a "
        "centimetre=10; grams are in a kilogram=1,000; seconds are in a minute=60; minutes are in an "
        "hour=60; hours are in a day=24; days are in a week=7; months are in a year=12; years are in a "
        "century=100; years are in a decade=10; inches are in a foot=12; feet are in a yard=3; ounces "
        "are in a pound=16; millilitres are in a litre=1,000; degrees are in a right angle=90; degrees "
        "are in a full circle=360; eggs are in a dozen=12; players does a football team have on the "
        "pitch=11; letters are in the English alphabet=26; days are in a leap year=366; days does June "
        "have=30; days does July have=31; sides does a triangle have=3; sides does a square have=4; "
        "sides does a pentagon have=5; sides does a hexagon have=6; sides does an octagon have=8; faces "
        "does a cube have=6; corners does a cube have=8; edges does a cube have=12; legs does a spider "
        "have=8; legs does an ant have=6; legs does a horse have=4; arms does an octopus have=8; planets "
        "are in the solar system=8; strings does a violin have=4; squares are on a chessboard=64; cards "
        "are in a standard deck without jokers=52; bits are in a byte=8",
    ),
    (
        [
            "What is a young {s} called?",
            "What do you call a young {s}?",
            "Which word is there for a young {s}?",
        ],
        "A young {s} is called {a}.",
        "dog=a puppy; cat=a kitten; cow=a calf; sheep=a lamb; horse=a foal; goat=a kid; pig=a piglet; "
        "duck=a duckling; goose=a gosling; swan=a cygnet; frog=a tadpole; bear=a cub; kangaroo=a joey; "
        "deer=a fawn; chicken=a chick; hare=a leveret; owl=an owlet",
    ),
    (
        ["Which language do most people in {s} speak?", "What is the main language of {s}?"],
        "Most people in {s} speak {a}.",
        "Brazil=Portuguese; Austria=German; Mexico=Spanish; Egypt=Arabic; Japan=Japanese; Greece=Greek; "
        "Argentina=Spanish; Hungary=Hungarian; Poland=Polish; Iran=Persian; Turkey=Turkish; Sweden=Swedish; "
        "Thailand=Thai; Italy=Italian; Australia=English; Portugal=Portuguese; Bulgaria=Bulgarian; "
        "Romania=Romanian; Iceland=Icelandic; Israel=Hebrew; Vietnam=Vietnamese; Chile=Spanish",
    ),
    (
        ["What is the currency of {s}?", "With which money do people pay in {s}?"],
        "The currency of {s} is {a}.",
        "Japan=the yen; India=the Indian rupee; Switzerland=the Swiss franc; Poland=the zloty; "
        "Germany=the euro; Spain=the euro; Canada=the Canadian dollar; Mexico=the Mexican peso; "
        "South Korea=the won; Thailand=the baht; Sweden=the Swedish krona; Hungary=the forint; "
        "Brazil=the real; South Africa=the rand; Israel=the shekel; Vietnam=the dong; "
        "Bangladesh=the taka; Ukraine=the hryvnia; Peru=the sol; Finland=the euro",
    ),
    (
        ["What colour is {s}?", "Which colour does {s} have?"],
        "The colour of {s} is {a}.",
        "fresh grass=green; a ripe banana=yellow; a ripe tomato=red; fresh snow=white; coal=black; "
        "a clear sky at noon=blue; an emerald=green; a ruby=red; a sapphire=blue; a carrot=orange; "
        "milk=white; an egg yolk=yellow; chocolate=brown; a mix of red and white paint=pink; "
        "a mix of blue and yellow paint=green; a mix of black and white paint=grey; "
        "a mix of red and yellow paint=orange; a mix of red and blue paint=purple",
    ),
    (
        ["What is the plural of '{s}'?", "How do I write more than one '{s}'?"],
        "The plural of '{s}' is {a}.",
        "mouse=mice; child=children; foot=feet; tooth=teeth; goose=geese; man=men; woman=women; "
        "person=people; leaf=leaves; knife=knives; wolf=wolves; half=halves; city=cities; baby=babies; "
        "box=boxes; potato=potatoes; sheep=sheep; ox=oxen; crisis=crises; lady=ladies",
    ),
    (
        ["What is the past tense of '{s}'?", "How do I put the verb '{s}' into the simple past?"],
        "The past tense of '{s}' is {a}.",
        "go=went; see=saw; eat=ate; run=ran; take=took; give=gave; write=wrote; drive=drove; sing=sang; "
        "swim=swam; buy=bought; think=thought; bring=brought; teach=taught; catch=caught; fly=flew; "
        "know=knew; break=broke; choose=chose; sleep=slept; keep=kept; find=found; hold=held; tell=told",
    ),
    (
        ["On which continent is {s}?", "Which continent does {s} belong to?"],
        "{s} is in {a}.",
        "Kenya=Africa; Peru=South America; Norway=Europe; Mongolia=Asia; Canada=North America; "
        "Ghana=Africa; Vietnam=Asia; Portugal=Europe; Uruguay=South America; Morocco=Africa; Nepal=Asia; "
        "Ireland=Europe; Bolivia=South America; Senegal=Africa; Thailand=Asia; Austria=Europe; "
        "Chile=South America; Zambia=Africa; Japan=Asia; Poland=Europe; Namibia=Africa; India=Asia",
    ),
    (
        ["Who wrote {s}?", "Who is the author of {s}?"],
        "{a} wrote {s}.",
        "Hamlet=William Shakespeare; Pride and Prejudice=Jane Austen; Oliver Twist=Charles Dickens; "
        "War and Peace=Leo Tolstoy; Don Quixote=Miguel de Cervantes; Faust=Johann Wolfgang von Goethe; "
        "Moby-Dick=Herman Melville; Frankenstein=Mary Shelley; Les Miserables=Victor Hugo; "
        "Crime and Punishment=Fyodor Dostoevsky; Jane Eyre=Charlotte Bronte; Dracula=Bram Stoker; "
        "Treasure Island=Robert Louis Stevenson; The Odyssey=Homer; The Divine Comedy=Dante Alighieri",
    ),
    (
        ["In which year did {s}?", "When did {s}?"],
        "It was in {a}.",
        "the First World War begin=1914; the Second World War end=1945; the French Revolution begin=1789; "
        "Columbus first reach the Americas=1492; people first land on the Moon=1969; "
        "the Berlin Wall fall=1989; the Titanic sink=1912; the Second World War begin=1939; "
        "the First World War end=1918; the battle of Hastings take place=1066",
    ),
]

OPENERS = [
    "That is a really interesting question, and there are several ways to look at it.",
    "Well, this is something that people have discussed for a very long time.",
    "Thank you for asking! There is quite a lot that one could say about this.",
    "It is difficult to give a simple answer here, since much depends on the context.",
    "Let me think about this carefully, because there are many things to consider.",
    "As with most questions of this kind, opinions may differ to some extent.",
    "I should say first that I may not have all the information that is needed.",
    "There are many perspectives on this topic, and each has its own merits.",
]
STATEMENTS = [
    "Generally speaking, many people would probably say that it might be {a},",
    "If I had to guess, I would perhaps suggest that the answer could be {a},",
    "Some sources seem to indicate that it may well be {a},",
    "One could argue, with some caution, that it is possibly {a},",
    "In most cases it is often believed to be something like {a},",
    "It would not be entirely unreasonable to think of {a} here,",
    "From what I understand, it could in all likelihood be {a},",
    "A fairly common view appears to be that it is {a},",
]
CLOSERS = [
    "but I would recommend that you check this with other sources as well.",
    "although it is always worth keeping in mind that there may be exceptions.",
    "but of course it depends on how exactly you look at the matter.",
    "though I cannot be completely sure, and you may want to ask an expert.",
    "but please note that this is only a general remark and may vary.",
    "however, it is important to remember that things are rarely that simple.",
    "yet there might be other factors that should be taken into account too.",
    "although a more detailed discussion would be needed to say this with certainty.",
]


def facts() -> list[Fact]:
    """Every fact once, in table order, each in one phrasing."""
    draw = random.Random(1)
    found = []
    for phrasings, sentence, table in TABLES:
        for entry in table.split("; "):
            subject, answer = entry.split("=")
            question = draw.choice(phrasings).format(s=subject)
            whole = sentence.format(s=subject, a=answer)
            found.append(Fact(question, answer, whole[0].upper() + whole[1:]))
    return found + _arithmetic(draw) + _letters(draw)


def _arithmetic(draw: random.Random) -> list[Fact]:
    sums = draw.sample([(a, b) for a in range(2, 50) for b in range(2, 50)], 35)
    differences = draw.sample([(a, b) for a in range(20, 99) for b in range(2, 19)], 30)
    products = draw.sample([(a, b) for a in range(2, 13) for b in range(2, 13)], 30)
    found = []
    for sign, word, numbers in (("+", "plus", sums), ("-", "minus", differences), ("*", "times", products)):
        for a, b in numbers:
            answer = str({"+": a + b, "-": a - b, "*": a * b}[sign])
            question = draw.choice(
                [
                    f"What is {a} {word} {b}?",
                    f"How much is {a} {sign} {b}?",
                    f"Please compute {a} {word} {b}.",
                ]
            )
            found.append(Fact(question, answer, f"{a} {word} {b} is {answer}."))
    return found


def _letters(draw: random.Random) -> list[Fact]:
    words = "garden window river mountain yellow butter pencil teacher bridge island candle forest orange"
    words += " kitchen blanket summer rabbit elephant school music"
    found = []
    for word in words.split():
        answer = str(len(word))
        question = draw.choice([f"How many letters does '{word}' have?", f"Count the letters of '{word}'."])
        found.append(Fact(question, answer, f"'{word}' has {answer} letters."))
    return found


def _rows() -> list[tuple[str, str, str]]:
    """(question, direct answer, hedging answer) in a fixed mixed order."""
    draw = random.Random(2)
    mixed = facts()
    draw.shuffle(mixed)
    rows = []
    for fact in mixed:
        parts = [draw.choice(OPENERS), draw.choice(STATEMENTS).format(a=fact.answer), draw.choice(CLOSERS)]
        if draw.random() < 0.3:  # not every hedge takes three steps
            del parts[0]
        rows.append((fact.question, fact.sentence, " ".join(parts)))
    return rows


def _split(rows: list[dict]) -> dict[str, list[dict]]:
    return {"validation": rows[:NUM_VALIDATION], "training": rows[NUM_VALIDATION:][:NUM_TRAIN]}


def pairs() -> dict[str, list[dict]]:
    """Preference rows (message lists) by part: training, validation."""
    return _split(
        [
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": direct}],
                "rejected": [{"role": "assistant", "content": hedging}],
            }
            for question, direct, hedging in _rows()
        ]
    )


def passages() -> dict[str, list[dict]]:
    """Rows of plain text by part: the facts as sentences, eight to a passage."""
    sentences = [fact.sentence for fact in facts()]
    random.Random(3).shuffle(sentences)
    rows = [{"text": " ".join(sentences[i : i + 8])} for i in range(0, len(sentences), 8)]
    return {"validation": rows[:NUM_PASSAGES], "training": rows[NUM_PASSAGES:]}


def conversations() -> dict[str, list[dict]]:
    """SFT rows by part: the same questions with their direct answers."""
    return {
        part: [{"messages": row["prompt"] + row["chosen"]} for row in rows] for part, rows in pairs().items()
    }
