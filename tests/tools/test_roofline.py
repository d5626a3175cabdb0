"""The counts behind the roofline, which is a bar on a GPU: recorded launches, their bytes, and traces of their SASS."""

from __future__ import annotations

import struct

import pytest
from sass import sass

from asgl_cuda import backends
from tools.roofline import prediction, sections
from tools.roofline.prediction import kernel_of_launch, moved, parameters_of
from tools.roofline.recorded_calls import BLOCK, BY_NEURON, COMMON, ELEMENTS, OTHERS, RESIDUAL_BLOCK, Call, launches
from tools.roofline.roofline import STEPS
from tools.roofline.sass_run import Program, indices

BY_NAME = {call.name: call for call in (COMMON, BLOCK, *OTHERS)}


def kinds(call: Call, steps: int = 4, dtype: str = "float32") -> list[str]:
    return [kernel_of_launch(launch).kind for launch in launches(call, steps, dtype)]


def test_launches_of_calls():
    assert kinds(COMMON) == ["forward plain, T = 4", "backward plain, T = 4", "gradient sum"]
    assert kinds(COMMON, 16, "bfloat16")[1] == "backward plain, 4 neurons"
    assert kinds(BY_NEURON)[:2] == ["forward by neuron, T = 4", "backward by neuron, T = 4"]
    for block, kernels in ((BLOCK, prediction.NORMALISATION_KERNELS), (RESIDUAL_BLOCK, prediction.RESIDUAL_KERNELS)):
        passes = [kind.split(",")[0] for kind in kinds(block)]
        assert [name for name in passes if name in prediction.MOVED] == list(kernels)
    assert not [name for name in backends.BACKENDS if "predicted" in name]
    for steps in STEPS:
        shape = parameters_of(launches(BY_NAME["lif, batch first"], steps, "bfloat16")[0]).shape
        assert shape.outer > 1
        assert (shape.steps, shape.outer * shape.steps * shape.inner) == (steps, ELEMENTS)


@pytest.mark.parametrize(
    ("name", "steps", "dtype", "forward", "backward"),
    [
        ("lif, width learned", 4, "float32", (8, 0), (12, 0)),
        ("lif, width learned", 128, "bfloat16", (4, 7 / 32), (6, 7 / 32)),
        ("lif, store_v_seq", 16, "bfloat16", (8, 0), (6, 0)),
        ("lif, batch first", 16, "float32", (8, 0), (12, 0)),
        ("lif, residual", 16, "bfloat16", (6, 0), (8, 0)),
    ],
)
def test_bytes(name, steps, dtype, forward, backward):
    found = [moved(parameters_of(launch), dtype) for launch in launches(BY_NAME[name], steps, dtype)[:2]]
    for (sequences, more), expected in zip(found, (forward, backward), strict=True):
        assert sequences == expected[0]
        assert more == pytest.approx(expected[1], abs=0.01)  # parameters and partial sums


def test_bytes_of_parameters_and_normalisation():
    common, by_channel = (
        moved(parameters_of(launches(BY_NAME[name], 4, "float32")[1]), "float32").more
        for name in ("lif, width learned", "lif, all by channel")
    )
    assert common < by_channel
    # Three parameters have a slot for each channel of a sample and for each block of 512 neurons.
    assert by_channel == pytest.approx(4 * 3 * (2**12 + 2**13) / 2**24, rel=0.01)
    # Behind a normalisation in channels_last, gain and bias have one for each of 64 channels and block.
    channels_last = launches(BY_NAME["batch_norm_lif, channels_last"], 4, "float32")
    (launch,) = (each for each in channels_last if "lif_backward" in each.kernel)
    assert moved(parameters_of(launch), "float32").more == pytest.approx(4 * 2 * 64 * 2**13 / 2**24, rel=0.01)
    for block, kernels in ((BLOCK, prediction.NORMALISATION_KERNELS), (RESIDUAL_BLOCK, prediction.RESIDUAL_KERNELS)):
        params = map(parameters_of, launches(block, 4, "float32"))
        found = [moved(each, "float32") for each in params if hasattr(each, "x_seq")]
        assert [each.sequences for each in found] == [4 * prediction.MOVED[name] for name in kernels]


def test_float64_instructions():
    slow = ("DADD", "DFMA", "DSETP.GEU.AND", "MUFU.RCP64H", "F2F.F64.F32", "I2F.F64.S64", "F2F.F32.F64")
    others = ("FADD", "FFMA", "MUFU.RCP", "I2F.RP", "F2I.U64", "I2F.S64", "DEPBAR.LE", "F2F.F16.F32")
    assert [bool(sections.FLOAT64.match(opcode)) for opcode in (*slow, *others)] == [True] * 7 + [False] * 8


def test_second_read():
    """An eighth of L2 for each of 16 steps of one sequence: 8 steps hit."""
    assert sections.more_bytes(1.0, 8.0, 1) == pytest.approx(0.5 / 3)
    assert sections.more_bytes(1.0, 8.0, 3) == pytest.approx((1 - 1 / 6) / 3)
    assert sections.more_bytes(1.0, 48.0, 3) == 0


def test_trace_without_all_steps_is_refused():
    launch = launches(COMMON, 4, "float32")[0]
    program = Program(sass("LDG.E R0, [R2.64]\nSTG.E [R2.64], R0\nEXIT"), 90)
    with pytest.raises(RuntimeError, match="1 loads and 1 stores in 4 steps"):
        prediction.issued(program, launch)
    program = Program(sass("LDG.E R0, [R2.64]\nSTG.E [R2.64], R0\n" * 4 + "EXIT"), 90)
    assert sum(prediction.issued(program, launch).values()) == 9


# For sm_90: as many rounds as the first parameter says, each with a load if the second is not null.
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


@pytest.mark.parametrize(("rounds", "pointer"), [(1, 0), (3, 1 << 40), (20, 0)])
def test_trace_of_loops_and_null_pointers(rounds, pointer):
    program = Program(sass(LOOP), 90)
    trace = program.run(struct.pack("<qQ", rounds, pointer))
    assert list(indices(trace)) == [*range(5), *list(range(5, 9)) * rounds, 9]
    assert [step >= 0 for step in trace if max(step, ~step) == 5] == [pointer != 0] * rounds
    assert not program.undecided
