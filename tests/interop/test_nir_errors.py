"""Graphs with any arrays, metadata and edges: each is read, or refused by one error that names the node."""

import copy

import pytest
import torch
from nir_graphs import chain, cuba, graph_of, nir, nir_lif, np, rewritten
from torch import nn

from asgl_cuda import LIF, LeakyIntegrator
from asgl_cuda.interop.nir import from_nir, to_nir

ONES = np.ones(6, np.float32)


def without(node, name):
    delattr(node, name)
    return node


def with_(node, **values):
    """The node with values that its class would refuse."""
    for name, value in values.items():
        setattr(node, name, value)
    return node


def affine(weight=None, bias=ONES):
    return with_(nir.Affine(np.eye(6), ONES), **{"weight": np.eye(6) if weight is None else weight, "bias": bias})


def conv2d(**values):
    node = nir.Conv2d((5, 4), np.ones((2, 3, 3, 3), np.float32), (1, 1), (0, 0), (1, 1), 1, np.ones(2, np.float32))
    return with_(node, **values)


def pool(**values):
    return with_(nir.AvgPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])), **values)


def whole(value):
    return rf"must be .*whole number.*, got {value}"


NAN = np.array([1, 1, np.nan, 1, 1, 1])
OBJECTS = np.array([1, None, "a", 1, 1, 1], object)
ARRAYS = {
    "complex": (nir_lif(), {"tau": ONES + 1j}, "tau must be an array of real numbers, got an array of complex64"),
    "complex tensor": (affine(), {"weight": torch.eye(6).cfloat()}, "weight.*got an array of complex64"),
    "one complex number": (nir_lif(), {"r": 1j}, "r must be an array of real numbers, got complex128"),
    "objects": (nir_lif(), {"r": OBJECTS}, "r must be an array of real numbers, got an array of object"),
    "strings": (nir_lif(), {"v_leak": np.array(["0"] * 6)}, "v_leak must be .* real numbers, got an array of <U1"),
    "bytes": (nir_lif(), {"v_leak": b"0"}, r"v_leak must be an array of real numbers, got \|S1"),
    "a string": (nir.Scale(ONES), {"scale": "1"}, "scale must be an array of real numbers, got <U1"),
    "booleans": (nir.Scale(ONES), {"scale": ONES > 0}, "scale must be an array of real numbers, got an array of bool"),
    "None": (nir_lif(), {"r": None}, "r must be an array of real numbers, got None"),
    "a dict": (nir_lif(), {"r": {}}, "r must be an array of real numbers, got object"),
    "a ragged list": (nir_lif(), {"r": [[1], [1, 2]]}, "r must be an array of real numbers, got setting an array"),
    "a date": (nir_lif(), {"r": np.array(["2020"], "M8[Y]")}, r"r must be .* got an array of datetime64\[Y\]"),
    "a record": (nir_lif(), {"r": np.zeros(6, "f4,f4")}, "r must be an array of real numbers, got an array of "),
    "nan": (nir_lif(), {"v_threshold": NAN}, "v_threshold must be finite in torch.float64, got nan"),
    "infinity": (nir_lif(), {"tau": ONES * np.inf}, "tau must be finite in torch.float64, got inf"),
    "nan in weights": (affine(), {"bias": NAN}, "bias must be finite in torch.float32, got nan"),
    "beyond the type": (affine(), {"bias": np.full(6, 1e300)}, "bias must be finite in torch.float32, got 1e"),
    "empty": (nir_lif(), {"tau": ONES[:0]}, r"tau must not be empty, got shape \[0\]"),
    "empty weights": (affine(np.ones((0, 6)), ONES[:0]), {}, r"weight must not be empty, got shape \[0, 6\]"),
    "no field": (without(nir_lif(), "r"), {}, "r must be an array of real numbers, got None"),
    "another shape": (nir_lif(), {"tau": ONES[:5]}, r"one shape, got tau \[5\], r \[6\], v_leak \[6\], v_thr"),
    "a matrix among rows": (cuba(), {"w_in": np.ones((6, 6))}, r"one shape, got .*w_in \[6, 6\]"),
    "a row of weights": (affine(ONES), {}, r"weight must have shape \[outputs, inputs\], got \[6\]"),
    "one weight": (affine(1.0), {}, r"weight must have shape \[outputs, inputs\], got \[\]"),
    "weights of three": (affine(np.ones((2, 6, 6))), {}, r"weight must have shape .*, got \[2, 6, 6\]"),
    "another bias": (affine(bias=ONES[:5]), {}, r"bias must have shape \[6\] as its weight says, got \[5\]"),
    "one bias": (affine(bias=1.0), {}, r"bias must have shape \[6\] as its weight says, got \[\]"),
    "a convolution of a line": (
        conv2d(), {"weight": np.ones((2, 3, 3))}, r"weight must .* \[outputs, inputs, size, size\], got \[2, 3, 3\]"
    ),
    "groups": (conv2d(), {"groups": 3}, "groups must divide its 2 outputs, got 3"),
    "no groups": (conv2d(), {"groups": 0}, "groups must divide its 2 outputs, got 0"),
    "half a group": (conv2d(), {"groups": 1.5}, f"groups {whole('1.5')}"),
    "stride": (conv2d(), {"stride": (0, 1)}, f"stride {whole('.0, 1.')}"),
    "three strides": (conv2d(), {"stride": (1, 1, 1)}, f"stride {whole('.1, 1, 1.')}"),
    "a stride that is no number": (conv2d(), {"stride": "one"}, f"stride {whole('.one.')}"),
    "no stride": (conv2d(), {"stride": None}, f"stride {whole('None')}"),
    "a masked size": (
        conv2d(), {"groups": np.ma.masked_array([1.0, 2.0], [0, 1])}, r"groups must be a whole number, got masked"
    ),
    "half a step": (conv2d(), {"dilation": 1.5}, f"dilation {whole('1.5')}"),
    "negative padding": (conv2d(), {"padding": (-1, 0)}, f"padding {whole('.-1, 0.')}"),
    "padding of another name": (conv2d(), {"padding": "full"}, "padding must be 'same', 'valid' or sizes, got 'full'"),
    "same with steps": (conv2d(), {"padding": "same", "stride": 2}, r"padding 'same' needs stride 1, got \[2, 2\]"),
    "a pooling of nothing": (pool(), {"kernel_size": 0}, f"kernel_size {whole('0')}"),
    "a pooling without steps": (pool(), {"stride": np.array([0, 0])}, "stride must be one or 2 whole .*, at least 1"),
    "padding of a pooling": (pool(), {"padding": 2}, r"at most half of kernel_size, got \[2, 2\] for \[2, 2\]"),
    "a padding by name": (pool(), {"padding": "same"}, f"padding {whole('.same.')}"),
    "a dimension": (with_(nir.Flatten(np.array([6])), start_dim="0"), {}, f"start_dim {whole('.0.')}"),
    "no dimension": (with_(nir.Flatten(np.array([6])), end_dim=None), {}, f"end_dim {whole('None')}"),
    "a graph inside": (chain(["0"]), {}, "can't be represented; what can be: LIF, IF, CubaLIF, LI, I, CubaLI, Affine"),
    "no node": (None, {}, "can't be represented; what can be: "),
    "a delay by half a step": (nir.Delay(1.5e-4 * ONES), {}, "delay must be a whole number of steps, dt = 0.0001, got"),
    "a delay backwards": (nir.Delay(-ONES), {}, "delay must be a whole number of steps, dt = 0.0001, got -1"),
    "delays for others": (nir.Delay(np.ones(1 + len(ONES))), {}, "its arrays are for neurons of shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_any_kind_are_an_error_that_names_the_node(name):
    node, values, message = ARRAYS[name]
    graph = graph_of(nir_lif(), with_(copy.deepcopy(node), **values))
    with pytest.raises(
        ValueError, match=rf"^asgl_cuda\.from_nir: node '1' \({type(node).__name__}\).*{message}"
    ) as error:
        from_nir(graph)
    assert "\n" not in str(error.value)


INSTEAD = {
    "whole numbers": np.full(6, 2),
    "one byte": np.full(6, 2, np.uint8),
    "long doubles": np.full(6, 2, np.longdouble),
    "half": np.full(6, 2, np.float16),
    "the other byte order": np.full(6, 2, ">f4"),
    "backwards": np.full(6, 2, np.float32)[::-1],
    "a view of one": np.broadcast_to(np.float32(2), 6),
    "read only": np.frombuffer(np.full(6, 2, np.float32).tobytes(), np.float32),
    "without dimensions": np.array(2.0),
    "a number": 2.0,
    "a list": [2.0] * 6,
    "a tensor": torch.full((6,), 2.0, requires_grad=True),
    "a tensor of another type": torch.full((6,), 2, dtype=torch.int16),
    "bfloat16": torch.full((6,), 2, dtype=torch.bfloat16),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", INSTEAD)
def test_numbers_of_any_type(name):
    value = INSTEAD[name]
    x_seq = torch.randn(20, 5, 6)
    for node, field in ((nir_lif(), "r"), (nir.Scale(ONES * 2), "scale"), (cuba(), "w_in")):
        expected = from_nir(graph_of(with_(copy.deepcopy(node), **{field: ONES * 2})))(x_seq)
        found = from_nir(graph_of(with_(node, **{field: value})))
        assert torch.equal(found(x_seq), expected)
        assert {each.dtype for each in (*found.parameters(), *found.buffers())} <= {torch.float32}
    if np.shape(value) == (6,) and not isinstance(value, torch.Tensor):
        weight = np.tile(np.asarray(value), (6, 1))
        assert torch.equal(
            from_nir(graph_of(affine(weight, value)))(x_seq),
            nn.functional.linear(x_seq, torch.full((6, 6), 2.0), torch.full((6,), 2.0)),
        )


def test_weights_are_not_those_of_the_graph():
    node = affine(np.eye(6, dtype=np.float32))
    model = from_nir(graph_of(node))
    model.get_submodule("0").weight.data.zero_()
    assert node.weight.sum() == 6


def written(layer=None, **changes):
    """The graph that to_nir writes for a layer, with changed entries in its metadata; None removes one."""
    graph = to_nir(layer or LIF(learn_decay=True), torch.rand(2, 3, 6))
    ours = graph.nodes["_0"].metadata["asgl_cuda"]
    for name, value in changes.items():
        ours[name] = value
        if value is None:
            del ours[name]
    return graph


def options(**changes):
    graph = written()
    graph.nodes["_0"].metadata["asgl_cuda"]["options"].update(changes)
    return graph


def metadata(value, layer=None):
    graph = written(layer)
    graph.nodes["_0"].metadata = value
    return graph


NOT_READ = r"metadata\['asgl_cuda'\] can't be read \(.*{}.*\); without it the numbers alone are read"
METADATA = {
    "a list": (lambda: metadata([1]), "metadata must be a dict, got list"),
    "a string": (lambda: metadata("asgl_cuda"), "metadata must be a dict, got str"),
    "ours a list": (lambda: metadata({"asgl_cuda": []}), r"metadata\['asgl_cuda'\] must be a dict, got list"),
    "ours a number": (lambda: metadata({"asgl_cuda": 0}, LeakyIntegrator()), "must be a dict, got int"),
    "ours an array": (lambda: metadata({"asgl_cuda": ONES}), "must be a dict, got ndarray"),
    "ours empty": (lambda: metadata({"asgl_cuda": {}}), r"metadata\['asgl_cuda'\]: dt must be a float, got NoneType"),
    "dt a string": (lambda: written(dt="1"), r"metadata\['asgl_cuda'\]: dt must be a float, got str"),
    "dt an array": (lambda: written(dt=ONES), r"metadata\['asgl_cuda'\]: dt must be a float, got ndarray"),
    "dt 0": (lambda: written(dt=0.0), "dt must be > 0 and finite, got 0.0"),
    "dt nan": (lambda: written(dt=np.float64("nan")), "dt must be > 0 and finite, got nan"),
    "no dt": (lambda: written(dt=None), "dt must be a float, got NoneType"),
    "no sizes": (lambda: written(num_features=None), r"\['num_features'\] must be a sequence of ints, got None"),
    "sizes of a string": (lambda: written(num_features="6"), "'num_features'] must be a sequence of ints, got '6'"),
    "half a size": (lambda: written(num_features=[1.5]), r"must be a sequence of ints, got \[1.5\]"),
    "sizes without granularity": (lambda: written(num_features=[6]), NOT_READ.format("num_features needs granularity")),
    "options a list": (lambda: written(options=[1]), r"\['options'\] must be a dict, got list"),
    "an option that is not known": (lambda: options(speed=1), NOT_READ.format("unknown options speed")),
    "an option that is no matter of it": (lambda: options(time_dim=1), NOT_READ.format("unknown options time_dim")),
    "a surrogate that is not known": (lambda: options(surrogate="step"), NOT_READ.format("surrogate must be one of")),
    "a surrogate of bytes": (lambda: options(surrogate=b"rectangle"), NOT_READ.format("surrogate must be one of")),
    "a decay of text": (lambda: options(decay="half"), NOT_READ.format("decay must be a float, got str")),
    "a width of an array": (lambda: options(width=ONES), NOT_READ.format("width must be a float, got ndarray")),
    "a flag of a number": (lambda: options(stateful=1), NOT_READ.format("stateful must be a bool, got int")),
    "a width below 0": (lambda: options(width=-1.0), NOT_READ.format("width must be > 0")),
    "parameters a list": (lambda: written(parameters=[1]), r"\['parameters'\] must be a dict, got list"),
    "another parameter": (lambda: written(parameters={"bias": ONES}), NOT_READ.format("bias")),
    "a method": (lambda: written(parameters={"forward": ONES}), NOT_READ.format("forward")),
    "a parameter of another size": (lambda: written(parameters={"logit_decay": ONES}), NOT_READ.format("shape")),
    "a parameter of text": (
        lambda: written(parameters={"logit_decay": "0"}), r"parameters\['logit_decay'\] must be an array of real"
    ),
    "a parameter that is complex": (
        lambda: written(parameters={"logit_decay": np.ones(1) * 1j}), "array of real numbers, got .* complex128"
    ),
    "a parameter that is nan": (
        lambda: written(parameters={"logit_decay": NAN[2:3]}), r"parameters\['logit_decay'\] must be finite .* got nan"
    ),
    "sizes of other neurons": (
        lambda: written(LIF(6, granularity="channel"), num_features=[5]), NOT_READ.format("shape")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_any_kind_are_an_error_that_names_the_node(name):
    make, message = METADATA[name]
    with pytest.raises(ValueError, match=rf"^asgl_cuda\.from_nir: node '_0' \(LIF?\).*{message}"):
        from_nir(make())


def test_metadata_of_others_are_left_alone():
    x_seq = torch.randn(20, 5, 6)
    for node in (nir_lif(tau=3e-4, r=3.0), cuba(), nir.Scale(ONES)):
        expected = from_nir(graph_of(node))(x_seq)
        for value in (None, {}, {"other": [1]}, {1: 2}):
            assert torch.equal(from_nir(graph_of(with_(node, metadata=value)))(x_seq), expected)
    del node.metadata
    assert torch.equal(from_nir(graph_of(node))(x_seq), expected)


def structure(nodes=None, edges=None):
    graph = graph_of(nir_lif(), nir_lif())
    graph.nodes = graph.nodes if nodes is None else nodes(graph.nodes)
    graph.edges = graph.edges if edges is None else edges
    return graph


LINE = [("in", "0"), ("0", "1"), ("1", "out")]
SHAPES = nir.Conv2d((3, 3), np.ones((2, 3, 3, 3), np.float32), 1, 0, 1, 1, np.ones(2, np.float32))
# At rest below the threshold, since the layer warns otherwise.
IMAGE = with_(nir_lif(), **{name: np.ones((3, 5, 4)) for name in ("tau", "r", "v_leak", "v_reset")})
IMAGE.v_threshold = np.full((3, 5, 4), 2.0)


def changed(layer=None, **numbers):
    """The graph that to_nir writes for the layer, with other values in the node."""
    graph = to_nir(layer or LIF(), torch.rand(2, 3, 6))
    for name, value in numbers.items():
        getattr(graph.nodes["_0"], name)[:] = value
    return graph


def without_scale():
    graph = to_nir(LIF(scale_output=True), torch.rand(2, 3, 6))
    del graph.nodes["_0_scale"]
    graph.edges[:] = [edge for edge in graph.edges if "_0_scale" not in edge] + [("_0", "output")]
    return graph


SOME = np.array([2, 3, 2, 4, 5, 3])
GRAPHS = {
    "names that are no strings": (
        lambda: structure(lambda nodes: nodes | {0: nir_lif()}), "the names of nodes must be strings, got 0"
    ),
    "nodes in a list": (lambda: structure(lambda nodes: list(nodes.items())), "nodes of the graph must be a dict"),
    "edges of three": (lambda: structure(edges=[*LINE, ("0", "1", "out")]), "edges of the graph must be pairs"),
    "edges of one": (lambda: structure(edges=[*LINE, "0"]), "edges of the graph must be pairs of names"),
    "no edges": (lambda: structure(edges=[]), r"node '0' \(LIF\) has no input"),
    "edges of nothing": (lambda: with_(structure(), edges=None), "edges of the graph must be pairs of names, got None"),
    "an edge into the input": (lambda: structure(edges=[*LINE, ("0", "in")]), r"node 'in' \(Input\) has an input, '0'"),
    "an edge out of the output": (
        lambda: structure(edges=[("in", "0"), ("0", "out"), ("out", "1")]),
        r"node 'out' \(Output\) must be the last node, got '1' after it",
    ),
    "a name of two lines": (lambda: structure(edges=[*LINE, ("a\nb", "1")]), r"the edge 'a\\nb' -> 1 is between"),
    "a node after itself": (lambda: structure(edges=[*LINE, ("1", "1")]), "recurrent .*, got the cycle 1 -> 1"),
    "two outputs": (
        lambda: structure(lambda nodes: nodes | {"more": nir.Output(np.array([6]))}), r"one Output .* \['out', 'more'\]"
    ),
    "no output": (lambda: structure(lambda nodes: {"in": nodes["in"]}, []), r"must have one Output node, got \[\]"),
    "no nodes": (lambda: structure(lambda nodes: {}, []), r"must have one Input node, got \[\]"),
    "weights for others": (
        lambda: graph_of(nir_lif(), nir.Linear(np.ones((3, 5)))),
        r"node '1' \(Linear\): its weight takes 5 neurons, got shape \[6\]",
    ),
    "neurons for others": (
        lambda: graph_of(nir.Linear(np.ones((5, 6))), nir_lif()),
        r"node '1' \(LIF\): its arrays are for neurons of shape \[6\], got \[5\]",
    ),
    "a scale for others": (
        lambda: graph_of(nir_lif(), nir.Scale(np.ones(5))), r"node '1' \(Scale\): its arrays are for .* \[5\]"
    ),
    "a convolution of a row": (
        lambda: graph_of(nir_lif(), SHAPES), r"node '1' \(Conv2d\): takes neurons of shape \[3, size, size\], got \[6\]"
    ),
    "a window that is too large": (
        lambda: graph_of(IMAGE, SHAPES, SHAPES), r"node '2' \(Conv2d\): takes .* \[3, size, size\], got \[2, 3, 2\]"
    ),
    "a pooling of nothing": (
        lambda: graph_of(IMAGE, pool(kernel_size=np.array([6, 2]))),
        r"node '1' \(AvgPool2d\): its window of \[6, 2\] is larger than its input \[3, 5, 4\]",
    ),
    "dimensions that are not there": (
        lambda: graph_of(IMAGE, nir.Flatten(np.array([3, 5, 4]), 0, 3)), "end_dim 3 do not fit a shape of 3 dimensions"
    ),
    "dimensions in another order": (
        lambda: graph_of(IMAGE, with_(nir.Flatten(np.array([3, 5, 4]), 0, 1), start_dim=2)),
        "start_dim must not be after end_dim, got 2 and 1",
    ),
    "dimensions of which nobody knows": (
        lambda: graph_of(with_(nir.Flatten(None, 0), start_dim=-3)), "must be counted from the front"
    ),
    "dimensions that are not declared": (
        lambda: graph_of(with_(nir.Flatten(np.array([3, 5]), 0), start_dim=-3)), "not fit a shape of 2 dimensions"
    ),
    "a sum of two shapes": (
        lambda: graph_of(
            nir.Linear(np.ones((5, 6))), nir_lif(), edges=[("in", "0"), ("in", "1"), ("0", "out"), ("1", "out")]
        ),
        r"node 'out' \(Output\): all its inputs must have one shape, got \[5\] of '0', \[6\] of '1'",
    ),
    "tau of a current": (lambda: graph_of(cuba(tau_syn=5e-5)), r"\(CubaLIF\): tau_syn must be at least dt = 0.0001, "),
    "tau behind it": (lambda: graph_of(cuba(tau_mem=5e-5)), r"\(CubaLIF\): tau_mem must be at least dt = 0.0001, got"),
    "rests": (lambda: graph_of(cuba(nir.CubaLI, v_leak=SOME)), r"v_leak must be the same for all neurons, got 2 to 5"),
    "another gain": (lambda: changed(LeakyIntegrator(), r=4), r"numbers say input_gain 2 and .* says 1, written"),
    "two inputs": (
        lambda: graph_of(nir_lif(), more=nir.Input(input_type={"input": np.array([6])})),
        r"one Input node, got \['in', 'more'\]",
    ),
    "recurrent": (
        lambda: graph_of(nir_lif(), nir_lif(), edges=[("in", "0"), ("0", "1"), ("1", "0"), ("1", "out")]),
        "recurrent graphs are not supported, got the cycle",
    ),
    "tau": (lambda: graph_of(nir_lif(tau=5e-5)), r"node '0' \(LIF\): tau must be at least dt = 0.0001, got 5e-05"),
    "r": (lambda: graph_of(nir_lif(r=SOME - 2)), r"node '0' \(LIF\): r must be > 0, got 0 to 3"),
    "v_reset": (lambda: graph_of(nir_lif(v_leak=SOME)), r"v_reset must be the same for all neurons, got -5 to -2"),
    "some without decay": (lambda: graph_of(nir_lif(tau=SOME / 2e4)), r"decay.* must be in \(0, 1\), got 0 to 0.6"),
    "another tau": (lambda: changed(tau=4e-4, r=4), r"numbers say decay 0.75 and metadata\['asgl_cuda'\] says 0.5"),
    "another threshold": (lambda: changed(v_threshold=2), "numbers say v_threshold 2 and .* says 1, written with dt"),
    "no scale": (without_scale, r"node '_0' \(LIF\) has scale_output in its metadata, but no Scale node"),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_any_kind_are_one_error(name):
    make, message = GRAPHS[name]
    with pytest.raises(ValueError, match=rf"^asgl_cuda\.from_nir: .*{message}"):
        from_nir(make())


def test_another_step_than_the_one_written_is_an_error():
    with pytest.raises(ValueError, match=r"numbers say decay 0\.75 and .* says 0.5, written with dt = 0.0001"):
        from_nir(changed(), dt=5e-5)
    graph = changed()
    del graph.nodes["_0"].metadata["asgl_cuda"]
    assert from_nir(graph, dt=5e-5).get_submodule("_0").decay == pytest.approx(0.75)


def test_an_image_through_all_layers(tmp_path):
    """Shapes are propagated through every kind of node, and valid graphs are not refused."""
    conv = nir.Conv2d((5, 4), np.ones((4, 3, 3, 2), np.float32) / 9, (1, 2), (1, 0), (1, 1), 1, np.ones(4, np.float32))
    same = nir.Conv2d((5, 2), np.ones((4, 1, 3, 3), np.float32) / 9, 1, "same", 1, 4, np.ones(4, np.float32))
    nodes = (
        IMAGE, conv, same, pool(), nir.Flatten(np.array([4, 2, 1]), 0, -1),
        nir.Linear(np.ones((6, 8), np.float32) / 8), nir_lif(), nir.Scale(ONES),
    )  # fmt: skip
    graph = graph_of(*nodes)
    for each in (graph, rewritten(graph, tmp_path / "model.nir", type_check=False)):
        assert from_nir(each)(torch.rand(4, 2, 3, 5, 4)).shape == (4, 2, 6)


def test_a_scale_with_dimensions_that_neurons_do_not_have():
    x_seq = torch.randn(5, 2, 6)
    model = from_nir(graph_of(nir.Scale(np.arange(6.0)[None])))
    graph = to_nir(model, x_seq)
    assert graph.nodes["_0"].scale.shape == (6,)
    assert torch.equal(from_nir(graph)(x_seq), model(x_seq))
    by_batch = from_nir(graph_of(nir.Scale(np.arange(12.0).reshape(2, 6))))
    with pytest.raises(ValueError, match=r"0 \(Scale\): scale must have the shape of neurons, \[6\], got \[2, 6\]"):
        to_nir(by_batch, x_seq)
    with pytest.raises(ValueError, match=r"0 \(Scale\): scale must have the shape of neurons, \[5\], got \[1, 6\]"):
        to_nir(model, x_seq[..., :5])
