"""The front door: every public name is there, and importing it costs nothing."""

import importlib
import re
import subprocess
import sys

import pytest

import hansa

HEAVY = ("torch", "flwr", "pandas", "numpy", "opacus", "sklearn", "matplotlib", "pyarrow")


def loaded_after(code: str) -> set[str]:
    """Return the heavy libraries that a new interpreter has imported after running code."""
    told = f"{code}\nimport sys; print([n for n in {HEAVY!r} if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"'(\w+)'", found.splitlines()[-1]))


@pytest.mark.parametrize("name", hansa.__all__)
def test_every_public_name_is_the_one_of_its_room(name: str) -> None:
    """The front door has no logic of its own."""
    found = getattr(hansa, name)
    assert found is getattr(importlib.import_module(found.__module__), name)


@pytest.mark.parametrize("name", hansa.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    """In the module's docstring, and with one of its own."""
    assert re.search(rf"\b{name}\b", hansa.__doc__ or "")
    assert getattr(hansa, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As in any module."""
    with pytest.raises(AttributeError, match="no 'nonsense'"):
        hansa.nonsense  # noqa: B018


def test_importing_hansa_is_instant() -> None:
    """Nothing heavy is imported before it is used."""
    assert loaded_after("import hansa") == set()


def test_importing_the_command_is_instant() -> None:
    """Nor by the command itself."""
    assert loaded_after("import hansa.cli") == set()


def test_the_example_of_the_docs_runs(tmp_path: object) -> None:
    """Load, revise, assemble, simulate, read."""
    from pathlib import Path

    out = Path(str(tmp_path))
    dataset = hansa.load("synthetic", preset="smoke", merchants=3)
    contract = dataset.contract.revised(training={"rounds": 1})
    federation = hansa.assemble(dataset, contract, out, None)
    result = hansa.simulate(federation, out, lambda _record, _rounds: None)
    assert hansa.read_bundle(result.bundle).contract == contract
    assert hansa.read_contract(result.bundle / "contract.toml") == contract
    assert isinstance(contract, hansa.Contract)
