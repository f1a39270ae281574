"""An output takes its first input's memory where nobody else needs that, and nowhere else.

`spy.cc` stands between onnxruntime and the library, notes where tensors are, and can take the
permission away: the results with it and without have to be the same bits.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxnorm.ops import bodies, build
from onnxnorm.session import open_session
from tests.ops import test_norm as norms
from tests.ops import test_softmax as softmaxes
from tests.ops.calls import (
    FLOAT32,
    FLOAT64,
    INSTRUCTION_SETS,
    LIBRARY,
    NUMBER,
    TYPES,
    Array,
    instruction_set,
    needs_library,
)
from tests.ops.test_build import needs_compiler

pytestmark = [needs_library, needs_compiler]


@dataclass(frozen=True)
class Ran:
    """What a model gave, and for how many calls of ours the output stood where the input had."""

    outputs: tuple[bytes, ...]
    in_place: int
    elsewhere: int


class Spy:
    """Runs models with the operators of a library, watched."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.native = ctypes.CDLL(str(path))
        self.native.spy_on.argtypes = [ctypes.c_char_p, ctypes.c_int]

    def run(
        self,
        model: onnx.ModelProto,
        feeds: Mapping[str, Array],
        *,
        in_place: bool = True,
        threads: int = 1,
        library: Path | None = LIBRARY,
    ) -> Ran:
        assert self.native.spy_on(str(library).encode(), int(in_place))
        file = self.folder / "model.onnx"
        onnx.save(model, file)
        with open_session(file, threads=threads, libraries=[self.path]) as session:
            outputs = session.run(feeds)
        counts = ctypes.c_int(), ctypes.c_int()
        self.native.spy_counts(*map(ctypes.byref, counts))
        return Ran(tuple(v.tobytes() for v in outputs.values()), *(c.value for c in counts))


@pytest.fixture(scope="module")
def spy(tmp_path_factory: pytest.TempPathFactory) -> Spy:
    compiler = build.compiler()
    assert compiler is not None
    folder = tmp_path_factory.mktemp("spy")
    source = str(Path(__file__).with_name("spy.cc"))
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{build.SOURCES}", "-ldl"]
    subprocess.run([*compiler, source, *flags, "-o", str(folder / "spy.so")], check=True)
    return Spy(folder / "spy.so", folder)


def between(
    name: str,
    inputs: Sequence[Array],
    *,
    nodes: Sequence[onnx.NodeProto] = (),
    outputs: Sequence[str] = (),
    shape: Sequence[int | str] | None = None,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """G -> Cast -> X -> name -> Y -> Cast -> Z, with more nodes and outputs, and its feeds.

    Casts, because onnxruntime has no other elementwise operator for every type on the CPU.
    """
    dtype = inputs[0].dtype
    outer = FLOAT32 if dtype == FLOAT64 else FLOAT64
    names = [f"C{i}" for i in range(1, len(inputs))]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["G"], ["X"], to=NUMBER[dtype]),
            bodies.node(name, ["X", *names], "Y", element_type=NUMBER[dtype], **attributes),
            helper.make_node("Cast", ["Y"], ["Z"], to=NUMBER[outer]),
            *nodes,
        ],
        "between",
        [
            helper.make_tensor_value_info("G", NUMBER[outer], shape or inputs[0].shape),
            *(
                helper.make_tensor_value_info(n, NUMBER[dtype], a.shape)
                for n, a in zip(names, inputs[1:], strict=True)
            ),
        ],
        [helper.make_empty_tensor_value_info(n) for n in ("Z", *outputs)],
    )
    for output in graph.output:
        number = NUMBER[outer if output.name == "Z" else dtype]
        output.type.tensor_type.elem_type = number
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=bodies.IR_VERSION
    )
    feeds = dict(zip(["G", *names], [inputs[0].astype(outer), *inputs[1:]], strict=True))
    return bodies.add_functions(made), feeds


def some(*shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


OPERATORS: Final[dict[str, tuple[list[Array], dict[str, Any]]]] = {
    "TwoPassSoftmax": ([some(2, 3, 40)], {"axis": 1}),
    "TwoPassLogSoftmax": ([some(2, 3, 40)], {}),
    "TwoPassMaskedSoftmax": ([some(2, 3, 40), some(), some(3, 40)], {}),
    "TwoPassMaskedLogSoftmax": ([some(2, 3, 40), some(1), some(1, 40)], {"axis": 1}),
    "ChannelLayerNormalization": ([some(2, 3, 40), some(3, 1), some(3, 1)], {"axes": [1]}),
    "ChannelRMSNormalization": ([some(2, 3, 40), some(40)], {"axes": [2]}),
    "GroupNormalization": ([some(2, 4, 40), some(4), some(4)], {"num_groups": 2}),
    "GroupNormalizationSilu": ([some(2, 4, 40), some(4), some(4)], {"num_groups": 2}),
}


@pytest.mark.parametrize("name", bodies.OPERATORS)
def test_an_input_that_nobody_else_reads_is_overwritten(name: str, spy: Spy) -> None:
    inputs, attributes = OPERATORS[name]
    model, feeds = between(name, inputs, **attributes)
    found = spy.run(model, feeds)
    apart = spy.run(model, feeds, in_place=False)
    assert (found.in_place, found.elsewhere) == (1, 0)
    assert (apart.in_place, apart.elsewhere) == (0, 1)
    assert found.outputs == apart.outputs


# what else there is -> (further nodes, further outputs)
KEPT: Final[dict[str, tuple[list[onnx.NodeProto], list[str]]]] = {
    "X is a graph output": ([], ["X"]),
    "Y is a graph output": ([], ["Y"]),
    "X has a second reader": ([helper.make_node("Add", ["X", "Y"], ["W"])], ["W"]),
    "a view of X is read behind it": (
        [
            helper.make_node("Flatten", ["X"], ["V"]),
            helper.make_node("Flatten", ["Y"], ["U"]),
            helper.make_node("Sub", ["V", "U"], ["W"]),
        ],
        ["W"],
    ),
    "a branch reads X": (
        [
            helper.make_node(
                "If",
                ["condition"],
                ["W"],
                then_branch=helper.make_graph(
                    [helper.make_node("Abs", ["X"], ["T"])],
                    "then",
                    [],
                    [helper.make_tensor_value_info("T", TensorProto.FLOAT, None)],
                ),
                else_branch=helper.make_graph(
                    [helper.make_node("Abs", ["Y"], ["E"])],
                    "else",
                    [],
                    [helper.make_tensor_value_info("E", TensorProto.FLOAT, None)],
                ),
            )
        ],
        ["W"],
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_still_needed_is_not_overwritten(case: str, spy: Spy) -> None:
    inputs, attributes = OPERATORS["TwoPassSoftmax"]
    nodes, outputs = KEPT[case]
    model, feeds = between("TwoPassSoftmax", inputs, nodes=nodes, outputs=outputs, **attributes)
    if case == "a branch reads X":
        condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
        model.graph.input.append(condition)
        feeds["condition"] = np.array(True)
    found = spy.run(model, feeds)
    assert (found.in_place, found.elsewhere) == (0, 1)
    assert found.outputs == spy.run(model, feeds, in_place=False).outputs


@pytest.mark.parametrize("constant", [False, True], ids=["graph input", "initializer"])
def test_what_the_caller_owns_is_not_overwritten(constant: bool, spy: Spy) -> None:
    inputs, attributes = OPERATORS["TwoPassSoftmax"]
    model, feeds = between("TwoPassSoftmax", inputs, **attributes)
    model.graph.node.pop(0)
    del model.graph.input[:]
    if constant:
        model.graph.initializer.append(onnx.numpy_helper.from_array(inputs[0], "X"))
        feeds = {}
    else:
        shape = inputs[0].shape
        model.graph.input.append(helper.make_tensor_value_info("X", TensorProto.FLOAT, shape))
        feeds = {"X": inputs[0].copy()}
    found = spy.run(model, feeds)
    assert found.in_place == 0
    for array in feeds.values():
        np.testing.assert_array_equal(array, inputs[0])


@pytest.mark.parametrize("mask", [(5, 3, 40), (3, 40, 1, 1)], ids=str)
def test_an_output_that_is_larger_stands_elsewhere(mask: tuple[int, ...], spy: Spy) -> None:
    inputs = [some(1, 3, 40), some(), some(*mask)]
    found = spy.run(*between("TwoPassMaskedSoftmax", inputs))
    assert (found.in_place, found.elsewhere) == (0, 1)


@pytest.mark.parametrize("mask", [(5, 3, 40), (1, 3, 40)], ids=str)
def test_a_mask_of_unknown_rank_may_make_the_output_larger(mask: tuple[int, ...], spy: Spy) -> None:
    model, feeds = between("TwoPassMaskedSoftmax", [some(1, 3, 40), some(), some(*mask)])
    model.graph.input[2].type.tensor_type.ClearField("shape")
    found = spy.run(model, feeds)
    assert (found.in_place, found.elsewhere) == (0, 1)
    assert len(found.outputs[0]) == 8 * np.prod(mask)


def test_sizes_that_have_names_are_equal_by_them(spy: Spy) -> None:
    inputs = [some(2, 3, 40), some(), some(40)]
    found = spy.run(*between("TwoPassMaskedSoftmax", inputs, shape=["batch", 3, "length"]))
    assert found.in_place == 0, "whether length is 40 is not known"
    found = spy.run(*between("TwoPassSoftmax", inputs[:1], shape=["batch", 3, "length"]))
    assert found.in_place == 1


def test_calls_in_a_row_all_stand_in_one_place(spy: Spy) -> None:
    """A convolution, as it stands in front of a norm in a network, and three calls behind it."""
    shapes = {"scale": (8, 1, 1), "bias": (8, 1, 1), "W": (8, 3, 3, 3), "gamma": (8,)}
    affine = ["scale", "bias"]
    nodes = [
        helper.make_node("Conv", ["X", "W"], ["A"], pads=[1, 1, 1, 1]),
        bodies.node("ChannelLayerNormalization", ["A", *affine], "B", axes=[1]),
        bodies.node("GroupNormalizationSilu", ["B", "gamma", "gamma"], "C", num_groups=4),
        bodies.node("TwoPassSoftmax", ["C"], "D", axis=1),
        helper.make_node("GlobalAveragePool", ["D"], ["Y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "row",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", 3, 20, 24])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(some(*s), name) for name, s in shapes.items()],
    )
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=bodies.IR_VERSION
    )
    model, feeds = bodies.add_functions(made), {"X": some(2, 3, 20, 24)}
    found = spy.run(model, feeds, threads=2)
    assert (found.in_place, found.elsewhere) == (3, 0)
    assert found.outputs == spy.run(model, feeds, in_place=False).outputs


# Each way through the kernels that the sizes below do not reach. Here what stands elsewhere
# is written past the caches, and what stands in place is not.
LARGE: Final = [
    ("TwoPassSoftmax", (2, 2**22 + 9), {"axis": -1}),
    ("TwoPassLogSoftmax", (2, 2**22 + 9), {"axis": -1}),
    ("TwoPassSoftmax", (1, 21, 640, 640), {"axis": 1}),
    ("TwoPassSoftmax", (1, 1100, 8000), {"axis": 1}),
    ("ChannelLayerNormalization", (1, 700, 12000), {"axes": [1]}),
    ("GroupNormalizationSilu", (1, 64, 131_200), {"num_groups": 2}),
]


@pytest.mark.parametrize(("name", "shape", "attributes"), LARGE, ids=str)
def test_large_tensors_come_out_the_same(
    name: str, shape: tuple[int, ...], attributes: dict[str, Any], spy: Spy
) -> None:
    inputs = [some(*shape)]
    inputs[0].flat[7] = np.nan  # its row is done again, after the sums
    if name == "ChannelLayerNormalization":
        inputs += [some(shape[1], 1), some(shape[1], 1)]
    elif name == "GroupNormalizationSilu":
        inputs += [some(shape[1]), some(shape[1])]
    model, feeds = between(name, inputs, **attributes)
    found = spy.run(model, feeds, threads=2)
    assert found.in_place == 1
    assert found.outputs == spy.run(model, feeds, threads=2, in_place=False).outputs


@st.composite
def calls(draw: Any) -> tuple[str, list[Array], dict[str, Any]]:
    """An operator with any shape, type, axes, mask, scale and bias."""
    if draw(st.booleans()):
        values, axis, mask, factor = draw(softmaxes.calls())
        log = "Log" if draw(st.booleans()) else ""
        if mask is None:
            return f"TwoPass{log}Softmax", [values], {"axis": axis}
        inputs = [values, np.full([1], factor, values.dtype), mask]
        axis = axis % values.ndim - max(values.ndim, mask.ndim)
        return f"TwoPassMasked{log}Softmax", inputs, {"axis": axis}
    values, axes, scale, bias = draw(norms.calls())
    if draw(st.booleans()):
        return "ChannelRMSNormalization", [values, scale], {"axes": axes}
    return "ChannelLayerNormalization", [values, scale, bias], {"axes": axes}


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_bits_do_not_depend_on_where_the_output_stands(isa: str, spy: Spy) -> None:
    @given(calls(), st.sampled_from([1, 2]))
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(call: tuple[str, list[Array], dict[str, Any]], threads: int) -> None:
        name, inputs, attributes = call
        model, feeds = between(name, inputs, **attributes)
        found = spy.run(model, feeds, threads=threads)
        shape = np.broadcast_shapes(inputs[0].shape, *(a.shape for a in inputs[2:]))
        if inputs[0].size:
            ranked = not name.startswith("TwoPassMasked") or inputs[2].ndim > 0
            assert found.in_place == (ranked and inputs[0].shape == shape)
        assert found.outputs == spy.run(model, feeds, threads=threads, in_place=False).outputs

    with instruction_set(isa):
        check()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_group_norm_in_any_type(dtype: Any, spy: Spy) -> None:
    for name in ("GroupNormalization", "GroupNormalizationSilu"):
        inputs = [some(2, 6, 37, dtype=dtype), some(6, dtype=dtype), some(6, dtype=dtype)]
        model, feeds = between(name, inputs, num_groups=3)
        found = spy.run(model, feeds)
        assert found.in_place == 1
        assert found.outputs == spy.run(model, feeds, in_place=False).outputs


@pytest.mark.skipif(sys.platform != "linux", reason="the emulation is built on Linux")
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_kernels_for_gpus_overwrite_their_input_too(
    order: str, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXNORM_EMULATED_ORDER", order)
    emulated = build.build(build.BUILT, build.Kind.EMULATED).library
    rows = [((7, 100), 1), ((5, 1500), 1), ((2, 70_001), 1), ((2, 65, 40), 1)]
    calls: list[tuple[str, list[Array], dict[str, Any]]] = []
    calls += [("TwoPassSoftmax", [some(*shape)], {"axis": axis}) for shape, axis in rows]
    for shape, axes in (((2, 5000), [1]), ((1, 300, 40), [1]), ((3, 5, 4, 9), [1, 3])):
        inputs = [some(*shape), some(1), some(1)]
        calls.append(("ChannelLayerNormalization", inputs, {"axes": axes}))
    for name, inputs, attributes in calls:
        model, feeds = between(name, inputs, **attributes)
        found = spy.run(model, feeds, library=emulated)
        assert found.in_place == 1
        assert found.outputs == spy.run(model, feeds, in_place=False, library=emulated).outputs
