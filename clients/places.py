"""Where things are in a merchant's folder, beside what `merchant.toml` itself names."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """A merchant's folder."""

    folder: Path

    @classmethod
    def of(cls, path: Path) -> "Places":
        """Return the places for a folder, or for the `merchant.toml` in it."""
        path = path.absolute()
        return cls(path.parent if path.name == "merchant.toml" else path)

    @property
    def merchant(self) -> Path:
        """Return the merchant's own file."""
        return self.folder / "merchant.toml"

    @property
    def enrolment(self) -> Path:
        """Return where operator and authority are pinned; no secret is in it."""
        return self.folder / "enrolment.json"

    @property
    def node_key(self) -> Path:
        """Return the key with which the node logs in."""
        return self.folder / "node.key"

    @property
    def run(self) -> Path:
        """Return the folder of locks, states and the socket."""
        return self.folder / "run"

    @property
    def socket(self) -> Path:
        """Return the worker's socket."""
        return self.run / "worker.sock"

    @property
    def node_state(self) -> Path:
        """Return what the node says of itself; its time shows that the node is alive."""
        return self.run / "node.alive"

    def log(self, name: str) -> Path:
        """Return the log of a process."""
        return self.folder / "logs" / f"{name}.jsonl"
