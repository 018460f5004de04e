"""Leaves classes out of a training set, so that what a model does with classes it never saw can be measured.

In: the words of the classes, a sample's landmark kinds and captions. Out: why the sample is held out, or None. It finds
words, not meanings: spellings and synonyms have to be listed (harbour, harbor). RS-Landmarks-89-holdout is the set of
this kind in the paper; how it was made is unpublished, so by landmark kind or caption mention is our default.
"""

import re
from collections.abc import Iterable, Sequence


class Holdout:
    """Classes that a training set must not show.

    Raises:
        ValueError: a class without a letter or digit.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        for name in classes:
            if not re.search(r"\w", name):
                raise ValueError(f"holdout: {name!r} is no class; name one in words, e.g. stadium")
        self._patterns = {name: _pattern(name) for name in classes}

    def reason(self, landmark_kinds: Iterable[str], captions: Iterable[str]) -> tuple[str, str] | None:
        """(class, what showed it) of the first held-out class that a landmark or a caption names; None: keep it."""
        for label, texts in (("landmark", landmark_kinds), ("caption", captions)):
            for text in texts:
                for name, pattern in self._patterns.items():
                    if pattern.search(text):
                        return name, f"{label}: {text}"
        return None


def _pattern(name: str) -> re.Pattern[str]:
    """The class as whole words in any case, singular or plural; kinds of landmarks join words by _ or -."""
    words = [re.escape(word) for word in re.findall(r"\w+", name.replace("_", " "))]
    last = words[-1]
    plural = f"(?:{last[:-1]}ies|{last})" if last.lower().endswith("y") else f"{last}(?:s|es)?"
    joined = r"[\s_-]+".join([*words[:-1], plural])
    # _ joins words in kinds (sports_stadium), so a word border is also there
    return re.compile(rf"(?<![^\W_]){joined}(?![^\W_])", re.IGNORECASE)
