"""Finds out whether an id comes twice among any number of ids, in little memory.

Every id leaves a 64-bit hash in one of a few nameless files, chosen by the hash's first bits. Equal
hashes lie in one file, so that one file at a time has to be looked at. Ids with equal hashes are
suspects, no more: of ten million, two different ones share a hash once in 400,000 tables.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Self

import numpy as np
import pandas as pd
from jaxtyping import Shaped, UInt64

from common.errors import DataError

_FILE_BITS = 6


class Marks:
    """The hashes of the ids that were met; use it in a `with` statement.

    The hash has a fresh key that is kept nowhere: the files tell nobody who is a customer.
    """

    def __init__(self) -> None:
        self._key = os.urandom(8).hex()
        self._stack = ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        with _told():
            for _ in range(1 << _FILE_BITS):
                self._files.append(self._stack.enter_context(tempfile.TemporaryFile()))
        return self

    def __exit__(self, *_: object) -> None:
        with _told():
            self._stack.close()

    def of(self, ids: Shaped[np.ndarray, "R"]) -> UInt64[np.ndarray, "R"]:
        """Return the hash of each id."""
        return pd.util.hash_array(ids, hash_key=self._key, categorize=False)

    def add(self, ids: Shaped[np.ndarray, "R"]) -> None:
        """Remember ids.

        Raises:
            DataError: The folder for temporary files cannot be written.
        """
        marks = self.of(ids)
        places = (marks >> np.uint64(64 - _FILE_BITS)).astype(np.uint8)
        ordered = marks[np.argsort(places, kind="stable")]
        counts = np.bincount(places, minlength=len(self._files))
        parts = np.split(ordered, np.cumsum(counts)[:-1])
        with _told():
            for file, part in zip(self._files, parts, strict=True):
                file.write(part.tobytes())

    def repeated(self) -> UInt64[np.ndarray, " suspects"]:
        """Return the hashes that were met more than once, each once.

        Raises:
            DataError: The files cannot be read.
        """
        found = [np.empty(0, dtype=np.uint64)]
        for file in self._files:
            with _told():
                file.seek(0)
                marks = np.sort(np.frombuffer(file.read(), dtype=np.uint64))
            found.append(np.unique(marks[1:][marks[1:] == marks[:-1]]))
        return np.concatenate(found)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{tempfile.gettempdir()}: temporary files cannot be written ({error.strerror}); make "
            "room there, or name another folder in the environment as TMPDIR"
        ) from None
