"""Calls at random: cases of any size, between those of the covering array in features.py, equal the reference."""

import math

import pytest
from features import COPIED, FACTORS, FEATURES, IN_PLACE, Case, assert_equals_reference, summed

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

# Around segments of 4, 8 and 16 steps, groups of 4 neurons and the width of vectors; with some sizes several runs fit
# in a tile.
STEPS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 18, 32, 33, 40)
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 67, 400, 700)
MOST_ELEMENTS = 40000  # processed by one CPU thread
MOST_NEURONS, MOST_RECURRENT = 3000, 300


@st.composite
def cases(draw: st.DrawFn, most_neurons: int) -> Case:
    chosen = {name: draw(st.sampled_from(values)) for name, values in FACTORS.items()}
    steps = draw(st.sampled_from(STEPS))
    sizes: list[int] = []
    for _ in range(4):
        room = min(most_neurons, MOST_ELEMENTS // steps) // math.prod(sizes)
        sizes.append(draw(st.sampled_from([size for size in SIZES if size <= room])))
    layout = draw(st.sampled_from((*IN_PLACE, *COPIED)))
    noise = draw(st.sampled_from((*FACTORS["noise"], 1 / 65536)))
    return Case(**chosen | {"steps": steps, "sizes": tuple(sizes), "layout": layout, "noise": noise})


# Examples do not change the backend or the device, which are function-scoped.
@settings(
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_equals_reference(backend, device, feature, data):
    case = data.draw(cases(MOST_RECURRENT if feature.flat else MOST_NEURONS), label="case")
    # The statistics of few values are roundings.
    assume(feature.allowed is not summed or case.steps * math.prod(case.sizes) >= 32 * case.sizes[1])
    assert_equals_reference(feature, case, backend, device)
