"""`server.toml`."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import SettingsError
from server.settings import (
    Settings,
    checked_settings,
    read_settings,
    settings_toml,
    write_settings,
)

PASSWORD = "sesame"  # noqa: S105
URL = f"postgresql+psycopg://hansa:{PASSWORD}@db/hansa"


def written(folder: Path, text: str) -> Path:
    """Write a file and return its folder."""
    (folder / "server.toml").write_text(text)
    return folder


class TestReading:
    """What a person wrote."""

    def test_an_empty_file(self, tmp_path: Path) -> None:
        """Means the defaults: everything on this machine."""
        found = read_settings(written(tmp_path, ""))
        assert found.url == "https://127.0.0.1:8443"
        assert found.superlink == "127.0.0.1:8444"
        assert found.bind == "127.0.0.1"
        assert found.store_url == f"sqlite:///{tmp_path / 'runs.sqlite'}"
        assert found.folder == tmp_path

    def test_an_address_of_version_six(self, tmp_path: Path) -> None:
        """Stands in brackets in the URL."""
        assert read_settings(written(tmp_path, 'host = "::1"')).url == "https://[::1]:8443"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("port = 0", r"server\.toml: port: "),
            ('port = "8443"', r"server\.toml: port: "),
            ("port = true", r"server\.toml: port: "),
            ("prot = 1", r"prot: this key is not known"),
            ('folder = "/x"', r"folder: this key is not known"),
            ('host = "a b"', r"server\.toml: host: 'a b' is neither a name"),
            ('names = ["ok", "-"]', r"server\.toml: names: '-' is neither"),
            ("port = 8444", r"must differ from each other"),
            ('database = "nonsense"', r"no SQLAlchemy URL"),
            ("port = ", r"not valid TOML"),
        ],
    )
    def test_what_cannot_be(self, tmp_path: Path, text: str, words: str) -> None:
        """Is told with the file and the key."""
        with pytest.raises(SettingsError, match=words):
            read_settings(written(tmp_path, text))

    def test_no_file(self, tmp_path: Path) -> None:
        """What to do is told."""
        with pytest.raises(SettingsError, match=r"make the federation with hansa server init"):
            read_settings(tmp_path)

    def test_no_text(self, tmp_path: Path) -> None:
        """Bytes are told as such; a folder, too."""
        (tmp_path / "server.toml").write_bytes(b"\xff")
        with pytest.raises(SettingsError, match="not UTF-8"):
            read_settings(tmp_path)
        (tmp_path / "server.toml").unlink()
        (tmp_path / "server.toml").mkdir()
        with pytest.raises(SettingsError, match="cannot be read"):
            read_settings(tmp_path)


class TestWriting:
    """What `hansa server init` writes."""

    @given(
        st.sampled_from(["127.0.0.1", "hansa.example.org", "::1"]),
        st.lists(st.sampled_from(["a", "b.c", "10.0.0.1"]), max_size=3),
        st.lists(st.integers(1, 65535), min_size=3, max_size=3, unique=True),
        st.sampled_from(["", URL, "sqlite:////x.db"]),
    )
    def test_comes_back(self, host: str, names: list[str], ports: list[int], database: str) -> None:
        """Every key is in the file, and is read as it was written."""
        import tomllib

        document: dict[str, Any] = dict(
            zip(("port", "superlink_port", "metrics_port"), ports, strict=True)
        )
        document |= {"host": host, "names": tuple(names), "database": database}
        found = checked_settings(document, Path("f"))
        again = tomllib.loads(settings_toml(found))
        assert set(again) == set(Settings.model_fields) - {"folder"}
        assert checked_settings(again, Path("f")) == found

    def test_a_file_for_the_operator_alone(self, tmp_path: Path) -> None:
        """Its URL may hold a password; it is never overwritten."""
        settings = checked_settings({"database": URL}, tmp_path)
        write_settings(settings)
        assert (tmp_path / "server.toml").stat().st_mode & 0o777 == 0o600
        assert read_settings(tmp_path).store_url == URL
        with pytest.raises(SettingsError, match="is not overwritten"):
            write_settings(settings)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        """Is told."""
        with pytest.raises(SettingsError, match="cannot be written"):
            write_settings(checked_settings({}, tmp_path / "no"))


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    """Neither in an error about another key nor in what Python prints."""
    text = f'database = "{URL}"\nport = 8444\n'
    with pytest.raises(SettingsError) as refusal:
        read_settings(written(tmp_path, text))
    assert PASSWORD not in str(refusal.value)
    with pytest.raises(SettingsError) as refusal:
        read_settings(written(tmp_path, f'database = "{PASSWORD}"\n'))
    assert PASSWORD not in str(refusal.value)
    assert PASSWORD not in repr(checked_settings({"database": URL}, tmp_path))
