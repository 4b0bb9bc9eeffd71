"""Tests of evidence as files: written whole or not at all, read without trusting it."""

import io
import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import evidence as module
from common.errors import EvidenceError
from common.evidence import INDEX, Evidence, read_evidence, write_evidence

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
FILES = {"ledger.jsonl": b'{"seq": 1}\n' * 100, "runs/r1/run.jsonl": b"", "members.toml": b"\x00"}
PLACES = pytest.mark.parametrize("name", ["shop.zip", "shop"])


def write(path: Path, files: dict[str, bytes] | None = None) -> None:
    """Write evidence of a merchant."""
    found = FILES if files is None else files
    write_evidence(path, "merchant", "shop", found, KEY, 5.0, "0.1.0", "c0de")


def refused(path: Path, match: str) -> None:
    """Check that evidence is refused, in words that name what is wrong."""
    with pytest.raises(EvidenceError, match=match):
        read_evidence(path)


def rezipped(path: Path, change: Callable[[zipfile.ZipFile], None]) -> Path:
    """Add to a zip file of evidence."""
    with zipfile.ZipFile(path, "a") as archive:
        change(archive)
    return path


class TestWrite:
    """What is written."""

    @PLACES
    def test_comes_back(self, tmp_path: Path, name: str) -> None:
        """All that was written is read, and who made it is known."""
        path = tmp_path / "deep" / name
        write(path)
        public = KEY.public_key().public_bytes_raw()
        assert read_evidence(path) == Evidence(
            path, "merchant", "shop", public, 5.0, "0.1.0", "c0de", FILES
        )

    def test_same_evidence_is_same_bytes(self, tmp_path: Path) -> None:
        """A zip file holds no clock and no order of its own."""
        write(tmp_path / "one.zip")
        write(tmp_path / "two.zip", dict(reversed(FILES.items())))
        assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()

    @PLACES
    def test_replaces_older_evidence(self, tmp_path: Path, name: str) -> None:
        """The newer one is there whole; nothing else is left."""
        write(tmp_path / name)
        write(tmp_path / name, {"only": b"1"})
        assert read_evidence(tmp_path / name).files == {"only": b"1"}
        assert os.listdir(tmp_path) == [name]

    @PLACES
    @pytest.mark.parametrize("content", [None, b"", b"holiday pictures"])
    def test_overwrites_nothing_else(
        self, tmp_path: Path, name: str, content: bytes | None
    ) -> None:
        """A folder or file that is no evidence stays as it is."""
        path = tmp_path / name
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        with pytest.raises(EvidenceError, match="is no evidence"):
            write(path)
        assert path.is_dir() if content is None else path.read_bytes() == content

    @PLACES
    def test_a_failure_leaves_the_older(
        self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full disk leaves neither a part nor nothing."""
        write(tmp_path / name)

        def full(_handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.os, "fsync", full)
        with pytest.raises(EvidenceError, match="No space left"):
            write(tmp_path / name, {"only": b"1"})
        assert read_evidence(tmp_path / name).files == FILES
        assert os.listdir(tmp_path) == [name]

    def test_a_failed_swap_leaves_the_older(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The older folder is put back if the newer cannot be put there."""
        write(tmp_path / "shop")
        real = os.replace

        def replace(source: Path, target: Path) -> None:
            if Path(source).name == "new":
                raise OSError(5, "Input/output error")
            real(source, target)

        monkeypatch.setattr(module.os, "replace", replace)
        with pytest.raises(EvidenceError, match="Input/output error"):
            write(tmp_path / "shop", {"only": b"1"})
        assert read_evidence(tmp_path / "shop").files == FILES

    @pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/./b", "", ".hidden", "a\\b", "é"])
    def test_refuses_names_that_lead_out(self, tmp_path: Path, name: str) -> None:
        """Nothing is written outside, whatever a run is called."""
        with pytest.raises(EvidenceError, match="no name of a file"):
            write(tmp_path / "shop", {name: b""})
        assert not os.listdir(tmp_path)


class TestRead:
    """What is refused, whoever signed it."""

    @PLACES
    @pytest.mark.parametrize("at", range(0, 1100, 100))
    def test_a_changed_byte(self, tmp_path: Path, name: str, at: int) -> None:
        """A change anywhere in a file is found."""
        write(tmp_path / "shop")
        file = tmp_path / "shop" / "ledger.jsonl"
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
        if name.endswith(".zip"):
            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                for path in sorted((tmp_path / "shop").rglob("*.*")):
                    archive.write(path, path.relative_to(tmp_path / "shop").as_posix())
        refused(tmp_path / name, "ledger.jsonl: was changed")

    @pytest.mark.parametrize("field", ["name", "made_at", "hansa", "code", "files", "key"])
    def test_a_changed_index(self, tmp_path: Path, field: str) -> None:
        """Everything that the index says is signed."""
        write(tmp_path / "shop")
        index = json.loads((tmp_path / "shop" / INDEX).read_text())
        other = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
        changed = {"made_at": 6.0, "files": {}, "key": other}
        index[field] = changed.get(field, "else")
        (tmp_path / "shop" / INDEX).write_text(json.dumps(index))
        refused(tmp_path / "shop", "is not listed|signature does not fit")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("format", "hansa/evidence/2"),
            ("kind", "friend"),
            ("key", "00"),
            ("made_at", True),
            ("made_at", float("inf")),
            ("made_at", "5"),
            ("files", {"a": 1}),
            ("files", []),
            ("signature", None),
            ("name", 3),
            ("name", "a shop"),
            ("code", "\n"),
            ("hansa", "\ud800"),
            ("more", 1),
        ],
    )
    def test_a_malformed_index(self, tmp_path: Path, field: str, value: object) -> None:
        """The field that is wrong is named."""
        write(tmp_path / "shop")
        index = json.loads((tmp_path / "shop" / INDEX).read_text())
        index[field] = value
        (tmp_path / "shop" / INDEX).write_text(json.dumps(index))
        refused(tmp_path / "shop", "is no index" if field == "format" else f"'{field}'")

    @pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
    def test_an_index_that_is_no_json(self, tmp_path: Path, text: str) -> None:
        """It is refused, and nothing breaks."""
        write(tmp_path / "shop")
        (tmp_path / "shop" / INDEX).write_bytes(text.encode("latin-1"))
        refused(tmp_path / "shop", "is no index")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        """What the index lists must be there."""
        write(tmp_path / "shop")
        (tmp_path / "shop" / "members.toml").unlink()
        refused(tmp_path / "shop", "members.toml: is listed .* and missing")

    @PLACES
    def test_an_extra_file(self, tmp_path: Path, name: str) -> None:
        """What the index does not list must not be there."""
        write(tmp_path / name)
        if name == "shop":
            (tmp_path / name / "extra").write_bytes(b"")
        else:
            rezipped(tmp_path / name, lambda archive: archive.writestr("extra", b""))
        refused(tmp_path / name, "extra: is not listed")

    def test_no_index(self, tmp_path: Path) -> None:
        """A folder without an index is no evidence."""
        (tmp_path / "a").write_bytes(b"")
        refused(tmp_path, "evidence.json: is missing")

    def test_nothing_there(self, tmp_path: Path) -> None:
        """The path is named."""
        refused(tmp_path / "no", "no: cannot be read")

    @pytest.mark.parametrize("content", [b"", b"PK\x05\x06", b"no zip at all"])
    def test_a_broken_zip(self, tmp_path: Path, content: bytes) -> None:
        """It is refused, and nothing breaks."""
        (tmp_path / "shop.zip").write_bytes(content)
        refused(tmp_path / "shop.zip", "cannot be read as a zip|evidence.json: is missing")

    def test_a_cut_or_flipped_zip(self, tmp_path: Path) -> None:
        """Whatever is broken in a zip file, the answer is an EvidenceError or the same files."""
        write(tmp_path / "shop.zip")
        raw = (tmp_path / "shop.zip").read_bytes()
        for at in range(0, len(raw), 7):
            flipped = bytearray(raw)
            flipped[at] ^= 0x55
            for content in (raw[:at], bytes(flipped)):
                (tmp_path / "broken.zip").write_bytes(content)
                try:
                    assert read_evidence(tmp_path / "broken.zip").files == FILES
                except EvidenceError:
                    continue

    @pytest.mark.parametrize("name", ["../out", "/etc/x", "a/../../x", "a\\..\\x", "C:/x", "./a"])
    def test_a_path_out_of_the_zip(self, tmp_path: Path, name: str) -> None:
        """Names that lead out are refused, before anything is read."""
        write(tmp_path / "shop.zip")
        rezipped(tmp_path / "shop.zip", lambda archive: archive.writestr(name, b"x"))
        refused(tmp_path / "shop.zip", "is no name of a file")

    def test_a_name_twice(self, tmp_path: Path) -> None:
        """Two readers could read two things."""
        write(tmp_path / "shop.zip")
        with pytest.warns(UserWarning, match="Duplicate name"):
            rezipped(tmp_path / "shop.zip", lambda archive: archive.writestr(INDEX, b"{}"))
        refused(tmp_path / "shop.zip", "twice")

    def test_a_link_in_a_zip(self, tmp_path: Path) -> None:
        """A zip file can hold links; evidence cannot."""
        write(tmp_path / "shop.zip")
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        rezipped(tmp_path / "shop.zip", lambda archive: archive.writestr(info, b"/etc/passwd"))
        refused(tmp_path / "shop.zip", "'link' is a link")

    @pytest.mark.parametrize("to", ["file", "folder", "evidence"])
    def test_a_link_in_a_folder(self, tmp_path: Path, to: str) -> None:
        """No link is followed, to a file, to a folder, or to the evidence itself."""
        write(tmp_path / "shop")
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "file").write_bytes(b"x")
        target = {"file": tmp_path / "secret" / "file", "folder": tmp_path / "secret"}
        if to == "evidence":
            (tmp_path / "link").symlink_to(tmp_path / "shop")
            refused(tmp_path / "link", "is a link")
        else:
            (tmp_path / "shop" / "link").symlink_to(target[to])
            refused(tmp_path / "shop", "link: is a link")

    def test_what_happens_while_it_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that fails, or a file that grows meanwhile, is an error that names the file."""
        write(tmp_path / "shop")
        real = Path.open

        def failing(path: Path, *mode: str, **more: str) -> io.BufferedReader:
            if path.name == "ledger.jsonl":
                raise OSError(5, "Input/output error")
            return real(path, *mode, **more)  # type: ignore[call-overload, no-any-return]

        def growing(_path: Path, *_mode: str, **_more: str) -> io.BytesIO:
            return io.BytesIO(bytes(10_000))

        for opened, told in ((failing, "Input/output"), (growing, "changed while it was read")):
            with monkeypatch.context() as patch:
                patch.setattr(Path, "open", opened)
                refused(tmp_path / "shop", told)

    def test_a_folder_that_cannot_be_listed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What cannot be seen is not passed over."""
        write(tmp_path / "shop")

        def scan(path: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(module.os, "scandir", scan)
        refused(tmp_path / "shop", "Permission denied")

    def test_a_pipe(self, tmp_path: Path) -> None:
        """A pipe would wait for ever."""
        write(tmp_path / "shop")
        os.mkfifo(tmp_path / "shop" / "pipe")
        refused(tmp_path / "shop", "no ordinary file")

    @PLACES
    @pytest.mark.parametrize("limit", ["MOST_BYTES", "MOST_FILE_BYTES", "MOST_FILES"])
    def test_too_large(
        self, tmp_path: Path, name: str, limit: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A bomb is refused by what it says of its size, without being unpacked."""
        write(tmp_path / name, {"zeros": bytes(200_000), "more": b"1"})
        monkeypatch.setattr(module, limit, 2 if limit == "MOST_FILES" else 199_999)
        refused(tmp_path / name, "is too large")

    @pytest.mark.parametrize("told", [10, 3_000_001])
    def test_a_zip_that_lies_about_sizes(self, tmp_path: Path, told: int) -> None:
        """What unpacks to more, or to less, than it says is refused."""
        write(tmp_path / "shop.zip", {"zeros": bytes(3_000_000)})
        raw = (tmp_path / "shop.zip").read_bytes()
        size = (3_000_000).to_bytes(4, "little")
        assert raw.count(size) == 2
        (tmp_path / "shop.zip").write_bytes(raw.replace(size, told.to_bytes(4, "little")))
        refused(tmp_path / "shop.zip", "cannot be read as a zip|has another size")

    def test_overwrites_no_link(self, tmp_path: Path) -> None:
        """What a link leads to stays as it is, though it is evidence."""
        write(tmp_path / "shop")
        (tmp_path / "link").symlink_to(tmp_path / "shop")
        with pytest.raises(EvidenceError, match="is no evidence"):
            write(tmp_path / "link", {})
        assert read_evidence(tmp_path / "shop").files == FILES

    def test_folders_in_a_zip(self, tmp_path: Path) -> None:
        """A zip file that somebody packed again, with entries for folders, is evidence too."""
        write(tmp_path / "shop")
        with zipfile.ZipFile(tmp_path / "again.zip", "w") as archive:
            for path in sorted((tmp_path / "shop").rglob("*")):
                archive.write(path, path.relative_to(tmp_path / "shop").as_posix())
        assert read_evidence(tmp_path / "again.zip").files == FILES

    def test_a_file_that_is_a_folder_too(self, tmp_path: Path) -> None:
        """No folder could hold such files."""
        with pytest.raises(EvidenceError, match="lies in a file"):
            write(tmp_path / "shop.zip", {"a": b"", "a/b": b""})
