"""Reading ahead of a consumer, in threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], *, ahead: int, workers: int) -> Generator[Result]:
    """``map(read, items)`` that reads a few results in advance.

    Args:
        read: called in a thread for each item.
        items: taken one by one, in the consumer's thread; may be endless.
        ahead: largest number of results read or being read in advance.
        workers: number of threads.

    Yields:
        Results, in the order of the items.

    Raises:
        Exception: any error of ``read``, at the position of the item.
    """
    upcoming = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="flaxdet-read") as pool:
        reading: deque[Future[Result]] = deque()
        try:
            for item in itertools.islice(upcoming, ahead):
                reading.append(pool.submit(read, item))
            while reading:
                result = reading.popleft().result()
                for item in itertools.islice(upcoming, 1):
                    reading.append(pool.submit(read, item))
                yield result
        finally:
            for future in reading:
                future.cancel()
