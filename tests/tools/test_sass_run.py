"""A thread takes the way through SASS that its parameters say, and waits where it must."""

from __future__ import annotations

import struct

import pytest
from sass import sass

from tools.roofline.sass_operations import Thread, float_of, operation
from tools.roofline.sass_run import ARITHMETIC_CYCLES, Program, alone, places

# For sm_90: as many rounds as the first parameter says, in each a load if the second is not null.
LOOP = """
    ULDC.64 UR4, c[0x0][0x210]
    LDC.64 R2, c[0x0][0x218]
    MOV R0, RZ
    ISETP.NE.U32.AND P0, PT, R2, RZ, PT
    ISETP.NE.AND.EX P0, PT, R3, RZ, PT, P0
    @P0 LDG.E.64 R4, desc[UR6][R2.64]
    VIADD R0, R0, 0x1
    ISETP.GE.AND P1, PT, R0, UR4, PT
    @!P1 BRA 0x50
    EXIT
"""


def after(code: str, parameters: bytes = b"", **special: int) -> Thread:
    """The thread that has done these instructions, which lead one to the next."""
    thread = Thread(parameters, 0, {f"SR_{name}": value for name, value in special.items()})
    for instruction in sass(code):
        operation(instruction)(thread)
    return thread


@pytest.mark.parametrize(("rounds", "pointer"), [(1, 0), (3, 1 << 40), (20, 0)])
def test_loops_and_null_pointers(rounds, pointer):
    program = Program(sass(LOOP), 90)
    way = program.run(struct.pack("<qQ", rounds, pointer))
    assert list(places(way)) == [*range(5), *list(range(5, 9)) * rounds, 9]
    assert [step >= 0 for step in way if max(step, ~step) == 5] == [pointer != 0] * rounds


def test_a_call_that_floats_decide_is_not_made():
    code = sass("""
        MUFU.RCP R0, R1
        FCHK P0, R0, R1
        @!P0 BRA 0x50
        CALL.REL.NOINC 0x60
        NOP
        EXIT
        RET.REL.NODEC R2 0x0
    """)
    program = Program(code, 90)
    assert program.run(b"") == [0, 1, 2, 5]
    assert not program.undecided


def test_other_branches_that_floats_decide_are_told():
    program = Program(sass("FSETP.GT.AND P0, PT, R0, R1, PT\n@P0 BRA 0x30\nFADD R0, R0, R1\nEXIT"), 90)
    assert program.run(b"") == [0, 1, 2, 3]
    assert program.undecided == {0x10}


def test_a_call_that_integers_decide_returns():
    program = Program(sass("MOV R2, 0x30\nMOV R3, 0x0\nCALL.REL.NOINC 0x40\nEXIT\nNOP\nRET.REL.NODEC R2 0x0"), 90)
    assert program.run(b"") == [0, 1, 2, 4, 5, 3]


DIVISION = """
    LDC R5, c[0x0][0x0]
    ULDC UR6, c[0x0][0x4]
    I2F.U32.RP R4, UR6
    ISETP.NE.U32.AND P1, PT, RZ, UR6, PT
    MUFU.RCP R4, R4
    VIADD R2, R4, 0xffffffe
    F2I.FTZ.U32.TRUNC.NTZ R3, R2
    HFMA2.MMA R2, -RZ, RZ, 0, 0
    IMAD.MOV R13, RZ, RZ, -R3
    IMAD R13, R13, UR6, RZ
    IMAD.HI.U32 R10, R3, R13, R2
    IMAD.HI.U32 R10, R10, R5, RZ
    IMAD.MOV R11, RZ, RZ, -R10
    IMAD R11, R11, UR6, R5
    ISETP.GE.U32.AND P0, PT, R11, UR6, PT
    @P0 VIADD R11, R11, -UR6
    @P0 VIADD R10, R10, 0x1
    ISETP.GE.U32.AND P0, PT, R11, UR6, PT
    @P0 VIADD R10, R10, 0x1
    @!P1 LOP3.LUT R10, RZ, UR6, RZ, 0x33, !PT
"""


@pytest.mark.parametrize(("number", "by"), [(1000, 7), (2**32 - 1, 3), (5, 9), (123456789, 1024), (2**31, 1)])
def test_division_as_the_compiler_writes_it(number, by):
    assert after(DIVISION, struct.pack("<II", number, by)).registers["R10"] == number // by


@pytest.mark.parametrize(("a", "b"), [(5, 7), (2**32, 1), (2**40 + 3, 2**33 + 9), (7, 7), (0, 0)])
def test_64_bits(a, b):
    thread = after(
        """
        LDC.64 R2, c[0x0][0x0]
        ULDC.64 UR4, c[0x0][0x8]
        IADD3 R6, P0, R2, -UR4, RZ
        IADD3.X R7, R3, ~UR5, RZ, P0, !PT
        ISETP.GE.U32.AND P1, PT, R2, UR4, PT
        ISETP.GE.AND.EX P1, PT, R3, UR5, PT, P1
        IMAD.WIDE.U32 R8, R2, UR4, R6
        SHF.L.U64.HI R11, R2, 0x2, R3
        LEA.HI.X R12, R2, UR5, R3, 0x2, !PT
        SEL R13, R2, RZ, P1
        """,
        struct.pack("<QQ", a, b),
    )
    found = thread.registers
    difference = (a - b) % 2**64
    assert found["R6"] | found["R7"] << 32 == difference
    assert thread.predicates["P1"] == (a >= b)
    assert found["R8"] | found["R9"] << 32 == ((a % 2**32) * (b % 2**32) + difference) % 2**64
    assert found["R11"] == (a << 2 >> 32) % 2**32
    assert found["R12"] == ((a << 2 >> 32) + (b >> 32)) % 2**32
    assert found["R13"] == (a % 2**32 if a >= b else 0)


def test_predicates_in_a_register_and_logic():
    thread = after("""
        S2R R0, SR_TID.X
        ISETP.GT.AND P2, PT, R0, 0x3, PT
        LOP3.LUT P3, R1, R0, 0x6, RZ, 0xc0, !PT
        PLOP3.LUT P4, PT, P2, P3, PT, 0x80, 0x0
        MOV R10, 0x21
        P2R R5, PR, R10, 0x1c
        LOP3.LUT R5, R5, 0x100, RZ, 0xfc, !PT
        ISETP.EQ.AND P2, PT, RZ, RZ, !PT
        R2P PR, R5, 0x4
        LOP3.LUT R6, R9, RZ, RZ, 0xc0, !PT
        SHF.R.S32.HI R7, RZ, 0x1f, R0
        PRMT R8, R5, 0x9910, RZ
    """, **{"TID.X": 5})  # fmt: skip
    assert thread.predicates == {"P2": True, "P3": True, "P4": True}
    assert [thread.registers[f"R{k}"] for k in (1, 5, 6, 7, 8)] == [4, 0x13D, 0, 0, 0x13D]


def test_integers_become_floats_that_are_not_less():
    for number, expected in ((7, 7.0), (2**24 + 1, 2.0**24 + 2), (2**32 - 1, 2.0**32)):
        assert (
            float_of(after("LDC R1, c[0x0][0x0]\nI2F.U32.RP R0, R1", struct.pack("<I", number)).registers["R0"])
            == expected
        )


def test_what_memory_holds_is_not_known():
    thread = after("LDG.E.64 R2, [R4.64]\nIADD3 R6, R2, 0x1, RZ\nISETP.LT.AND P0, PT, R3, R6, PT\nSEL R8, RZ, 0x0, P0")
    assert (thread.registers["R6"], thread.predicates["P0"], thread.registers["R8"]) == (None, None, 0)


def cycles(code: str, memory: int = 600, steps: tuple[int, ...] = ()) -> tuple[int, int]:
    instructions = sass(code)
    return alone(instructions, steps or range(len(instructions)), memory)


def test_a_chain_waits_and_loads_overlap():
    assert cycles("FADD R0, R1, R2\nFADD R3, R0, R0\nFADD R4, R3, R3")[0] == 3 * ARITHMETIC_CYCLES
    assert cycles("FADD R0, R1, R2\nFADD R3, R1, R1\nFADD R4, R1, R1")[0] == 2 + ARITHMETIC_CYCLES
    together = "LDG.E.128 R4, [R2.64]\nLDG.E.128 R8, [R2.64]\nFADD R0, R4, R8"
    in_turn = "LDG.E.128 R4, [R2.64]\nFADD R0, R7, R7\nLDG.E.128 R8, [R2.64]\nFADD R0, R8, R0"
    assert cycles(together) == (1 + 600 + ARITHMETIC_CYCLES, 32)
    assert cycles(in_turn) == (1 + 2 * 600 + ARITHMETIC_CYCLES, 16)
    assert cycles(together, memory=100)[0] == 1 + 100 + ARITHMETIC_CYCLES


def test_a_load_under_a_false_predicate_takes_no_time():
    assert cycles("@P0 LDG.E R4, [R2.64]\nFADD R0, R4, R4", steps=(~0, 1)) == (1 + ARITHMETIC_CYCLES, 0)
