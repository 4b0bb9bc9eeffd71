"""Compiled loops: the same as the plain Python in them, kept between processes where it can be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.step_loops import add_noise, move
from common.discrete_gaussian import _GUIDE_BITS
from common.noise_loops import any_twice, choose

ROOT = Path(__file__).parents[2]
LOOP = """
from common.compiled import compiled

@compiled
def double(number):
    return 2 * number
"""


words = st.integers(0, 2**64 - 1)


class TestLikePython:
    """Machine code and the text it was made from."""

    @given(st.lists(words, max_size=40), st.floats(0, 1))
    def test_choose(self, drawn: list[int], rate: float) -> None:
        """Whose upper 53 bits lie below the limit, and their words, in order."""
        numbers = np.array(drawn, dtype=np.uint64)
        limit = np.uint64(np.ceil(rate * 2.0**53))
        rows, keys = np.zeros(41, dtype=np.int64), np.zeros(41, dtype=np.uint64)
        count = choose(numbers, limit, rows, keys)
        expected = [row for row, word in enumerate(drawn) if word >> 11 < int(limit)]
        assert rows[:count].tolist() == expected
        assert keys[:count].tolist() == [drawn[row] for row in expected]

    @given(st.lists(st.integers(0, 30), max_size=12))
    def test_any_twice(self, drawn: list[int]) -> None:
        """Two equal keys are found wherever they are."""
        keys = np.array(drawn, dtype=np.uint64)
        assert any_twice(keys, np.argsort(keys)) == (len(set(drawn)) < len(drawn))

    @given(
        st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=20),
        st.integers(-(2**40), 2**40),
        st.floats(1e-9, 1e9),
    )
    def test_add_noise(self, sums: list[float], number: int, scale: float) -> None:
        """Rounded half to even, like numpy; integers are added exactly, and then scaled."""
        values = np.array(sums)
        noise = np.full(len(sums), number)
        expected = (np.rint(values * 8.0) + noise) * scale
        assert add_noise(values, 8.0, 2.0**52, noise, scale)
        assert np.array_equal(values, expected)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**52, -(2.0**52)])
    @pytest.mark.parametrize("place", [0, 5, 9])
    def test_too_large(self, bad: float, place: int) -> None:
        """One number that a lattice does not hold is seen at every place."""
        values = np.zeros(10)
        values[place] = bad
        assert not add_noise(values, 1.0, 2.0**52, np.zeros(10, dtype=np.int64), 1.0)

    @given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.floats(0, 1e6))
    def test_move(self, slopes: list[float], rate: float) -> None:
        """Against the gradient, and never beyond the bound; the very numbers of numpy."""
        gradient = np.array([slopes, slopes[::-1]])
        theta = np.linspace(-3, 3, gradient.size).reshape(gradient.shape)
        expected = np.clip(theta - gradient * rate, -100.0, 100.0)
        move(theta, gradient, rate, 100.0)
        assert np.array_equal(theta, expected)


class TestKept:
    """Machine code on the disk."""

    CALL = "from loop import double; print(double(21), len(double.stats.cache_hits))"

    def run(
        self,
        folder: Path,
        code: str = CALL,
        loop: str = LOOP,
        before: str = "",
        *,
        bytecode: bool = False,
    ) -> str:
        """Run a few lines beside a module with a loop; `before` is for the shell."""
        (folder / "loop.py").write_text(loop)
        done = subprocess.run(
            ["bash", "-c", f'{before}\nexec "$@"', "-", sys.executable, "-c", code],
            cwd=folder,
            env={
                "PYTHONPATH": f"{ROOT}:{folder}",
                "NUMBA_CACHE_DIR": str(folder / "kept"),
                **({} if bytecode else {"PYTHONDONTWRITEBYTECODE": "1"}),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def kept(self, folder: Path) -> list[Path]:
        """Return the files with machine code."""
        return sorted(folder.rglob("*.code"))

    def test_the_next_process_finds_it(self, tmp_path: Path) -> None:
        """The first one compiles, the second one reads."""
        assert self.run(tmp_path) == "42 0"
        assert self.run(tmp_path) == "42 1"
        assert len(self.kept(tmp_path)) == 1

    def test_compiling_after_reading(self, tmp_path: Path) -> None:
        """What was read needs nothing that compiling needs; compiling still finds it."""
        assert self.run(tmp_path) == "42 0"
        code = (
            "from loop import double; print(double(21), double(2.5), len(double.stats.cache_hits))"
        )
        assert self.run(tmp_path, code) == "42 5.0 1"
        assert self.run(tmp_path, code) == "42 5.0 2"

    def test_old_code_is_not_taken_for_new(self, tmp_path: Path) -> None:
        """Whatever the file's time says, and although the bytes of Python are the same."""
        text = LOOP.replace("2 *", "FACTOR *") + "FACTOR = 2\n"
        assert self.run(tmp_path, loop=text) == "42 0"
        assert self.run(tmp_path, loop=text.replace("= 2", "= 3")) == "63 0"
        assert self.run(tmp_path, loop=text) == "42 1"

    def test_old_bytecode_is_not_kept_for_new_source(self, tmp_path: Path) -> None:
        """Python runs bytecode of before where two saves are a second apart at most.

        Its machine code is found again; under the new source, once that runs, it is not.
        """
        text = LOOP.replace("2 *", "FACTOR *") + "FACTOR = 2\n"
        code = f"import os; os.utime('loop.py', (1e9, 1e9)); {self.CALL}"
        for loop, said in ((text, "42 0"), (text.replace("= 2", "= 3"), "42 1")):
            assert self.run(tmp_path, code, loop, bytecode=True) == said
        shutil.rmtree(tmp_path / "__pycache__")
        assert self.run(tmp_path, loop=text.replace("= 2", "= 3")) == "63 0"

    def test_a_source_that_is_replaced_while_the_process_starts(self, tmp_path: Path) -> None:
        """What was loaded is compiled, and never kept for the source that is there by now."""
        text = (
            "from pathlib import Path\n"
            "source = Path(__file__)\n"
            "source.write_text(source.read_text().replace('R = 2', 'R = 3'))\n"
            + LOOP.replace("2 *", "FACTOR *")
            + "FACTOR = 2\n"
        )
        assert self.run(tmp_path, loop=text) == "42 0"
        assert self.run(tmp_path, loop=text.replace("R = 2", "R = 3")) == "63 0"

    def test_a_loop_within_a_function(self, tmp_path: Path) -> None:
        """What else it depends on cannot be known, so that nothing is kept."""
        loop = "def made():\n" + LOOP.strip().replace("\n", "\n    ").replace("from", "    from")
        text = loop + "\n    return double\ndouble = made()\n"
        for _ in range(2):
            assert self.run(tmp_path, loop=text) == "42 0"
        assert not self.kept(tmp_path)

    def test_a_save_that_breaks_off(self, tmp_path: Path) -> None:
        """Where the disk is full nothing is kept, and nothing fails."""
        assert self.run(tmp_path, before="ulimit -f 1; trap '' XFSZ") == "42 0"
        assert not self.kept(tmp_path)
        assert self.run(tmp_path) == "42 0"
        assert self.run(tmp_path) == "42 1"

    @pytest.mark.slow
    @pytest.mark.parametrize("damage", ["empty", "short", "one bit", "other", "folder", "closed"])
    def test_damaged_code_is_compiled_again(self, tmp_path: Path, damage: str) -> None:
        """Nothing of it runs."""
        self.run(tmp_path)
        (path,) = self.kept(tmp_path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "folder":
            path.unlink()
            path.mkdir()
        elif damage == "closed":
            path.chmod(0)
        else:
            wrong = {"empty": b"", "short": content[:-9], "one bit": content, "other": b"x" * 99}
            path.write_bytes(wrong[damage])
        whole = damage == "closed" and os.geteuid() == 0  # whom nothing is closed to
        assert self.run(tmp_path) == f"42 {int(whole)}"
        assert self.run(tmp_path) == f"42 {int(damage != 'folder')}"

    def test_where_nothing_can_be_written(self, tmp_path: Path) -> None:
        """It is compiled all the same."""
        code = (
            "from numba.core import caching\n"
            "def refuse(*_): raise OSError('read-only')\n"
            "for kind in caching.FunctionCache._impl_class._locator_classes:\n"
            "    kind.ensure_cache_path = refuse\n"
            "from loop import double; print(double(21), double.stats.cache_path)"
        )
        assert self.run(tmp_path, code) == "42 None"
        assert not self.kept(tmp_path)


def test_constants_that_loops_repeat() -> None:
    """Loops hold every constant themselves; these are elsewhere too."""
    assert _GUIDE_BITS == 16
