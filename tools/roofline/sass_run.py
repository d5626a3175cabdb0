"""Runs the SASS of a kernel for one thread, as far as parameters decide its control flow, and times a single warp.

Loops and branches of the kernels depend on the parameters alone, so each is taken as often as on a GPU. A branch on an
unknown value, such as a float, takes the side that calls no subroutine, else the next instruction. An instruction under
a false predicate is issued and counted.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..kernels.cuda_code import Instruction
from .sass_operations import PREDICATE, Thread, operands_of, operation, split, width_of

# Offset of a kernel's parameters in constant bank 0, by architecture / 10.
PARAMETERS_AT = {8: 0x160, 9: 0x210, 10: 0x380, 12: 0x380}
MOST_INSTRUCTIONS = 4_000_000
# Cycles from an instruction to the use of its result.
ARITHMETIC_CYCLES, ON_CHIP_CYCLES, MEMORY_CYCLES = 5, 25, 600
_FROM_MEMORY = re.compile(r"LDG|LD$|ATOM")
_ON_CHIP = re.compile(r"LDS|LDC|ULDC|SHFL|MUFU|F2I|I2F|F2F|D[A-Z]+|S2R|S2UR|R2UR")


class Program:
    """The code of a kernel."""

    def __init__(self, code: Sequence[Instruction], architecture: int) -> None:
        self.code = code
        self._at = {i.address: k for k, i in enumerate(code)}
        self._operations = [None if i.name in ("BRA", "CALL", "RET", "EXIT") else operation(i) for i in code]
        self._targets = [self._target(i) for i in code]
        self._parameters_at = PARAMETERS_AT[architecture // 10]
        self.undecided: set[int] = set()  # addresses of branches that neither values nor a call decides

    def _target(self, i: Instruction) -> int | None:
        addresses = re.findall(r"0x([0-9a-f]+)", i.operands)
        return self._at.get(int(addresses[-1], 16)) if i.name in ("BRA", "CALL") and addresses else None

    def run(self, parameters: bytes, thread: int = 0, block: int = 0) -> list[int]:
        """The trace of a thread: indices into the code, ~index where the predicate is false."""
        state = Thread(parameters, self._parameters_at, {"SR_TID.X": thread, "SR_CTAID.X": block})
        trace: list[int] = []
        index = 0
        while len(trace) < MOST_INSTRUCTIONS:
            trace.append(index)
            run = self._operations[index]
            if run is not None:
                if not run(state):
                    trace[-1] = ~index
                index += 1
                continue
            i = self.code[index]
            taken = self._is_taken(state, index)
            if not taken:
                index += 1
            elif i.name == "EXIT":
                return trace
            elif i.name == "RET":
                address = state.registers.get(operands_of(i)[0].split()[0])
                if address is None:
                    raise RuntimeError(f"the return at {i.address:#x} leads to an unknown address")
                index = self._at[address]
            else:
                target = self._targets[index]
                if target is None:
                    raise NotImplementedError(f"{i.opcode} {i.operands}")
                index = target
        raise RuntimeError(f"more than {MOST_INSTRUCTIONS} instructions: a loop whose end is not known")

    def _is_taken(self, state: Thread, index: int) -> bool:
        i = self.code[index]
        if ".DIV" in i.opcode:
            return False  # reconvergence
        conditions = [i.guard] if i.guard else []
        conditions += [word for word in operands_of(i)[:-1] if PREDICATE.match(word)] if i.name == "BRA" else []
        values = [state.predicate(word) for word in conditions]
        if False in values:
            return False
        if None not in values:
            return True
        target = self._targets[index]
        sides = self._calls(index + 1), target is not None and self._calls(target)
        if sides[0] == sides[1]:
            self.undecided.add(i.address)
        return sides == (True, False)

    def _calls(self, index: int) -> bool:
        """Whether a call comes before any branch."""
        for i in self.code[index:]:
            if i.name in ("CALL", "BRA", "RET", "EXIT"):
                return i.name == "CALL"
        return False


class Alone(NamedTuple):
    """A trace run by a warp alone on its scheduler: in order, one instruction a cycle."""

    cycles: int
    loaded_bytes: int  # peak of a thread's loads in flight from global memory


def alone(code: Sequence[Instruction], trace: Sequence[int], memory_cycles: int = MEMORY_CYCLES) -> Alone:
    """`memory_cycles`: from a load of global memory to its use."""
    ready: dict[str, int] = {}
    known = {step: _Timed.make(code[max(step, ~step)], memory_cycles, step >= 0) for step in set(trace)}
    now = -1
    last = 0
    in_flight: deque[tuple[int, int]] = deque()  # cycle of arrival, bytes
    most = loaded = 0
    for step in trace:
        timed = known[step]
        now = max([now + 1, *(ready[name] for name in timed.sources if name in ready)])
        last = max(last, now + timed.latency)
        for name in timed.results:
            ready[name] = now + timed.latency
        if timed.loaded_bytes:
            while in_flight and in_flight[0][0] <= now:
                loaded -= in_flight.popleft()[1]
            in_flight.append((now + timed.latency, timed.loaded_bytes))
            loaded += timed.loaded_bytes
            most = max(most, loaded)
    return Alone(last, most)


def indices(trace: Iterable[int]) -> Iterator[int]:
    """Indices into the code, predicated off or not."""
    return (max(step, ~step) for step in trace)


class _Timed(NamedTuple):
    sources: list[str]
    results: list[str]
    latency: int
    loaded_bytes: int

    @classmethod
    @functools.cache
    def make(cls, i: Instruction, memory_cycles: int, runs: bool) -> _Timed:
        if not runs:
            return cls(_names(i.guard, 1), [], 0, 0)
        from_memory = _FROM_MEMORY.match(i.name) is not None
        latency = memory_cycles if from_memory else ON_CHIP_CYCLES if _ON_CHIP.match(i.name) else ARITHMETIC_CYCLES
        # A load of one bfloat16 element has fewer than 32 bits.
        return cls(_sources(i), _results(i), latency, i.bits // 8 if i.name == "LDG" else 0)


def _names(word: str, width: int) -> list[str]:
    found = []
    for kind, number in re.findall(r"(U?R|U?P)(\d+)", word):
        count = width if kind in ("R", "UR") else 1
        found += [f"{kind}{int(number) + k}" for k in range(count)]
    return found


def _sources(i: Instruction) -> list[str]:
    s = split(i)
    wide = i.name.startswith("D") or "WIDE" in i.opcode
    found = [name for word in s.ins for name in _names(word, 1)]
    found += _names(i.guard, 1)
    for k, word in enumerate(s.sources):
        is_address = "[" in word and i.name != "LDC"
        stored = max(1, i.bits // 32) if i.name.startswith("ST") else 1
        found += _names(word, 2 if is_address or (wide and (i.name[0] == "D" or k == 2)) else stored)
    return found


def _results(i: Instruction) -> list[str]:
    s = split(i)
    return [*_names(s.result, width_of(i)), *(name for word in s.outs for name in _names(word, 1))]
