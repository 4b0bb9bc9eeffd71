"""A process that saves one checkpoint after the other, until a test ends it.

    python run_writer.py URL RUN begin|resume

It writes a line "saved N" after each, and the error that ends it.
"""

import hashlib
import sys
import time
from itertools import count

LARGEST = 200_000


def body_of(number: int) -> bytes:
    """Return the only checkpoint that a number may have; sizes vary."""
    size = 1 + number * 7919 % LARGEST
    words = (hashlib.sha512(f"{number} {part}".encode()).digest() for part in count())
    body = number.to_bytes(8, "big")
    while len(body) < size:
        body += next(words) * 64
    return body


def number_of(body: bytes | None) -> int:
    """Return the number of a checkpoint; 0: there is none."""
    return 0 if body is None else int.from_bytes(body[:8], "big")


def main(url: str, run: str, how: str) -> None:
    """Save until the end."""
    from common.errors import ArchiveError
    from server.runs import RunStore

    if how == "begin":
        lease = RunStore(url).begin(run, "c0ffee", 10**6, "77")
    else:  # whoever was here before was killed
        lease = RunStore(url, lambda: time.time() + 3600).resume(run, "78")
    try:
        for number in count(number_of(lease.checkpoint) + 1):
            lease.save(body_of(number), round=number, epsilon=number / 8, cohort=5)
            print(f"saved {number}", flush=True)
    except ArchiveError as error:
        print(error, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
