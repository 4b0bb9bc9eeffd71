"""The federation's contract: read, validate, hash.

One TOML file that every member agrees on before anything is computed: the features with
their *public* bounds, the segments, the model, the training, the privacy and what is
published. Two merchants that hold the same contract hash compute the same thing.

Bounds are knowledge about the domain ("nobody buys more than 200 times in nine months"),
never a statistic of the customers at hand.
"""

import hashlib
import json
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from common.errors import ContractError

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Positive = Annotated[Number, Field(gt=0, le=1e9)]
Fraction = Annotated[Number, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=80)]

MAX_COHORT = 200  # merchants of one secure sum
ADAM_DECAYS, ADAM_EPSILON = (0.9, 0.99), 1e-8  # wherever the contract says Adam

MEASURES = {
    "recency_days": "days from the last purchase to the end of the window",
    "tenure_days": "days from the first purchase to the end of the window",
    "purchases": "number of purchases",
    "spend": "sum of the amounts",
    "mean_purchase": "mean amount of a purchase",
    "weekend_share": "share of purchases on Saturday or Sunday",
    "evening_share": "share of purchases at 17:00 or later",
    "mean_gap_days": "mean days between purchases; the upper bound for one purchase",
    "spend_last": "sum of the amounts in the last N days (spend_last:30)",
    "purchases_last": "number of purchases in the last N days (purchases_last:30)",
    "category_share": "share of the spend in one category (category_share:FUEL)",
    "distinct_categories": "number of different categories bought",
}


# Keys that came later, with the default that means "as before them". At it they are left out of
# the hash, so that contracts that merchants agreed on before keep theirs.
_LATER: tuple[tuple[str, str, object], ...] = (
    ("model", "start", None),
    ("training", "local_optimizer", "sgd"),
    ("training", "local_momentum", 0.0),
)


class Section(BaseModel):
    """A frozen part of the contract that knows no keys but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Federation(Section):
    """Who takes part, and how long the coordinator waits."""

    name: Name = Field(description="What the members call this federation.")
    version: Whole = Field(1, ge=1, description="Raised with every change of the contract.")
    min_merchants: Whole = Field(
        2,
        ge=1,
        description="Merchants that the federation counts on; `min_survivors` of them are enough "
        "for a run to start and for every sum.",
    )
    round_timeout_s: Positive = Field(
        60.0, description="Seconds after which a silent merchant counts as dropped out of a stage."
    )


class Feature(Section):
    """One column of a customer's row, with its public bounds."""

    name: Name = Field(description="The feature's name; also the default column name.")
    kind: Literal["number", "flag", "category"] = Field(
        "number", description="`number`, `flag` (0 or 1) or `category` (one of `categories`)."
    )
    low: Number = Field(0.0, allow_inf_nan=False, description="Public lower bound (numbers).")
    high: Number = Field(1.0, allow_inf_nan=False, description="Public upper bound (numbers).")
    categories: tuple[str, ...] = Field((), description="The known values (categories).")
    transform: Literal["none", "log1p", "sqrt"] = Field(
        "none", description="Applied after clipping to the bounds and before scaling to [-1, 1]."
    )
    missing: Literal["refuse", "indicator"] | Number = Field(
        "refuse",
        description="A missing value is refused, gets an indicator input of its own, "
        "or is replaced by this public number.",
    )
    unit: str = Field("", description="Unit of the value, for people.")
    description: str = Field("", description="What the value means, for people.")
    measure: str | None = Field(
        None,
        description="How the value is computed from raw transactions: one of the measures below, "
        "with an argument after a colon where it has one. Not needed for tables with one row "
        "a customer.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Feature":
        if self.kind == "category":
            self._check_category()
        elif self.categories:
            raise ValueError("`categories` belong to features of kind 'category' only")
        if self.kind == "number":
            self._check_number()
        elif self.transform != "none":
            raise ValueError("a transform belongs to features of kind 'number' only")
        if self.measure is not None:
            self._check_measure(self.measure)
        return self

    def _check_category(self) -> None:
        if len(set(self.categories)) != max(len(self.categories), 2):
            raise ValueError("a category feature needs at least two different `categories`")
        if self.missing not in {"refuse", "indicator"}:
            raise ValueError("a category is missing as 'refuse' or 'indicator', not as a number")

    def _check_number(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"expected low < high, got low={self.low} and high={self.high}")
        if self.transform != "none" and self.low < 0:
            raise ValueError(f"transform '{self.transform}' needs low >= 0, got {self.low}")

    @staticmethod
    def _check_measure(measure: str) -> None:
        name, _, argument = measure.partition(":")
        if name not in MEASURES:
            raise ValueError(f"unknown measure '{name}'; expected one of {', '.join(MEASURES)}")
        if name in {"spend_last", "purchases_last"} and not re.fullmatch(r"[1-9]\d{0,4}", argument):
            raise ValueError(f"measure '{name}' needs a number of days, like '{name}:30'")
        if name == "category_share" and not argument:
            raise ValueError(
                "measure 'category_share' needs a category, like 'category_share:FUEL'"
            )

    @property
    def width(self) -> int:
        """Number of model inputs that this feature becomes."""
        inputs = len(self.categories) if self.kind == "category" else 1
        return inputs + (self.missing == "indicator")


class Windows(Section):
    """Half-open periods [start, end) in which raw transactions are read."""

    features: tuple[date, date] = Field(description="Transactions that become features.")
    label: tuple[date, date] = Field(description="Transactions that become the segment label.")
    previous: tuple[date, date] | None = Field(
        None, description="The period that the free rule 'same as last period' looks at."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Windows":
        for name in ("features", "label", "previous"):
            window = getattr(self, name)
            if window is not None and not window[0] < window[1]:
                raise ValueError(f"window '{name}' must start before it ends")
        if self.label[0] < self.features[1]:
            raise ValueError("the label window must not start before the feature window ends")
        return self


class Segments(Section):
    """The classes of customers, with stable ids 0..S-1 in the order of `names`."""

    source: Literal["column", "spend"] = Field(
        "column",
        description="`column`: the label is a column of the table. `spend`: the label is the spend "
        "in the label window, cut at `cuts` (raw transactions).",
    )
    names: tuple[Name, ...] = Field(min_length=2, description="One name a segment, in id order.")
    column: str = Field("segment", description="Column that holds the label.")
    previous_column: str | None = Field(
        None, description="Column with last period's segment, for the free rule; optional."
    )
    cuts: tuple[Number, ...] = Field(
        (), description="Rising spend limits between segments; one fewer than names."
    )
    actions: tuple[str, ...] = Field(
        (), description="A suggested action for each segment; empty or as many as names."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Segments":
        if len(set(self.names)) != len(self.names):
            raise ValueError("segment names must differ from each other")
        if self.source == "spend":
            if len(self.cuts) != len(self.names) - 1:
                raise ValueError(
                    f"{len(self.names)} segments need {len(self.names) - 1} cuts, "
                    f"got {len(self.cuts)}"
                )
            if list(self.cuts) != sorted(set(self.cuts)):
                raise ValueError("cuts must rise")
        if self.actions and len(self.actions) != len(self.names):
            raise ValueError("expected no actions, or as many as there are segment names")
        return self


class Model(Section):
    """The classifier that a run trains."""

    family: Literal["mlp", "linear"] = Field(
        "mlp", description="`mlp` (multi-layer perceptron) or `linear` (softmax regression)."
    )
    hidden: tuple[Annotated[Whole, Field(ge=1, le=4096)], ...] = Field(
        (32,),
        max_length=8,  # so that no parameters that a worker accepts overflow 64-bit numbers
        description="Sizes of the hidden layers (mlp).",
    )
    activation: Literal["relu", "tanh"] = Field("relu", description="Activation of hidden layers.")
    start: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None,
        description="SHA-256 of the parameters that training starts from, which lie beside the "
        "contract in a file that ends in `.start` (`hansa pretrain` makes both). Default: "
        "parameters that everybody computes from the contract's hash.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Model":
        if self.family == "mlp" and not self.hidden:
            raise ValueError("family 'mlp' needs at least one hidden layer; see family 'linear'")
        return self


class Training(Section):
    """How the federation learns. Defaults were chosen on synthetic customers only."""

    mode: Literal["distributed", "local"] = Field(
        "distributed",
        description="`distributed`: one noisy gradient step over the union of all customers a "
        "round, noise shared between the merchants. `local`: every merchant's own noise gives the "
        "whole guarantee.",
    )
    engine: Literal["fused", "opacus"] = Field(
        "fused", description="What computes the clipped gradient sum; both give the same sum."
    )
    rounds: Whole = Field(60, ge=1, le=100_000, description="Number of training rounds.")
    spare_rounds: Whole = Field(
        2, ge=0, description="Further rounds that the budget pays for, used when a round fails."
    )
    sampling_rate: Fraction = Field(
        1.0,
        description="Chance of each customer to be in a step (Poisson sampling); 1 takes all. "
        "Below 1 in mode 'local' only.",
    )
    local_steps: Whole = Field(1, ge=1, le=1000, description="Noisy steps a round (mode 'local').")
    proximal: Number = Field(
        0.0, ge=0, le=1e6, description="FedProx pull towards the round's start (mode 'local')."
    )
    optimizer: Literal["sgd", "adam", "yogi"] = Field(
        "adam",
        description="The coordinator's step on the averaged update: with `local` mode these are "
        "FedAvg (FedAvgM with momentum), FedAdam and FedYogi.",
    )
    learning_rate: Positive | None = Field(
        None,
        description="Learning rate of the coordinator's step. Default: 0.1 in mode 'distributed', "
        "0.03 in mode 'local', whose sums hold more noise.",
    )
    local_optimizer: Literal["sgd", "adam"] = Field(
        "sgd",
        description="What turns noisy sums into a merchant's own steps (mode 'local'); its state "
        "begins anew in every round. Adam's decays are 0.9 and 0.99, as at the coordinator.",
    )
    local_learning_rate: Positive = Field(
        1.0, description="Learning rate of a merchant's own steps (mode 'local')."
    )
    local_momentum: Number = Field(
        0.0, ge=0, lt=1, description="Momentum of local_optimizer 'sgd' (mode 'local')."
    )
    momentum: Number = Field(0.0, ge=0, lt=1, description="Momentum of optimizer 'sgd'.")
    averaging: Number = Field(
        0.9,
        ge=0,
        lt=1,
        description="Decay of the exponential average of the model over rounds that is published; "
        "0 publishes the last model.",
    )
    held_out: Number = Field(
        0.25,
        gt=0,
        lt=1,
        description="Share of the customers kept for evaluation, never trained on.",
    )
    split_seed: Whole = Field(
        0, ge=0, description="Enters the hash that decides which customers are held out."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.mode == "distributed":
            if self.sampling_rate != 1.0:
                raise ValueError("mode 'distributed' takes all customers: sampling_rate must be 1")
            if self.local_steps != 1 or self.proximal != 0.0:
                raise ValueError("local_steps and proximal belong to mode 'local'")
            if self.local_optimizer != "sgd" or self.local_momentum:
                raise ValueError("local_optimizer and local_momentum belong to mode 'local'")
        if self.local_learning_rate * self.proximal >= 1:
            raise ValueError("local_learning_rate * proximal must be below 1, or steps diverge")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum belongs to optimizer 'sgd'")
        if self.local_momentum and self.local_optimizer != "sgd":
            raise ValueError("local_momentum belongs to local_optimizer 'sgd'")
        return self

    @property
    def step_size(self) -> float:
        """The learning rate, or the mode's default where none is stated."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.1 if self.mode == "distributed" else 0.03


class Split(Section):
    """How the budget is divided, in shares of the squared Gaussian parameter mu."""

    census: Fraction = Field(0.02, description="The noisy number of training customers.")
    training: Fraction = Field(0.88, description="The training steps.")
    evaluation: Fraction = Field(0.06, description="Confusion counts on held-out customers.")
    profiles: Fraction = Field(0.04, description="Segment sizes and profiles.")

    @model_validator(mode="after")
    def _whole(self) -> "Split":
        total = self.census + self.training + self.evaluation + self.profiles
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"the shares must add up to 1, got {total:.6g}")
        return self


class Privacy(Section):
    """The whole run's promise: (epsilon, delta) for one customer of one merchant."""

    epsilon: Number = Field(
        gt=0,
        le=100,
        description="No merchant releases more than this in one run, all releases composed.",
    )
    delta: Number = Field(
        ge=1e-12,
        le=0.01,
        description="Chance that the bound does not hold; well below 1 / customers.",
    )
    clip_norm: Number = Field(
        2.0,
        ge=1e-9,  # below 1e-19 a factor that clips to it is no normal float32
        le=1e9,
        description="L2 bound of one customer's gradient.",
    )
    split: Split = Field(default_factory=Split, description="Division over the purposes.")


class Aggregation(Section):
    """How updates are summed."""

    secure: StrictBool = Field(
        True,
        description="Secure aggregation: the coordinator sees sums only. `false`: it sees each "
        "merchant's single noisy message, and every merchant must accept that in its own file.",
    )
    ring_bits: Literal[32, 64] = Field(
        32,
        description="Sums are taken modulo 2^32 or 2^64: 4 or 8 bytes a number. 64 leaves room "
        "for more customers at a finer rounding.",
    )
    max_customers: Whole = Field(
        1_000_000,
        ge=1,
        le=1_000_000_000_000,
        description="Public bound on the customers of all merchants in one sum, for which the "
        "ring keeps room. A run with more ends after the census.",
    )
    min_survivors: Whole | None = Field(
        None,
        ge=1,
        description="Fewest merchants whose answers make a valid sum; noise shares are sized for "
        "them. Default: 90 % of min_merchants, rounded down, at least 1 (2 where sums are "
        "secure). Secure sums of more than 200 merchants are taken in equal groups, and it is "
        "90 % of a group.",
    )
    colluders: Whole = Field(
        0, ge=0, description="Merchants whose noise shares are not counted on."
    )


class Publication(Section):
    """What leaves the run beside the model."""

    evaluate_every: Whole = Field(
        10, ge=1, description="A noisy evaluation after every so many rounds, and after the last."
    )
    profiles: StrictBool = Field(True, description="Publish noisy segment sizes and profiles.")


class Contract(Section):
    """What every member of a federation agreed on."""

    format: Literal[1] = Field(1, description="Version of this file format.")
    federation: Federation
    features: tuple[Feature, ...] = Field(min_length=1, max_length=4096)
    windows: Windows | None = Field(None, description="Only for raw transactions.")
    segments: Segments
    model: Model = Field(default_factory=Model)
    training: Training = Field(default_factory=Training)
    privacy: Privacy
    aggregation: Aggregation = Field(default_factory=Aggregation)
    publication: Publication = Field(default_factory=Publication)

    @model_validator(mode="after")
    def _consistent(self) -> "Contract":
        names = [feature.name for feature in self.features]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"features: the name '{twice[0]}' is used more than once")
        if self.aggregation.secure:
            self._check_secure()
        if self.min_survivors > self.federation.min_merchants:
            raise ValueError("aggregation.min_survivors is larger than federation.min_merchants")
        if self.noise_contributors < 1:
            raise ValueError("aggregation.colluders must be smaller than min_survivors")
        if self.segments.source == "spend" and self.windows is None:
            raise ValueError("segments.source = 'spend' needs a [windows] section")
        return self

    def _check_secure(self) -> None:
        if self.federation.min_merchants < 2:
            raise ValueError(
                "a secure sum hides nothing of a single merchant: federation.min_merchants must "
                "be 2 or more (or aggregation.secure = false)"
            )
        if not 2 <= self.min_survivors <= MAX_COHORT:
            raise ValueError(
                f"aggregation.min_survivors must lie between 2 and {MAX_COHORT}, the most "
                "merchants of one secure sum; more merchants are summed in groups"
            )

    @property
    def inputs(self) -> int:
        """Number of model inputs, F."""
        return sum(feature.width for feature in self.features)

    @property
    def min_survivors(self) -> int:
        """Fewest merchants whose answers make a valid sum."""
        stated = self.aggregation.min_survivors
        if stated is not None:
            return stated
        merchants, fewest = self.federation.min_merchants, 1
        if self.aggregation.secure:
            merchants, fewest = merchants // -(-merchants // MAX_COHORT), 2
        return max(fewest, merchants * 9 // 10)

    @property
    def max_merchants(self) -> int:
        """Most merchants of a run, for which the ring keeps room."""
        return max(MAX_COHORT, 4 * self.federation.min_merchants)

    @property
    def noise_contributors(self) -> int:
        """Honest noise shares that any admitted sum holds at least (m in docs)."""
        if self.training.mode == "local":
            return 1
        return self.min_survivors - self.aggregation.colluders

    @property
    def exposed_contributors(self) -> int:
        """Shares that the noise is divided into as far as the coordinator sees single messages.

        One where sums are secure: the coordinator sees what everybody may see.
        """
        return 1 if self.aggregation.secure else self.noise_contributors

    @property
    def sha256(self) -> str:
        """SHA-256 over the canonical JSON of the validated contract, defaults included.

        Keys of `_LATER` are in it where they differ from their defaults.
        """
        document = self.model_dump(mode="json")
        for section, key, default in _LATER:
            if document[section][key] == default:
                del document[section][key]
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def revised(self, source: str = "revised contract", **sections: dict[str, Any]) -> "Contract":
        """Return a validated copy with some keys of some sections replaced.

        Parameters to start from are a model's own: another model starts anew, unless its `start`
        is among the changes.

        Raises:
            ContractError: The result would not be a valid contract; `source` starts the message.
        """
        document = self.model_dump(mode="json")
        if "model" in sections:
            document["model"]["start"] = None
        for section, changes in sections.items():
            document[section] = {**document[section], **changes}
        return parse_contract(document, source=source)


def read_contract(path: Path) -> Contract:
    """Read and validate a contract file.

    Raises:
        ContractError: The file is missing, is not TOML, or breaks a rule; the message names the
            file, the key, what was expected and what was found.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ContractError(f"{path}: there is no such contract file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ContractError(f"{path}: is not valid TOML: {error}") from None
    return parse_contract(document, source=str(path))


def parse_contract(document: dict[str, Any], *, source: str) -> Contract:
    """Validate a contract that is already a dictionary; `source` starts every message."""
    try:
        return Contract.model_validate(document)
    except ValidationError as error:
        raise ContractError(describe(error, source)) from None


def describe(error: ValidationError, source: str) -> str:
    """Turn a pydantic error into one line for each finding: file, key, expected, got."""
    lines = []
    findings = error.errors(include_url=False)
    for finding in findings:
        # of an alternative's branches pydantic names each one; a list of bad items it calls short
        parts = [str(part) for part in finding["loc"] if "[" not in str(part)]
        key = ".".join(parts) or "(whole file)"
        if finding["type"] == "too_short" and len(findings) > 1 and finding["input"]:
            continue
        message = finding["msg"].removeprefix("Value error, ")
        got = finding.get("input")
        shown = f", got {got!r}" if isinstance(got, str | int | float | bool) else ""
        if finding["type"] == "extra_forbidden":
            message, shown = "this key is not known; check its spelling", ""
        lines.append(f"{source}: {key}: {message}{shown}")
    return "\n".join(lines)


def contract_toml(contract: Contract) -> str:
    """Write a contract as TOML, every default spelled out."""
    import tomli_w

    return tomli_w.dumps(_without_none(contract.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
