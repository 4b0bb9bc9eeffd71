"""The coordinator's records -> evidence that an auditor can read. Docs: docs/evidence.md.

Only files that the format knows are taken; whatever else lies in the coordinator's folder, its
private key above all, stays there.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from common.bundle import MANIFEST
from common.errors import RunError
from common.evidence import COORDINATOR, write_evidence
from common.identity import Members, members_toml, read_members
from common.start import START
from common.versions import code_sha256, hansa_version
from server.archive import Archive, open_archive

SERVER = "server"
_RECORD = ("contract.toml", "run.jsonl")


def federation_evidence(folder: Path, out: Path) -> dict[str, bytes]:
    """Write the evidence of the coordinator of a federation's folder; return its files.

    Args:
        folder: Holds `server/` and `members.toml`.
        out: A zip file if the name ends in .zip, else a folder.

    Raises:
        IdentityError: The coordinator's key or the list of members is missing.
        RunError: A record cannot be read, or merchants pinned another witness.
        EvidenceError: It cannot be written.
    """
    members = read_members(folder / "members.toml")
    return coordinator_evidence(open_archive(folder / "server"), members, out)


def coordinator_evidence(archive: Archive, members: Members, out: Path) -> dict[str, bytes]:
    """Write a coordinator's evidence, signed with its key; return its files by name.

    Raises:
        RunError: A record cannot be read, or merchants pinned another witness.
        EvidenceError: It cannot be written.
    """
    archive.check_pinned(members)
    files = server_files(archive, members)
    write_evidence(
        out,
        SERVER,
        COORDINATOR,
        files,
        archive.identity.key,
        time.time(),
        hansa_version(),
        code_sha256(),
    )
    return files


def server_files(archive: Archive, members: Members) -> dict[str, bytes]:
    """Return the files of a coordinator's evidence by name.

    Raises:
        RunError: A record cannot be read.
    """
    found = {
        "members.toml": members_toml(members).encode(),
        "witness.jsonl": b"".join(
            json.dumps(head).encode() + b"\n" for head in archive.witness.log()
        ),
    }
    try:
        for run in sorted((archive.folder / "runs").glob("*")):
            found |= dict(_run_files(run))
    except OSError as error:
        raise RunError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return found


def _run_files(run: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the record of one run; a run that never started left none."""
    if not all((run / name).is_file() for name in _RECORD):
        return
    contract, record = ((run / name).read_bytes() for name in _RECORD)
    # a line that a power cut left unfinished was never acted upon
    whole = record[: record.rfind(b"\n") + 1]
    yield f"runs/{run.name}/contract.toml", contract
    yield f"runs/{run.name}/run.jsonl", whole
    if (run / START).is_file():
        yield f"runs/{run.name}/{START}", (run / START).read_bytes()
    for path in _bundle_files(run / "bundle"):
        yield f"runs/{run.name}/bundle/{path.name}", path.read_bytes()


def _bundle_files(bundle: Path) -> list[Path]:
    """Return the manifest of a bundle and the files that it lists."""
    try:
        listed = json.loads((bundle / MANIFEST).read_bytes())["files"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{bundle / MANIFEST}: is no manifest of a bundle") from None
    paths = [bundle / MANIFEST, *(bundle / Path(name).name for name in sorted(listed))]
    return [path for path in paths if path.is_file() and not path.is_symlink()]
