"""Rules for alt-text: one text in, the cleaned text or the reason why it is no caption out. No model, no network.

The rules are RECIPE [D]: 3-64 words, no file names, URLs or boilerplate, a language we train on, nothing that is
markup or an instruction. Repeats across rows are capped by filter_web.drop_repeats, which sees all rows.
"""

import html
import re
import unicodedata

MIN_WORDS, MAX_WORDS = 3, 64
MAX_CHARACTERS = 2000
_FILE_NAME = re.compile(
    r"(?i)\b[\w-]+\.(?:jpe?g|png|gif|webp|tiff?|bmp|svg|pdf|psd|raw)\b|\b(?:img|dsc|dscn|pict)[_-]?\d{3,}"
)
_URL = re.compile(r"(?i)\b(?:https?:|www\.|ftp:)|\b[\w-]+\.(?:com|org|net|io|info)\b")
_MARKUP = re.compile(r"(?i)<\s*/?\s*[a-z!][^>]*>?|&lt;|javascript:|\bon(?:error|load|click)\s*=|\{\{|<\?|</")
_INSTRUCTION = re.compile(
    r"(?i)\b(?:ignore|disregard|forget|override)\b.{0,40}\b(?:instruction|prompt|rule|guideline)"
    r"|\b(?:ignore|disregard|forget|override)(?: all| any| everything| of| what was| the){0,3} (?:previous|above|prior)"
    # a role speaks at the beginning of a sentence or in capitals; "an irrigation system: …" is a description
    r"|(?:^|[.!?;|\]}>\"'])\W*(?:system|assistant|user)\s*:|\b(?:system|assistant|user) (?:prompt|message)\s*:"
    r"|(?-i:\b(?:SYSTEM|ASSISTANT|USER)\s*:)"
    r"|\byou (?:are|must|will|should) (?:now|always|act|respond|answer|reply|output|label|classify)"
    r"|\b(?:respond|answer|reply|output|print|say|write)\b.{0,30}\b(?:only|exactly|with|yes|score)\b.{0,30}\b(?:only|exactly|word|yes|1\.0)\b"
    r"|\bas an? (?:ai|language model)|\b(?:classify|label|mark|rate|score) (?:this|the) (?:image|picture|pair|sample)"
    r"|\[/?inst\]|<\|"
    r"|\b(?:drop|select|insert|delete)\b.{0,20}\b(?:table|from|into)\b.*(?:;|--)|';"
)
# What no description of a place holds, wherever it stands: phrases, so that a mapped copyright office, a cookie factory
# or a hoarding with an advertisement may be described.
_BOILERPLATE = re.compile(
    r"(?i)\b(?:click (?:here|to|for)|stock (?:photo|image|vector|illustration)s?|royalty[- ]free|shutterstock"
    r"|getty ?images|istock|alamy|all rights reserved"
    r"|copyright(?:ed)? (?:©|\(c\)|(?:19|20)\d\d|by|holder|protected|notice)"
    r"|(?:protected by|under) copyright|(?:image|photo|picture) copyright"
    r"|(?:image|photo) (?:not available|placeholder|may contain)|add to (?:cart|wishlist)|buy (?:now|print)"
    r"|free (?:download|shipping)|download now|subscribe (?:to|now|for|today)"
    r"|(?:accept|use|uses|enable|disable) (?:all |our |the )?cookies|cookie (?:policy|settings|consent|notice)"
    r"|read more(?= about|\W*$)|share (?:this )?on (?:facebook|twitter|pinterest|instagram|whatsapp|social)"
    r"|thumbnail (?:image|of|for|size)|no description (?:available|provided|given|yet)"
    r"|sponsored (?:by|post|content|link)|(?:with|without|no) (?:a )?watermark|watermarked"
    r"|view (?:larger|full size))\b|copyright\s*:|(?:©|\(c\))\s*(?:copyright|(?:19|20)\d\d)"
    # … and words that say nothing of the picture when the text begins with them or is nothing else
    r"|^\W*(?:untitled|thumbnail|advertisement|copyright|no description|watermark)\b(?:\W|\d)*(?:$|[:|©-])"
    r"|^\W*untitled\b|^\s*(?:image|photo|picture|figure|img)\s*\d*\s*$"
)
_STOPWORDS = (
    "a an the of in on at with and or is are from by to for this that there near above over view many some several it "
    "its next between into surrounded by beside along one two three"
)
_FOREIGN = (
    "der die das und ist nicht mit ein eine von auf für le la les des une est dans avec pour sur el los las del una "
    "con por para que il gli della di och det som en het een van op met na w z jest dla um uma não na em dos ao"
)


class TextRejected(ValueError):
    """A text that is no caption; `reason` is one word for the ledger."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["TextRejected"], tuple[str, str]]:
        """Pickled with both parts: it crosses from Ray's workers to the driver."""
        return type(self), (self.reason, self.detail)


def clean_text(text: str | None) -> str:
    """The text as a caption: entities resolved, white space joined.

    Raises:
        TextRejected: reason no_text | text_too_long | control_characters | markup | instruction | url | file_name |
            boilerplate | too_few_words | too_many_words | language. The detail quotes at most 60 characters.
    """
    if not text or not text.strip():
        raise TextRejected("no_text", "empty")
    if len(text) > MAX_CHARACTERS:
        raise TextRejected("text_too_long", f"{len(text)} characters")
    text = unicodedata.normalize("NFKC", html.unescape(text))
    hidden = [character for character in text if _is_hidden(character)]
    if hidden:
        raise TextRejected("control_characters", ", ".join(sorted({f"U+{ord(c):04X}" for c in hidden})[:4]))
    text = " ".join(text.split())
    rules = (
        ("markup", _MARKUP),
        ("instruction", _INSTRUCTION),
        ("url", _URL),
        ("file_name", _FILE_NAME),
        ("boilerplate", _BOILERPLATE),
    )
    for reason, pattern in rules:
        found = pattern.search(text)
        if found:
            raise TextRejected(reason, repr(found.group()[:60]))
    _check_words(text)
    return text


def _is_hidden(character: str) -> bool:
    """Control, bidirectional and zero-width characters, which show a person another text than a model reads."""
    return unicodedata.category(character) in {"Cc", "Cf", "Co", "Cs"} and character not in "\t\n\r\u00ad"


def _check_words(text: str) -> None:
    words = re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text)
    if len(words) < MIN_WORDS:
        raise TextRejected("too_few_words", f"{len(words)} words: {text[:60]!r}")
    if len(words) > MAX_WORDS:
        raise TextRejected("too_many_words", f"{len(words)} words")
    letters = [character for character in text if character.isalpha()]
    num_latin = sum("LATIN" in unicodedata.name(character, "") for character in letters)
    lower = [word.lower() for word in words]
    english, foreign = set(_STOPWORDS.split()), set(_FOREIGN.split())
    num_english = sum(word in english for word in lower)
    num_foreign = sum(word in foreign for word in lower)
    # Short titles ("Aerial view harbour") hold no stopword: only positive evidence of another language rejects them.
    if num_latin < 0.8 * len(letters) or num_foreign > max(1, num_english):
        raise TextRejected("language", f"not English: {text[:60]!r}")
    if len(set(lower)) <= len(lower) / 3:
        raise TextRejected("boilerplate", f"the same words again: {text[:60]!r}")
