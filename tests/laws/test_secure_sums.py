"""Laws of secure sums: the exact sum of exactly the survivors, or a refusal with a reason."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import SecureSumError
from common.session import threshold, to_bitmap
from tests.secure_world import (
    ANSWER,
    ASKED,
    LABEL,
    SETUP_STAGES,
    STEP_STAGES,
    Fates,
    World,
    occasion,
    vectors_of,
)

RINGS = (np.uint32, np.uint64)
WAYS = (ASKED, ANSWER)


def fates(stages: tuple[str, ...], most: int) -> st.SearchStrategy[Fates]:
    """Draw which merchants are lost, where, and on which way."""
    fate = st.tuples(st.sampled_from(stages), st.sampled_from(WAYS))
    return st.dictionaries(st.integers(0, 11), fate, max_size=most)


def lost_at(stage: str, chosen: Fates, positions: list[int], world: World) -> set[int]:
    """Return the positions that are lost in a stage, either way."""
    numbers = {number for number, (where, _) in chosen.items() if where == stage}
    return {position for position in positions if int(world.roster[position][-3:]) in numbers}


def check_step(world: World, vectors: list[np.ndarray], chosen: Fates) -> bool:
    """Take one step and compare with what the rules promise; tell whether the session goes on."""
    coordinator = world.coordinator
    active, quorum = coordinator.ready, coordinator.roster.threshold
    if len(active) < coordinator.needed:
        with pytest.raises(SecureSumError, match=r"can take part in a secure sum, \d+ are needed"):
            world.sum(vectors, chosen)
        return False
    survivors = sorted(set(active) - lost_at("update", chosen, active, world))
    confirmed = set(survivors) - lost_at("confirm", chosen, survivors, world)
    revealed = confirmed - lost_at("reveal", chosen, sorted(confirmed), world)
    if len(survivors) < coordinator.needed:
        with pytest.raises(SecureSumError, match=r"masked vectors came, \d+ are needed"):
            world.sum(vectors, chosen)
    elif len(confirmed) < quorum:
        with pytest.raises(SecureSumError, match=r"members confirmed the sum, \d+ are needed"):
            world.sum(vectors, chosen)
    elif len(revealed) < quorum:
        with pytest.raises(SecureSumError, match=r"good shares of '.*' were revealed, \d+ are"):
            world.sum(vectors, chosen)
    else:
        total = world.sum(vectors, chosen)
        assert total.dtype == vectors[0].dtype
        np.testing.assert_array_equal(total, world.plain(vectors, survivors))
    assert coordinator.ready == survivors
    assert not coordinator.blamed
    return True


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(2, 12),
    ring=st.sampled_from(RINGS),
    minimum=st.integers(2, 8),
    forgetful=st.booleans(),
    setup=fates(SETUP_STAGES, 3),
    steps=st.lists(fates(STEP_STAGES, 4), min_size=1, max_size=4),
    length=st.integers(0, 6),
    seed=st.integers(0, 2**32),
)
def test_a_sum_is_that_of_the_survivors_or_there_is_none(
    *,
    count: int,
    ring: type[np.unsignedinteger],
    minimum: int,
    forgetful: bool,
    setup: Fates,
    steps: list[Fates],
    length: int,
    seed: int,
) -> None:
    """Whoever is lost, wherever: the survivors' exact sum, or an error that says what is needed."""
    world = World(count, minimum, forgetful)
    world.advertise(setup)
    there = [n for n in range(count) if setup.get(n, ("", ""))[0] != "advertise"]
    if len(there) < 2:
        with pytest.raises(SecureSumError, match="a secure sum needs 2 to 200"):
            world.coordinator.close_roster()
        return
    refusals = world.share(setup)
    if len(there) < minimum:
        assert all("joins sums of" in str(error) for error in refusals)
        assert world.coordinator.ready == []
    else:
        assert not refusals
    for number, chosen in enumerate(steps):
        vectors = vectors_of(count, length, ring, seed + number)
        if not check_step(world, vectors, chosen):
            break


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(3, 12),
    ring=st.sampled_from(RINGS),
    length=st.sampled_from([8191, 8192, 8193, 16384, 16385, 70_001]),
    late=st.integers(0, 11),
    seed=st.integers(0, 2**32),
)
def test_long_vectors_sum_up_too(
    count: int, ring: type[np.unsignedinteger], length: int, late: int, seed: int
) -> None:
    """Also where streams are made block by block, with and without somebody missing."""
    world = World(count, 2).set_up()
    vectors = vectors_of(count, length, ring, seed)
    lost: Fates = {late: ("update", ANSWER)} if count > 3 else {}
    assert check_step(world, vectors, lost)
    assert check_step(world, vectors, {})


def subsets(count: int) -> Iterator[set[int]]:
    """Yield every set of survivors that reaches the threshold."""
    for size in range(threshold(count), count + 1):
        yield from (set(chosen) for chosen in combinations(range(count), size))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7])
def test_every_set_of_survivors_and_every_silence_after_it(count: int) -> None:
    """All sets above the threshold, each with all single losses of the stages that follow."""
    start = World(count, 2).set_up()
    vectors = vectors_of(count, 3, np.uint32, count)
    for number, survivors in enumerate(subsets(count)):
        lost: dict[int, tuple[str, str]] = {
            gone: ("update", WAYS[(number + gone) % 2]) for gone in set(range(count)) - survivors
        }
        assert check_step(start.snapshot(), vectors, lost)
        for silent in survivors:
            for stage in ("confirm", "reveal"):
                way = WAYS[(number + silent) % 2]
                world = start.snapshot()
                assert check_step(world, vectors, {**lost, silent: (stage, way)})
                assert check_step(world, vectors, {})


@pytest.mark.parametrize("way", WAYS)
def test_who_dropped_stays_out_while_the_others_go_on(way: str) -> None:
    """A merchant that was lost once is in no later sum of the session, and may not be put back."""
    world = World(7, 5).set_up()
    vectors = vectors_of(7, 4, np.uint64, 1)
    world.sum(vectors, {2: ("update", way)})
    for _ in range(3):
        assert world.coordinator.ready == [0, 1, 3, 4, 5, 6]
        total = world.sum(vectors)
        np.testing.assert_array_equal(total, world.plain(vectors, [0, 1, 3, 4, 5, 6]))
    asked = to_bitmap(range(7), 7)
    boxes = bytes(6 * 80)
    for position in world.coordinator.ready:
        with pytest.raises(SecureSumError, match="'shop-002' cannot be in it"):
            world.at(position).prepare(5, occasion(5), asked, boxes, LABEL)


def test_losses_may_add_up_to_the_threshold_and_not_beyond() -> None:
    """One merchant falls out a step until the threshold holds the session."""
    world = World(10, 2).set_up()
    vectors = vectors_of(10, 2, np.uint32, 3)
    for gone in range(3):
        world.sum(vectors, {gone: ("update", ANSWER)})
    np.testing.assert_array_equal(world.sum(vectors), world.plain(vectors, list(range(3, 10))))
    with pytest.raises(SecureSumError, match="6 masked vectors came, 7 are needed"):
        world.sum(vectors, {3: ("update", ANSWER)})
    with pytest.raises(SecureSumError, match="6 members can take part"):
        world.sum(vectors)


def test_a_step_that_was_not_finished_is_lost_and_the_next_one_works() -> None:
    """Where too few reveal, nothing is unmasked; everybody is in the next step."""
    world = World(5, 3).set_up()
    vectors = vectors_of(5, 4, np.uint32, 5)
    with pytest.raises(SecureSumError, match="3 good shares"):
        world.sum(vectors, {0: ("reveal", ASKED), 1: ("reveal", ANSWER)})
    with pytest.raises(SecureSumError, match="no step of this session is under way"):
        world.coordinator.total()
    np.testing.assert_array_equal(world.sum(vectors), world.plain(vectors, list(range(5))))


class TestLate:
    """Messages that come after their stage was closed."""

    def test_a_late_vector_is_not_in_the_sum(self) -> None:
        """After the set of survivors is fixed, no vector is taken, and the sum is right."""
        world = World(4, 2).set_up()
        vectors = vectors_of(4, 3, np.uint32, 1)
        world.update(vectors, {3: ("update", ANSWER)})
        world.confirm()
        with pytest.raises(SecureSumError, match="or is late"):
            world.coordinator.take_masked(3, *world.held[3])
        world.reveal()
        np.testing.assert_array_equal(world.coordinator.total(), world.plain(vectors, [0, 1, 2]))
        assert world.coordinator.ready == [0, 1, 2]

    def test_a_late_advert_changes_no_roster(self) -> None:
        """Who advertises after the roster was fixed is not in the session."""
        world = World(5, 2)
        world.advertise({4: ("advertise", ANSWER)})
        world.share()
        world.coordinator.take_advert(world.merchants["shop-004"].advert, "shop-004")
        vectors = vectors_of(5, 3, np.uint32, 1)
        np.testing.assert_array_equal(world.sum(vectors), world.plain(vectors, [0, 1, 2, 3]))
