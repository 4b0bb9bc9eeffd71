"""Stacks of real processes: one a module where tests leave it whole, else one a test."""

from collections.abc import Iterator

import pytest

from tests.deployed.stack import Stack, stack


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Give four merchants that joined; a sum needs three of them."""
    with stack(tmp_path_factory.mktemp("federation"), 4) as found:
        found.up(rounds=4, aggregation={"min_survivors": 3})
        yield found


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Give a stack that nothing was done with yet, in a folder whose sockets have short paths."""
    with stack(tmp_path_factory.mktemp("f"), 3) as found:
        yield found
