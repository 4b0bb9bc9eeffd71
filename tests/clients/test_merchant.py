"""Tests of merchant.toml."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from clients.merchant import read_merchant
from common.errors import PolicyError

MINIMAL = {
    "merchant": 'id = "shop-1"',
    "data": 'kind = "customers"\npath = "customers.csv"',
    "policy": "epsilon = 2.0\ndelta = 1e-5",
}


def write(folder: Path, **sections: str) -> Path:
    """Write a merchant.toml; an empty section is left out."""
    path = folder / "merchant.toml"
    parts = {**MINIMAL, **sections}
    text = "\n".join(f"[{name}]\n{body}" for name, body in parts.items() if body)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """Return the message with which a merchant.toml is refused, without its folder."""
    with pytest.raises(PolicyError) as caught:
        read_merchant(path)
    return str(caught.value).replace(f"{path.parent}/", "")


class TestReadMerchant:
    """read_merchant."""

    def test_fills_defaults(self, tmp_path: Path) -> None:
        """Only the identity, the data and the cap have to be stated."""
        merchant = read_merchant(write(tmp_path))
        assert merchant.merchant.id == "shop-1"
        assert merchant.columns.customer == "customer_id"
        assert merchant.columns.person is None
        assert merchant.policy.accept_unmasked_sums is False
        assert merchant.simulation.seed is None

    def test_resolves_relative_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Paths are relative to the folder of the file, wherever the process runs."""
        write(tmp_path)
        monkeypatch.chdir(tmp_path.parent)
        merchant = read_merchant(Path(tmp_path.name) / "merchant.toml")
        assert merchant.data.path == tmp_path / "customers.csv"
        assert merchant.ledger.path == tmp_path / "ledger.sqlite"

    def test_keeps_absolute_paths(self, tmp_path: Path) -> None:
        """An absolute path stays as it is written."""
        data = 'kind = "customers"\npath = "/srv/customers.parquet"'
        assert read_merchant(write(tmp_path, data=data)).data.path == Path("/srv/customers.parquet")

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("sqlite:///shop.db", "sqlite:///{folder}/shop.db"),
            ("sqlite:////srv/shop.db", "sqlite:////srv/shop.db"),
            ("sqlite://", "sqlite://"),
            ("postgresql://ann:secret@db/shop", "postgresql://ann:secret@db/shop"),
        ],
    )
    def test_resolves_sqlite_urls(self, tmp_path: Path, url: str, expected: str) -> None:
        """The file of a SQLite URL is relative to the folder; other URLs stay."""
        data = f'kind = "customers"\nurl = "{url}"\nquery = "select 1"'
        resolved = read_merchant(write(tmp_path, data=data)).data.url
        assert resolved is not None
        assert resolved.get_secret_value() == expected.format(folder=tmp_path)

    def test_hides_password(self, tmp_path: Path) -> None:
        """The text of a merchant never shows the database URL."""
        data = 'kind = "customers"\nurl = "postgresql://ann:secret@db/shop"\nquery = "select 1"'
        merchant = read_merchant(write(tmp_path, data=data))
        assert "secret" not in f"{merchant} {merchant!r} {merchant.model_dump_json()}"

    def test_is_frozen(self, tmp_path: Path) -> None:
        """The cap cannot be raised after reading."""
        merchant = read_merchant(write(tmp_path))
        with pytest.raises(ValidationError):
            merchant.policy.epsilon = 50.0


BOTH = "merchant.toml: data: expected either `path`, or `url` together with `query`"
REFUSED = [
    (
        {"merchant": 'id = "-shop"'},
        "merchant.toml: merchant.id: String should match pattern "
        "'^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$', got '-shop'",
    ),
    ({"merchant": ""}, "merchant.toml: merchant: Field required"),
    ({"data": 'kind = "customers"'}, BOTH),
    ({"data": 'kind = "customers"\npath = "a.csv"\nurl = "sqlite://"\nquery = "q"'}, BOTH),
    (
        {"data": 'kind = "customers"\nurl = "sqlite://"'},
        "merchant.toml: data: `url` and `query` belong together",
    ),
    (
        {"data": 'kind = "customers"\nurl = "no url"\nquery = "q"'},
        "merchant.toml: data: `url` is not a database URL like 'sqlite:///shop.db'",
    ),
    (
        {"data": 'kind = "rows"\npath = "a.csv"'},
        "merchant.toml: data.kind: Input should be 'customers' or 'transactions', got 'rows'",
    ),
    (
        {"columns": 'custommer = "id"'},
        "merchant.toml: columns.custommer: this key is not known; check its spelling",
    ),
    (
        {"policy": "epsilon = 0.0\ndelta = 1e-5"},
        "merchant.toml: policy.epsilon: Input should be greater than 0, got 0.0",
    ),
    (
        {"policy": 'epsilon = "1"\ndelta = 1e-5'},
        "merchant.toml: policy.epsilon: Input should be a valid number, got '1'",
    ),
    (
        {"policy": "epsilon = nan\ndelta = 1e-5"},
        "merchant.toml: policy.epsilon: Input should be less than or equal to 100, got nan",
    ),
    (
        {"policy": "epsilon = 1.0\ndelta = 0.5"},
        "merchant.toml: policy.delta: Input should be less than or equal to 0.01, got 0.5",
    ),
    (
        {"policy": 'epsilon = 1.0\ndelta = 1e-5\naccept_unmasked_sums = "yes"'},
        "merchant.toml: policy.accept_unmasked_sums: Input should be a valid boolean, got 'yes'",
    ),
    (
        {"simulation": "seed = -1"},
        "merchant.toml: simulation.seed: Input should be greater than or equal to 0, got -1",
    ),
]


class TestRefusals:
    """What read_merchant refuses, and with which words."""

    @pytest.mark.parametrize(("sections", "message"), REFUSED)
    def test_names_file_key_expected_and_got(
        self, tmp_path: Path, sections: dict[str, str], message: str
    ) -> None:
        """A broken rule is one line: file, key, expected, got."""
        assert refusal(write(tmp_path, **sections)) == message

    def test_several_findings_are_several_lines(self, tmp_path: Path) -> None:
        """Each finding has its own line."""
        path = write(tmp_path, merchant='id = ""', policy="epsilon = 1.0")
        assert len(refusal(path).splitlines()) == 2

    def test_missing_file(self, tmp_path: Path) -> None:
        """A missing file is said to be missing."""
        message = refusal(tmp_path / "merchant.toml")
        assert message == "merchant.toml: there is no such merchant file"

    def test_broken_toml(self, tmp_path: Path) -> None:
        """Broken TOML is told with its line."""
        path = tmp_path / "merchant.toml"
        path.write_text("[merchant]\nid =", encoding="utf-8")
        assert refusal(path).startswith("merchant.toml: is not valid TOML: Invalid value (at ")

    def test_not_utf8(self, tmp_path: Path) -> None:
        """A file in another encoding is refused by the byte."""
        path = tmp_path / "merchant.toml"
        path.write_bytes(b'[merchant]\nid = "\xff"')
        assert refusal(path) == "merchant.toml: is not UTF-8 text (byte 17)"

    def test_folder(self, tmp_path: Path) -> None:
        """A folder in place of the file is refused."""
        path = tmp_path / "merchant.toml"
        path.mkdir()
        assert refusal(path) == "merchant.toml: cannot be read (Is a directory)"

    def test_invalid_url_is_not_repeated(self, tmp_path: Path) -> None:
        """A database URL that cannot be parsed is not printed: it may hold a password."""
        data = 'kind = "customers"\nurl = "postgres ann:secret"\nquery = "q"'
        assert "secret" not in refusal(write(tmp_path, data=data))
