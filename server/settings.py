"""The operator's own file, `server.toml`: names, ports, where runs are kept."""

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from common.contract import Section, describe
from common.errors import SettingsError
from common.files import write_new

Port = Annotated[int, Field(ge=1, le=65535, strict=True)]
NAME = "server.toml"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - said to the operator, who may choose another


class Settings(Section):
    """All of `server.toml`; the folder it lies in is known, not read."""

    host: str = Field(
        "127.0.0.1", description="Name or address by which merchants reach the gateway."
    )
    names: tuple[str, ...] = Field(
        (), description="Further names and addresses in the server's certificate."
    )
    bind: str = Field(
        "127.0.0.1",
        description="Address that the gateway listens at; 0.0.0.0 is every address of the machine.",
    )
    port: Port = Field(8443, description="Port of the gateway: TLS, all that the outside sees.")
    superlink_port: Port = Field(
        8444, description="Port of Flower's SuperLink: TLS, on 127.0.0.1 only."
    )
    metrics_port: Port = Field(
        8445, description="Port of metrics and health: on 127.0.0.1 only, without TLS."
    )
    database: SecretStr = Field(
        SecretStr(""),
        description="SQLAlchemy URL of the run store; empty: runs.sqlite in the folder.",
    )
    folder: Path = Field(Path(), exclude=True)

    @field_validator("host", "bind")
    @classmethod
    def _is_host(cls, text: str) -> str:
        return _checked(text)

    @field_validator("names")
    @classmethod
    def _are_hosts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked(name) for name in names)

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        # A finding on the whole file shows no input: the URL may hold a password.
        if len({self.port, self.superlink_port, self.metrics_port}) != 3:
            raise ValueError("port, superlink_port and metrics_port must differ from each other")
        url = self.database.get_secret_value()
        if url and not _is_database_url(url):
            raise ValueError(
                "database: is no SQLAlchemy URL like 'postgresql+psycopg://user@host/name'"
            )
        return self

    @property
    def url(self) -> str:
        """Where merchants find the gateway."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """All names of the server's certificate; loopback is added to them."""
        return (self.host, *self.names)

    @property
    def superlink(self) -> str:
        """Where our own processes find the SuperLink, without the scheme."""
        return f"127.0.0.1:{self.superlink_port}"

    @property
    def store_url(self) -> str:
        """The run store's URL, with its password if it has one: never show it."""
        given = self.database.get_secret_value()
        return given or f"sqlite:///{self.folder.absolute() / 'runs.sqlite'}"

    @property
    def tls(self) -> Path:
        """The folder of certificates."""
        return self.folder / "tls"

    @property
    def archive(self) -> Path:
        """The folder of the coordinator's identity, witness and records."""
        return self.folder / "server"

    @property
    def run_folder(self) -> Path:
        """The folder of locks and states of what runs."""
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        """The folder of logs."""
        return self.folder / "logs"


def read_settings(folder: Path) -> Settings:
    """Read and validate a federation's `server.toml`.

    Raises:
        SettingsError: It is missing, is not TOML, or breaks a rule; file and key are named.
    """
    path = folder / NAME
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"{path}: there is none; make the federation with hansa server init"
        ) from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: is not valid TOML: {error}") from None
    if "folder" in document:
        raise SettingsError(f"{path}: folder: this key is not known; check its spelling")
    return checked_settings(document, folder)


def checked_settings(document: dict[str, object], folder: Path) -> Settings:
    """Validate what a `server.toml` says or shall say.

    Raises:
        SettingsError: A key breaks a rule.
    """
    try:
        found = Settings.model_validate(document)
    except ValidationError as error:
        raise SettingsError(describe(error, str(folder / NAME))) from None
    return found.model_copy(update={"folder": folder.absolute()})


def write_settings(settings: Settings) -> None:
    """Write a new `server.toml`, every key with its meaning.

    Raises:
        SettingsError: There is one already, or it cannot be written.
    """
    path = settings.folder / NAME
    try:
        write_new(path, settings_toml(settings).encode(), 0o600)  # a URL may hold a password
    except FileExistsError:
        raise SettingsError(f"{path}: is there already; it is not overwritten") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written ({error.strerror})") from None


def settings_toml(settings: Settings) -> str:
    """Return the settings as commented TOML."""
    import tomli_w

    lines = ["# What `hansa server start` serves, and where. Changes count from the next start."]
    for name, field in Settings.model_fields.items():
        if name == "folder":
            continue
        value = getattr(settings, name)
        plain = value.get_secret_value() if isinstance(value, SecretStr) else value
        lines += ["", f"# {field.description}", tomli_w.dumps({name: plain}).strip()]
    return "\n".join(lines) + "\n"


def _checked(text: str) -> str:
    from server.certificates import checked_host

    try:
        return checked_host(text)
    except SettingsError as error:
        raise ValueError(str(error).removeprefix("host: ")) from None


def _is_database_url(text: str) -> bool:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(text)
    except ArgumentError:
        return False
    return True
