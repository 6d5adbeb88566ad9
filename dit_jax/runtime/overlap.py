"""Iterators whose work overlaps with that of whoever asks them."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor


def one_behind(run, items):
    """run(item) of each, in order. run starts work on the devices and returns at once: the next item's is started before
    a result is handed over."""
    before = []
    for item in items:
        now = run(item)
        yield from before
        before = [now]
    yield from before


def ahead(items):
    """The same items; a thread reads the next one meanwhile. Not for items that the devices make: programs that two
    threads start may wait for each other."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (now := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield now


def read_ahead(read, indices, ahead):
    """(index, read(index)) in order, `ahead` of them being read by threads."""
    waiting = deque()
    with ThreadPoolExecutor() as pool:
        try:
            for index in indices:
                waiting.append((index, pool.submit(read, index)))
                if len(waiting) > ahead:
                    index, result = waiting.popleft()
                    yield index, result.result()
            for index, result in waiting:
                yield index, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
