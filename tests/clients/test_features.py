"""Tests of the encoding of customers."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.features import encode
from clients.table import make_table
from common.contract import Contract
from common.scaling import inputs

MakeContract = Callable[..., Contract]

anything = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.one_of(st.none(), anything)
rows = st.fixed_dictionaries(
    {
        "spend": anything,
        "age": maybe,
        "visits": maybe,
        "member": st.booleans(),
        "plan": st.sampled_from(["basic", "plus", None]),
    }
)


def frame_of(drawn: list[dict[str, object]]) -> pd.DataFrame:
    """Number drawn customers."""
    frame = pd.DataFrame(drawn).astype({"age": "float64", "visits": "float64"})
    return frame.assign(customer_id=[f"c{row}" for row in range(len(frame))])


class TestEncode:
    """encode."""

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(drawn=st.lists(rows, min_size=1, max_size=6))
    def test_is_finite_and_bounded(
        self, contract: Contract, drawn: list[dict[str, object]]
    ) -> None:
        """Whatever the finite values, every input is in [-1, 1]."""
        encoded = encode(make_table(frame_of(drawn), contract, source="frame"), contract)
        assert encoded.shape == (len(drawn), contract.inputs)
        assert encoded.dtype == np.float64
        assert (np.abs(encoded) <= 1.0).all()

    @settings(
        max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(drawn=st.lists(rows, min_size=2, max_size=6), data=st.data())
    def test_rows_are_independent(
        self, contract: Contract, drawn: list[dict[str, object]], data: st.DataObject
    ) -> None:
        """Removing or moving customers never changes another one's encoding."""
        frame = frame_of(drawn)
        order = data.draw(st.permutations(range(len(frame))))
        kept = order[: data.draw(st.integers(1, len(frame)))]
        whole = encode(make_table(frame, contract, source="frame"), contract)
        part = encode(make_table(frame.iloc[kept], contract, source="frame"), contract)
        np.testing.assert_array_equal(part, whole[kept])

    def test_one_customer_by_hand(self, contract: Contract) -> None:
        """Each kind of feature is encoded as documented, in the order of the inputs."""
        drawn = {"spend": 5000.0, "age": 59.0, "visits": 12.5, "member": True, "plan": "plus"}
        encoded = encode(make_table(frame_of([drawn]), contract, source="frame"), contract)
        labels = [item.label for item in inputs(contract)]
        assert dict(zip(labels, encoded[0].tolist(), strict=True)) == {
            "spend": 1.0,
            "age": 0.0,
            "age (missing)": -1.0,
            "visits": 0.0,
            "member": 1.0,
            "plan = basic": -1.0,
            "plan = plus": 1.0,
            "plan (missing)": -1.0,
        }

    def test_missing_values(self, contract: Contract) -> None:
        """A missing value is 0 (a category: all -1) with an indicator, or the public number."""
        drawn = {"spend": 0.0, "age": None, "visits": None, "member": False, "plan": None}
        encoded = encode(make_table(frame_of([drawn]), contract, source="frame"), contract)
        assert encoded[0].tolist() == [-1.0, 0.0, 1.0, -1.0, -1.0, -1.0, -1.0, 1.0]

    @pytest.mark.parametrize(("replacement", "expected"), [(0.0, -1.0), (0.5, 0.0), (7.0, 1.0)])
    def test_replacement_is_bounded(
        self, make_contract: MakeContract, replacement: float, expected: float
    ) -> None:
        """A public replacement of a number or a flag is clipped like a value."""
        features = [
            {"name": "x", "missing": replacement},
            {"name": "y", "kind": "flag", "missing": replacement},
        ]
        contract = make_contract(features=features)
        frame = pd.DataFrame({"customer_id": ["a"], "x": [None], "y": [None]})
        encoded = encode(make_table(frame, contract, source="frame"), contract)
        assert encoded.tolist() == [[expected, expected]]
