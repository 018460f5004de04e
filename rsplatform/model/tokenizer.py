"""Text to token ids and back: lower-cased byte-level BPE of our own, or another model's tokenizer.json.

In: strings. Out: int64 arrays (B, T), padded with 0; every text is start, its tokens (cut if too long), end.
Does not clean captions; a text that spells a special token ("<end>") is ordinary text.
Ids of our own: 0 pad, 1 start, 2 end, then the 256 bytes, then the learned merges. Others keep theirs, but the models
pad with 0: CLIP's token 0 ("!") counts as padding, as it did when openMaMMUT was trained.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

PAD_ID = 0
SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")
# How tokenizers mark where a text starts and ends: ours, CLIP's, SentencePiece's, BERT's.
START_AND_END = (("<start>", "<end>"), ("<|startoftext|>", "<|endoftext|>"), ("<s>", "</s>"), ("[CLS]", "[SEP]"))
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


class Tokenizer:
    """A trained vocabulary. Make one with `train` or `load`.

    Raises:
        ValueError: no pair of START_AND_END in the vocabulary, or one of the two has the id of padding.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "tokenizer"):
        pairs = [(backend.token_to_id(start), backend.token_to_id(end)) for start, end in START_AND_END]
        known = [(start, end) for start, end in pairs if start is not None and end is not None]
        if not known or PAD_ID in known[0]:
            problem = "they have the id 0, which is padding" if known else "there is none"
            raise ValueError(
                f"{source}: needs tokens that start and end a text, such as {' and '.join(START_AND_END[0])}, "
                f"but {problem}; train one with jobs/train_tokenizer.py"
            )
        self.start_id, self.end_id = known[0]
        backend.no_padding()  # a file may bring settings for both, which would change what `encode` makes
        backend.no_truncation()
        backend.encode_special_tokens = True  # a caption that spells "<end>" must not end itself
        self._backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from `texts`; the same texts give the same vocabulary. Few texts may give a smaller one."""
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"vocab_size {vocab_size}: at least {SMALLEST_VOCABULARY} (specials and 256 bytes)")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((_without_surrogates(text) for text in texts), trainer=trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read tokenizer.json; a missing or damaged file raises with its name."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no tokenizer there; save one with Tokenizer.save")
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))

    @classmethod
    def from_json(cls, text: str, source: str) -> "Tokenizer":
        """The inverse of `to_json`; `source` names the text's origin in errors."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{source}: not a readable tokenizer.json ({error})") from error
        return cls(backend, source)

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json: whole or not at all."""
        path = Path(path)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(self.to_json(), encoding="utf-8")
        os.replace(unfinished, path)

    def to_json(self) -> str:
        """The vocabulary and merges as the text that `save` writes."""
        return self._backend.to_str(pretty=True)

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        return self._backend.get_vocab_size()

    def encode(self, texts: Sequence[str], context_length: int, pad_to_longest: bool = False) -> np.ndarray:
        """Token ids (B, T) int64 with T = context_length, or the longest text's length if `pad_to_longest`.

        A text that is too long loses its last tokens, never its end token.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one string")
        if context_length < 2:
            raise ValueError(f"context_length {context_length}: at least 2 for start and end")
        rows = [[self.start_id, *ids[: context_length - 2], self.end_id] for ids in self.token_ids(texts)]
        width = max((len(row) for row in rows), default=2) if pad_to_longest else context_length
        tokens_BT = np.full((len(rows), width), PAD_ID, dtype=np.int64)
        for index, row in enumerate(rows):
            tokens_BT[index, : len(row)] = row
        return tokens_BT

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each whole text alone: not cut, not padded, without start and end."""
        clean = [_without_surrogates(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(clean, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one row of ids, up to the first end token, without specials."""
        kept = []
        for token_id in (int(value) for value in ids):
            if token_id == self.end_id:
                break
            if token_id not in (PAD_ID, self.start_id):
                kept.append(token_id)
        text = self._backend.decode(kept, skip_special_tokens=False)
        # CLIP marks the ends of words in its tokens, and its file does not say how to read that back
        end_of_word = getattr(self._backend.model, "end_of_word_suffix", None)
        return (text.replace(end_of_word, " ") if end_of_word else text).strip()


def _without_surrogates(text: str) -> str:
    """Lone surrogates (broken text from elsewhere) cannot be UTF-8: they become '?'."""
    return text.encode("utf-8", "replace").decode("utf-8")
