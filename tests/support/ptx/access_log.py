"""Which warp touched which bytes, and whether another warp may have seen it: races.

Two accesses of different warps to the same bytes, one of them a write, are ordered by a barrier of
their program. Between programs, a write is ordered before a read if the writer released it (a
barrier, then an atomic with release) and the reader acquired it (then a barrier).

One instruction may store from several warps at one address, as Triton does where a layout repeats:
the memories refuse different values, and such stores overlap as a whole, so that PTX's memory model
says what a later read finds. To what follows, such a write is another warp's for each warp.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.support.ptx.fault import Fault
from tests.support.ptx.numbers import Array

NOBODY, SEVERAL = -1, -2


@dataclass
class Programs:
    """The order between the programs of a grid, as far as barriers and atomics make one.

    Args:
        count: programs of the grid.
        warps: of each program.
    """

    count: int
    warps: int
    # Barriers that each program has passed.
    epoch: Array = field(init=False)
    # Acquisitions that each program's barriers have made known to all of its warps.
    acquired: Array = field(init=False)
    # Program → for each program, its first epoch whose writes aren't visible to the first.
    _visible: dict[int, Array] = field(default_factory=dict)
    _pending: dict[int, Array] = field(default_factory=dict)
    # Address of an atomic → for each program, its first epoch that isn't released there.
    _released: dict[int, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.epoch = np.zeros(self.count, np.int64)
        self.acquired = np.zeros(self.count, np.int64)

    def pass_barrier(self, programs: Array) -> None:
        """Count a barrier for the programs, after which all warps see what one of them acquired."""
        self.epoch[programs] += 1
        if self._pending:
            for program in programs.tolist():
                if program in self._pending:
                    self._visible[program] = self._pending.pop(program)
                    self.acquired[program] += 1

    def release(self, program: int, address: int) -> None:
        """Let whoever acquires at the address see what the program wrote before its barrier."""
        visible = self._released.setdefault(address, np.zeros(self.count, np.int64))
        if program in self._visible:
            np.maximum(visible, self._visible[program], out=visible)
        visible[program] = self.epoch[program]

    def acquire(self, program: int, address: int) -> None:
        """Let the program see, from its next barrier on, what was released at the address."""
        released = self._released.get(address)
        if released is not None:
            known = self._pending.get(program, self._visible.get(program, 0))
            self._pending[program] = np.maximum(released, known)

    def sees(self, program: Array, writer: Array, epoch: Array) -> Array:
        """Return whether what each writer wrote in its epoch is visible to each program."""
        found = np.zeros(len(program), bool)
        for one in np.unique(program).tolist():
            if one in self._visible:
                mine = program == one
                found[mine] = self._visible[one][writer[mine]] > epoch[mine]
        return found


class AccessLog:
    """The last write and read of each cell of a memory.

    Args:
        cells: how many cells there are.
        programs: of the grid that accesses them.
    """

    def __init__(self, cells: int, programs: Programs):
        self._programs = programs
        self._writer = np.full(cells, NOBODY, np.int32)
        self._write_epoch = np.zeros(cells, np.int32)
        # The last write was one instruction's of several warps.
        self._by_several = np.zeros(cells, np.bool_)
        self._reader = np.full(cells, NOBODY, np.int32)
        self._read_program = np.full(cells, NOBODY, np.int32)
        self._read_epoch = np.zeros(cells, np.int32)
        self._read_acquired = np.zeros(cells, np.int32)
        # Copies by cp.async that haven't landed.
        self._copies = np.zeros(cells, np.int32)

    def read(self, cells: Array, warp: Array) -> None:
        """Note that warps (numbered through the grid) read cells; raise Fault if that races."""
        if self._copies[cells].any():
            raise Fault("race: a read of bytes that a cp.async may still write")
        writer, program = self._writer[cells], warp // self._programs.warps
        others = ((writer != warp) | self._by_several[cells]) & (writer != NOBODY)
        if others.any():
            epoch = self._write_epoch[cells]
            unordered = self._unordered(writer[others], epoch[others], program[others])
            if unordered.any():
                raise Fault("race: a read of what another warp wrote, without a barrier between")
        now = self._programs.epoch[program]
        earlier = (self._read_program[cells] == program) & (self._read_epoch[cells] != now)
        alone = (self._reader[cells] == NOBODY) | (self._reader[cells] == warp) | earlier
        readers = np.where(alone, warp, SEVERAL)
        from_one = alone | (self._read_program[cells] == program)
        self._read_program[cells] = np.where(from_one, program, SEVERAL)
        self._reader[cells] = readers
        # Of warps that read a cell by one instruction, the last is now noted.
        self._reader[cells[self._reader[cells] != readers]] = SEVERAL
        self._read_epoch[cells] = now
        self._read_acquired[cells] = self._programs.acquired[program]

    def write(self, cells: Array, warp: Array) -> None:
        """Note that warps write cells; raise Fault if that races."""
        self._check_write(cells, warp, copies=0)
        self._check_readers(cells, warp)
        self._set_writer(cells, warp)

    def begin_copy(self, cells: Array, warp: Array) -> None:
        """Note that warps begin a cp.async into cells; raise Fault if that races."""
        self._check_write(cells, warp, copies=0)
        self._check_readers(cells, warp)
        self._writer[cells] = NOBODY
        # Two threads that copy to one cell at once are noted as one, here and at the end.
        self._copies[cells] += 1

    def end_copy(self, cells: Array, warp: Array) -> None:
        """Note that the copies' bytes are there for the threads that copied them."""
        self._check_write(cells, warp, copies=1)
        self._copies[cells] -= 1
        self._set_writer(cells, warp)

    def _set_writer(self, cells: Array, warp: Array) -> None:
        self._writer[cells] = warp
        self._by_several[cells] = False
        # Of warps that write a cell by one instruction, the last is now noted.
        self._by_several[cells[self._writer[cells] != warp]] = True
        self._write_epoch[cells] = self._programs.epoch[warp // self._programs.warps]

    def _check_write(self, cells: Array, warp: Array, copies: int) -> None:
        if (self._copies[cells] > copies).any():
            raise Fault("race: a write of bytes that a cp.async may still write")
        writer, program = self._writer[cells], warp // self._programs.warps
        others = ((writer != warp) | self._by_several[cells]) & (writer != NOBODY)
        if others.any():
            epoch = self._write_epoch[cells][others]
            if self._unordered(writer[others], epoch, program[others]).any():
                raise Fault("race: a write of what another warp writes, without a barrier between")

    def _check_readers(self, cells: Array, warp: Array) -> None:
        reader, program = self._reader[cells], warp // self._programs.warps
        others = (reader != warp) & (reader != NOBODY)
        if not others.any():
            return
        reading = self._read_program[cells]
        here = (reading == program) & (self._read_epoch[cells] == self._programs.epoch[program])
        # Between programs: since a reader's last acquisition, the writer must have made another.
        acquired = self._programs.acquired[program]
        elsewhere = (reading != program) & (self._read_acquired[cells] >= acquired)
        if (others & (here | elsewhere)).any():
            raise Fault("race: a write of what another warp reads, without a barrier between")

    def _unordered(self, writer: Array, epoch: Array, program: Array) -> Array:
        writing = writer // self._programs.warps
        same = writing == program
        unordered = same & (epoch == self._programs.epoch[program])
        if not same.all():
            unordered |= ~same & ~self._programs.sees(program, writing, epoch)
        return unordered
