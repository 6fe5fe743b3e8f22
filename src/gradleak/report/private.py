"""Files that hold private data are their owner's alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def private() -> Iterator[None]:
    """Files that are made meanwhile can be read by their owner only: what was recovered is as private as the data."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
