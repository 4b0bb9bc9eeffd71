"""Who takes part in a run: asked at its start, and again for those that come late.

A merchant helps to unmask sums with members of the list that it pinned, and with nobody else. So
of merchants that pinned different versions of the list those are taken that all know each other.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from common.contract import Contract
from common.errors import RunError, WireError
from common.wire import Attest, Attested, pack, unpack
from server.cohort import Cohort

_PAUSE_S = 1.0  # between two looks for merchants
OnMessage = Callable[[str], object]


@dataclass(frozen=True)
class Enrolled:
    """What is known of enrolled merchants beside their keys.

    Attributes:
        added: Merchant -> version of the list of members that it came with.
        nodes: Flower's node -> merchant that registered it.
    """

    added: Mapping[str, int] = field(default_factory=dict)
    nodes: Mapping[int, str] = field(default_factory=dict)


@dataclass
class Attendance:
    """Asks nodes whether they take part.

    Attributes:
        cohort: Gets the members, refusals and failures.
        contract: Of the run.
        run: The run's name.
        enrolled: What the registry knows; empty in simulations.
        exchanged: Merchants whose ledger was seen under another key, without a rotation.
        repeatable: Some merchant's noise was seeded.
    """

    cohort: Cohort
    contract: Contract
    run: str
    enrolled: Enrolled
    exchanged: frozenset[str] = frozenset()
    repeatable: bool = False
    asked: set[int] = field(default_factory=set)  # nodes that answered, either way
    pinned: dict[str, int] = field(default_factory=dict)  # merchant -> version of its list

    def gather(self, wait_s: float, on_message: OnMessage) -> None:
        """Wait for merchants; keep those that take part.

        Raises:
            RunError: Too few take part when the time is up; says who is missing and why.
        """
        end = time.monotonic() + wait_s
        self._attest()
        while not self._complete() and time.monotonic() < end:
            on_message(self._waits_for(end - time.monotonic()))
            time.sleep(_PAUSE_S)
            self._attest()
        self._keep_acquainted()
        members, needed = self.cohort.members, self.contract.min_survivors
        if len(members) < needed:
            waited = f" after {wait_s:g} s" if wait_s else ""
            raise RunError(
                f"{len(members)} of {len(self.cohort.connected())} merchants take part{waited}, "
                f"the contract needs {needed} (aggregation.min_survivors){self.cohort.reasons()}"
            )

    def late(self) -> list[str]:
        """Take in merchants that came since the last look; return their names."""
        before = {*self.cohort.members.values()}
        self._attest()
        taken = {*before}
        for name in sorted({*self.cohort.members.values()} - before):
            if self._knows_everybody(name, taken):
                taken.add(name)
            else:
                self._leave_out(name)
        return sorted({*self.cohort.members.values()} - before)

    def states(self) -> dict[str, tuple[str, str]]:
        """Return merchant -> what it does in the run, and what went wrong with it last."""
        cohort, nodes = self.cohort, self.enrolled.nodes
        named = {
            (nodes.get(int(who[5:]), who) if who.startswith("node ") else who): what
            for who, what in cohort.failures.items()
        }
        taking_part = {*cohort.members.values()}
        known = {*taking_part, *cohort.refusals, *(named.keys() & cohort.enrolled.keys.keys())}
        return {
            name: (
                "takes part" if name in taking_part
                else "refused" if name in cohort.refusals
                else "is out",
                cohort.refusals.get(name, named.get(name, "")),
            )
            for name in sorted(known)
        }  # fmt: skip

    def _complete(self) -> bool:
        """Tell whether everybody that the contract counts on has spoken."""
        spoke = len(self.cohort.members) + len(self.cohort.refusals)
        return (
            spoke >= self.contract.federation.min_merchants
            and len(self.cohort.members) >= self.contract.min_survivors
        )

    def _waits_for(self, left_s: float) -> str:
        here, wanted = len(self.cohort.members), self.contract.federation.min_merchants
        more = max(wanted - here, 1)
        return (
            f"waits for {more} more merchant{'s' if more > 1 else ''} ({here} of {wanted} are "
            f"here; at most {max(left_s, 0):.0f} s more){self.cohort.reasons()}"
        )

    def _attest(self) -> None:
        """Ask all nodes that did not answer yet."""
        cohort = self.cohort
        nodes = sorted(cohort.connected() - self.asked)
        if not nodes:
            return
        content = pack(Attest(self.run, self.contract.sha256))
        refusals: dict[int, Attested] = {}
        for node, record in cohort.ask("query.attest", dict.fromkeys(nodes, content)).items():
            try:
                answer = unpack(Attested, record)
            except WireError as error:
                cohort.failures[f"node {node}"] = str(error)
                continue
            self.asked.add(node)
            cohort.failures.pop(f"node {node}", None)
            problem = self._problem(node, answer)
            if problem:
                cohort.failures[f"node {node}"] = problem
            elif answer.refusal:
                refusals[node] = answer
            else:
                self._take(node, answer)
        self._note_refusals(refusals)

    def _problem(self, node: int, answer: Attested) -> str:
        """Return why an answer cannot stand, whatever it says; empty if it can."""
        if self.enrolled.nodes and self.enrolled.nodes.get(node) != answer.merchant:
            return f"called itself '{answer.merchant}', which did not register this node"
        if answer.refusal:
            return ""
        if answer.merchant in self.exchanged:
            return (
                f"'{answer.merchant}' was seen with a ledger of another key: what it spent would "
                "be forgotten; a key is changed with hansa merchant rotate --identity"
            )
        if answer.merchant in self.cohort.members.values():
            return f"a second node called itself '{answer.merchant}'; it was left out"
        if len(self.cohort.members) == self.contract.max_merchants:
            return (
                f"the contract has room for {self.contract.max_merchants} merchants; it was left "
                "out"
            )
        return ""

    def _take(self, node: int, answer: Attested) -> None:
        self.cohort.members[node] = answer.merchant
        self.cohort.refusals.pop(answer.merchant, None)
        self.pinned[answer.merchant] = answer.members
        self.repeatable |= answer.repeatable

    def _note_refusals(self, refusals: dict[int, Attested]) -> None:
        """Keep the reasons; a refusal in the name of one that takes part is its node's own."""
        for node, answer in refusals.items():
            if answer.merchant in self.cohort.members.values():
                self.cohort.failures[f"node {node}"] = (
                    f"refused in the name of '{answer.merchant}', which takes part"
                )
            else:
                self.cohort.refusals[answer.merchant] = answer.refusal

    def _keep_acquainted(self) -> None:
        """Go on with the most merchants that all pinned each other."""
        names = {*self.cohort.members.values()}
        known = acquainted({name: self.pinned.get(name, 0) for name in names}, self.enrolled.added)
        for name in sorted(names - known):
            self._leave_out(name)

    def _knows_everybody(self, name: str, others: set[str]) -> bool:
        group = {*others, name}
        pinned = {one: self.pinned.get(one, 0) for one in group}
        return acquainted(pinned, self.enrolled.added) == group

    def _leave_out(self, name: str) -> None:
        node = next(node for node, other in self.cohort.members.items() if other == name)
        del self.cohort.members[node]
        self.cohort.failures[name] = (
            "is left out of this run: not all merchants pinned the same members; they can with "
            "`hansa merchant members --accept`"
        )


def acquainted(pinned: Mapping[str, int], added: Mapping[str, int]) -> set[str]:
    """Return the most merchants of which everybody pinned everybody.

    Lists only grow from version to version, so a group knows itself if nobody in it was added
    after the oldest list that somebody in it pinned.

    Args:
        pinned: Merchant -> version of the list that it pinned.
        added: Merchant -> version of the list that it came with; 0 where it is not said.

    >>> sorted(acquainted({"a": 2, "b": 3, "c": 3}, {"a": 1, "b": 2, "c": 3}))
    ['b', 'c']
    >>> sorted(acquainted({"a": 2, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3}))
    ['a', 'b']
    """
    best: set[str] = set()
    for oldest in sorted({*pinned.values()}):
        group = {
            name
            for name, version in pinned.items()
            if version >= oldest and added.get(name, 0) <= oldest
        }
        if len(group) >= len(best):
            best = group
    return best
