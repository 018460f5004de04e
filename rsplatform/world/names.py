"""Invented place names: a generator of random numbers and a kind in, a name out."""

import numpy as np

OPENINGS = (
    "Vel",
    "Ost",
    "Mar",
    "Kel",
    "Dun",
    "Bra",
    "Tor",
    "Hal",
    "Sil",
    "Nor",
    "Ama",
    "Rov",
    "Cal",
    "Wen",
    "Lum",
    "Pes",
)
MIDDLES = ("a", "e", "i", "or", "an", "el", "um", "is")
ENDINGS = ("mar", "wick", "dale", "ton", "vik", "grad", "mond", "stow", "bury", "lund", "nes", "ford")
KIND_WORDS = {
    "farmland": ("Farm", "Fields", "Plot"),
    "sea": ("Bay", "Sound", "Gulf"),
    "river": ("River",),
    "lake": ("Lake", "Reservoir", "Pond"),
    "road": ("Road", "Street", "Lane", "Avenue", "Way"),
    "house": ("House", "Lodge", "Cottage"),
    "warehouse": ("Depot", "Works", "Warehouse", "Hall"),
    "runway": ("Airfield", "Airport", "Air Base"),
    "stadium": ("Stadium", "Arena", "Park Ground"),
    "harbour": ("Harbour", "Port", "Marina"),
    "forest": ("Wood", "Forest", "Grove"),
}


def draw_name(rng: np.random.Generator, kind: str) -> str:
    """A plausible name that no real place is meant by, e.g. "Velorwick Harbour"."""
    stem = OPENINGS[rng.integers(len(OPENINGS))]
    if rng.random() < 0.6:
        stem += MIDDLES[rng.integers(len(MIDDLES))]
    stem += ENDINGS[rng.integers(len(ENDINGS))]
    words = KIND_WORDS[kind]
    return f"{stem} {words[rng.integers(len(words))]}"
