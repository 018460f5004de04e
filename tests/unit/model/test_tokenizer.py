"""The tokenizer: fixed special ids, any string round-trips, training is deterministic, files are checked."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from rsplatform.model.tokenizer import Tokenizer

TEXTS = ["An aerial image of a harbour with many boats.", "many boats in a harbour", "a road through fields"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


def test_every_row_is_start_text_end_pads(tokenizer):
    tokens_BT = tokenizer.encode(["boats", ""], 10)
    assert tokens_BT.shape == (2, 10) and tokens_BT.dtype == np.int64
    assert tokens_BT[1].tolist() == [1, 2] + [0] * 8
    assert tokens_BT[0, 0] == 1 and (tokens_BT[0] == 2).sum() == 1
    assert tokenizer.encode(["boats", ""], 10, pad_to_longest=True).shape[1] == (tokens_BT[0] != 0).sum()
    assert tokenizer.encode([], 10).shape == (0, 10)


@pytest.mark.parametrize(
    "text", ["many boats", "Ünïcödé 港 🛰 naïve", "tabs\tand\nlines", "<end> <pad> <start>", "\x00\x7f"]
)
def test_any_text_round_trips_in_lower_case(tokenizer, text):
    ids = tokenizer.encode([text], 120)[0]
    assert tokenizer.decode(ids) == text.lower()
    assert (ids == 2).sum() == 1  # a text that spells the end token does not end itself


def test_a_long_text_is_cut_but_keeps_its_end(tokenizer):
    tokens_BT = tokenizer.encode(["boats " * 100], 12)
    assert tokens_BT[0, 0] == 1 and tokens_BT[0, -1] == 2


def test_broken_unicode_is_encoded_not_raised(tokenizer):
    assert tokenizer.decode(tokenizer.encode(["a\udc80b"], 20)[0]) == "a?b"


def test_training_is_deterministic_and_merges_save_tokens(tokenizer):
    assert Tokenizer.train(iter(TEXTS), 320).to_json() == tokenizer.to_json()
    assert (tokenizer.encode(["many boats"], 30) != 0).sum() < len("many boats")
    assert tokenizer.vocab_size <= 320


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(loaded.encode(TEXTS, 20), tokenizer.encode(TEXTS, 20))
    assert loaded.to_json() == tokenizer.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_clips_layout_of_a_vocabulary_is_read(tmp_path):
    """Words end in </w>, texts are between two tokens at the end of the vocabulary, and 0 is an ordinary token."""
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\S+"), "removed", invert=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer=trainer)
    backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.start_id, loaded.end_id) == (loaded.vocab_size - 2, loaded.vocab_size - 1)
    ids = loaded.encode(["Many boats"], 8)[0]
    assert (ids[0], ids[-1], (ids == loaded.end_id).sum()) == (loaded.start_id, 0, 1)
    assert loaded.decode(ids) == "many boats"


def test_bad_files_and_arguments_are_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        Tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json"):
        Tokenizer.load(tmp_path / "bad.json")
    for change, problem in ((("<start>", "<other>"), "there is none"), (("<pad>", "<s>"), "id 0, which is padding")):
        changed = tokenizer.to_json().replace(*change).replace("<start>", "<first>").replace("<end>", "</s>")
        (tmp_path / "other.json").write_text(changed)
        with pytest.raises(ValueError, match=f"other.json.*start and end a text.*{problem}"):
            Tokenizer.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="vocab_size 100"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(TypeError, match="list of texts"):
        tokenizer.encode("one string", 10)
    with pytest.raises(ValueError, match="context_length 1"):
        tokenizer.encode(["a"], 1)
