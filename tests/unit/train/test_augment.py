"""Batches: the same whatever the threads, the ranks and the cache do; captions with directions are never flipped."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from rsplatform.train.augment import (
    Augmentation,
    augment,
    draw_caption,
    has_direction,
    pad_tokens,
    sample_rng,
    square_symmetry,
)
from rsplatform.train.loader import LoaderPhase, Share
from tests.unit.train.tiny_training import (
    CONTEXT_LENGTH,
    IMAGE_SIZE,
    DamagedStore,
    TinyStore,
    tiny_loader,
    tiny_tokenizer,
)


def batches_of(loader, start: int = 0, end: int = 6) -> list:
    return list(loader.batches(start, end))


def assert_same_batches(first, second) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.sample_ids == other.sample_ids
        assert torch.equal(one.images_BHWC, other.images_BHWC)
        assert torch.equal(one.tokens_BT, other.tokens_BT)
        assert_same_distances(one, other.ground_sample_distance_m_B)


def assert_same_distances(batch, expected_m_B: torch.Tensor) -> None:
    torch.testing.assert_close(batch.ground_sample_distance_m_B, expected_m_B, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "settings", [{"decode_threads": 1}, {"prefetch_batches": 1}, {"cache_gb": 0.0}, {"cache_gb": 4e-6}]
)
def test_threads_and_cache_change_nothing(settings: dict) -> None:
    assert_same_batches(batches_of(tiny_loader(**settings)), batches_of(tiny_loader(decode_threads=4)))


def test_a_batch_does_not_depend_on_the_ones_before() -> None:
    assert_same_batches(batches_of(tiny_loader(), 4, 6), batches_of(tiny_loader())[4:])


def test_ranks_share_the_global_batch() -> None:
    whole = batches_of(tiny_loader(), 0, 2)
    shares = [batches_of(tiny_loader(Share(rank, 4)), 0, 2) for rank in range(4)]
    for step, batch in enumerate(whole):
        for rank in range(4):
            assert shares[rank][step].sample_ids == batch.sample_ids[rank::4]
            assert torch.equal(shares[rank][step].images_BHWC, batch.images_BHWC[rank::4])
            assert_same_distances(shares[rank][step], batch.ground_sample_distance_m_B[rank::4])


def test_every_sample_is_seen_once_an_epoch() -> None:
    ids = [sample_id for batch in batches_of(tiny_loader(), 0, 3) for sample_id in batch.sample_ids]
    assert sorted(ids) == sorted(TinyStore().ids)


def test_the_cache_saves_reads_up_to_its_budget() -> None:
    reads = {}
    for cache_gb in (0.0, 0.01):
        store = TinyStore()
        # one batch at a time: of two that are made at once, neither finds what the other has just read
        batches_of(tiny_loader(store=store, cache_gb=cache_gb, prefetch_batches=1), 0, 9)
        reads[cache_gb] = store.num_reads
    assert reads == {0.0: 72, 0.01: 24}


class MeetingStore(TinyStore):
    """A store on the other side of a network: its first reads come back when two of them are on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.both = threading.Barrier(2, timeout=20)
        self.waiting = [True, True]

    def read(self, indices):
        if self.waiting:
            self.waiting.pop()
            self.both.wait()
        return super().read(indices)


def test_a_batch_is_read_while_another_is_on_its_way() -> None:
    assert_same_batches(batches_of(tiny_loader(store=MeetingStore())), batches_of(tiny_loader()))


def test_stopping_early_leaves_no_threads() -> None:
    stream = tiny_loader().batches(0, 1000)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with ThreadPoolExecutor(1) as threads, pytest.raises(ValueError, match="8 does not divide among 3 workers"):
        tiny_loader(Share(0, 3)).batch(0, threads)


def test_the_next_sample_stands_in_for_one_that_cannot_be_decoded(caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it is drawn, whatever the ranks, the cache and the start: counted, named, and all others as ever."""
    broken = {"sample-3": "sample-5", "sample-4": "sample-5", "sample-23": "sample-0"}
    tried = {"sample-3": 2, "sample-4": 1, "sample-23": 1}
    sound = batches_of(tiny_loader())
    batches = batches_of(tiny_loader(store=DamagedStore(set(broken))))
    for batch, expected in zip(batches, sound, strict=True):
        assert batch.sample_ids == tuple(broken.get(name, name) for name in expected.sample_ids)
        assert batch.undecodable == sum(tried.get(name, 0) for name in expected.sample_ids)
        same = torch.tensor([name not in broken for name in expected.sample_ids])
        assert torch.equal(batch.images_BHWC[same], expected.images_BHWC[same])
    assert sum(batch.undecodable for batch in batches) == 2 * sum(tried.values()), "two epochs"
    assert "sample sample-3: unreadable" in caplog.text
    assert_same_batches(batches[3:], batches_of(tiny_loader(store=DamagedStore(set(broken)), cache_gb=0.0), 3))
    shares = [batches_of(tiny_loader(Share(rank, 2), DamagedStore(set(broken)))) for rank in range(2)]
    assert [sum(pair) for pair in zip(*([b.undecodable for b in own] for own in shares), strict=True)] == [
        batch.undecodable for batch in batches
    ]


def test_a_row_of_damaged_samples_is_reported_and_not_searched_on() -> None:
    everything = set(TinyStore(60).ids)
    assert batches_of(tiny_loader(store=DamagedStore(everything, 60)), 0, 1)[0].undecodable == float("inf")


def test_captions_are_drawn_by_their_weights() -> None:
    captions, rngs = ["alt text", "landmarks", "never"], [sample_rng(0, 0, place) for place in range(3000)]
    weighted = Counter(draw_caption(captions, (1.0, 3.0, 0.0), rng) for rng in rngs)
    assert weighted["never"] == 0 and abs(weighted["landmarks"] / 3000 - 0.75) < 0.03
    even = Counter(draw_caption(captions, (), sample_rng(0, 1, place)) for place in range(3000))
    assert all(abs(even[caption] / 3000 - 1 / 3) < 0.03 for caption in captions)
    assert draw_caption(captions, (1.0, 3.0, 0.0), sample_rng(0, 0, 5)) == draw_caption(
        captions, (1.0, 3.0, 0.0), sample_rng(0, 0, 5)
    )


def test_the_symmetries_are_eight_and_undo_nothing_else() -> None:
    picture = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    views = {square_symmetry(picture, index).tobytes() for index in range(8)}
    assert len(views) == 8
    assert all(sorted(view) == sorted(picture.tobytes()) for view in views)


@pytest.mark.parametrize(
    "caption",
    [
        "a bar on the Left of the field",
        "north-eastern corner",
        "southwest of the river",
        "the upper part is water",
        *(f"a road {word} of the harbour" for word in ("above", "below", "beneath", "underneath")),
        *(f"the {word} bank" for word in ("leftmost", "rightmost", "uppermost", "bottommost", "lowermost", "topmost")),
        *(
            f"the {word} bank"
            for word in ("lefthand", "right-hand", "left hand", "left-side", "topside", "righthanded")
        ),
        *(f"the {word} bank" for word in ("northernmost", "southmost", "easterly", "north-westerly", "westside")),
        *(
            f"cars go {word}"
            for word in ("northbound", "southeastward", "leftwards", "rightward", "upward", "downwards")
        ),
        *(
            f"cars go {word}"
            for word in ("clockwise", "anticlockwise", "counter-clockwise", "vertically", "horizontal")
        ),
        *(f"the {word} corner" for word in ("NW", "NE", "SW", "SE", "NNE", "WSW")),
    ],
)
def test_directions_are_found(caption: str) -> None:
    assert has_direction(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "many green trees around a stadium",
        "a desktop of rusty leftovers in Westminster, bright",
        *(
            "leftover",
            "rights of way",
            "an aboveground pool",
            "a hot topic",
            "bottomland",
            "a stopped train",
            "clockwork",
        ),
        *("aboveboard", "the southerner", "a laptop", "se vende", "ne bougez pas", "upwardly", "lefty", "easter eggs"),
    ],
)
def test_words_that_contain_a_direction_are_none(caption: str) -> None:
    assert not has_direction(caption)


def test_captions_with_directions_keep_their_picture_upright() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    config = Augmentation()
    for position in range(20):
        view, _ = augment(picture, IMAGE_SIZE, config, "a road in the north", sample_rng(0, 0, position))
        assert (view == picture).all()
    views = {augment(picture, IMAGE_SIZE, config, "a road", sample_rng(0, 0, p))[0].tobytes() for p in range(60)}
    assert len(views) == 8


def test_a_phase_varies_its_pictures_in_its_own_way() -> None:
    """Upright in the first two steps, as the whole run without symmetries would have them; turned afterwards."""
    upright = Augmentation(symmetries=False)
    mixed = batches_of(
        tiny_loader(augmentation=Augmentation(), phases=(LoaderPhase(2, IMAGE_SIZE, upright), LoaderPhase(4, 16)))
    )
    assert_same_batches(mixed[:2], batches_of(tiny_loader(augmentation=upright), 0, 2))
    assert_same_batches(mixed[2:], batches_of(tiny_loader(augmentation=Augmentation()), 2))
    assert not torch.equal(
        mixed[1].images_BHWC, batches_of(tiny_loader(augmentation=Augmentation()), 1, 2)[0].images_BHWC
    )


def test_a_view_covers_as_much_ground_as_it_says() -> None:
    """On a ramp, brightness per pixel tells how far apart the view's pixels were in the picture."""
    ramp_HWC = np.repeat(np.repeat(np.arange(80, dtype=np.uint8)[None, :, None] * 3, 80, axis=0), 3, axis=2)
    covered = []
    for position in range(20):
        rng = sample_rng(0, 0, position)
        view_HWC, pixels = augment(ramp_HWC, 64, Augmentation(False, min_crop_area=0.2), "a road", rng)
        slope = np.polyfit(np.arange(4, 60), view_HWC[32, 4:60, 0].astype(float), 1)[0]
        assert slope == pytest.approx(3 * pixels, rel=0.01)
        covered.append(pixels)
    assert 0.2**0.5 * 80 / 64 <= min(covered) < 0.75 < max(covered) <= 80 / 64


def test_a_batchs_distances_are_those_of_its_pixels() -> None:
    """20 px pictures: resized to 16 whole, or to 20 and cropped to 16; some scales are unknown."""
    whole = batches_of(tiny_loader(augmentation=Augmentation()), 0, 3)
    cropped = batches_of(tiny_loader(augmentation=Augmentation(min_crop_area=0.7)), 0, 3)
    for one, other in zip(whole, cropped, strict=True):
        own_m_B = torch.tensor([TinyStore.distance_m(int(name.removeprefix("sample-"))) for name in one.sample_ids])
        assert own_m_B.isnan().any() and not own_m_B.isnan().all()
        assert_same_distances(one, own_m_B * 20 / 16)
        shrunk_B = (other.ground_sample_distance_m_B / one.ground_sample_distance_m_B)[~own_m_B.isnan()]
        assert (shrunk_B >= 0.7**0.5).all() and (shrunk_B <= 1).all() and len(shrunk_B.unique()) > 1
        assert (other.ground_sample_distance_m_B.isnan() == own_m_B.isnan()).all()


def test_tokens_are_padded_to_a_multiple_of_eight_within_the_context() -> None:
    tokenizer = tiny_tokenizer()
    for captions in (["a"], ["a red field number 3", "a"], ["word " * 50]):
        tokens_BT = pad_tokens(captions, tokenizer, CONTEXT_LENGTH)
        assert tokens_BT.shape[1] in (8, CONTEXT_LENGTH)
        longest = tokenizer.encode(captions, CONTEXT_LENGTH, pad_to_longest=True)
        assert (tokens_BT[:, : longest.shape[1]].numpy() == longest).all()
        assert (tokens_BT[:, longest.shape[1] :] == 0).all()
