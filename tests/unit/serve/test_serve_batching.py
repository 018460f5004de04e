"""Batches that fill while a forward runs: every item gets its own answer, and a bad one fails alone."""

import asyncio
import threading

import pytest

from rsplatform.serve.batching import Batcher


def test_items_that_come_together_share_a_batch_and_keep_their_answers() -> None:
    sizes: list[int] = []

    def doubled(items: list[int]) -> list[int]:
        return [2 * item for item in items]

    double = Batcher(doubled, max_size=4, observe=sizes.append)

    async def run() -> list[int]:
        return list(await asyncio.gather(*(double(number) for number in range(10))))

    for _ in range(2):  # also in the event loop of another run
        assert asyncio.run(run()) == [2 * number for number in range(10)]
    assert sizes == [4, 4, 2] * 2


def test_the_next_batch_fills_while_a_forward_runs() -> None:
    entered, released, sizes = threading.Event(), threading.Event(), []

    def work(items: list[int]) -> list[int]:
        entered.set()
        assert released.wait(60)
        return items

    batcher = Batcher(work, max_size=32, observe=sizes.append)

    async def run() -> None:
        first = asyncio.create_task(batcher(0))
        assert await asyncio.to_thread(entered.wait, 60)  # alone, without waiting for company
        others = []
        for number in range(1, 20):
            others.append(asyncio.create_task(batcher(number)))
            await asyncio.sleep(0)
        released.set()
        assert [await first, *await asyncio.gather(*others)] == list(range(20))

    asyncio.run(run())
    assert sizes == [1, 19]


def test_a_bad_item_fails_alone() -> None:
    def work(items: list[int]) -> list[int]:
        if 3 in items:
            raise ValueError("three")
        return items

    async def run() -> list[object]:
        batcher = Batcher(work, max_size=8)
        return list(await asyncio.gather(*(batcher(number) for number in range(6)), return_exceptions=True))

    answers = asyncio.run(run())
    assert [answer for answer in answers if not isinstance(answer, Exception)] == [0, 1, 2, 4, 5]
    with pytest.raises(ValueError, match="three"):
        raise next(answer for answer in answers if isinstance(answer, Exception))


def test_who_gave_up_is_not_worked_for() -> None:
    seen: list[int] = []

    def work(items: list[int]) -> list[int]:
        seen.extend(items)
        return items

    async def run() -> None:
        batcher = Batcher(work, max_size=8)
        kept, given_up = asyncio.create_task(batcher(1)), asyncio.create_task(batcher(2))
        await asyncio.sleep(0)  # both wait now
        given_up.cancel()
        assert await kept == 1

    asyncio.run(run())
    assert seen == [1]
