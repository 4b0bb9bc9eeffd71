"""Opacus' accountants, imported without what Opacus trains with.

`import opacus` imports torch: two seconds and a quarter of a gigabyte, in every process that
plans a run. The accountants need numpy and scipy alone; of the rest they name one class, in an
annotation.
"""

import sys
import threading
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

_lock = threading.Lock()
_found: list[ModuleType] = []


def opacus_accountants() -> ModuleType:
    """Return Opacus' module `opacus.accountants`, with `utils`.

    Where `opacus` was not imported before, this copy is ours alone: a later `import opacus` finds
    nothing of it. No other thread may import Opacus meanwhile: it would find half of it.

    Raises:
        ImportError: Opacus is not installed, or its accountants need more than they used to.
    """
    with _lock:
        if not _found:
            _found.append(_imported() if "opacus" in sys.modules else _imported_alone())
        return _found[0]


def _imported() -> ModuleType:
    import_module("opacus.accountants.utils")
    return import_module("opacus.accountants")


def _imported_alone() -> ModuleType:
    """Import the accountants from a package `opacus` that is there for just as long."""
    spec = find_spec("opacus")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("opacus is not installed")
    package, optimizers = ModuleType("opacus"), ModuleType("opacus.optimizers")
    package.__path__ = list(spec.submodule_search_locations)
    optimizers.DPOptimizer = object  # type: ignore[attr-defined]  # named, not used
    sys.modules |= {"opacus": package, "opacus.optimizers": optimizers}
    try:
        return _imported()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
            del sys.modules[name]
