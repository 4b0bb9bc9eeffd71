"""The published bundle: what a run leaves behind, as files with hashes and a signature.

`manifest.json` lists the SHA-256 of every file and is signed with Ed25519. A bundle is written
beside its final place and renamed, so that it is there whole or not at all.
"""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from jaxtyping import Float

from common.contract import Contract, read_contract
from common.errors import BundleError
from common.network import Network, network_of

MANIFEST = "manifest.json"
_FORMAT = "hansa/bundle/1"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked.

    Attributes:
        signer: The public key that signed it; whose key it is, the bundle cannot prove.
    """

    folder: Path
    contract: Contract
    network: Network
    parameters: Float[np.ndarray, " P"]
    model_sha256: str
    signer: bytes


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """Return JSON with sorted keys and no spaces, as it is hashed and signed."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def write_bundle(folder: Path, files: Mapping[str, bytes], key: Ed25519PrivateKey) -> None:
    """Write the files and their signed manifest; an older bundle in `folder` is replaced.

    Raises:
        BundleError: The folder holds something else than a bundle, or cannot be written.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder}: is there already and is no bundle; choose another folder")
    body = {
        "format": _FORMAT,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
    }
    signature = base64.b64encode(key.sign(canonical_json(body))).decode()
    manifest = _manifest_bytes({**body, "signature": signature})
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, data in {**files, MANIFEST: manifest}.items():
            (partial / name).write_bytes(data)
        _swap(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise BundleError(f"{folder}: the bundle cannot be written ({error})") from None


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n"


def _swap(partial: Path, folder: Path) -> None:
    """Put a finished folder in its place; the older one stays until the new one is there."""
    older = folder.with_name(folder.name + ".older")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        os.replace(folder, older)
    try:
        os.replace(partial, folder)
    except OSError:
        if older.exists():
            os.replace(older, folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every hash, the signature and the model's shape.

    Raises:
        BundleError: A file is missing, was changed or was added; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    files, signer = _checked_files(folder)
    for name in ("contract.toml", "model.safetensors"):
        if name not in files:
            raise BundleError(f"{folder / name}: is missing from the bundle")
    contract = read_contract(folder / "contract.toml")
    network = network_of(contract)
    try:
        tensors = load(files["model.safetensors"])
    except SafetensorError as error:
        raise BundleError(f"{folder / 'model.safetensors'}: cannot be read ({error})") from None
    theta = tensors.get("parameters")
    if (
        theta is None
        or theta.shape != (network.size,)
        or theta.dtype != np.float32
        or not np.isfinite(theta).all()
    ):
        raise BundleError(
            f"{folder / 'model.safetensors'}: expected 'parameters' with {network.size} finite "
            "float32 numbers, as the contract's model has"
        )
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    return Bundle(folder, contract, network, theta.astype(np.float64), digest, signer)


def _checked_files(folder: Path) -> tuple[dict[str, bytes], bytes]:
    """Return the bundle's files, and who signed, after checking hashes and signature."""
    try:
        listed, signer = _listed((folder / MANIFEST).read_bytes())
        files = {name: (folder / name).read_bytes() for name in listed}
    except FileNotFoundError as error:
        raise BundleError(f"{error.filename}: is missing; is {folder} a bundle?") from None
    except InvalidSignature:
        raise BundleError(
            f"{folder / MANIFEST}: the signature does not fit; it was changed"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{folder / MANIFEST}: is no manifest of a bundle") from None
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != listed[name]:
            raise BundleError(f"{folder / name}: was changed after the bundle was written")
    extra = sorted({path.name for path in folder.iterdir()} - set(listed) - {MANIFEST})
    if extra:
        raise BundleError(f"{folder / extra[0]}: is not in the manifest")
    return files, signer


def _listed(raw: bytes) -> tuple[dict[str, str], bytes]:
    """Return names and hashes of a manifest whose signature fits to the last byte, and its key."""
    manifest = json.loads(raw)
    whole = _manifest_bytes(manifest)
    signature = base64.b64decode(manifest.pop("signature"))
    public_key = Ed25519PublicKey.from_public_bytes(base64.b64decode(manifest["public_key"]))
    public_key.verify(signature, canonical_json(manifest))
    # spaces, and the unused bits of the signature's last letter, are not covered by it
    signed = {**manifest, "signature": base64.b64encode(signature).decode()}
    if not raw == whole == _manifest_bytes(signed):
        raise InvalidSignature
    names: dict[str, str] = dict(manifest["files"])
    if any(Path(name).name != name for name in names):
        raise InvalidSignature
    return names, public_key.public_bytes_raw()
