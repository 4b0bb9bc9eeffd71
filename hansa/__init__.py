"""Hansa: merchants learn customer segments together and keep their books.

The public API, imported when first used:

    Contract, read_contract     the agreement of a federation
    load                        a built-in data set
    assemble, open_federation   merchants that are ready to take part
    simulate, compare           run them
    read_bundle                 what a run published
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Contract": "common.contract",
    "assemble": "simulations.federation",
    "compare": "simulations.compare",
    "load": "simulations.datasets",
    "open_federation": "simulations.federation",
    "read_bundle": "common.bundle",
    "read_contract": "common.contract",
    "simulate": "simulations.run",
}

__all__ = sorted(_PUBLIC)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used; importing hansa itself stays instant."""
    if name not in _PUBLIC:
        raise AttributeError(f"hansa has no '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)
