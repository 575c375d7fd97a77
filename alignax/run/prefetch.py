"""Batches that are made ahead: while the device computes on one, a thread lays the next ones out and puts them on the device."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")
DEPTH = 2  # items that are made before they are asked for


class Prefetch(Generic[Item]):
    """A function of an index whose next values are computed ahead in one thread: `prefetch(i)` is `make(i)`, bit for bit.

    Values depend on the index alone, so a run may begin anywhere. The thread must start no collective and no program that several
    processes run: their order would be the thread's own in each process. `alignax.mesh.put_batch` starts neither.
    """

    def __init__(self, make: Callable[[int], Item], stop: int):
        """Computes nothing yet; no index from `stop` on is computed ahead."""
        self.make, self.stop = make, stop
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._made: dict[int, Future[Item]] = {}

    def __call__(self, index: int) -> Item:
        """The value at an index, waited for; an exception of `make` is raised here."""
        ahead = range(index, min(index + 1 + DEPTH, self.stop)) if index < self.stop else (index,)
        self._made = {i: self._made.get(i) or self._thread.submit(self.make, i) for i in ahead}
        return self._made.pop(index).result()

    def close(self) -> None:
        """Waits for the value that is being computed, and computes no other."""
        self._thread.shutdown(cancel_futures=True)


@contextmanager
def prefetched(make: Callable[[int], Item], count: int) -> Iterator[Iterator[Item]]:
    """A context with the values of `make` at 0 .. count - 1, each computed ahead; the thread ends with the context."""
    ahead = Prefetch(make, count)
    try:
        yield map(ahead, range(count))
    finally:
        ahead.close()


def late(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each once the next one is there: while the host reads the result of a program, the device runs the next program."""
    waiting: list[Item] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting
