"""Evidence: the files that an audit reads, as a zip file or a folder, signed by who made them.

`evidence.json` lists the SHA-256 of every other file and is signed with Ed25519. Who reads
evidence trusts nobody: names, sizes, links and hashes are checked before anything is used, and
nothing is unpacked to disk. Docs: docs/evidence.md.
"""

import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.chain import body_bytes, is_signed
from common.errors import EvidenceError
from common.identity import MERCHANT_ID
from common.masks import joined

INDEX = "evidence.json"
FORMAT = "hansa/evidence/1"
KINDS = ("merchant", "server")
COORDINATOR = "coordinator"  # the name in every server's evidence
MOST_BYTES = 2**30  # of all files together, unpacked
MOST_FILE_BYTES = 2**29
MOST_FILES = 100_000

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_PRINTABLE = re.compile(r"[ -~]{0,200}")
_HASH, _KEY, _SIGNATURE = (re.compile(rf"[0-9a-f]{{{n}}}") for n in (64, 64, 128))
_STAMP = (1980, 1, 1, 0, 0, 0)  # of every file in a zip, so that equal evidence is equal bytes
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
)


@dataclass(frozen=True)
class Evidence:
    """Evidence whose hashes and signature fit; whether its key is enrolled is not known here."""

    path: Path
    kind: str  # "merchant" or "server"
    name: str
    key: bytes
    made_at: float  # seconds since 1970, by the maker's clock
    hansa: str
    code: str
    files: dict[str, bytes]  # all but evidence.json


def write_evidence(  # noqa: PLR0913, PLR0917  # what the index says, one by one
    path: Path,
    kind: str,
    name: str,
    files: Mapping[str, bytes],
    key: Ed25519PrivateKey,
    made_at: float,
    hansa: str,
    code: str,
) -> None:
    """Write evidence, whole or not at all; older evidence at the same place is replaced.

    Args:
        path: A zip file if the name ends in .zip, else a folder.
        kind: `merchant` or `server`.
        name: The merchant's id, or `coordinator`.
        files: Name, with `/` between folders -> content.
        key: Signs the index.
        made_at: Seconds since 1970.
        hansa: Version of the package.
        code: SHA-256 of the installed code.

    Raises:
        EvidenceError: Something else is at `path`, a name cannot be used, or it cannot be written.
    """
    _check_names(path, files)
    if os.path.lexists(path) and not _is_evidence(path):
        raise EvidenceError(f"{path}: is there already and is no evidence; choose another place")
    index = {
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "key": key.public_key().public_bytes_raw().hex(),
        "made_at": made_at,
        "hansa": hansa,
        "code": code,
        "files": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    }
    index["signature"] = key.sign(_signed(index)).hex()
    text = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
    try:
        _put(path, {**files, INDEX: text})
    except OSError as error:
        raise EvidenceError(f"{path}: cannot be written ({error.strerror})") from None


def read_evidence(path: Path) -> Evidence:
    """Read evidence and check names, sizes, hashes and the signature.

    Raises:
        EvidenceError: It is unsafe to read, a file is missing, was changed or was added, or the
            signature does not fit; the message names the file.
    """
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise EvidenceError(f"{path}: cannot be read ({error.strerror})") from None
    if stat.S_ISLNK(mode):
        raise EvidenceError(f"{path}: is a link; evidence is read from the place itself")
    files = _read_folder(path) if stat.S_ISDIR(mode) else _read_zip(path)
    raw = files.pop(INDEX, None)
    if raw is None:
        raise EvidenceError(f"{path / INDEX}: is missing; this is no evidence")
    index = _index(path / INDEX, raw)
    _check_files(path, files, index["files"])
    key = bytes.fromhex(index["key"])
    if not is_signed(key, _signed(index), bytes.fromhex(index["signature"])):
        raise EvidenceError(f"{path / INDEX}: the signature does not fit; it was changed")
    texts = {name: index[name] for name in ("kind", "name", "hansa", "code")}
    return Evidence(path=path, key=key, made_at=float(index["made_at"]), files=files, **texts)


def _signed(index: Mapping[str, Any]) -> bytes:
    body = {name: value for name, value in index.items() if name != "signature"}
    return joined(b"hansa evidence", body_bytes(body))


def _check_names(path: Path, names: Mapping[str, Any]) -> None:
    """Refuse names that could lead out of a folder, or that one folder cannot hold together."""
    for name in names:
        parts = name.split("/")
        if not all(map(_PART.fullmatch, parts)):
            raise EvidenceError(f"{path}: '{name[:100]}' is no name of a file of evidence")
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in names:
                raise EvidenceError(f"{path}: '{name[:100]}' lies in a file, not in a folder")


def _check_files(path: Path, files: Mapping[str, bytes], listed: Mapping[str, str]) -> None:
    _check_names(path, listed)
    for name, expected in sorted(listed.items()):
        if name not in files:
            raise EvidenceError(f"{path / name}: is listed in {INDEX} and missing")
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise EvidenceError(f"{path / name}: was changed after the evidence was made")
    extra = sorted(files.keys() - listed.keys())
    if extra:
        raise EvidenceError(f"{path / extra[0]}: is not listed in {INDEX}")


def _index(path: Path, raw: bytes) -> dict[str, Any]:
    """Return the index if every field is there and is what it should be."""
    try:
        index = json.loads(raw)
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise EvidenceError(f"{path}: is no index of evidence in format {FORMAT}")
    name = MERCHANT_ID if index.get("kind") == "merchant" else COORDINATOR
    fits = {
        "format": True,
        "kind": index.get("kind") in KINDS,
        "key": _matches(index.get("key"), _KEY),
        "made_at": _is_time(index.get("made_at")),
        "files": _is_listing(index.get("files")),
        "signature": _matches(index.get("signature"), _SIGNATURE),
        "name": _matches(index.get("name"), re.compile(name)),
        **{text: _matches(index.get(text), _PRINTABLE) for text in ("hansa", "code")},
    }
    wrong = [*(name for name, good in fits.items() if not good), *(index.keys() - fits.keys())]
    if wrong:
        raise EvidenceError(f"{path}: field '{wrong[0][:40]}' is missing, wrong or not known")
    return index


def _matches(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_time(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0 <= value < 2**53
    )


def _is_listing(value: object) -> bool:
    return isinstance(value, dict) and all(_matches(item, _HASH) for item in value.values())


def _read_folder(path: Path) -> dict[str, bytes]:
    """Read all files below a folder; follow no link."""
    files: dict[str, bytes] = {}
    room = MOST_BYTES
    for file in _walk(path):
        mode, size = file.lstat().st_mode, file.lstat().st_size
        if not stat.S_ISREG(mode):
            raise EvidenceError(f"{file}: is a link or no ordinary file")
        _check_size(file, size, room, len(files))
        try:
            with file.open("rb") as opened:
                content = opened.read(size + 1)
        except OSError as error:
            raise EvidenceError(f"{file}: cannot be read ({error.strerror})") from None
        if len(content) != size:
            raise EvidenceError(f"{file}: changed while it was read")
        files[file.relative_to(path).as_posix()] = content
        room -= size
    return files


def _walk(path: Path) -> Iterator[Path]:
    """Yield everything below a folder that is no folder itself."""
    for parent, folders, names in os.walk(path, onerror=_raise):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield Path(parent) / name


def _raise(error: OSError) -> None:
    raise EvidenceError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _check_size(file: Path, size: int, room: int, count: int) -> None:
    if size > min(MOST_FILE_BYTES, room) or count >= MOST_FILES:
        raise EvidenceError(
            f"{file}: is too large; evidence has at most {MOST_FILES:,} files of up to "
            f"{MOST_FILE_BYTES / 2**20:g} MiB, {MOST_BYTES / 2**20:g} MiB together"
        )


def _read_zip(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    room = MOST_BYTES
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir() and not info.file_size:
                    continue
                name = _checked_name(path, info)
                if name in files:
                    raise EvidenceError(f"{path / name}: is in the zip file twice")
                _check_size(path / name, info.file_size, room, len(files))
                files[name] = _content(archive, info, path / name)
                room -= len(files[name])
    except _BROKEN_ZIP as error:
        raise EvidenceError(f"{path}: cannot be read as a zip file ({error})") from None
    return files


def _checked_name(path: Path, info: zipfile.ZipInfo) -> str:
    """Return the name of a file in a zip, as it is written there, if it is safe."""
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise EvidenceError(f"{path}: '{info.filename[:100]}' is a link or no ordinary file")
    _check_names(path, {info.orig_filename: None})
    return info.orig_filename


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Path) -> bytes:
    """Unpack one file; whatever the zip says of its size, no more than that is unpacked."""
    with archive.open(info) as opened:
        content = opened.read(info.file_size + 1)
    if len(content) != info.file_size:
        raise EvidenceError(f"{file}: has another size than the zip file says")
    return content


def _is_evidence(path: Path) -> bool:
    """Tell whether an index of evidence is at a place that is to be written to."""
    with suppress(*_BROKEN_ZIP, KeyError):
        if path.is_symlink():
            return False
        if path.is_dir():
            raw = (path / INDEX).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                raw = archive.read(INDEX)
        return str(json.loads(raw)["format"]).startswith("hansa/evidence/")
    return False


def _put(path: Path, files: Mapping[str, bytes]) -> None:
    """Write beside the place and rename: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        if path.suffix == ".zip":
            _write_zip(beside / "new", files)
        else:
            _write_folder(beside / "new", files)
        if path.is_dir():
            os.replace(path, beside / "older")
        os.replace(beside / "new", path)
    finally:
        if (beside / "older").exists() and not path.exists():
            os.replace(beside / "older", path)
        shutil.rmtree(beside, ignore_errors=True)


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in sorted(files.items()):
                info = zipfile.ZipInfo(name, _STAMP)
                info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(info, content)
        file.flush()
        os.fsync(file.fileno())
