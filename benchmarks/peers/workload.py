"""What all runners share: the workload's files, and how a run is measured. Needs numpy alone.

A runner is started as `python run_X.py FOLDER`, by the Python of X's own virtual environment, and
prints one JSON line. `benchmarks.simulation` writes the folder.
"""

import json
import os
import resource
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

_TICKS = os.sysconf("SC_CLK_TCK")


class Rows:
    """An array on disk, of which one merchant's part is read at a time.

    Not memory-mapped: how much around such a part counts as memory is the kernel's choice.

    Attributes:
        shape: Of the whole; merchants first.
    """

    def __init__(self, path: Path) -> None:
        whole = np.load(path, mmap_mode="r")
        self._path, self._start, self._dtype = path, whole.offset, whole.dtype
        self.shape = whole.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, merchant: int) -> np.ndarray:
        if not 0 <= merchant < len(self):
            raise IndexError(f"there are {len(self)} merchants, none is {merchant}")
        part = self.shape[1:]
        count = int(np.prod(part))
        start = self._start + int(merchant) * count * self._dtype.itemsize
        return np.fromfile(self._path, self._dtype, count, offset=start).reshape(part)


class Workload:
    """The files of one workload.

    Attributes:
        x, y: Customers of each merchant, [M, R, F] float32 and [M, R] int64.
        layers: Weights [out, in] and bias [out] of each layer of the first model, float32.
        cohorts: The merchants of each round, [rounds, K].
        batch, learning_rate, clip_norm, noise_multiplier: Of a merchant's own steps.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        settings = json.loads((self.folder / "settings.json").read_text())
        self.batch = int(settings["batch"])
        self.learning_rate = float(settings["learning_rate"])
        self.clip_norm = float(settings["clip_norm"])
        self.noise_multiplier = float(settings["noise_multiplier"])
        self.x = Rows(self.folder / "x.npy")
        self.y = Rows(self.folder / "y.npy")
        self.cohorts = np.load(self.folder / "cohorts.npy")
        first = np.load(self.folder / "first.npz")
        self.layers = [(first[f"w{n}"], first[f"b{n}"]) for n in range(len(first) // 2)]

    @property
    def rows(self) -> int:
        """Customers of a merchant."""
        return self.x.shape[1]

    @property
    def steps(self) -> int:
        """Batches of one epoch."""
        return -(-self.rows // self.batch)

    def accuracy(self, layers: "list[tuple[np.ndarray, np.ndarray]]") -> float:
        """Return a model's accuracy on customers that nobody trained on."""
        found = np.load(self.folder / "test_x.npy")
        for number, (weights, bias) in enumerate(layers):
            found = found @ np.asarray(weights).T + np.asarray(bias)
            if number < len(layers) - 1:
                found = np.maximum(found, 0.0)
        return float((found.argmax(axis=1) == np.load(self.folder / "test_y.npy")).mean())


class Meter:
    """Wall time and CPU of this process and all that it started, from mark to mark."""

    def __init__(self) -> None:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        self._began = int(fields[19]) / _TICKS  # seconds since boot
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """Note that a round ended."""
        self._marks.append((time.clock_gettime(time.CLOCK_BOOTTIME) - self._began, _cpu_s()))

    def report(self, accuracy: float) -> None:
        """Print what was found, as the last line."""
        rounds = [
            [b - a for a, b in zip(one, next_one, strict=True)]
            for one, next_one in zip(self._marks, self._marks[1:], strict=False)
        ]
        found = {
            "first_round_s": self._marks[0][0],
            "first_round_cpu_s": self._marks[0][1],
            "wall_s": [wall for wall, _ in rounds],
            "cpu_s": [cpu for _, cpu in rounds],
            "peak_mib": _peak_mib(),
            "accuracy": accuracy,
        }
        print(json.dumps(found), flush=True)


def _others() -> "set[int]":
    """Return the processes that this one started, directly or not."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1])
    found, size = {os.getpid()}, 0
    while len(found) != size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {os.getpid()}


def _cpu_s() -> float:
    """Return the CPU seconds of this process, finely, and of the others, in hundredths."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for pid in _others() if _has_children() else ():
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / _TICKS
    return total


def _has_children() -> bool:
    tasks = Path("/proc/self/task").glob("*/children")
    return any(task.read_text().strip() for task in tasks)


def _peak_mib() -> float:
    """Return this process's peak memory and what the others hold now, shared parts divided."""
    own = Path("/proc/self/status").read_text().splitlines()
    total = sum(int(line.split()[1]) / 1024 for line in own if line.startswith("VmHWM:"))
    for pid in _others():
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) / 1024
    return total
