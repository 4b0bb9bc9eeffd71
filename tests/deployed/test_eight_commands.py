"""From an empty folder to a finished run, by the commands of the documentation as they stand."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.deployed.stack import BIN, OFFLINE

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "ten-minutes.md"


def blocks() -> list[list[str]]:
    """Return the commands of each console block of the page."""
    found = re.findall(r"^```console[^\n]*\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    return [
        [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
        for block in found
    ]


def typed(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a line as a person types it into a shell."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, **OFFLINE, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def test_at_most_eight_commands(tmp_path: Path) -> None:
    """They end in a finished run of three merchants over TLS, and everything can be ended again."""
    begin, end = blocks()[:2]
    assert 0 < len(begin) <= 8
    assert all(line.startswith("hansa ") for line in begin)
    try:
        for line in begin:
            done = typed(line, tmp_path)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        printed = done.stdout
        assert "merchant-0000" not in done.stderr
        assert (tmp_path / "coordinator" / "bundles").is_dir(), printed
        (bundle,) = (tmp_path / "coordinator" / "bundles").iterdir()
        assert (bundle / "model.safetensors").is_file()
    finally:
        for line in end:
            typed(line, tmp_path)
    left = [
        process
        for process in Path("/proc").glob("[0-9]*")
        if str(tmp_path).encode() in _command(process)
    ]
    assert not left


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
