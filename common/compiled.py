"""Loops that numba turns into machine code, which is kept for the next process.

Rules for such functions: a module of their own (tools that check types at run time wrap Python
functions, and numba cannot read those), no check of indices (whoever calls them makes sure that
they hold), and whatever they call, and every constant, in the same file: numba looks for changes
in that file alone, and constants of another one would stay what they were.
"""

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

Loop = TypeVar("Loop", bound=Callable[..., object])


def compiled(loop: Loop) -> Loop:
    """Compile a function when it is first called, or take what an earlier process compiled.

    The machine code lies beside the source, else in the user's cache folder. Where neither can
    be written to, each process compiles anew, for a few seconds.
    """
    try:
        machine = njit(loop, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # numba's word for "no folder can be written to"
        machine = njit(loop, nogil=True, error_model="numpy")
    return cast("Loop", machine)
