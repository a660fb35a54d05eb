"""Work that other threads begin before its result is asked for."""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future


def wait(futures: Iterable[Future]) -> list:
    """The results; the first error is raised."""
    return [future.result() for future in futures]


def ahead(items: Iterable) -> Iterator:
    """The items of a lazy iterable, each only when the next one has been started."""
    for now, _ in itertools.pairwise(itertools.chain(items, [None])):
        yield now
