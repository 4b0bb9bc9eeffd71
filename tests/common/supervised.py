"""A supervisor for tests: `supervised.py FOLDER SPEC.json`, in a process of its own.

A spec is a list of children: `name`, `code` (Python that the child runs, with the folder as its
argument) or `command`, and, where wanted, `beats` (healthy while FOLDER/NAME.alive changes),
`after`, `start_s`, `hang_s`, `user`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from common.supervision import Child, Supervisor

BEATING = (
    "import pathlib, sys, time\n"
    "while True:\n"
    "    pathlib.Path(sys.argv[1], '{name}.alive').write_text(str(time.time()))\n"
    "    time.sleep(0.05)\n"
)


def child_of(folder: Path, spec: dict[str, Any]) -> Child:
    """Return a child as the spec has it."""
    alive = folder / f"{spec['name']}.alive"

    def healthy() -> bool:
        return alive.exists() and time.time() - alive.stat().st_mtime < 0.5

    return Child(
        name=spec["name"],
        command=tuple(spec.get("command") or (sys.executable, "-c", spec["code"], str(folder))),
        log=folder / f"{spec['name']}.log",
        healthy=healthy if spec.get("beats") else None,
        start_s=spec.get("start_s", 30),
        hang_s=spec.get("hang_s", 1),
        user=spec.get("user"),
        after=tuple(spec.get("after", ())),
    )


def main() -> int:
    """Run until a signal comes."""
    folder = Path(sys.argv[1])
    children = [child_of(folder, spec) for spec in json.loads(Path(sys.argv[2]).read_text())]
    return Supervisor(folder, children, lambda event: print(json.dumps(event), flush=True)).run()


if __name__ == "__main__":
    sys.exit(main())
