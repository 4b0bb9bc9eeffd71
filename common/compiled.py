"""Loops that numba turns into machine code, which is kept for the next process.

Rules for such functions: a module of their own (tools that check types at run time wrap Python
functions, and numba cannot read those), no check of indices (whoever calls them makes sure that
they hold), and whatever they call, and every constant, in the same module: only what Python runs
as that module and this file are looked at for changes.

numba's own cache takes old code for new after a save that broke off, and a damaged file ends the
process. Wrong noise would be worse than slow noise, so here a file is named by everything that
its code depends on, holds a checksum, and is passed over, whatever is wrong with it.
"""

import hashlib
import os
import pickle
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar, cast

import llvmlite
import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps

Loop = TypeVar("Loop", bound=Callable[..., object])

_DIGEST = hashlib.sha256().digest_size


def compiled(loop: Loop) -> Loop:
    """Compile a function when it is first called, or take what an earlier process compiled.

    The machine code lies in `NUMBA_CACHE_DIR`, beside the source or in the user's cache folder;
    who may write there may change what is computed. Where nothing can be written or read, each
    process compiles anew, for a few seconds.
    """
    machine: Any = njit(loop, nogil=True, error_model="numpy")
    module = sys._getframe(1).f_code
    # numba's words for "there is no folder"
    with suppress(OSError, RuntimeError, ValueError):
        machine._cache = _KeptCode(loop, module)
    return cast("Loop", machine)


def _told(code: Any) -> Any:
    """Return a code object as something that is told alike in every process."""
    if isinstance(code, frozenset):
        return sorted(map(repr, code))  # whose order is another one in every process
    if not isinstance(code, CodeType):
        return code
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    run = code.co_argcount, code.co_flags, code.co_code, code.co_exceptiontable
    return names, run, [_told(one) for one in code.co_consts]


class _KeptCode(FunctionCache):
    """What numba asks for machine code, and gives new code to; never fails.

    Args:
        loop: The function.
        module: What Python runs as the function's module. The source may say something else: it
            may be replaced while the process starts, and Python takes bytecode of before for a
            source of the same length and time, as after two saves in a second.

    Raises:
        ValueError: The function is not made where a module is run.
    """

    def __init__(self, loop: Callable[..., object], module: CodeType) -> None:
        super().__init__(loop)
        if module.co_name != "<module>":
            raise ValueError("no module tells what the loop depends on")
        parts = (repr(_told(module)).encode(), Path(__file__).read_bytes())
        files: Any = _Files(Path(self._cache_path), self._impl.filename_base, parts)
        self._cache_file = files

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            # numba would get ready to compile first: half a second, for what may not be needed
            rtsys.initialize(target_context)
            return self._load_overload(sig, target_context)
        except Exception:  # noqa: BLE001  # whatever it is, compiling helps
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:  # noqa: BLE001  # the next process compiles again
            return


class _Files:
    """One file for each piece of machine code, in the place of numba's index and data files."""

    def __init__(self, folder: Path, base: str, sources: tuple[bytes, ...]) -> None:
        self._folder, self._base = folder, base
        self._sources = [hashlib.sha256(source).hexdigest() for source in sources]

    def _path(self, key: object) -> Path:
        parts = (*self._sources, numba.__version__, llvmlite.__version__, sys.version, repr(key))
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
        return self._folder / f"{self._base}.{name}.code"

    def load(self, key: object) -> Any:
        """Return what was saved; None where nothing whole is there."""
        try:
            found = self._path(key).read_bytes()
        except OSError:
            return None
        digest, data = found[:_DIGEST], found[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            return None
        return pickle.loads(data)  # noqa: S301  # from a folder that only its user may write to

    def save(self, key: object, data: object) -> None:
        """Write a file that is whole or not there."""
        content: bytes = dumps(data)
        path = self._path(key)
        new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            new.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
