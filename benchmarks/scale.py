"""A large federation in one process: how much memory and time `hansa simulate` takes.

    python -m benchmarks.scale --json FILE [--preset wide] [--rounds 3]

1,000 synthetic merchants with 1,000 customers each, secure sums, from the generator to report and
evidence, in both modes; each run is a process of its own.

- `runs`: by mode: `peak_mib` (resident, the most that the process had), `cpu_s`, `wall_s`, and
  how many merchants and customers there were.
- `peak_mib`: the larger of both; `fits_into_4_gib`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_MODES = ("distributed", "local")


def measure(mode: str, preset: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Simulate once.

    Raises:
        RuntimeError: The command failed.
    """
    command = [sys.executable, "-m", "hansa.cli", "simulate", "--data", "synthetic"]
    command += ["--preset", preset, "--mode", mode, "--rounds", str(rounds), "--epsilon", "1"]
    command += ["--out", str(folder / mode), "--json", str(folder / f"{mode}.json")]
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, "COLUMNS": "120"})  # noqa: S603  # our own
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"hansa simulate, mode {mode}: exit code {status >> 8}")
    found = json.loads((folder / f"{mode}.json").read_text(encoding="utf-8"))
    return {
        "peak_mib": used.ru_maxrss / 1024,
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.monotonic() - start,
        "merchants": len(found["merchants"]),
        "customers": sum(merchant["customers"] for merchant in found["merchants"]),
        "epsilon": found["epsilon"],
    }


def main() -> None:
    """Measure both modes; print and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path)
    parser.add_argument("--preset", default="wide")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        runs = {
            mode: measure(mode, options.preset, options.rounds, Path(folder)) for mode in _MODES
        }
    peak = max(run["peak_mib"] for run in runs.values())
    document = {"runs": runs, "peak_mib": peak, "fits_into_4_gib": peak < 4096}
    text = json.dumps(document, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
