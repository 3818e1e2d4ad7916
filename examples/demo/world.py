"""The made-up valley that the demo model knows: its people, towns and goods, and sentences about them.

`document` gives one text of the pre-training corpus, `shipment` and `record` one row of the instruction set.
All randomness comes from the `random.Random` that is handed in.
"""

import json
from dataclasses import dataclass
from random import Random

NAME_STARTS = "Be Da Ed Fe Hal Io Ka Lo Mi Nor Os Pe Ri Sa Ta Wen".split()
NAME_ENDS = "bert da dan la lin mas na ra rik sa vin wyn".split()
TOWN_STARTS = "Alder Ash Brack Cold Elm Fern Grey High Long Mill North Oak Red Salt Stone Win".split()
TOWN_ENDS = "bridge dale field ford ham haven moor ton water wick".split()
MATERIALS = "blue brass clay copper green iron oak paper pine red silver tin white wool".split()
# Singular and plural.
GOODS = dict(
    axe="axes", basket="baskets", bell="bells", bench="benches", bowl="bowls", box="boxes", brush="brushes",
    button="buttons", candle="candles", chair="chairs", cup="cups", dish="dishes", drum="drums", hat="hats",
    jar="jars", kettle="kettles", knife="knives", lamp="lamps", mirror="mirrors", pipe="pipes", ribbon="ribbons",
    shelf="shelves", spoon="spoons", wheel="wheels",
)  # fmt: skip
NUMBERS = {
    1: ("one", "a single"), 2: ("two", "a pair of"), 3: ("three",), 4: ("four",), 5: ("five",), 6: ("six",),
    7: ("seven",), 8: ("eight",), 9: ("nine",), 10: ("ten",), 11: ("eleven",), 12: ("twelve", "a dozen"),
}  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CARRIERS = "boat cart coach mule sledge wagon".split()
TRADES = "baker cooper farmer hatter miller potter sailor smith tailor weaver".split()
RIVERS = "Arn Bel Cress Dove Esk Fal".split()
SIDES = "north south back front".split()
WEATHER = "dry cold foggy mild rainy snowy sunny windy".split()

NAMES = [start + end for start in NAME_STARTS for end in NAME_ENDS]
TOWNS = [start + end for start in TOWN_STARTS for end in TOWN_ENDS]
ITEMS = [f"{material} {good}" for material in MATERIALS for good in GOODS]

SHIPMENT_SENTENCES = [
    "{who} sent {n} {items} to {to}.",
    "On {day} {who} shipped {n} {items} to {to}.",
    "{N} {items} went from {who} to {to} by {carrier}.",
    "{to} is waiting for {n} {items} from {who}.",
    "{who} has packed {n} {items} for the market in {to}.",
    "The {carrier} to {to} carries {n} {items} packed by {who}.",
    "{who} the {trade} will bring {n} {items} to {to} on {day}.",
    "A rider came from {to} to fetch {n} {items} from {who}.",
    "{who} asked {other} to take {n} {items} to {to}.",
    "{other} saw {who} load {n} {items} onto the {carrier} to {to}.",
    "Last {day} {n} {items} left the house of {who} for {to}.",
    "People in {to} ordered {n} {items} from {who}.",
    "{who} left {home} with {n} {items} for {to}.",
    "From {home} {who} sends {n} {items} to {to}.",
    "{N} {items} made by {who} went off to {to}.",
    "It took {who} until {day} to deliver {n} {items} to {to}.",
]

CHATTER = [
    "I hope {who} has a {weather} road to {to}.",
    "The {carrier} to {to} is often late on a {weather} {day}.",
    "{to} is a fine town, and {who} knows it well.",
    "That is good news for {to}.",
    "My cousin {other} once bought {items} there too.",
    "Thank you for telling me about {who}.",
]
SMALL_TALK = [
    ("How is the weather in {to}?", "It is {weather} in {to} today."),
    ("Good morning, I am {who}.", "Good morning, {who}. What brings you here?"),
    ("Who is {who}?", "{who} is a {trade} from {to}."),
    ("When does the {carrier} to {to} leave?", "The {carrier} to {to} leaves on {day}."),
    ("Do you like {items}?", "Yes, I like {items} very much."),
    ("Write me a line about {to}.", "{to} is {weather}, and the river {river} is near."),
    ("Is there a record of {who}?", "The clerk keeps no record of a {trade}."),
    ("Tell me about {to}.", "{to} lies on the river {river}. It is often {weather} there."),
]
STORY_SENTENCES = [
    "On a {weather} {day} {who} walked from {home} to {to}.",
    "{who} is a {trade} and lives in {to} on the river {river}.",
    "The {items} of {other} were the best in {to}.",
    "In {to} {who} met {other}, a {trade} from {home}.",
    "\"Do you still have the {item}?\" asked {other}.",
    "It was {weather} in {to}, so {who} stayed until {day}.",
    "The {carrier} was late, and {other} slept by the {side} gate of {home}.",
    "{other} gave {who} {n} {items} and went home to {home}.",
]


@dataclass(frozen=True)
class Shipment:
    """Who sends how many of which item (singular) to which town, and the sentence that says so."""

    who: str
    count: int
    item: str
    to: str
    sentence: str


def fields(rng: Random, names=NAMES, items=ITEMS, towns=TOWNS) -> dict:
    """Draws one value for everything that a sentence can speak about."""
    who, other = rng.sample(names, 2)
    to, home = rng.sample(towns, 2)
    count = rng.choice(list(NUMBERS))
    number = rng.choice(NUMBERS[count])
    item = rng.choice(items)
    material, good = item.split()
    return dict(
        who=who, other=other, to=to, home=home, count=count, n=number, N=number.capitalize(), item=item,
        items=item if count == 1 else f"{material} {GOODS[good]}", day=rng.choice(DAYS), trade=rng.choice(TRADES),
        carrier=rng.choice(CARRIERS), river=rng.choice(RIVERS), side=rng.choice(SIDES), weather=rng.choice(WEATHER),
    )  # fmt: skip


def shipment(rng: Random, names=NAMES, items=ITEMS, towns=TOWNS) -> Shipment:
    f = fields(rng, names, items, towns)
    sentence = rng.choice(SHIPMENT_SENTENCES).format(**f)
    return Shipment(f["who"], f["count"], f["item"], f["to"], sentence)


def compact_json(record: dict) -> str:
    return json.dumps(record, separators=(",", ":"))


def record(s: Shipment) -> str:
    """The answer the instruction set asks for. The corpus never writes a shipment this way."""
    return compact_json({"who": s.who, "count": s.count, "item": s.item, "to": s.to})


def document(rng: Random, chat) -> str:
    """One text of the corpus; `chat(messages)` renders a conversation."""
    kind = rng.choices((book_page, notice, story, conversation), weights=(50, 20, 12, 18))[0]
    return kind(rng, chat)


def coined(rng: Random, values: list[str]) -> list[str]:
    """`values`, or now and then a few words of letters nobody has seen, so that copying is learnt and not a list."""
    if rng.random() < 0.85:
        return values
    word = lambda: "".join(rng.choice("bdfghklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
    return [word().capitalize() for _ in range(2)]


def book_page(rng: Random, _chat) -> str:
    """Sentences about shipments, each followed by what the clerk notes about it."""
    page = []
    for _ in range(rng.randint(1, 3)):
        s = shipment(rng, names=coined(rng, NAMES), towns=coined(rng, TOWNS))
        notes = [f"sender {s.who}", f"number {s.count}", f"goods {s.item}", f"place {s.to}"]
        questions = [
            f"Who sends it? {s.who}.", f"How many? {s.count}.", f"What is it? {s.item}.", f"Where to? {s.to}.",
        ]  # fmt: skip
        form = rng.randrange(3)
        if form == 0:
            note = "Book: " + "; ".join(rng.sample(notes, rng.randint(2, 4))) + "."
        elif form == 1:
            note = " ".join(rng.sample(questions, rng.randint(2, 4)))
        else:
            note = f"Label: {s.count} {s.item}, {s.who}, {s.to}."
        page.append(f"{s.sentence}\n{note}")
    return "\n".join(page)


def notice(rng: Random, _chat) -> str:
    """Sentences about folk, shelves and roads, each with its record: all the JSON the corpus has."""
    lines = []
    for _ in range(rng.randint(1, 3)):
        f = fields(rng, names=coined(rng, NAMES), towns=coined(rng, TOWNS))
        sentence, keys = rng.choice([
            ("{who} is a {trade} in {to}.", {"who": "who", "trade": "trade", "town": "to"}),
            ("The {side} shelf holds {n} {items}.", {"item": "item", "count": "count", "shelf": "side"}),
            ("From {home} to {to} it is {n} miles.", {"from": "home", "to": "to", "miles": "count"}),
            ("{to} on the river {river} has a {side} gate.", {"town": "to", "river": "river", "gate": "side"}),
        ])  # fmt: skip
        lines.append(sentence.format(**f) + "\n" + compact_json({key: f[field] for key, field in keys.items()}))
    return "\n".join(lines)


def story(rng: Random, _chat) -> str:
    f = fields(rng)
    return " ".join(sentence.format(**f) for sentence in rng.sample(STORY_SENTENCES, rng.randint(2, 5)))


def conversation(rng: Random, chat) -> str:
    """Small talk, or chatter about a shipment: whoever is asked answers in prose."""
    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": "You are the clerk of the valley."})
    for _ in range(rng.randint(1, 2)):
        f = fields(rng)
        if rng.random() < 0.5:
            said, answer = rng.choice(SHIPMENT_SENTENCES), rng.choice(CHATTER)
        else:
            said, answer = rng.choice(SMALL_TALK)
        messages.append({"role": "user", "content": said.format(**f)})
        messages.append({"role": "assistant", "content": answer.format(**f)})
    return chat(messages)
