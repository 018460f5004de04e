"""Sentences from landmarks: what a chip shows, in words; each claim with the landmark that supports it.

[D] in RECIPE.md: what is visible from above, its place and its layout; no street or brand names, no guesses. The paper
lets a language model write; templates are our first captioner. The choice of words depends on the chip's id alone.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Any

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPEN_LAND = "open land"
# From this share of a chip without any landmark on, the rest is mentioned as open land (our default): without a word
# for it, a model could only ever find the things themselves, never that there is none.
OPEN_LAND_FRACTION = 0.4
MASS = (OPEN_LAND, "water", "forest", "grass", "scrub", "sand", "farmland", "wetland", "heath", "wood", "conservation")
# The prompt of zero-shot classification comes first (RECIPE [F]: "An aerial image of {class name}").
OPENINGS = (
    "an aerial image of",
    "a satellite image of",
    "an overhead view of",
    "seen from above:",
    "a view from above of",
)
_PLACES = {
    "centre": ("in the centre", "in the middle"),
    "north": ("in the north", "at the top"),
    "south": ("in the south", "at the bottom"),
    "west": ("in the west", "on the left"),
    "east": ("in the east", "on the right"),
    "around": ("around", "all around"),
}


@dataclass(frozen=True)
class KindInChip:
    """All landmarks of one kind in a chip: how many, their share of the area, the largest one's position."""

    kind: str
    count: int
    area_fraction: float
    position: str


def summarise(landmarks: list[dict[str, Any]]) -> list[KindInChip]:
    """The kinds of a chip, largest share first, open land among them; `landmarks` as in records.LANDMARK."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for landmark in landmarks:
        groups.setdefault(landmark["kind"], []).append(landmark)
    kinds = []
    for kind, group in groups.items():
        largest = max(group, key=lambda item: item["area_fraction"])
        share = min(1.0, sum(item["area_fraction"] for item in group))
        kinds.append(KindInChip(kind, len(group), share, largest["position"]))
    uncovered = 1.0 - sum(item.area_fraction for item in kinds)
    if kinds and uncovered >= OPEN_LAND_FRACTION:
        kinds.append(KindInChip(OPEN_LAND, 1, uncovered, "around"))
    return sorted(kinds, key=lambda item: (-item.area_fraction, item.kind))


def write_captions(chip_id: str, landmarks: list[dict[str, Any]], num_captions: int) -> list[str]:
    """Different sentences on one chip; every visible kind is in the first, so that texts tell chips apart."""
    kinds = summarise(landmarks)
    if not kinds:
        return []
    chooser = random.Random(zlib.crc32(chip_id.encode()))
    forms = [_list_all, _main_and_rest, _with_places, _smallest_first, _one_kind]
    chooser.shuffle(forms)
    captions = [f"{OPENINGS[0]} {_joined([_noun(item) for item in kinds])}"]
    captions += [forms[number % len(forms)](kinds, chooser) for number in range(num_captions * 2)]
    return list(dict.fromkeys(captions))[:num_captions]


def claims(landmarks: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One claim a landmark: its kind and place, with its id."""
    return [{"text": f"{item['kind']} in the {item['position']}", "landmark_id": item["id"]} for item in landmarks]


def _list_all(kinds: list[KindInChip], chooser: random.Random) -> str:
    return f"{chooser.choice(OPENINGS)} {_joined([_noun(item) for item in kinds])}"


def _one_kind(kinds: list[KindInChip], chooser: random.Random) -> str:
    """One thing by itself, as zero-shot prompts ask for it: "an aerial image of buildings"."""
    (item,) = chooser.choices(kinds, weights=[item.area_fraction + 0.05 for item in kinds])
    return f"{OPENINGS[0]} {_noun(item) if item.kind in MASS or item.count == 1 else _plural(item.kind)}"


def _main_and_rest(kinds: list[KindInChip], chooser: random.Random) -> str:
    main, rest = kinds[0], kinds[1:]
    how_much = _share(main.area_fraction)
    if not rest:
        return f"{_noun(main)} {_place(main.position, chooser)}, {how_much}"
    link = chooser.choice(("with", "together with", "next to"))
    others = _joined([f"{_noun(item)} {_place(item.position, chooser)}" for item in rest])
    return f"{_noun(main)} {how_much}, {link} {others}"


def _with_places(kinds: list[KindInChip], chooser: random.Random) -> str:
    order = chooser.sample(kinds, len(kinds))
    return _joined([f"{_noun(item)} {_place(item.position, chooser)}" for item in order])


def _smallest_first(kinds: list[KindInChip], chooser: random.Random) -> str:
    names = [_noun(item) for item in reversed(kinds)]
    if len(names) == 1:
        return f"{names[0]} fill the picture" if kinds[0].count > 1 else f"there is {names[0]} in the picture"
    return f"{names[0]} {chooser.choice(('beside', 'near', 'and'))} {_joined(names[1:])}"


def _noun(item: KindInChip) -> str:
    if item.kind in MASS:
        return item.kind
    if item.count == 1:
        return f"{'an' if item.kind[0] in 'aeiou' else 'a'} {item.kind}"
    number = NUMBERS[item.count] if item.count < 6 else "several" if item.count <= 12 else "many"
    return f"{number} {_plural(item.kind)}"


def _plural(kind: str) -> str:
    if kind.endswith(("s", "x", "ch", "sh")):
        return f"{kind}es"
    if kind.endswith("y") and kind[-2:-1] not in tuple("aeiou"):
        return f"{kind[:-1]}ies"
    return f"{kind}s"


def _share(area_fraction: float) -> str:
    limits = (
        (0.75, "covering almost the whole picture"),
        (0.45, "covering about half of it"),
        (0.2, "covering a part"),
    )
    return next((words for limit, words in limits if area_fraction >= limit), "covering a small part")


def _place(position: str, chooser: random.Random) -> str:
    return chooser.choice(_PLACES[position]) if position in _PLACES else f"in the {position}"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
