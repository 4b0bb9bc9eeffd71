"""A merchant's folder before it takes part: keys that are made here and never leave, a file."""

import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from clients.merchant import Merchant, read_merchant
from common.contract import describe
from common.errors import IdentityError, PolicyError
from common.files import write_new
from common.identity import Identity, read_identity

NODE_KEY = "node.key"
FILE = "merchant.toml"
_TABLES = {".csv", ".parquet"}
_TEMPLATE = """\
# Who you are, where your customers are, and what may be spent on their privacy.
# Nothing outside of this file can raise a cap: neither the contract nor the operator.
# Every key is explained in docs/merchant-file.md; try it with hansa merchant check.

[merchant]
{id}

[data]
# "customers": one row a customer. "transactions": one row a line item.
kind = "customers"
# A .csv or .parquet file, relative to this one; or `url` and `query` of a database instead.
{path}

# Where your columns are called otherwise than the contract's features:
# [columns]
# customer = "customer_id"
# features = {{ spend = "revenue" }}

[policy]
# The most that one customer is exposed to over all runs; a larger epsilon protects less.
{epsilon}
# Well below 1 / the number of your customers.
{delta}
# Fewest merchants in a sum that you help to unmask.
min_cohort = 3
"""


@dataclass(frozen=True)
class Wishes:
    """What a new `merchant.toml` shall say."""

    merchant: str | None  # default: the folder's name
    data: Path | None
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Keys:
    """A merchant's identity, and the public half of its node's key."""

    identity: Identity
    node: bytes  # PEM


@dataclass
class _Making:
    """Files that were made, to be taken away again if the next one cannot be made."""

    made: list[Path] = field(default_factory=list)

    def write(self, path: Path, content: bytes, mode: int) -> None:
        try:
            write_new(path, content, mode)
        except FileExistsError:
            raise IdentityError(f"{path}: is there already; it is not overwritten") from None
        except OSError as error:
            raise IdentityError(f"{path}: cannot be written ({error.strerror})") from None
        self.made.append(path)

    def undo(self) -> None:
        for path in reversed(self.made):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()


def prepare(folder: Path, wishes: Wishes) -> tuple[Keys, list[str]]:
    """Make what is missing in a merchant's folder; return the keys and what was made.

    Raises:
        PolicyError: The `merchant.toml` that is there, or shall be, breaks a rule.
        IdentityError: A key cannot be used or written; what was made is taken away again.
    """
    making = _Making()
    try:
        if not folder.is_dir():
            _make_folder(folder)
            making.made.append(folder)
        merchant = _merchant(folder, wishes, making)
        identity = merchant.merchant.key
        if not identity.exists():
            made = Identity.generate(merchant.merchant.id)
            making.write(identity, made.key.private_bytes_raw().hex().encode() + b"\n", 0o600)
        if not (folder / NODE_KEY).exists():
            making.write(folder / NODE_KEY, make_node_key(), 0o600)
        keys = Keys(read_identity(merchant.merchant.id, identity), node_public(folder / NODE_KEY))
    except BaseException:
        making.undo()
        raise
    return keys, [path.name for path in making.made if path != folder]


def read_keys(folder: Path) -> Keys:
    """Read the keys of a merchant's folder.

    Raises:
        PolicyError: `merchant.toml` cannot be used.
        IdentityError: A key is missing or cannot be used.
    """
    merchant = read_merchant(folder / FILE).merchant
    return Keys(read_identity(merchant.id, merchant.key), node_public(folder / NODE_KEY))


def make_node_key() -> bytes:
    """Return a new private key for a node, in the format of OpenSSH, as Flower reads it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def node_public(path: Path) -> bytes:
    """Return the public half of a node's key as Flower sends it: PEM.

    Raises:
        IdentityError: The file is missing, is no such key, or can be read by others.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        content, mode = path.read_bytes(), path.stat().st_mode
    except FileNotFoundError:
        raise IdentityError(f"{path}: there is no node key; hansa merchant init makes it") from None
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read ({error.strerror})") from None
    if mode & 0o077:
        raise IdentityError(f"{path}: others can read this key; run chmod 600 on it")
    try:
        key = serialization.load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise IdentityError(f"{path}: is no private key in the format of OpenSSH") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IdentityError(f"{path}: is no key on the curve P-384")
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise IdentityError(f"{folder}: cannot be made ({error.strerror})") from None


def _merchant(folder: Path, wishes: Wishes, making: _Making) -> Merchant:
    """Return what `merchant.toml` says; write it where there is none."""
    path = folder / FILE
    if path.exists():
        found = read_merchant(path)
        if wishes.merchant not in {None, found.merchant.id}:
            raise PolicyError(f"{path}: merchant.id: is '{found.merchant.id}', not the --id given")
        return found
    text = _merchant_toml(folder, wishes)
    try:
        merchant = Merchant.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise PolicyError(describe(error, str(path))) from None
    making.write(path, text.encode(), 0o644)
    return merchant.located(folder)


def _merchant_toml(folder: Path, wishes: Wishes) -> str:
    import tomli_w

    def line(**entry: str | float) -> str:
        return tomli_w.dumps(entry).strip()

    path = "customers.csv" if wishes.data is None else _from(folder, wishes.data)
    return _TEMPLATE.format(
        id=line(id=wishes.merchant or folder.resolve().name),
        path=line(path=path),
        epsilon=line(epsilon=float(wishes.epsilon)),
        delta=line(delta=float(wishes.delta)),
    )


def _from(folder: Path, data: Path) -> str:
    """Return where the table is: relative to the folder if it is inside, so that it may move."""
    if data.suffix.lower() not in _TABLES:
        raise PolicyError(f"{data}: expected a file that ends in .csv or .parquet")
    absolute = data.absolute()
    inside = absolute.is_relative_to(folder.absolute())
    return str(absolute.relative_to(folder.absolute()) if inside else absolute)
