"""Single items of many requests in, batches for a model out: while one forward runs, the next batch fills.

Nothing waits for company: an item that comes alone is worked on at once, and under load batches grow by themselves.
Ray Serve's `serve.batch` cuts a batch whenever its wait is over, also while a forward runs: with forwards longer than
the wait its batches stay small, and without load every request pays for the wait.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Awaitable for one item at a time; `work` gets up to `max_size` of them in a thread, one batch after the other.

    A batch that fails is tried again item by item, so that a bad one fails alone. `observe` hears each batch's size.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Result]],
        max_size: int,
        observe: Callable[[int], None] | None = None,
    ) -> None:
        self._work, self._max_size, self._observe = work, max_size, observe
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._pump: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """What `work` makes of the item, or its exception."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._pump is None:
            self._pump = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(self._max_size, len(self._waiting)))]
                await self._answer(
                    [(item, future) for item, future in batch if not future.done()]
                )  # given up meanwhile
        finally:
            self._pump = None

    async def _answer(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        if not batch:
            return
        if self._observe:
            self._observe(len(batch))
        try:
            results = await asyncio.to_thread(self._work, [item for item, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for pair in batch:
                    await self._answer([pair])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)


def parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Of a large request, what is worked on before others get their turn."""
    return (items[start : start + size] for start in range(0, len(items), size))
