"""The benchmark of real processes runs, and writes what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployed.stack import OFFLINE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_it_writes_its_figures(tmp_path: Path) -> None:
    """Beside Flower's defaults, in one JSON document."""
    document = tmp_path / "deployment.json"
    command = [sys.executable, "-m", "benchmarks.deployment", "--json", str(document)]
    command += ["--rounds", "3", "--turns", "1"]
    environment = {**os.environ, **OFFLINE}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    found = json.loads(document.read_text(encoding="utf-8"))
    figures = {
        "speedup_over_flower_defaults", "seconds_per_round", "merchant_cpu_s_per_round",
        "flower_seconds_per_round", "flower_merchant_cpu_s_per_round", "operator_cpu_s_per_round",
    }  # fmt: skip
    assert figures <= found.keys()
    assert all(found[name] > 0 for name in figures)
