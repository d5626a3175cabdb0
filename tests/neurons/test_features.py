"""The same questions to every feature of neurons; see features.py."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from comparison import negated, uniform
from features import (
    CASES,
    COPIED,
    FACTORS,
    FEATURES,
    IN_PLACE,
    PARAMETERS,
    Case,
    assert_equals_reference,
    leaves_of,
    random_like,
)
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

import asgl_cuda
from asgl_cuda.backends import BACKENDS, Operators
from asgl_cuda.reference.records import Parameters
from asgl_cuda.reference.surrogates import SURROGATES
from benchmarks.speed.clocks import saved_bytes

DOUBLE = torch.float64
# One of each function, since compilers take seconds; tests/torch_modes compiles plain neurons.
COMPILED = ("several spikes", "adaptive", "integrator", "normalised beside a residual", "recurrent and adaptive")


def every(condition=lambda feature: True):
    """Parametrises by the features that meet a condition."""
    chosen = [pytest.param(feature, id=name) for name, feature in FEATURES.items() if condition(feature)]
    return pytest.mark.parametrize("feature", chosen)


def results(feature, x_seq, options, backend, names=None):
    """Outputs, and gradients of all leaves, by name."""
    outputs, leaves = feature.run(x_seq, options, names or feature.outputs, backend), leaves_of(x_seq, options)
    given = list(outputs.values()), list(leaves.values()), random_like(outputs.values())
    found = torch.autograd.grad(*given, allow_unused=True, materialize_grads=True)
    return {**outputs, **{f"grad_{name}": each for name, each in zip(leaves, found, strict=True)}}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name, each in expected.items() if not torch.equal(actual[name], each)]


def tensors_of(options):
    return {name: each for name, each in options.items() if isinstance(each, Tensor)}


def without_running(options):
    """Without what a call in training changes."""
    return {
        name: each for name, each in options.items() if not (options.get("training") and name.startswith("running"))
    }


def test_every_two_values_meet_in_a_case():
    assert len(CASES) < 60
    for (one, values), (other, others) in itertools.combinations(FACTORS.items(), 2):
        met = {(getattr(case, one), getattr(case, other)) for case in CASES}
        assert met == set(itertools.product(values, others))


@pytest.mark.parametrize("case", CASES, ids=str)
@every()
def test_equals_reference(backend, device, feature, case):
    assert_equals_reference(feature, case, backend, device)


@every()
def test_one_tensor_at_a_time(backend, device, feature):
    """So that no other parameter's accumulator or row hides a missing one."""
    for case in (
        Case(steps=17, shape="one", flags="scaled", asked="spikes"),
        Case(steps=4, reset="amount"),
        Case(reset="soft", shape="step", flags="detached", asked="states"),
    ):
        for name in leaves_of(*feature.call(case, device)):
            assert_equals_reference(feature, case, backend, device, only=name)


@every()
def test_each_output_alone(backend, device, feature):
    """The gradients of the other outputs are None, not zeros."""
    x_seq, options = feature.call(Case(DOUBLE, 18), device)
    leaves = list(leaves_of(x_seq, options).values())
    for name in feature.outputs:
        found = []
        for each in (backend, "reference"):
            output = feature.run(x_seq, options, feature.outputs, each)[name]
            grads = random_like([output])
            found.append(torch.autograd.grad(output, leaves, grads, allow_unused=True, materialize_grads=True))
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@every(lambda feature: feature.smooth)
def test_gradcheck(backend, device, feature):
    """Where every element is analog; the kinks of rectangle and triangle are missed."""
    turn = 3 * list(FEATURES.values()).index(feature)
    surrogates = itertools.islice(itertools.cycle(SURROGATES), turn, turn + 3)
    for surrogate, reset, shape in zip(surrogates, FACTORS["reset"], ("channel", "one", "step"), strict=True):
        flags = "scaled" if shape == "channel" else "none"
        case = Case(DOUBLE, 4, surrogate, reset, shape=shape, noise=1.0, sizes=(2, 2, 1, 3), flags=flags)
        x_seq, options = feature.call(case, device)
        leaves = leaves_of(x_seq, options)
        for name in (backend, "reference"):

            def function(x_seq, *values, name=name, options=options, names=tuple(leaves)[1:]):
                given = {**options, **dict(zip(names, values, strict=True))}
                return tuple(feature.run(x_seq, given, feature.outputs, name).values())

            assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@every()
def test_nan_and_infinity_go_through(backend, device, feature):
    """Placed in the first, a middle and the last step: NaN and infinity are where the reference has them."""
    others = itertools.cycle(FACTORS["noise"]), itertools.cycle(FACTORS["reset"])
    for (surrogate, asked), noise, reset in zip(itertools.product(SURROGATES, ("spikes", "all")), *others):  # noqa: B905
        case = Case(steps=6, surrogate=surrogate, reset=reset, noise=noise, sizes=(4, 4, 1, 3), asked=asked)
        x_seq, options = feature.call(case, device)
        with torch.no_grad():
            for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
                for channel, step in enumerate((0, 2, 5)):
                    x_seq[step, row].view(4, 3)[channel, :2] = value
        theirs, ours = (results(feature, x_seq, options, name, feature.names(asked)) for name in ("reference", backend))
        assert any(each.isnan().any() for each in ours.values())
        for name, each in theirs.items():
            torch.testing.assert_close(ours[name], each, equal_nan=True, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("sizes", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)], ids=str)
@every()
def test_no_neurons(backend, device, feature, sizes):
    for dtype in FACTORS["dtype"]:
        assert_equals_reference(feature, Case(dtype, 17, sizes=sizes), backend, device)


@every()
def test_same_tensor_as_all_parameters(backend, device, feature):
    """And the input as the residual: the gradient is the sum of all."""
    x_seq, options = feature.call(Case(DOUBLE), device)
    shape = options["width" if "width" in options else "decay" if "decay" in options else "v_threshold"].shape
    value = uniform(*shape, low=0.6, high=0.9, dtype=DOUBLE, device=device)
    options |= {name: value for name in tensors_of(options) if name in PARAMETERS}
    options |= {"residual": x_seq} if "residual" in options else {}
    ours, theirs = (results(feature, x_seq, without_running(options), name) for name in (backend, "reference"))
    assert {"grad_x_seq"} < {name for name in ours if name.startswith("grad")}
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.traced
@every(lambda feature: feature in map(FEATURES.get, COMPILED))
def test_compile(backend, device, feature):
    """One graph, with the eager bits and running statistics."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x_seq, tensors, others):
        found = feature.run(x_seq, {**tensors, **others}, feature.outputs, backend)
        return {name: each * 2 for name, each in found.items()}

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    several = feature.function is asgl_cuda.leaky_integrator  # sizes; other functions' are traced in seconds
    flags = "scaled" if several else "detached"
    for steps, sizes in ((5, (6, 3, 4, 2)), (7, (5, 3, 2, 4)))[: 1 + several]:
        x_seq, options = feature.call(Case(steps=steps, shape="channel", sizes=sizes, noise=0.3, flags=flags), device)
        others = {name: each for name, each in options.items() if not isinstance(each, Tensor)}
        found = []
        for each in (function, compiled):
            tensors = {
                name: value.clone() if name.startswith("running") else value
                for name, value in tensors_of(options).items()
            }
            outputs = each(x_seq, tensors, others)
            leaves = leaves_of(x_seq, options)
            grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), random_like(outputs.values()))
            running = {name: each for name, each in tensors.items() if name.startswith("running")}
            found.append(({**outputs, **dict(zip([f"grad_{name}" for name in leaves], grads, strict=True))}, running))
        assert_equal(found[1][0], found[0][0])
        torch.testing.assert_close(found[1][1], found[0][1])
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@every()
def test_vmap_is_a_loop(backend, device, feature):
    """Of gradients inside, outside and in pairs, where all is mapped, or x_seq alone; over one segment and several."""
    for noise, shared, steps, flags in (
        (0.0, False, 5, "detached"), (0.0, True, 36, "scaled"), (0.3, False, 20, "scaled"),
    ):  # fmt: skip
        case = Case(DOUBLE, steps, noise=noise, shape="channel", flags=flags)
        three = [feature.call(case, device) for _ in range(3)]
        options = without_running(three[0][1])
        names = [name for name in leaves_of(*three[0]) if name != "x_seq"]
        samples = [(x_seq.detach(), *(given[name].detach() for name in names)) for x_seq, given in three]

        def loss(x_seq, *values, names=names, options=options):
            given = {**options, **dict(zip(names, values, strict=True))}
            return sum(each.square().sum() for each in feature.run(x_seq, given, feature.outputs, backend).values())

        every, mapped = tuple(range(1 + len(names))), (0, *[None if shared else 0] * len(names))
        function = grad(loss, every)
        stacked = [torch.stack(each) for each in zip(*samples, strict=True)]
        inputs = [stacked[0], *(samples[0][1:] if shared else stacked[1:])]
        by_sample = [function(x_seq, *(samples[0][1:] if shared else values)) for x_seq, *values in samples]
        expected = [torch.stack(each) for each in zip(*by_sample, strict=True)]
        torch.testing.assert_close(list(vmap(function, mapped)(*inputs)), expected)
        pairs = vmap(vmap(function, mapped), (0, *[None] * len(names)))(torch.stack([inputs[0]] * 2), *inputs[1:])
        torch.testing.assert_close([each[1] for each in pairs], expected)
        outside = grad(lambda *given, loss=loss, mapped=mapped: vmap(loss, mapped)(*given).sum(), every)(*inputs)
        sums = [each if dim == 0 else each.sum(0) for each, dim in zip(expected, mapped, strict=True)]
        torch.testing.assert_close(list(outside), sums)


@every()
def test_jacrev_is_a_gradient_of_each_output(backend, device, feature):
    """The gradients that come in are mapped, and nothing else."""
    x_seq, options = feature.call(Case(DOUBLE, shape="channel", flags="detached"), device)
    options = {name: each.detach() if isinstance(each, Tensor) else each for name, each in options.items()}

    def by_step(x_seq):
        (output,) = feature.run(x_seq, without_running(options), feature.outputs[:1], backend).values()
        return output.square().flatten(1).sum(1)

    expected = [grad(lambda x_seq, t=t: by_step(x_seq)[t])(x_seq.detach()) for t in range(len(x_seq))]
    torch.testing.assert_close(jacrev(by_step)(x_seq.detach()), torch.stack(expected))


@every()
def test_forward_mode_of_the_reference(feature):
    """With tangents of all tensors: the products <J v, g> and <v, J^T g> are equal."""
    for flags, reset, noise in zip(("detached", "scaled", "detached"), FACTORS["reset"], FACTORS["noise"], strict=True):
        case = Case(DOUBLE, 3, "sigmoid", reset, shape="channel", noise=noise, sizes=(2, 3, 1, 2), flags=flags)
        x_seq, options = feature.call(case, "cpu")
        leaves, options = leaves_of(x_seq, options), without_running(options)

        def function(*values, options=options, names=tuple(leaves)):
            given = {**options, **dict(zip(names, values, strict=True))}
            return tuple(feature.run(given.pop("x_seq"), given, feature.outputs, "reference").values())

        values = tuple(each.detach() for each in leaves.values())
        tangents = tuple(random_like(values))
        outputs, forward = jvp(function, values, tangents)
        grads = tuple(each.cos() for each in outputs)  # of another kind than the tangents
        reverse = vjp(function, *values)[1](grads)
        products = [
            torch.stack([(a * b).sum() for a, b in zip(*each, strict=True)]).sum()
            for each in ((forward, grads), (tangents, reverse))
        ]
        assert products[0].abs() > 1e-3
        torch.testing.assert_close(*products, rtol=1e-10, atol=1e-10)


@every()
def test_the_default_type_changes_nothing(backend, device, feature):
    """Of tensors that a call makes."""
    x_seq, options = feature.call(Case(steps=5, shape="channel", noise=0.3, flags="detached"), device)
    leaves, options = list(leaves_of(x_seq, options).values()), without_running(options)
    before = torch.get_default_dtype()
    for name in (backend, "reference"):
        found = []
        for default in (before, DOUBLE, torch.float16):
            torch.set_default_dtype(default)
            try:
                outputs = feature.run(x_seq, options, feature.outputs, name)
                losses = [each.float().square().sum() for each in outputs.values()]
                grads = torch.autograd.grad(losses, leaves, allow_unused=True, materialize_grads=True)
            finally:
                torch.set_default_dtype(before)
            found.append([*outputs.values(), *grads])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@every(lambda feature: feature.splits)
def test_two_parts_are_the_whole(backend, device, feature):
    """Without noise, which is indexed by the steps of a call."""
    for reset, noise in zip(FACTORS["reset"], (0.0, 1.0, 0.0), strict=True):
        x_seq, options = feature.call(Case(steps=40, reset=reset, noise=noise, flags="scaled"), device)
        whole = feature.run(x_seq, options, feature.outputs, backend)
        parts, state = [], {}
        for begin, steps in ((0, 17), (17, 23)):
            residual = {"residual": options["residual"].narrow(0, begin, steps)} if "residual" in options else {}
            given = {**options, **residual, **state}
            parts.append(feature.run(x_seq.narrow(0, begin, steps), given, feature.outputs, backend))
            state = {f"{name[0]}_init": each for name, each in parts[-1].items() if name.endswith("last")}
        for name, each in whole.items():
            joined = parts[1][name] if name.endswith("last") else torch.cat([part[name] for part in parts])
            assert torch.equal(joined, each), name
        sums = (sum(each[feature.outputs[0]].square().sum() for each in calls) for calls in (parts, [whole]))
        torch.testing.assert_close(*(torch.autograd.grad(each, x_seq) for each in sums))


@every()
def test_bits_depend_on_no_number_of_threads(backend, device, feature):
    x_seq, options = feature.call(Case(steps=18, noise=0.3, shape="channel", sizes=(18, 8, 1, 17)), device)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(feature, x_seq, options, backend))
    finally:
        torch.set_num_threads(before)
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@every()
def test_layouts(backend, device, feature):
    """Bits are those of the reference; dense layouts are used as they are, and results have them."""
    for layout in (*IN_PLACE, *COPIED):
        case = Case(torch.bfloat16, 5, layout=layout, shape="channel", sizes=(1, 3, 1, 1), noise=0.3)
        assert_equals_reference(feature, case, backend, device)
        if layout not in FACTORS["layout"]:
            assert_equals_reference(feature, case._replace(sizes=(3, 5, 4, 7)), backend, device)
        x_seq, options = feature.call(case._replace(sizes=(3, 5, 4, 7)), device)
        outputs = feature.run(x_seq, options, feature.outputs, backend)
        (dx,) = torch.autograd.grad(outputs[feature.outputs[0]], x_seq, torch.ones_like(outputs[feature.outputs[0]]))
        if layout in IN_PLACE and not feature.flat:
            assert {each.stride() for each in (dx, *outputs.values()) if each.dim() == x_seq.dim()} == {x_seq.stride()}


@every(lambda feature: not (feature.flat or "training" in feature.call(Case(), "cpu")[1]))
def test_one_dimension_is_one_neuron(backend, device, feature):
    x_seq, options = feature.call(Case(steps=33, shape="one", sizes=(1, 1, 1, 1), noise=0.3), device)
    whole = {name: each for name, each in options.items() if name.endswith("init") or name == "residual"}
    flat = {
        **options,
        **{name: each.flatten()[: x_seq.numel()].view(x_seq.shape[: each.dim() - 4]) for name, each in whole.items()},
    }
    found = results(feature, x_seq.view(33), flat, backend)
    expected = results(feature, x_seq, options, backend)
    assert_equal(
        {name: each.flatten() for name, each in found.items()},
        {name: each.flatten() for name, each in expected.items()},
    )


@every()
def test_gradients_of_any_layout_come_in(backend, device, feature):
    """Expanded, transposed and sliced ones."""
    x_seq, options = feature.call(Case(DOUBLE, 4), device)
    leaves = list(leaves_of(x_seq, options).values())
    (output,) = feature.run(x_seq, options, feature.outputs[:1], backend).values()
    reverse = torch.randn(*x_seq.shape[::-1], 2, dtype=DOUBLE).to(device)[..., 0].permute(*reversed(range(x_seq.dim())))
    for each in (reverse, torch.ones_like(x_seq.flatten()[0]).expand(x_seq.shape)):
        found = (torch.autograd.grad(output, leaves, given, retain_graph=True) for given in (each, each.contiguous()))
        torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["time first", "channels last"])
@every()
def test_rules_of_autograd(backend, device, feature, layout):
    x_seq, options = feature.call(Case(surrogate="sigmoid", layout=layout), device)
    tensors = {"x_seq": x_seq, **tensors_of(options)}
    before = {name: each.detach().clone() for name, each in tensors.items() if not name.startswith("running")}
    first, *_ = feature.outputs

    def output(x_seq, **changed):
        return feature.function(x_seq, **{**options, **changed}, backend=backend)

    (dx,) = torch.autograd.grad(output(x_seq).square().sum(), x_seq, create_graph=True)
    with pytest.raises(RuntimeError, match=r"asgl_cuda: a second derivative was asked for.* backend='reference'"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match=r"asgl_cuda.*forward-mode"):
        torch.func.jvp(output, (x_seq.detach(),), (x_seq.detach(),))

    loss = output(x_seq).sum()
    once = torch.autograd.grad(loss, x_seq, retain_graph=True)
    assert torch.equal(*once, *torch.autograd.grad(loss, x_seq))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x_seq)
    assert_equal({name: tensors[name] for name in before}, before)

    for name in () if feature.flat or layout != "time first" else {"x_seq", "residual"} & tensors.keys():
        changed = tensors[name] * 1
        s_seq = output(**{"x_seq": x_seq, name: changed})
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            s_seq.sum().backward()

    # Views made in an autograd function could be neither changed nor detached in place.
    outputs = feature.run(x_seq, options, feature.outputs, backend)
    both_states = {"v_last", "w_last"} if "w_last" in outputs else set()
    assert not [name for name, each in outputs.items() if each._is_view() and name not in both_states]
    outputs[first].mul_(2)


@every()
def test_kept_for_backward(backend, device, feature):
    """Whole sequences, and the states of every 16th step beyond the first 16."""
    for dtype, steps in ((torch.float32, 4), (torch.bfloat16, 16), (torch.float32, 64)):
        case = Case(dtype, steps, shape="one", sizes=(64, 4, 2, 2), noise=0.3, asked="spikes")
        x_seq, options = feature.call(case, device)
        saved = saved_bytes(lambda: feature.run(x_seq, options, feature.outputs[:1], backend))  # noqa: B023
        given, real = feature.kept
        checkpoints = (steps - 1) // 16 / steps * (2 if "w_last" in feature.outputs else 1)
        bytes_an_element = dtype.itemsize * given + 4 * (real + checkpoints)
        assert saved <= x_seq.numel() * bytes_an_element + 2048  # parameters


def imaginary(value):
    """The same values as the imaginary part of a conjugate, which has the negative bit; one value is dense."""
    if not value.is_floating_point():
        return negated(value)
    lazy = torch.complex(torch.zeros_like(value), -value.detach()).conj().imag
    assert lazy.is_neg()
    return lazy.requires_grad_(value.requires_grad)


def copied(value):
    return value.detach().clone().requires_grad_(value.requires_grad)


@pytest.mark.parametrize("way", ["direct", "operators"])
@every()
def test_bits_of_the_dispatcher(backend, device, feature, way, monkeypatch):
    """Each tensor, and the gradients, with their values under the negative bit: the results are the same."""
    if BACKENDS[backend].direct is None:
        pytest.skip("there is one way only")
    if way == "operators":
        monkeypatch.setitem(BACKENDS, backend, BACKENDS[backend]._replace(direct=None))
    x_seq, options = feature.call(Case(steps=20, surrogate="triangle", noise=0.3, sizes=(2, 3, 1, 5)), device)
    tensors = {"x_seq": x_seq, **tensors_of(options)}

    def found(lazy, chosen):
        given = {name: (lazy if name in chosen else copied)(each) for name, each in tensors.items()}
        leaves = leaves_of(given["x_seq"], given)
        outputs = feature.run(given.pop("x_seq"), {**options, **given}, feature.outputs, backend)
        grads = [(lazy if "grads" in chosen else copied)(each) for each in random_like(outputs.values())]
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads)
        running = {name: each for name, each in given.items() if name.startswith("running")}
        return {**outputs, **running, **dict(zip([f"grad_{name}" for name in leaves], grads, strict=True))}

    expected = found(copied, ())
    for chosen in (*((name,) for name in tensors), ("grads",), ("grads", *tensors)):
        for lazy in (negated,) if "running_mean" in tensors else (negated, imaginary):
            assert_equal(found(lazy, chosen), expected)


def recorded(feature, backend, device, monkeypatch, steps):
    """The operators that a call and its backward use, each with its arguments."""
    calls, found = [], BACKENDS[backend]

    def recording(name, operator):
        def call(*arguments):
            calls.append((name, torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, arguments)))
            return operator(*arguments)

        return call

    operators = zip(Operators._fields, found.direct or found.operators, strict=True)
    monkeypatch.setitem(BACKENDS, backend, found._replace(direct=Operators(*(recording(*each) for each in operators))))
    case = Case(steps=steps, shape="channel", noise=0.3, flags="scaled", asked="states")
    results(feature, *feature.call(case, device), backend)
    monkeypatch.setitem(BACKENDS, backend, found)
    assert {name.rpartition("_")[2] for name, _ in calls} >= {"forward", "backward"}
    return calls


@every()
def test_opcheck(backend, device, feature, monkeypatch):
    """Of schemas, and of traced sizes, among them those of checkpoints."""
    for steps in (16, 20):
        for name, arguments in recorded(feature, backend, device, monkeypatch, steps):
            operator = getattr(BACKENDS[backend].operators, name)
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def changes(tensor, broadcasts):
    """The same tensor on another device, of another type, and of another shape."""
    yield tensor.to("meta")
    yield tensor.to({torch.float32: DOUBLE, DOUBLE: torch.float32}.get(tensor.dtype, torch.int32))
    if tensor.dim() and tensor.numel():
        yield torch.cat([tensor, tensor], min(2, tensor.dim() - 1))
        yield tensor[(None,) * 4] if broadcasts else tensor.flatten()[0]


@pytest.mark.parametrize("way", ["operators", "direct"])
@every(lambda feature: not feature.flat)
def test_operators_check_each_tensor(backend, device, feature, way, monkeypatch):
    """Before they read any."""
    if getattr(BACKENDS[backend], way) is None:
        pytest.skip("no direct calls")
    for name, arguments in recorded(feature, backend, device, monkeypatch, steps=18):
        operator = getattr(getattr(BACKENDS[backend], way), name)
        schema = getattr(BACKENDS[backend].operators, name)._schema
        for place, (value, argument) in enumerate(zip(arguments, schema.arguments, strict=True)):
            broadcasts = argument.name in Parameters._fields
            for other in changes(value, broadcasts) if isinstance(value, Tensor) else ():
                what = f"{name} takes {argument.name}: {list(other.shape)}, {other.dtype}, {other.device}"
                with pytest.raises((ValueError, TypeError), match="asgl_cuda"):
                    refused(operator, what, [*arguments[:place], other, *arguments[place + 1 :]])


def refused(operator, what, arguments):
    operator(*arguments)
    pytest.fail(what)
