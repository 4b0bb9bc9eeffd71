"""Ctrl-C, and when it is not heard."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C; so do processes started meanwhile, and for good."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears them
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
