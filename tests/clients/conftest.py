"""Contracts and merchants for the tests of the merchant's side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.merchant import Merchant, read_merchant
from common.contract import Contract, parse_contract

FEATURES: list[dict[str, Any]] = [
    {"name": "spend", "high": 5000.0, "transform": "log1p"},
    {"name": "age", "low": 18.0, "high": 100.0, "missing": "indicator"},
    {"name": "visits", "high": 50.0, "transform": "sqrt", "missing": 0.0},
    {"name": "member", "kind": "flag"},
    {"name": "plan", "kind": "category", "categories": ["basic", "plus"], "missing": "indicator"},
]
MEASURED: list[dict[str, Any]] = [
    {"name": "spend", "measure": "spend", "high": 5000.0},
    {"name": "purchases", "measure": "purchases", "high": 200.0},
]
WINDOWS = {
    "features": ["2017-01-01", "2017-10-01"],
    "label": ["2017-10-01", "2018-01-01"],
    "previous": ["2017-07-01", "2017-10-01"],
}

MakeContract = Callable[..., Contract]
MakeMerchant = Callable[..., Merchant]


def build_contract(**sections: Any) -> Contract:
    """Build a small valid contract; keywords replace whole sections."""
    document = {
        "federation": {"name": "test"},
        "features": FEATURES,
        "segments": {"names": ["low", "high"], "previous_column": "last_segment"},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
    }
    return parse_contract({**document, **sections}, source="test")


@pytest.fixture
def contract() -> Contract:
    """Give a contract for one row a customer."""
    return build_contract()


@pytest.fixture
def make_contract() -> MakeContract:
    """Give the function that builds contracts."""
    return build_contract


@pytest.fixture
def spend_contract() -> Contract:
    """Give a contract for raw transactions."""
    segments = {"source": "spend", "names": ["none", "some", "much"], "cuts": [0.01, 50.0]}
    return build_contract(features=MEASURED, windows=WINDOWS, segments=segments)


@pytest.fixture
def make_merchant(tmp_path: Path) -> MakeMerchant:
    """Give a function that writes a merchant.toml around `[data]` and reads it."""

    def make(data: str, *, columns: str = "", kind: str = "customers") -> Merchant:
        path = tmp_path / "merchant.toml"
        path.write_text(
            f'[merchant]\nid = "shop"\n[data]\nkind = "{kind}"\n{data}\n'
            f"[columns]\n{columns}\n[policy]\nepsilon = 1.0\ndelta = 1e-5\n",
            encoding="utf-8",
        )
        return read_merchant(path)

    return make
