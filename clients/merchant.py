"""A merchant's own file, `merchant.toml`: where its customers are and what may be spent on them.

Nothing outside this file can raise the cap in `[policy]`: neither the contract nor the
coordinator. Relative paths in it are relative to the folder it lies in.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, model_validator

from common.contract import MAX_COHORT, Section, describe
from common.errors import PolicyError
from common.identity import MERCHANT_ID

PositiveEpsilon = Annotated[float, Field(gt=0, le=100, strict=True)]
ColumnName = Annotated[str, Field(min_length=1)]


class Identity(Section):
    """Who the merchant is in the federation."""

    id: str = Field(
        pattern=MERCHANT_ID,
        description="Up to 64 letters, digits, dots, underscores and hyphens.",
    )
    key: Path = Field(
        Path("identity.key"),
        description="The private key that only this merchant has: it signs the ledger and makes "
        "secure sums; mode 0600.",
    )
    session: Path = Field(
        Path("session.sealed"),
        description="Where the state of a secure sum is kept between two messages, sealed.",
    )


class Data(Section):
    """Where the customers are: one file, or one query of a database."""

    kind: Literal["customers", "transactions"] = Field(
        description="`customers`: one row a customer. `transactions`: one row a line item."
    )
    path: Path | None = Field(None, description="A file that ends in .csv or .parquet.")
    url: SecretStr | None = Field(None, description="An SQLAlchemy database URL.")
    query: str | None = Field(None, description="The SELECT statement that gives the rows.")

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        # A finding on the whole section shows no input: the URL may hold a password.
        if (self.path is None) == (self.url is None):
            raise ValueError("expected either `path`, or `url` together with `query`")
        if (self.url is None) != (self.query is None):
            raise ValueError("`url` and `query` belong together")
        if self.url is not None:
            from sqlalchemy.engine import make_url
            from sqlalchemy.exc import ArgumentError

            try:
                make_url(self.url.get_secret_value())
            except ArgumentError:
                raise ValueError("`url` is not a database URL like 'sqlite:///shop.db'") from None
        return self


class Columns(Section):
    """What the columns of the merchant's table are called."""

    customer: ColumnName = Field("customer_id", description="Names the customer, once a table.")
    person: ColumnName | None = Field(
        None,
        description="Names the person behind the customer; decides who is held out. "
        "Default: the customer column.",
    )
    time: ColumnName = Field("time", description="Time of a purchase, ISO 8601 (transactions).")
    amount: ColumnName = Field(
        "amount", description="Amount of a line item; refunds are negative (transactions)."
    )
    category: ColumnName | None = Field(None, description="Category of a line item (transactions).")
    order: ColumnName | None = Field(
        None,
        description="Groups line items into one purchase; by default every row is a purchase "
        "(transactions).",
    )
    features: dict[str, ColumnName] = Field(
        default_factory=dict,
        description="Feature of the contract -> column of the table; by default the same name.",
    )
    segment: ColumnName | None = Field(
        None, description="Column with the label, if not called as the contract says."
    )
    previous: ColumnName | None = Field(
        None, description="Column with last period's segment, if not called as the contract says."
    )


class Policy(Section):
    """The most that this merchant spends on the privacy of one of its customers."""

    epsilon: float = Field(
        gt=0, le=100, strict=True, description="Cap on epsilon towards whoever sees sums."
    )
    delta: float = Field(gt=0, le=0.01, strict=True, description="The delta of that cap.")
    refresh_days: float | None = Field(
        None,
        ge=1,
        strict=True,
        description="After so many days a run no longer counts against the caps. Customers that "
        "stay go on being exposed to it: the ledger and every audit tell the lifetime's epsilon "
        "too. Default: a run counts for ever.",
    )
    purposes: dict[Literal["census", "update", "evaluation", "profile"], PositiveEpsilon] = Field(
        default_factory=dict,
        description="What one purpose may cost alone, as epsilon, beside the cap on the whole: "
        "`census`, `update` (training), `evaluation`, `profile`. Default: no caps of their own.",
    )
    epsilon_towards_server: float | None = Field(
        None,
        gt=0,
        strict=True,
        description="Cap on epsilon towards whoever runs the coordinator and sees this merchant's "
        "single messages. Default: no cap beyond `accept_unmasked_sums`.",
    )
    min_cohort: int = Field(
        3,
        ge=2,
        le=MAX_COHORT,
        strict=True,
        description="Fewest merchants in a secure sum that this merchant helps to unmask; the "
        "contract may ask for more, never for fewer.",
    )
    accept_unmasked_sums: bool = Field(
        False, strict=True, description="Take part although the coordinator sees unmasked sums."
    )


class LedgerFile(Section):
    """Where the record of everything spent is kept."""

    path: Path = Field(Path("ledger.sqlite"), description="The SQLite file; never delete it.")


class NodeSettings(Section):
    """How this merchant's processes run, once it takes part in a federation."""

    user: str | None = Field(
        None,
        min_length=1,
        description="User of the operating system that the node, the process that faces the "
        "network, runs as; only root can start it so. Default: the user that joins.",
    )
    poll_s: float = Field(
        2.0,
        ge=0.1,
        le=60,
        description="Longest pause, in seconds, between two questions whether there is work; "
        "while a run goes on, pauses are much shorter.",
    )
    metrics_port: int | None = Field(
        None,
        ge=1024,
        le=65535,
        strict=True,
        description="Port on 127.0.0.1 for Prometheus's metrics. Default: none.",
    )


class Simulation(Section):
    """Settings for simulations, never for a deployment."""

    seed: int | None = Field(
        None,
        ge=0,
        strict=True,
        description="Makes the noise repeatable and therefore guessable: no protection at all.",
    )


class Merchant(Section):
    """All of `merchant.toml`, with absolute paths."""

    merchant: Identity
    data: Data
    columns: Columns = Field(default_factory=Columns)
    policy: Policy
    ledger: LedgerFile = Field(default_factory=LedgerFile)
    node: NodeSettings = Field(default_factory=NodeSettings)
    simulation: Simulation = Field(default_factory=Simulation)

    def located(self, folder: Path) -> "Merchant":
        """Return a copy whose relative paths are resolved against `folder`."""
        folder = folder.absolute()
        data, ledger, merchant = self.data, self.ledger, self.merchant
        paths = {"key": folder / merchant.key, "session": folder / merchant.session}
        merchant = merchant.model_copy(update=paths)
        if data.path is not None:
            data = data.model_copy(update={"path": folder / data.path})
        if data.url is not None:
            url = _located_url(data.url.get_secret_value(), folder)
            data = data.model_copy(update={"url": SecretStr(url)})
        ledger = ledger.model_copy(update={"path": folder / ledger.path})
        return self.model_copy(update={"data": data, "ledger": ledger, "merchant": merchant})


def read_merchant(path: Path) -> Merchant:
    """Read and validate a merchant's file.

    Raises:
        PolicyError: The file is missing, is not TOML, or breaks a rule; the message names the
            file, the key, what was expected and what was found.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        merchant = Merchant.model_validate(document)
    except FileNotFoundError:
        raise PolicyError(f"{path}: there is no such merchant file") from None
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{path}: is not valid TOML: {error}") from None
    except ValidationError as error:
        raise PolicyError(describe(error, str(path))) from None
    return merchant.located(path.parent)


def _located_url(text: str, folder: Path) -> str:
    """Resolve the file of a SQLite URL; leave every other URL alone."""
    from sqlalchemy.engine import make_url

    url = make_url(text)
    name = url.database or ":memory:"
    if url.get_backend_name() != "sqlite" or name == ":memory:" or name.startswith("file:"):
        return text
    return url.set(database=str(folder / name)).render_as_string(hide_password=False)
