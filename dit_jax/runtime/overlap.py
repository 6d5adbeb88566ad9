"""Iterators whose work overlaps with that of their consumer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_flight(
    started: Iterable[Item], limit: int, ready: Callable[[Item], bool] = lambda item: False
) -> Iterator[Item]:
    """Yields the same items in order, each when it is ready or when `limit` later ones were started.

    For items that are work on the devices: the iterator starts it and does not wait.
    """
    waiting = deque()
    for item in started:
        waiting.append(item)
        while waiting and (len(waiting) > limit or ready(waiting[0])):
            yield waiting.popleft()
    yield from waiting


def one_behind(run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields run(item) of each item, in order, after starting the next one.

    For a `run` that starts work on the devices and returns at once.
    """
    return in_flight(map(run, items), 1)


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the same items, none of them None, while a thread reads the next one.

    Not for items that the devices compute: programs that two threads start may wait for each other.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, iterator, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, iterator, None)
            yield item


def read_ahead(read: Callable[[Item], Result], indices: Iterable[Item], ahead: int) -> Iterator[tuple[Item, Result]]:
    """Yields (index, read(index)) in order. Threads read up to `ahead` of them in advance."""
    futures = deque()
    with ThreadPoolExecutor() as pool:
        try:
            for index in indices:
                futures.append((index, pool.submit(read, index)))
                if len(futures) > ahead:
                    index, future = futures.popleft()
                    yield index, future.result()
            for index, future in futures:
                yield index, future.result()
        finally:
            for _, future in futures:
                future.cancel()
