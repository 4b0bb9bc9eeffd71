"""Finding pinned files of installed packages, and the cache of what is made of them."""

import hashlib
from pathlib import Path

import pandas as pd
import pytest

from common.errors import DataError
from simulations.sources import Source, cache_folder, cached

CONTENT = b"purchases"
TABLE = pd.DataFrame({"customer": ["a", "b"], "spend": [1.5, None]})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package with one data file on the import path; importing it fails."""
    folder = tmp_path / "site" / "shopdata"
    (folder / "files").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "files" / "a.txt").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache of its own."""
    monkeypatch.setenv("HANSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source(content: bytes = CONTENT, package: str = "shopdata") -> Source:
    """Pin the test file to a content."""
    return Source(package, "files", {"a.txt": hashlib.sha256(content).hexdigest()})


@pytest.mark.usefixtures("package")
def test_files_are_found_without_importing_the_package() -> None:
    """The package's own code never runs."""
    assert source().locate()["a.txt"].read_bytes() == CONTENT


def test_a_missing_package_names_the_extra() -> None:
    """The message says what to install."""
    with pytest.raises(DataError, match=r"pip install 'hansa\[data\]'"):
        source(package="no_such_package_of_purchases").locate()


@pytest.mark.usefixtures("package")
def test_a_changed_file_is_refused() -> None:
    """Other bytes than the pinned ones are not read."""
    with pytest.raises(DataError, match="expected SHA-256"):
        source(b"other purchases").locate()


def test_a_missing_file_is_refused(package: Path) -> None:
    """A package without its file is told apart from a missing package."""
    (package / "files" / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        source().locate()


@pytest.mark.usefixtures("cache")
def test_a_table_is_built_once() -> None:
    """The second load reads the cache and gives the same table."""
    first = cached("shop", ["v1"], TABLE.copy)

    def fail() -> pd.DataFrame:
        raise AssertionError("built twice")

    pd.testing.assert_frame_equal(cached("shop", ["v1"], fail), first)
    pd.testing.assert_frame_equal(first, TABLE)


@pytest.mark.usefixtures("cache")
def test_another_identity_is_another_table() -> None:
    """A new source or contract never meets an old table."""
    cached("shop", ["v1"], TABLE.copy)
    assert len(cached("shop", ["v2"], lambda: TABLE.head(1))) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "no checksum"])
def test_a_damaged_cache_is_rebuilt(cache: Path, damage: str) -> None:
    """A changed, shortened or unproven file is built again and then right."""
    cached("shop", ["v1"], TABLE.copy)
    (path,) = cache.glob("*.parquet")
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "cut":
        path.write_bytes(content[:-3])
    else:
        path.with_name(f"{path.name}.sha256").unlink()
    rebuilt = cached("shop", ["v1"], lambda: TABLE.head(1))
    assert len(rebuilt) == 1
    assert len(cached("shop", ["v1"], TABLE.copy)) == 1


def test_an_unwritable_cache_only_costs_time(cache: Path) -> None:
    """Where the cache cannot be written the table comes all the same."""
    cache.write_text("a file where the folder should be")
    assert len(cached("shop", ["v1"], TABLE.copy)) == len(TABLE)


def test_a_failed_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves no part of a file, and the table comes all the same."""

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    assert len(cached("shop", ["v1"], TABLE.copy)) == len(TABLE)
    assert list(cache.iterdir()) == []


def test_the_cache_holds_no_unfinished_files(cache: Path) -> None:
    """Only the table and its checksum are left."""
    cached("shop", ["v1"], TABLE.copy)
    assert sorted(path.suffix for path in cache.iterdir()) == [".parquet", ".sha256"]


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """HANSA_CACHE goes before XDG_CACHE_HOME, which goes before the home folder."""
    monkeypatch.setenv("HANSA_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("HANSA_CACHE")
    assert cache_folder() == Path("/two/hansa")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "hansa"
