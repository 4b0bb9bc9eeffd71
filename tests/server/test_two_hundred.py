"""The largest cohort of one secure sum."""

import numpy as np
import pytest

from common.contract import MAX_COHORT
from tests.secure_world import World, vectors_of


@pytest.mark.slow
def test_two_hundred_merchants_of_whom_sixty_are_lost() -> None:
    """With 134 of 200 left at the end the sum is still that of the survivors, exactly."""
    world = World(MAX_COHORT, 120).set_up()
    vectors = vectors_of(MAX_COHORT, 257, np.uint32, 1)
    np.testing.assert_array_equal(world.sum(vectors), world.plain(vectors, list(range(MAX_COHORT))))
    stages = ["update"] * 26 + ["confirm"] * 20 + ["reveal"] * 20
    fates = {3 * number: (stage, "asked") for number, stage in enumerate(stages)}
    absent = {number for number, (stage, _) in fates.items() if stage == "update"}
    present = [number for number in range(MAX_COHORT) if number not in absent]
    np.testing.assert_array_equal(world.sum(vectors, fates), world.plain(vectors, present))
