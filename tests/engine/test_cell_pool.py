"""The pool's count of cells against a brute-force model: sets of cells held by each sequence."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stockpot.engine.cell_pool import CellPool

SEQUENCES = st.integers(0, 5)


class PoolMachine(RuleBasedStateMachine):
    """Random growth, sharing and release."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = CellPool(64)
        self.cells: dict[int, list[int]] = {}
        self.names = count()

    @property
    def used(self) -> int:
        return len({cell for cells in self.cells.values() for cell in cells})

    @rule(sequence=SEQUENCES, tokens=st.integers(1, 20))
    def extend(self, sequence: int, tokens: int) -> None:
        if tokens > 64 - self.used:
            with pytest.raises(ValueError, match="free"):
                self.pool.extend(sequence, tokens)
            return
        self.pool.extend(sequence, tokens)
        self.cells.setdefault(sequence, []).extend(next(self.names) for _ in range(tokens))

    @rule(source=SEQUENCES, to=SEQUENCES, tokens=st.integers(1, 30))
    def share(self, source: int, to: int, tokens: int) -> None:
        if to in self.cells or tokens > len(self.cells.get(source, [])):
            with pytest.raises(ValueError, match=r"holds"):
                self.pool.share(source, to, tokens)
            return
        self.pool.share(source, to, tokens)
        self.cells[to] = self.cells[source][:tokens]

    @rule(sequence=SEQUENCES)
    def release(self, sequence: int) -> None:
        before = self.used
        self.cells.pop(sequence, None)
        assert self.pool.release(sequence) == before - self.used

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.used == self.used
        assert self.pool.free == 64 - self.used
        for sequence in range(6):
            assert self.pool.length(sequence) == len(self.cells.get(sequence, []))


TestPool = PoolMachine.TestCase
