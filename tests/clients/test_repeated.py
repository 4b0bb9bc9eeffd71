"""Ids that come twice are found, and nothing is left behind."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.repeated import Marks
from common.errors import DataError

ids = st.lists(st.text("abc1é", max_size=2))


def of(names: list[str]) -> np.ndarray:
    """Make the ids of one batch."""
    return np.array(names, dtype=object)


class TestMarks:
    """Marks."""

    @given(batches=st.lists(ids, max_size=4))
    def test_finds_exactly_those_that_come_twice(self, batches: list[list[str]]) -> None:
        """In one batch or in several, each once."""
        every = [name for batch in batches for name in batch]
        with Marks() as marks:
            for batch in batches:
                marks.add(of(batch))
            found = set(marks.repeated().tolist())
            expected = {name for name in every if every.count(name) > 1}
            assert found == set(marks.of(of(sorted(expected))).tolist())

    def test_many_ids(self) -> None:
        """One pair among many is found, whichever file its hash lies in."""
        names = [str(number) for number in range(20_000)]
        with Marks() as marks:
            marks.add(of(names[:10_000]))
            marks.add(of([*names[10_000:], "17"]))
            assert marks.repeated().tolist() == marks.of(of(["17"])).tolist()

    def test_the_key_is_fresh(self) -> None:
        """The same id has another hash the next time."""
        with Marks() as one, Marks() as other:
            assert one.of(of(["ann"])) != other.of(of(["ann"]))

    def test_no_file_has_a_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing of it can be left behind, however the process ends."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with Marks() as marks:
            marks.add(of(["ann"]))
            assert not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The message says what to do."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        with pytest.raises(DataError, match=r"files cannot be written.*TMPDIR"), Marks():
            pass
