"""Plain sums: the coordinator sees each merchant's single noisy vector and adds them up."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from common.errors import SecureSumError
from common.fixed_point import Lattice
from common.wire import Advertise, Advertised, SumRequest, pack
from server.asking import MESSAGE_TYPES, RENEWAL_STEPS, LatticeSum, Run, answers, usable


class PlainSums:
    """Asks for vectors and adds them up; the coordinator sees each of them."""

    def __init__(self, run: Run) -> None:
        self._cohort = run.cohort
        self._contract = run.contract
        self._run = run.name
        self._look_for_late = run.look_for_late
        self._reserved: set[int] = set()  # nodes whose ledgers were countersigned
        self._asked = 0

    @property
    def state(self) -> dict[str, Any]:
        """Return what a later process needs to go on with the next sum."""
        return {"reserved": sorted(self._reserved), "asked": self._asked}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._reserved, self._asked = {*state["reserved"]}, int(state["asked"])

    def ask(self, request: SumRequest, length: int, lattice: Lattice) -> LatticeSum | None:
        """Return the sum; None where too few merchants answered.

        Raises:
            SecureSumError: Nobody could be asked; nothing is spent.
        """
        if self._asked % RENEWAL_STEPS == 0 or len(self._ready) < self._contract.min_survivors:
            if self._asked:
                self._look_for_late()
            self._reserve()
        if len(self._ready) < self._contract.min_survivors:
            raise SecureSumError("too few merchants reserved what the run costs; nobody was asked")
        self._asked += 1
        contents = {
            node: pack(replace(request, countersigned=self._cohort.countersigned(node)))
            for node in self._ready
        }
        records = self._cohort.ask(MESSAGE_TYPES[request.stage], contents)
        vectors = {
            self._cohort.members[node]: answer.vector
            for node, answer in answers(self._cohort, records, length, lattice).items()
        }
        if len(vectors) < self._contract.min_survivors:
            return None
        parts = {merchant: lattice.from_ring(vector) for merchant, vector in vectors.items()}
        total = np.sum(list(vectors.values()), axis=0, dtype=lattice.dtype)
        return LatticeSum(lattice.from_ring(total), tuple(parts), len(parts), parts)

    @property
    def _ready(self) -> list[int]:
        """Nodes that take part and may be asked."""
        return sorted(self._reserved & self._cohort.members.keys())

    def _reserve(self) -> None:
        """Let merchants that did not yet reserve what the run costs, and see their ledgers."""
        contents = {
            node: pack(Advertise(self._run, self._contract.sha256, 0, self._cohort.renewed(node)))
            for node in sorted(self._cohort.members.keys() - self._reserved)
        }
        for node, _ in usable(self._cohort, "query.advertise", contents, Advertised):
            self._reserved.add(node)
