"""Work that other threads begin before its result is asked for."""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future


def results(futures: Iterable[Future]) -> list:
    """What the futures found; the first error is raised."""
    return [future.result() for future in futures]


def prefetched(items: Iterable) -> Iterator:
    """The items of a lazy iterable, each only when the next one has been started."""
    for now, _ in itertools.pairwise(itertools.chain(items, [None])):
        yield now
