"""How the coordinator gets one sum over the cohort without seeing its parts.

Masked or plain, the same answers give the same multiples of the lattice step.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import UInt

from common.chain import Head
from common.contract import MAX_COHORT
from common.errors import SecureSumError, WireError
from common.fixed_point import Lattice
from common.session import Advert, occasion_hash, session_context
from common.wire import (
    Advertise,
    Advertised,
    Confirm,
    Confirmed,
    Record,
    Reveal,
    Revealed,
    Share,
    Shared,
    SumRequest,
    pack,
)
from server.archive import RunRecord
from server.asking import (
    MESSAGE_TYPES,
    RENEWAL_STEPS,
    Answer,
    LatticeSum,
    Run,
    answers,
    usable,
)
from server.secure_sum import CoordinatorSession, groups


@dataclass
class _Group:
    """Merchants that are summed together, and their session."""

    number: int
    session: CoordinatorSession
    nodes: list[int]  # in the order of the roster
    steps: int = 0

    def at(self, positions: Iterable[int]) -> list[int]:
        """Return the nodes at some positions."""
        return [self.nodes[position] for position in positions]


class SecureSums:
    """Asks for masked vectors; the coordinator sees their sum over a group, and nothing else."""

    def __init__(self, run: Run, record: RunRecord) -> None:
        self._cohort = run.cohort
        self._contract = run.contract
        self._run = run.name
        self._look_for_late = run.look_for_late
        self._on_change = run.on_change
        self._record = record
        self._sessions = 0
        self._groups: list[_Group] = []
        self._taken_up = False  # members may have confirmed other survivors to another process
        self._left_over: set[str] = set()  # merchants that no group has room for
        self._liars: set[str] = set()  # merchants that a third of their group or more accuse

    @property
    def state(self) -> dict[str, Any]:
        """Return what a later process needs to go on with the next sum."""
        return {
            "sessions": self._sessions,
            "groups": [
                {"number": g.number, "steps": g.steps, "nodes": g.nodes, **g.session.state}
                for g in self._groups
            ],
            "left_over": sorted(self._left_over),
            "liars": sorted(self._liars),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        enrolled, minimum = self._cohort.enrolled, self._contract.min_survivors
        self._sessions, self._taken_up = int(state["sessions"]), True
        self._left_over, self._liars = {*state["left_over"]}, {*state["liars"]}
        self._groups = [
            _Group(
                int(group["number"]),
                CoordinatorSession.restored(group, enrolled, minimum),
                [*group["nodes"]],
                int(group["steps"]),
            )
            for group in state["groups"]
        ]

    def ask(self, request: SumRequest, length: int, lattice: Lattice) -> LatticeSum | None:
        """Return the sum over all groups that could be unmasked; None where there is none.

        Raises:
            SecureSumError: Nobody could be asked; nothing is spent.
        """
        steps = min((group.steps for group in self._groups), default=0)
        if steps and steps % RENEWAL_STEPS == 0:
            self._look_for_late()
        if self._stale():
            self._set_up()
            self._on_change()
        occasion = occasion_hash(
            request.stage,
            request.round,
            request.attempt,
            request.customers_per_merchant,
            request.parameters,
        )
        under_way = [
            group for group in self._groups if self._begun(group, occasion, length, lattice)
        ]
        if not under_way:
            raise SecureSumError("too few merchants are in a session; nobody was asked")
        self._collect(under_way, request, length, lattice)
        under_way = self._confirm(under_way)
        found = self._unmasked(self._reveal(under_way), lattice)
        if found is None and self._taken_up:
            self._groups = []
        self._taken_up = False
        return found

    def _stale(self) -> bool:
        """Tell whether sessions are missing, too small, or without members that came back."""
        if not self._groups:
            return True
        if any(len(group.session.ready) < group.session.needed for group in self._groups):
            return True
        ready = {
            group.session.roster.adverts[position].merchant
            for group in self._groups
            for position in group.session.ready
        }
        missing = self._present().keys() - ready - self._left_over
        return bool(missing) and min(group.steps for group in self._groups) >= RENEWAL_STEPS

    def _set_up(self) -> None:
        """Set up a session for every group of merchants that are there."""
        nodes = self._present()
        divided = groups(nodes, MAX_COHORT, self._contract.min_survivors)
        self._groups = []
        for names in divided:
            self._sessions += 1
            group = self._advertised(self._sessions, [nodes[name] for name in names])
            if group is not None:
                self._groups.append(group)
        self._left_over = nodes.keys() - {name for names in divided for name in names}
        for name in self._left_over:
            self._cohort.failures[name] = "left over when merchants were divided into groups"

    def _present(self) -> dict[str, int]:
        """Return merchant -> node of all that can be reached and were not found to lie."""
        connected = self._cohort.connected()
        return {
            merchant: node
            for node, merchant in self._cohort.members.items()
            if merchant not in self._liars and node in connected
        }

    def _put_out_liars(self, group: _Group) -> None:
        """Go on without a member that a third of its group or more accuse: not all of them lie."""
        names = {advert.merchant for advert in group.session.roster.adverts}
        for name in names & self._cohort.accusers.keys():
            if len(self._cohort.accusers[name] & names) > (len(names) - 1) // 3:
                self._liars.add(name)
                group.session.put_out(name)

    def _advertised(self, number: int, nodes: list[int]) -> _Group | None:
        """Collect keys, show them to everybody, and collect the first shares."""
        run, sha256, cohort = self._run, self._contract.sha256, self._cohort
        context = session_context(run, number, sha256)
        session = CoordinatorSession(context, cohort.enrolled, self._contract.min_survivors)
        joined: dict[str, int] = {}

        def advertised(node: int, answer: Advertised) -> None:
            if Advert.from_bytes(answer.advert).head != Head.from_bytes(answer.head).link:
                raise WireError("field 'advert': is bound to another head than the ledger's")
            name = session.take_advert(answer.advert, cohort.members[node])
            joined[name] = node

        contents = {
            node: pack(Advertise(run, sha256, number, cohort.renewed(node))) for node in nodes
        }
        self._stage("query.advertise", contents, Advertised, advertised)
        try:
            roster = session.close_roster()
        except SecureSumError as error:
            cohort.failures[f"session {number}"] = str(error)
            return None
        self._record.session(number, context, roster)
        order = [joined[name] for name in sorted(joined)]
        positions = {node: position for position, node in enumerate(order)}
        contents = {
            node: pack(Share(run, sha256, number, cohort.countersigned(node), roster))
            for node in order
        }
        self._stage(
            "query.share",
            contents,
            Shared,
            lambda node, answer: session.take_escrow(positions[node], answer.escrow),
        )
        return _Group(number, session, order)

    def _begun(self, group: _Group, occasion: bytes, length: int, lattice: Lattice) -> bool:
        try:
            group.session.begin(occasion, length, lattice.dtype)
        except SecureSumError as error:
            self._note(group, error)
            return False
        group.steps += 1
        return True

    def _collect(
        self, under_way: list[_Group], request: SumRequest, length: int, lattice: Lattice
    ) -> None:
        """Ask all active members of all groups for masked vectors and add them up."""
        places = self._places(under_way)
        contents = {}
        for node, (group, position) in places.items():
            active, boxes = group.session.request(position)
            contents[node] = pack(
                replace(
                    request,
                    session=group.number,
                    step=group.session.step,
                    active=active,
                    boxes=boxes,
                    countersigned=self._cohort.countersigned(node),
                )
            )
        records = self._cohort.ask(MESSAGE_TYPES[request.stage], contents)
        for node, answer in answers(self._cohort, records, length, lattice).items():
            group, position = places[node]
            try:
                group.session.take_masked(position, answer.vector, answer.escrow)
            except WireError as error:
                self._cohort.failures[self._cohort.name(node)] = str(error)
        for group in under_way:
            self._put_out_liars(group)

    def _confirm(self, under_way: list[_Group]) -> list[_Group]:
        """Let survivors vouch for the set of survivors; return the groups that go on."""
        contents, going = {}, []
        for group in under_way:
            try:
                content = pack(Confirm(group.number, group.session.step, group.session.close_sum()))
            except SecureSumError as error:
                self._note(group, error)
                continue
            going.append(group)
            contents.update(dict.fromkeys(group.at(group.session.survivors), content))
        places = self._places(going)

        def confirmed(node: int, answer: Confirmed) -> None:
            group, position = places[node]
            group.session.take_confirmations(position, answer.confirmations)

        self._stage("query.confirm", contents, Confirmed, confirmed)
        return going

    def _reveal(self, under_way: list[_Group]) -> list[_Group]:
        """Hand round the confirmations and collect shares; return the groups that go on."""
        asked: dict[int, tuple[_Group, int]] = {}
        going = []
        for group in under_way:
            try:
                confirmed = group.session.confirmed
            except SecureSumError as error:
                self._note(group, error)
                continue
            going.append(group)
            asked |= {group.nodes[position]: (group, position) for position in confirmed}
        places = dict(asked)

        def revealed(node: int, answer: Revealed) -> None:
            group, position = places[node]
            group.session.take_shares(position, answer.shares)

        wrong: dict[int, set[str]] = {node: set() for node in asked}
        for node, known in wrong.items():
            self._accuses(node, known)
        while asked:  # who finds a confirmation wrong is asked again without it
            contents = {
                node: pack(
                    Reveal(
                        group.number,
                        group.session.step,
                        *group.session.confirmations_for(position, wrong[node]),
                    )
                )
                for node, (group, position) in asked.items()
            }
            self._stage("query.reveal", contents, Revealed, revealed)
            asked = {node: asked[node] for node in asked if self._accuses(node, wrong[node])}
        for group in going:
            self._put_out_liars(group)
        return going

    def _accuses(self, node: int, known: set[str]) -> bool:
        """Tell whether a merchant accuses a member that it did not accuse before; note whom.

        It is heard as long as it accuses no more than the third that may lie.
        """
        name, members = self._cohort.name(node), set(self._cohort.members.values())
        accusers = self._cohort.accusers
        new = {liar for liar in accusers.keys() & members if name in accusers[liar]} - known
        known |= new
        return bool(new) and len(known) <= (len(members) - 1) // 3

    def _note_conflicts(self, group: _Group) -> None:
        """Count two members that left different keys of their pair as accusing each other."""
        adverts = group.session.roster.adverts
        for one, other in group.session.conflicts:
            names = adverts[one].merchant, adverts[other].merchant
            self._cohort.accusers.setdefault(names[0], set()).add(names[1])
            self._cohort.accusers.setdefault(names[1], set()).add(names[0])
        group.session.conflicts.clear()
        self._put_out_liars(group)

    def _unmasked(self, under_way: list[_Group], lattice: Lattice) -> LatticeSum | None:
        totals: list[UInt[np.ndarray, " P"]] = []
        counts: list[int] = []
        merchants: list[str] = []
        for group in under_way:
            survivors = group.session.survivors
            counts.append(len(survivors))  # of a group that fails, too: its members counted on it
            try:
                totals.append(group.session.total())
            except SecureSumError as error:
                self._note(group, error)
                continue
            finally:
                self._cohort.failures.update(group.session.blamed)
                self._note_conflicts(group)
            merchants += [group.session.roster.adverts[i].merchant for i in survivors]
        if not totals:
            return None
        total = np.zeros_like(lattice.from_ring(totals[0]))
        for part in totals:
            total += lattice.from_ring(part)
        return LatticeSum(total, tuple(sorted(merchants)), min(counts))

    def _places(self, under_way: list[_Group]) -> dict[int, tuple[_Group, int]]:
        """Return node -> (group, position) of all active members."""
        return {
            group.nodes[position]: (group, position)
            for group in under_way
            for position in group.session.active
        }

    def _stage(
        self,
        message_type: str,
        contents: dict[int, Record],
        kind: type[Answer],
        take: Callable[[int, Answer], None],
    ) -> None:
        """Ask, and hand over each usable answer; note what is wrong with the others."""
        for node, answer in usable(self._cohort, message_type, contents, kind):
            try:
                take(node, answer)
            except WireError as error:
                self._cohort.failures[self._cohort.name(node)] = str(error)

    def _note(self, group: _Group, error: SecureSumError) -> None:
        self._cohort.failures[f"secure sum {group.number}.{group.steps}"] = str(error)
