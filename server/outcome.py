"""What a coordinator knows of a run: noisy sums, who took part, what was asked and what came."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from common.events import Event, from_document, to_document
from server import checkpoint


@dataclass(frozen=True)
class NoisySum:
    """A decoded sum over the merchants that answered."""

    stage: str
    round: int
    total: Float[np.ndarray, " P"]
    stddev: float  # of the noise in each number of `total`
    merchants: tuple[str, ...]
    parts: dict[str, Float[np.ndarray, " P"]]  # merchant -> its noisy part; plain sums only

    @property
    def document(self) -> dict[str, Any]:
        """Return it for a checkpoint, without anybody's part."""
        return {
            "stage": self.stage,
            "round": self.round,
            "total": checkpoint.to_text(self.total),
            "stddev": self.stddev,
            "merchants": list(self.merchants),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "NoisySum":
        """Read it back."""
        return cls(
            document["stage"],
            int(document["round"]),
            checkpoint.from_text(document["total"]),
            float(document["stddev"]),
            tuple(document["merchants"]),
            {},
        )


@dataclass(frozen=True)
class RoundReport:
    """What can be told about a round while the run goes on."""

    round: int
    rounds: int
    cohort: int
    epsilon: float  # spent so far by a merchant that answered everything
    evaluation: NoisySum | None


@dataclass
class Outcome:
    """What the coordinator knows at the end of a run."""

    run: str
    parameters: Float[np.ndarray, " P"]
    customers: float  # noisy number of training customers
    evaluations: list[NoisySum] = field(default_factory=list)
    profile: NoisySum | None = None
    cohorts: list[int] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)  # merchant -> reason
    failures: dict[str, str] = field(default_factory=dict)  # node or merchant -> what happened
    events: list[tuple[str, Event]] = field(default_factory=list)  # (stage, event) asked for
    occasions: list[tuple[str, int, int]] = field(default_factory=list)  # stage, round, attempt
    # merchants in the smallest part that was summed apart, event by event; None: none came of it
    survivors: list[int | None] = field(default_factory=list)
    merchants: list[str] = field(default_factory=list)
    repeatable: bool = False  # a merchant's noise was seeded: not for release

    @property
    def document(self) -> dict[str, Any]:
        """Return it for a checkpoint."""
        return {
            "customers": self.customers,
            "evaluations": [found.document for found in self.evaluations],
            "profile": None if self.profile is None else self.profile.document,
            "cohorts": self.cohorts,
            "refusals": self.refusals,
            "failures": self.failures,
            "events": [[stage, to_document(event)] for stage, event in self.events],
            "occasions": [list(occasion) for occasion in self.occasions],
            "survivors": self.survivors,
            "merchants": self.merchants,
            "repeatable": self.repeatable,
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        """Take up what `document` gave."""
        self.customers = float(document["customers"])
        self.evaluations = [NoisySum.from_document(found) for found in document["evaluations"]]
        profile = document["profile"]
        self.profile = None if profile is None else NoisySum.from_document(profile)
        self.cohorts = [*document["cohorts"]]
        self.refusals.update(document["refusals"])
        self.failures.update(document["failures"])
        self.events = [(stage, from_document(event)) for stage, event in document["events"]]
        self.occasions = [(stage, int(n), int(a)) for stage, n, a in document["occasions"]]
        self.survivors = [*document["survivors"]]
        self.merchants = [*document["merchants"]]
        self.repeatable = bool(document["repeatable"])
