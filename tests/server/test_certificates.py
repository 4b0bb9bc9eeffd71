"""The operator's own certificate authority."""

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from common.errors import SettingsError
from server.certificates import (
    AUTHORITY_DAYS,
    SERVER_DAYS,
    announce_next,
    announced,
    authority_sha256,
    checked_host,
    expiry_warnings,
    issue,
    make_authority,
    make_tls,
    pem_sha256,
    read_certificate,
    read_pair,
    renew,
    switch,
    trusted,
)


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    """Make a folder of certificates."""
    make_tls(tmp_path / "tls", "shops", ["hansa.example.org", "192.0.2.7"])
    return tmp_path / "tls"


def accepts(tls: Path, trust: str, name: str) -> str:
    """Shake hands with the folder's server; return the reason of a refusal, or nothing."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tls / "server.crt", tls / "server.key")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=trust)
    left, right = socket.socketpair()

    def answer() -> None:
        try:
            server.wrap_socket(left, server_side=True).close()
        except OSError:
            left.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(right, server_hostname=name) as wrapped:
            assert wrapped.version() == "TLSv1.3"
            return ""
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        right.close()
        thread.join()


class TestMaking:
    """`hansa server init`."""

    def test_files(self, tls: Path) -> None:
        """All are for the operator alone."""
        names = {path.name: path.stat().st_mode & 0o777 for path in tls.iterdir()}
        assert names == dict.fromkeys(("ca.crt", "ca.key", "server.crt", "server.key"), 0o600)
        assert tls.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("name", ["hansa.example.org", "192.0.2.7", "127.0.0.1", "localhost"])
    def test_a_client_that_trusts_the_authority(self, tls: Path, name: str) -> None:
        """Accepts the server under each of its names, and on loopback."""
        assert accepts(tls, trusted(tls), name) == ""

    def test_another_name(self, tls: Path) -> None:
        """Is refused."""
        assert "mismatch" in accepts(tls, trusted(tls), "other.example.org")

    def test_another_authority(self, tls: Path) -> None:
        """Is refused, even one of the same name."""
        other = make_authority("shops").pem.decode()
        assert accepts(tls, other, "localhost") in {
            "unable to get local issuer certificate",
            "self-signed certificate in certificate chain",
        }

    def test_keys(self, tls: Path) -> None:
        """P-384 each, none the other's."""
        authority, server = read_pair(tls, "ca"), read_pair(tls, "server")
        for pair in (authority, server):
            assert isinstance(pair.key.curve, ec.SECP384R1)
        assert authority.key.public_key() != server.key.public_key()

    def test_constraints(self, tls: Path) -> None:
        """The authority signs servers only, and a server signs nobody."""
        authority, server = (read_certificate(tls / name) for name in ("ca.crt", "server.crt"))
        limits = authority.extensions.get_extension_for_class(x509.BasicConstraints)
        assert (limits.value.ca, limits.value.path_length, limits.critical) == (True, 0, True)
        assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca

    def test_never_over_another(self, tls: Path) -> None:
        """An authority that is there stays."""
        before = authority_sha256(tls)
        with pytest.raises(SettingsError, match="is not overwritten"):
            make_tls(tls, "shops", [])
        assert authority_sha256(tls) == before

    def test_a_bad_host(self, tmp_path: Path) -> None:
        """Leaves nothing behind."""
        with pytest.raises(SettingsError, match="neither a name"):
            make_tls(tmp_path / "tls", "shops", ["a b"])
        assert not (tmp_path / "tls").exists()

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        """Is named."""
        (tmp_path / "file").write_text("")
        with pytest.raises(SettingsError, match=r"tls: cannot be written"):
            make_tls(tmp_path / "file" / "tls", "shops", [])


class TestHosts:
    """Names and addresses."""

    @pytest.mark.parametrize(
        ("text", "found"),
        [("Hansa.Example.ORG", "hansa.example.org"), ("10.0.0.1", "10.0.0.1"), ("::1", "::1")],
    )
    def test_good(self, text: str, found: str) -> None:
        """As certificates hold them."""
        assert checked_host(text) == found

    @pytest.mark.parametrize(
        "text", ["", "a_b", "-a", "a..b", "*.org", "1.2.3", "https://a", "a:1", "a" * 300, "ü.org"]
    )
    def test_bad(self, text: str) -> None:
        """Are refused."""
        with pytest.raises(SettingsError, match="is neither"):
            checked_host(text)

    @given(st.text(max_size=40))
    def test_whatever_passes_can_be_certified(self, text: str) -> None:
        """No text that is accepted breaks a certificate."""
        try:
            host = checked_host(text)
        except SettingsError:
            return
        assert checked_host(host) == host
        assert host.isascii()


class TestExpiry:
    """What runs out is told before."""

    def test_warnings(self, tls: Path) -> None:
        """First the server's, then the authority's, each with its remedy."""
        now = datetime.now(UTC).timestamp()
        day = 86400
        assert expiry_warnings(tls, now) == []
        (soon,) = expiry_warnings(tls, now + (SERVER_DAYS - 20) * day)
        assert "server.crt: runs out in" in soon
        assert "--tls" in soon
        assert "ran out" in expiry_warnings(tls, now + (SERVER_DAYS + 1) * day)[0]
        server, authority = expiry_warnings(tls, now + (AUTHORITY_DAYS - 3) * day)
        assert "ran out" in server
        assert "ca.crt: runs out in" in authority
        assert "--ca" in authority

    def test_a_server_never_outlives_its_authority(self) -> None:
        """Its certificate ends with it."""
        then = datetime.now(UTC) - timedelta(days=AUTHORITY_DAYS - 10)
        authority = make_authority("old", then)
        server = issue(authority, ["a"])
        ends = authority.certificate.not_valid_after_utc
        assert server.certificate.not_valid_after_utc == ends


class TestRotation:
    """New certificates, with and without a new authority."""

    def test_renewing_the_server(self, tls: Path) -> None:
        """Merchants that pinned the authority notice nothing."""
        trust, before = trusted(tls), (tls / "server.key").read_bytes()
        renew(tls, ["new.example.org"])
        assert (tls / "server.key").read_bytes() != before
        assert accepts(tls, trust, "new.example.org") == ""

    def test_a_new_authority(self, tls: Path) -> None:
        """Whoever pinned both goes over without a gap; who pinned the old one only does not."""
        old = trusted(tls)
        announce_next(tls, "shops")
        now, later = announced(tls)
        assert now == old
        assert accepts(tls, now + later, "localhost") == ""
        assert accepts(tls, later, "localhost") != ""
        switch(tls, ["hansa.example.org"])
        assert announced(tls) == (later, "")
        assert pem_sha256(later) == authority_sha256(tls)
        for trust, well in ((now + later, True), (later, True), (now, False)):
            assert (accepts(tls, trust, "hansa.example.org") == "") is well
        assert accepts(tls, trusted(tls), "localhost") == ""

    def test_our_own_processes_go_over_without_a_gap(self, tls: Path) -> None:
        """They trust the authority before, until all were started anew."""
        old = (tls / "ca.crt").read_text()
        announce_next(tls, "shops")
        switch(tls, [])
        assert old in trusted(tls)

    def test_no_switch_without_an_announcement(self, tls: Path) -> None:
        """There is nothing to switch to."""
        with pytest.raises(SettingsError, match=r"next/ca\.crt: cannot be read"):
            switch(tls, [])

    def test_a_disk_that_is_full(self, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leaves the old pair, which belongs together."""
        monkeypatch.setattr("common.files.os.fsync", _no_room)
        with pytest.raises(SettingsError, match="cannot be written"):
            renew(tls, [])
        monkeypatch.undo()
        read_pair(tls, "server")
        assert len(list(tls.iterdir())) == 4


def _no_room(_handle: int) -> None:
    raise OSError(28, "No space left on device")


class TestReading:
    """Files that people handled."""

    def test_a_key_that_others_can_read(self, tls: Path) -> None:
        """Is refused."""
        (tls / "ca.key").chmod(0o644)
        with pytest.raises(SettingsError, match="chmod 600"):
            read_pair(tls, "ca")

    def test_a_key_of_another_certificate(self, tls: Path) -> None:
        """Is refused."""
        (tls / "ca.key").write_bytes((tls / "server.key").read_bytes())
        with pytest.raises(SettingsError, match=r"is not the key of ca\.crt"):
            read_pair(tls, "ca")

    @pytest.mark.parametrize("name", ["ca.crt", "ca.key"])
    def test_something_else(self, tls: Path, name: str) -> None:
        """Is named."""
        (tls / name).write_text("-----BEGIN NOTHING-----")
        with pytest.raises(SettingsError, match=rf"{name}: is no"):
            read_pair(tls, "ca")

    @pytest.mark.parametrize("name", ["ca.crt", "ca.key"])
    def test_something_missing(self, tls: Path, name: str) -> None:
        """Is named."""
        (tls / name).unlink()
        with pytest.raises(SettingsError, match=rf"{name}: cannot be read"):
            read_pair(tls, "ca")
