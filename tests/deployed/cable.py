"""A cable between merchants and the gateway that a test can cut: it forwards bytes, or does not."""

import contextlib
import selectors
import socket
import threading


class Cable:
    """Forwards connections from a port of its own to another one, until it is cut.

    Args:
        target: The port at 127.0.0.1 that is reached.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self._whole = threading.Event()
        self._whole.set()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Return the port to connect to."""
        found: int = self._listener.getsockname()[1]
        return found

    def cut(self) -> None:
        """Cut it: what is open ends, and nothing new comes through."""
        self._whole.clear()
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let everything through again."""
        self._whole.set()

    def close(self) -> None:
        """End it for good."""
        self._ended.set()
        self.cut()
        self._thread.join(5)
        self._listener.close()

    def _accept(self) -> None:
        self._listener.settimeout(0.2)
        while not self._ended.is_set():
            try:
                here, _ = self._listener.accept()
            except TimeoutError:
                continue
            if not self._whole.is_set():
                here.close()
                continue
            try:
                there = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                here.close()
                continue
            there.settimeout(None)
            pair = (here, there)
            with self._lock:
                self._pairs.add(pair)
            threading.Thread(target=self._forward, args=(pair,), daemon=True).start()

    def _forward(self, pair: tuple[socket.socket, socket.socket]) -> None:
        here, there = pair
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
            selector.register(here, selectors.EVENT_READ, there)
            selector.register(there, selectors.EVENT_READ, here)
            while self._whole.is_set():
                for key, _ in selector.select(0.5):
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if not data:
                        self._whole.is_set()
                        raise ConnectionError
                    key.data.sendall(data)
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            end.close()
