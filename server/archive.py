"""What the coordinator keeps: its key, the heads it witnessed, and a record of every run.

    <folder>/identity.key       private, mode 0600; merchants pin its public half as the witness
    <folder>/witness.sqlite     heads of the merchants' ledgers
    <folder>/runs/<run>/        contract.toml, run.jsonl (docs/evidence.md), bundle/, and
                                contract.start where the contract names where to start

A record holds what everybody may see: noisy sums over many merchants and who took part. From it
an auditor works out the published model again.
"""

import base64
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from common.contract import Contract, contract_toml
from common.errors import ArchiveError, RunError
from common.identity import Identity, Members, read_identity, write_identity
from common.start import START
from common.versions import code_sha256, hansa_version
from server.witness import Witness

COORDINATOR = "coordinator"


class RunRecord:
    """Keeps what happens in one run, line by line; written down when `flush` is called.

    What was not flushed is in `pending`: a checkpoint that holds it lets a later process write
    the very same lines.

    Args:
        folder: Of the run; made here.
        goes_on: The run was begun by an earlier process.
        durable: What is flushed is on the disk.
    """

    def __init__(self, folder: Path, *, goes_on: bool = False, durable: bool = True) -> None:
        self._folder, self._durable = folder, durable
        self.pending: list[str] = []
        try:
            folder.mkdir(parents=True, mode=0o700, exist_ok=goes_on)
        except OSError as error:
            raise ArchiveError(f"{folder}: cannot be made ({error.strerror})") from None

    def start(
        self,
        run: str,
        contract: Contract,
        merchants: list[str],
        parameters: str,
        start: bytes | None = None,
    ) -> None:
        """Note a run's contract, where it starts from if the contract says so, and who takes part.

        Raises:
            ArchiveError: It cannot be written.
        """
        contents = {"contract.toml": contract_toml(contract).encode()}
        contents |= {} if start is None else {START: start}
        for name, content in contents.items():
            path = self._folder / name
            try:
                path.write_bytes(content)
            except OSError as error:
                raise ArchiveError(f"{path}: cannot be written ({error.strerror})") from None
        self._note(
            kind="start",
            run=run,
            contract=contract.sha256,
            at=time.time(),
            merchants=merchants,
            parameters=parameters,
            hansa=hansa_version(),
            code=code_sha256(),
        )

    def late(self, merchants: list[str]) -> None:
        """Note merchants that came when the run was under way."""
        self._note(kind="late", at=time.time(), merchants=merchants)

    def session(self, number: int, context: bytes, adverts: list[bytes]) -> None:
        """Note the roster of a session of secure sums."""
        self._note(
            kind="session",
            session=number,
            context=context.hex(),
            adverts=[advert.hex() for advert in adverts],
        )

    def sum(self, total: Int[np.ndarray, " P"] | None, **fields: Any) -> None:
        """Note a sum that was asked for, and what came of it."""
        raw = None if total is None else np.ascontiguousarray(total, dtype="<i8").tobytes()
        encoded = None if raw is None else base64.b64encode(raw).decode()
        self._note(kind="sum", **fields, total=encoded)

    def end(self, parameters: str) -> None:
        """Note the final model."""
        self._note(kind="end", parameters=parameters)

    def _note(self, **line: Any) -> None:
        self.pending.append(json.dumps(line, sort_keys=True, allow_nan=False))

    def restore(self, lines: Sequence[str]) -> None:
        """Take up the lines of a checkpoint; those that reached the disk are not written again.

        Raises:
            ArchiveError: The record cannot be read or mended.
        """
        path = self._folder / "run.jsonl"
        try:
            written = path.read_text(encoding="ascii") if path.exists() else ""
            whole = written[: written.rfind("\n") + 1]
            if whole != written:  # a line that a crash left unfinished was never acted upon
                os.truncate(path, len(whole))
        except (OSError, UnicodeDecodeError) as error:
            raise ArchiveError(f"{path}: the run's record cannot be read ({error})") from None
        there = {*whole.splitlines()}
        self.pending = [line for line in lines if line not in there]

    def flush(self) -> None:
        """Write down what was noted; if the record is durable, it is on the disk afterwards.

        Raises:
            ArchiveError: It cannot be written.
        """
        if not self.pending:
            return
        try:
            with (self._folder / "run.jsonl").open("a", encoding="ascii") as file:
                file.write("".join(line + "\n" for line in self.pending))
                file.flush()
                if self._durable:
                    os.fsync(file.fileno())
        except OSError as error:
            raise ArchiveError(f"{self._folder}: the run cannot be recorded ({error})") from None
        self.pending = []


@dataclass(frozen=True)
class Archive:
    """The coordinator's folder, opened."""

    folder: Path
    identity: Identity
    witness: Witness
    durable: bool = True

    def record(self, run: str, *, goes_on: bool = False) -> RunRecord:
        """Return the record of a run, new unless an earlier process began it."""
        return RunRecord(self.folder / "runs" / run, goes_on=goes_on, durable=self.durable)

    def keep_bundle(self, run: str, bundle: Path) -> None:
        """Keep a copy of what a run published.

        Raises:
            ArchiveError: It cannot be copied.
        """
        try:
            shutil.copytree(bundle, self.folder / "runs" / run / "bundle", dirs_exist_ok=True)
        except OSError as error:
            raise ArchiveError(f"{bundle}: cannot be kept in the archive ({error})") from None

    def check_pinned(self, members: Members) -> None:
        """Raise a `RunError` unless the members pinned this coordinator as their witness."""
        if members.witness != self.identity.public:
            raise RunError(
                f"{self.folder / 'identity.key'}: is not the key of the witness that members.toml "
                "names; merchants would not accept its countersignatures"
            )


def make_archive(folder: Path) -> Identity:
    """Make a folder for a new coordinator, with a key of its own.

    Raises:
        IdentityError: There is a key already, or it cannot be written.
        ArchiveError: The folder cannot be made.
    """
    identity = Identity.generate(COORDINATOR)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be made ({error.strerror})") from None
    write_identity(identity, folder / "identity.key")
    return identity


def open_archive(folder: Path, *, durable: bool = True) -> Archive:
    """Open a coordinator's folder.

    Args:
        folder: The coordinator's own.
        durable: Nothing is acted upon before it is on the disk. False for a simulation whose
            merchants exist in it alone.

    Raises:
        IdentityError: Its key is missing or cannot be used.
        ArchiveError: The witness's record cannot be used.
    """
    identity = read_identity(COORDINATOR, folder / "identity.key")
    witness = Witness(folder / "witness.sqlite", identity, durable=durable)
    return Archive(folder, identity, witness, durable)
