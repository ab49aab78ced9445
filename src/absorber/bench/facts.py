"""Facts to be planted in a text and asked for later: pass keys, names, numbers, and what belongs to what.

Nobody can guess an answer from its question, and no two facts of a stream are about the same thing. A question comes in
two wordings: that of the text, which the answer continues, and another.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from absorber.errors import BenchmarkError

Wording = Literal["text", "other"]
WORDINGS: tuple[Wording, ...] = ("text", "other")

# fmt: off
_PLACES = [
    "Ashcombe", "Birchwell", "Coldharbour", "Dunmere", "Eastlow", "Fernhill", "Gorsley", "Hexton", "Ivybridge",
    "Kelmoor", "Longford", "Marwick", "Netherby", "Oakdale", "Pinmoor", "Ravenscar", "Stanmore", "Thornby", "Uplyme",
    "Westholm",
]
_SHIPS = [
    "Seabird", "Halcyon", "Meteor", "Corsair", "Pelican", "Minerva", "Swallow", "Orion", "Dolphin", "Harrier", "Vesta",
    "Tempest",
]
_COLORS = ["Black", "White", "Silver", "Golden", "Crimson", "Northern", "Southern", "Royal", "Little", "Flying"]
_FIRST = ["Thomas", "Mary", "James", "Alice", "Henry", "Emma", "George", "Laura", "Robert", "Helen"]
_LAST = ["Baker", "Cooper", "Taylor", "Hunter", "Mason", "Fisher", "Carter", "Turner", "Walker", "Parker"]
_THINGS = [
    "lantern", "compass", "violin", "teapot", "ribbon", "hammer", "mirror", "feather", "saddle", "anchor", "candle",
    "basket", "kettle", "trumpet", "thimble", "bottle",
]
# fmt: on


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact."""

    kind: str
    """passkey, name, number or pair."""
    prompts: dict[Wording, str]
    """What stands before the answer, by wording; no blank at the end."""
    answer: str
    """Begins with a blank."""

    @property
    def sentence(self) -> str:
        """What is planted."""
        return f"{self.prompts['text']}{self.answer}."


@dataclass(frozen=True, slots=True)
class _Template:
    subjects: Sequence[str]
    text: str
    other: str
    answer: Callable[[random.Random], str]


_TEMPLATES = {
    "passkey": _Template(
        [f"{place} {house}" for place, house in product(_PLACES, ("Hall", "Castle", "Abbey", "Lodge"))],
        "The pass key of {} is",
        "Question: What is the pass key of {}?\nAnswer: The pass key is",
        lambda dice: str(dice.randrange(10_000, 100_000)),
    ),
    "name": _Template(
        [f"{color} {ship}" for color, ship in product(_COLORS, _SHIPS)],
        "The captain of the {} is called",
        "Question: Who is the captain of the {}?\nAnswer: The captain is",
        lambda dice: f"{dice.choice(_FIRST)} {dice.choice(_LAST)}",
    ),
    "number": _Template(
        [f"{place} {house}" for place, house in product(_PLACES, ("Church", "Chapel", "Station", "Theatre"))],
        "The number of lamps in {} is",
        "Question: How many lamps are in {}?\nAnswer: The number of lamps is",
        lambda dice: str(dice.randrange(100, 1000)),
    ),
    "pair": _Template(
        [f"{place} {house}" for place, house in product(_PLACES, ("Manor", "Cottage", "Mill", "Farm"))],
        "The box of {} holds a",
        "Question: What is in the box of {}?\nAnswer: The box holds a",
        lambda dice: dice.choice(_THINGS),
    ),
}
KINDS = tuple(_TEMPLATES)


def draw_facts(count: int, *, seed: object, first_kind: int = 0) -> list[Fact]:
    """Draw facts about different things; their kinds take turns.

    Args:
        count: How many.
        seed: Of the draw.
        first_kind: Place in `KINDS` of the first fact's kind.

    Raises:
        BenchmarkError: If there are not so many things to say something of.
    """
    dice = random.Random(f"facts/{seed}")
    subjects = {kind: dice.sample(template.subjects, len(template.subjects)) for kind, template in _TEMPLATES.items()}
    if count > len(KINDS) * min(map(len, subjects.values())):
        raise BenchmarkError(f"there are no {count} different facts to plant in a stream; use fewer rounds or facts")
    found = []
    for index in range(count):
        kind = KINDS[(first_kind + index) % len(KINDS)]
        template, subject = _TEMPLATES[kind], subjects[kind].pop()
        prompts: dict[Wording, str] = {"text": template.text.format(subject), "other": template.other.format(subject)}
        found.append(Fact(kind, prompts, f" {template.answer(dice)}"))
    return found
