"""The predictions of tools/roofline/ROOFLINE.md: what calls start and move, and how many blocks there are at once."""

from __future__ import annotations

import pytest
from sass import sass

from asgl_cuda import backends
from tools.kernels.cuda_code import Kernel, Usage
from tools.roofline import prediction, recorded_calls, roofline
from tools.roofline import sections as roofline_sections
from tools.roofline.prediction import CARDS, Moved, blocks_at_once, kernel_of_launch, moved, parameters_of
from tools.roofline.recorded_calls import BLOCK, BY_NEURON, COMMON, ELEMENTS, OTHERS, Launch, launches
from tools.roofline.sass_run import Program

BY_NAME = {call.name: call for call in (COMMON, BLOCK, *OTHERS)}


def kinds(call: recorded_calls.Call, steps: int = 4, dtype: str = "float32") -> list[str]:
    return [kernel_of_launch(launch).kind for launch in launches(call, steps, dtype)]


def test_calls_start_what_the_launchers_choose():
    assert kinds(COMMON) == ["forward plain, T = 4", "backward plain, T = 4", "gradient sum"]
    assert kinds(COMMON, 16, "bfloat16")[1] == "backward plain, 4 neurons"
    assert kinds(BY_NEURON)[:2] == ["forward normalised, 1 neuron", "backward normalised, 1 neuron"]
    passes = [kind.split(",")[0] for kind in kinds(BLOCK)]
    assert [name for name in passes if name in prediction.OF_NORMALISATION] == list(prediction.OF_NORMALISATION)
    assert not [name for name in backends.BACKENDS if "predicted" in name]


@pytest.mark.parametrize(
    ("name", "steps", "dtype", "forward", "backward"),
    [
        ("lif, width learned", 4, "float32", (8, 0), (12, 0)),
        ("lif, width learned", 128, "bfloat16", (4, 7 / 32), (6, 7 / 32)),
        ("lif, store_v_seq", 16, "bfloat16", (8, 0), (6, 0)),
        ("lif, batch first", 16, "float32", (8, 0), (12, 0)),
    ],
)
def test_bytes(name, steps, dtype, forward, backward):
    found = [moved(parameters_of(launch), dtype) for launch in launches(BY_NAME[name], steps, dtype)[:2]]
    for (sequences, more), expected in zip(found, (forward, backward), strict=True):
        assert sequences == expected[0]
        assert more == pytest.approx(expected[1], abs=0.01)  # parameters and partial sums


def test_bytes_of_parameters_and_normalisation():
    of_common, of_others = (
        moved(parameters_of(launches(BY_NAME[name], 4, "float32")[1]), "float32").more
        for name in ("lif, width learned", "lif, all by channel")
    )
    assert of_common < of_others
    # Three parameters have a slot for each channel of a sample and for each block of 512 neurons.
    assert of_others == pytest.approx(4 * 3 * (2**12 + 2**13) / 2**24, rel=0.01)
    all_of_block = map(parameters_of, launches(BLOCK, 4, "float32"))
    found = [moved(params, "float32") for params in all_of_block if hasattr(params, "x_seq")]
    assert [each.sequences for each in found] == [4, 8, 12, 12]


def test_blocks_at_once():
    a100 = next(card for card in CARDS if card.architecture == 80)
    for registers, shared, blocks in ((64, 0, 8), (65, 0, 7), (162, 16, 3), (32, 0, 16), (40, 32784, 6)):
        assert blocks_at_once(CARDS[0], Usage(registers, shared, 0, 0, 0), 128) == blocks
    assert blocks_at_once(a100, Usage(40, 32784, 0, 0, 0), 128) == 4
    assert blocks_at_once(CARDS[0], Usage(54, 128, 0, 0, 0), 512) == 2


def test_a_way_that_misses_steps_is_told():
    launch = launches(COMMON, 4, "float32")[0]
    program = Program(sass("LDG.E R0, [R2.64]\nSTG.E [R2.64], R0\nEXIT"), 90)
    with pytest.raises(RuntimeError, match="1 loads and 1 stores in 4 steps"):
        prediction.issued(program, launch)
    program = Program(sass("LDG.E R0, [R2.64]\nSTG.E [R2.64], R0\n" * 4 + "EXIT"), 90)
    assert sum(prediction.issued(program, launch).values()) == 9


def test_waves():
    found = roofline_sections.waves(25, 10, 16, 128, seconds=25.0, alone=4.0)
    assert (found.waves, found.wave) == (2.5, 10)
    assert (found.full_bytes, found.last_bytes) == (10 * 128 * 16, 5 * 128 * 16)
    assert found.seconds == 25, "the last wave is longer than a block alone"
    assert roofline_sections.waves(21, 10, 16, 128, 21.0, 4.0).seconds == 24
    assert roofline_sections.waves(20, 10, 16, 128, 20.0, 4.0).seconds == 20, "the last wave is a full one"
    assert roofline_sections.waves(20, 10, 16, 128, 20.0, 30.0).seconds == 60, "latency binds in each wave"


def test_times_of_a_sum():
    card = CARDS[0]._replace(multiprocessors=10, clock=1e9, bandwidth=1e12)
    one = Launch("", 1, 512, b"")
    time = roofline_sections.sum_time(card, 100, 5e-6, one, 64000, 2)
    assert time == pytest.approx((0.4e-6, 4e-6, 5e-6, 0.256e-6))
    assert time.binds == "latency"
    many = roofline_sections.sum_time(card, 100, 5e-6, one._replace(blocks=41), 64000, 2)
    assert many.issue == pytest.approx(5 * 0.4e-6)
    assert many.latency == pytest.approx(15e-6), "five blocks, two at once"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("IMAD.WIDE.U32 R4, R134, -0x2daee0ad, RZ", True),
        ("UIMAD.WIDE.U32 UR10, UR10, -0x326172a9, URZ", True),
        ("IMAD.WIDE.U32 R4, R134, 0x80, RZ", False),
        ("VIADD R4, R4, -0x2daee0ad", False),
    ],
)
def test_products_of_philox(line, expected):
    (instruction,) = sass(line)
    assert roofline_sections.is_philox(instruction) == expected


def predicted(call: str, kind: str, instructions: float, steps: int = 4) -> prediction.Prediction:
    counted = {name: instructions / len(prediction.CLASSES) for name in prediction.CLASSES}
    return prediction.predict(CARDS[0], call, Kernel(kind, "bfloat16"), steps, Moved(4.0, 0.5), counted)


def test_prediction():
    found = predicted("lif", "forward plain, 4 neurons", 8000)
    assert found.bytes == 4.5
    assert found.memory / found.floor == pytest.approx(4.5 / 4)
    assert found.issue == pytest.approx(8000 / 128 / 132 / 1.755e9 * 1e12)
    assert (found.busiest, found.binds) == ("special", "special")
    assert predicted("lif", "forward plain, 4 neurons", 0.0).binds == "memory"


def test_rows_of_other_calls():
    common = predicted(COMMON.name, "forward plain, 4 neurons", 8)
    same, other = (
        predicted("lif, decay learned", kind, 8) for kind in ("forward plain, 4 neurons", "forward, 1 neuron")
    )
    assert roofline.of_other_calls([common, same, other]) == [other]
    (row,) = roofline.rows_of_calls_in_short([other])
    assert row[:2] == ("lif, decay learned, forward", "")
    assert row[4].endswith("memory")


def test_shapes_of_the_calls():
    for steps in roofline.STEPS:
        launch = launches(BY_NAME["lif, batch first"], steps, "bfloat16")[0]
        shape = parameters_of(launch).shape
        assert shape.outer > 1
        assert shape.steps == steps
        assert shape.outer * shape.steps * shape.inner == ELEMENTS
