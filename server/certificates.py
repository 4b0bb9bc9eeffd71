"""The operator's own certificate authority, and the server's certificate.

    <folder>/tls/ca.crt, ca.key          the authority; merchants pin its certificate
    <folder>/tls/server.crt, server.key  what gateway and SuperLink show
    <folder>/tls/next/ca.crt, ca.key     the authority that follows, announced but not in use
    <folder>/tls/previous.crt            the one before, until the SuperLink was started anew

Keys are P-384; every file has mode 0600. Nobody else's authority is trusted, and this one signs
for this federation only.
"""

import ipaddress
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import SettingsError
from common.files import write_together

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
WARN_DAYS = 30
ALWAYS = ("127.0.0.1", "localhost")  # the SuperLink shows the same certificate on loopback
_BACKDATED = timedelta(days=1)  # a merchant's clock may be slow
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*")
_DAY_S = 86400.0


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """Return the certificate as PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """Return the private key as PEM, not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def checked_host(text: str) -> str:
    """Return a host's name or address as certificates hold it.

    Raises:
        SettingsError: It is neither.
    """
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if len(text) > 253 or not _HOST.fullmatch(text) or re.fullmatch(r"[\d.]+", text):
            raise SettingsError(
                f"host: '{text[:253]}' is neither a name like hansa.example.org nor an address"
            ) from None
        return text.lower()


def make_authority(name: str, now: datetime | None = None) -> Pair:
    """Return a new certificate authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Hansa {name}"[:64])])
    start = now or datetime.now(UTC)
    builder = (
        _builder(key, start, start + timedelta(days=AUTHORITY_DAYS))
        .subject_name(subject)
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
    )
    return Pair(builder.sign(key, hashes.SHA384()), key)


def issue(authority: Pair, hosts: Iterable[str], now: datetime | None = None) -> Pair:
    """Return a server's certificate for some names and addresses, and for loopback."""
    key, issuer = ec.generate_private_key(ec.SECP384R1()), authority.certificate
    names = list(dict.fromkeys([*map(checked_host, hosts), *ALWAYS]))
    start = now or datetime.now(UTC)
    end = min(start + timedelta(days=SERVER_DAYS), issuer.not_valid_after_utc)
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    signer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
    alternatives = x509.SubjectAlternativeName([_general(name) for name in names])
    builder = (
        _builder(key, start, end)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
        .issuer_name(issuer.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(signer, critical=False)
    )
    return Pair(builder.sign(authority.key, hashes.SHA384()), key)


def make_tls(tls: Path, name: str, hosts: Iterable[str]) -> None:
    """Make an authority and a server's certificate in a new folder.

    Raises:
        SettingsError: There is an authority already, a host is none, or nothing can be written.
    """
    if tls.exists():
        raise SettingsError(f"{tls}: is there already; a certificate authority is not overwritten")
    authority = make_authority(name)
    server = issue(authority, hosts)
    try:
        tls.mkdir(parents=True, mode=0o700)
        write_together(_authority_files(tls, authority) | _server_files(tls, server), 0o600)
    except OSError as error:
        shutil.rmtree(tls, ignore_errors=True)
        raise SettingsError(f"{tls}: cannot be written ({error.strerror})") from None


def renew(tls: Path, hosts: Iterable[str]) -> None:
    """Replace the server's certificate and key; the authority stays.

    Raises:
        SettingsError: The authority cannot be read, or nothing can be written.
    """
    _replace(tls, _server_files(tls, issue(read_pair(tls, "ca"), hosts)))


def announce_next(tls: Path, name: str) -> None:
    """Make the authority that follows, for merchants to learn of before it is used.

    Raises:
        SettingsError: It cannot be written.
    """
    following = tls / "next"
    try:
        following.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{following}: cannot be made ({error.strerror})") from None
    _replace(following, _authority_files(following, make_authority(name)))


def switch(tls: Path, hosts: Iterable[str]) -> None:
    """Put the authority that was announced in the place of the present one.

    Raises:
        SettingsError: None was announced, or nothing can be written.
    """
    authority = read_pair(tls / "next", "ca")
    server = issue(authority, hosts)
    before = {tls / "previous.crt": _read(tls / "ca.crt")}
    _replace(tls, before | _authority_files(tls, authority) | _server_files(tls, server))
    shutil.rmtree(tls / "next")


def read_pair(tls: Path, name: str) -> Pair:
    """Read `<name>.crt` and `<name>.key`.

    Raises:
        SettingsError: One is missing, is something else, or they do not belong together.
    """
    certificate = read_certificate(tls / f"{name}.crt")
    path = tls / f"{name}.key"
    content = _read(path)
    if path.stat().st_mode & 0o077:
        raise SettingsError(f"{path}: others can read this key; run chmod 600 on it")
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError):
        raise SettingsError(f"{path}: is no private key as PEM") from None
    if (
        not isinstance(key, ec.EllipticCurvePrivateKey)
        or key.public_key() != certificate.public_key()
    ):
        raise SettingsError(f"{path}: is not the key of {name}.crt")
    return Pair(certificate, key)


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate.

    Raises:
        SettingsError: It is missing or is none.
    """
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError:
        raise SettingsError(f"{path}: is no certificate as PEM") from None


def authority_sha256(tls: Path) -> str:
    """Return what a token holds of the authority: SHA-256 of its certificate (DER)."""
    return read_certificate(tls / "ca.crt").fingerprint(hashes.SHA256()).hex()


def pem_sha256(pem: str) -> str:
    """Return the SHA-256 of a certificate (DER)."""
    return x509.load_pem_x509_certificate(pem.encode()).fingerprint(hashes.SHA256()).hex()


def announced(tls: Path) -> tuple[str, str]:
    """Return the authority in use and the one that follows, as PEM; the second may be empty."""
    following = tls / "next" / "ca.crt"
    later = _read(following).decode("ascii") if following.exists() else ""
    return _read(tls / "ca.crt").decode("ascii"), later


def trusted(tls: Path) -> str:
    """Return the authorities that our own processes trust on loopback, as PEM."""
    previous = tls / "previous.crt"
    before = _read(previous).decode("ascii") if previous.exists() else ""
    return _read(tls / "ca.crt").decode("ascii") + before


def expiry_warnings(tls: Path, now: float | None = None) -> list[str]:
    """Say which certificates ran out, or will within a month, and what to do.

    Raises:
        SettingsError: A certificate cannot be read.
    """
    at = time.time() if now is None else now
    told = []
    for name, remedy in (("server.crt", "--tls"), ("ca.crt", "--ca")):
        left = read_certificate(tls / name).not_valid_after_utc.timestamp() - at
        if left < WARN_DAYS * _DAY_S:
            when = "ran out" if left <= 0 else f"runs out in {left / _DAY_S:.0f} days"
            told.append(f"{tls / name}: {when}; run hansa server rotate with {remedy}")
    return told


def _builder(
    key: ec.EllipticCurvePrivateKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _authority_files(tls: Path, pair: Pair) -> dict[Path, bytes]:
    return {tls / "ca.key": pair.key_pem, tls / "ca.crt": pair.pem}


def _server_files(tls: Path, pair: Pair) -> dict[Path, bytes]:
    return {tls / "server.key": pair.key_pem, tls / "server.crt": pair.pem}


def _replace(tls: Path, contents: dict[Path, bytes]) -> None:
    try:
        write_together(contents, 0o600)
    except OSError as error:
        raise SettingsError(f"{tls}: cannot be written ({error.strerror})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
