"""The merchants of a run: who takes part, who refused, and what went wrong with whom."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import RecordDict

from common.chain import Head
from common.errors import WireError
from common.identity import Members
from common.session import accused
from server.stages import Grid, Patience, run_stage
from server.witness import Witness

_MOST_REASONS = 5
A = TypeVar("A", bound=Any)  # an answer with a ledger's head


@dataclass
class Cohort:
    """Nodes and merchants of one run, reached over a Flower grid."""

    grid: Grid
    patience: Patience
    witness: Witness
    enrolled: Members
    members: dict[int, str] = field(default_factory=dict)  # node -> merchant
    refusals: dict[str, str] = field(default_factory=dict)  # merchant -> reason
    failures: dict[str, str] = field(default_factory=dict)  # node or merchant -> what happened
    accusers: dict[str, set[str]] = field(default_factory=dict)  # merchant -> who accuses it
    on_wait: Callable[[], object] = lambda: None  # called every other second of a stage

    def ask(self, message_type: str, contents: Mapping[int, RecordDict]) -> dict[int, RecordDict]:
        """Send each node its message and return the answers; note errors and silence."""
        result = run_stage(self.grid, message_type, contents, self.patience, self.on_wait)
        for node, reason in result.errors.items():
            self.failures[self.name(node)] = reason
            name = accused(reason)
            if name is not None and name in self.members.values() and name != self.name(node):
                self.accusers.setdefault(name, set()).add(self.name(node))
        for node in result.silent:
            self.failures[self.name(node)] = f"no answer within {self.patience.timeout_s:g} s"
        return dict(sorted(result.contents.items()))

    def countersigned(self, node: int) -> bytes:
        """Return what the witness saw last of a merchant's ledger, countersigned; or nothing."""
        return self.witness.latest(self.enrolled.keys.get(self.members[node], b""))

    def renewed(self, node: int) -> bytes:
        """Return the same with the time of now."""
        return self.witness.renewed(self.enrolled.keys.get(self.members[node], b""))

    def witnessed(self, answers: Mapping[int, A]) -> dict[int, A]:
        """Let the witness see the ledgers' heads; return the answers whose heads it accepts.

        Raises:
            ArchiveError: The witness cannot remember them.
        """
        heads: dict[str, tuple[bytes, Head]] = {}
        for node, answer in answers.items():
            name = self.members[node]
            try:
                heads[name] = (self.enrolled.key_of(name), Head.from_bytes(answer.head))
            except WireError as error:
                self.failures[name] = str(error)
        refused = self.witness.countersign(heads)
        self.failures.update(refused)
        accepted = heads.keys() - refused.keys()
        return {node: a for node, a in answers.items() if self.members[node] in accepted}

    def connected(self) -> set[int]:
        """Return the nodes that can be reached now."""
        return {*self.grid.get_node_ids()}

    def name(self, node: int) -> str:
        """Return the merchant at a node, or the node where it is not known."""
        return self.members.get(node, f"node {node}")

    def dismiss(self, node: int, refusal: str) -> None:
        """Go on without a merchant that refused."""
        self.refusals[self.members.pop(node)] = refusal

    def reasons(self) -> str:
        """Return the first few reasons why merchants are missing, to end a sentence with."""
        reasons = {**self.failures, **self.refusals}
        shown = [_harmless(f"{name}: {reason}") for name, reason in sorted(reasons.items())]
        more = len(shown) - _MOST_REASONS
        told = shown[:_MOST_REASONS] + ([f"and {more} more"] if more > 0 else [])
        return ("; " + "; ".join(told)) if told else ""


def _harmless(text: str) -> str:
    """Return a stranger's text on one line, without signs that move a terminal's cursor."""
    return "".join(sign if sign.isprintable() else " " for sign in text)[:300]
