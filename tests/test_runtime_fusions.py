"""What the predicate calls wrongly fused is what the installed onnxruntime gets wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import parser

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.norms import find_norms
from onnxnorm.passes.lower_norms import LowerNorms
from onnxnorm.runtime_fusions import misfused
from onnxnorm.testing import run

Array = NDArray[Any]


@dataclass(frozen=True)
class Chain:
    """A chain of primitives that looks like a norm.

    Attributes:
        centred: Whether a mean is subtracted first.
        exponent: Of Pow.
        keepdims: Of the two means.
        epsilon: Its shape.
        first: Whether epsilon is the first input of Add.
        swapped: Whether the input is subtracted from the mean.
        wide: Whether scale and bias expand the input.
        division: How the deviation comes in.
        bias: Whether something is added at last.
        opset: Of the model.
    """

    centred: bool = True
    exponent: float = 2.0
    keepdims: tuple[int, int] = (1, 1)
    epsilon: str = ""
    first: bool = False
    swapped: bool = False
    wide: bool = False
    division: str = "div"
    bias: bool = True
    opset: int = 17

    def model(self) -> onnx.ModelProto:
        """The chain as a model; with keepdims=0 a cube, along all of whose axes it broadcasts."""
        dims = "4,4,1" if self.wide else "4,4,4"
        one, two = self.keepdims
        values = {"": "0.05", "[1]": "0.05", "[4]": "0.05, 0.5, 5.0, 50.0"}[self.epsilon]
        mean = self.mean("m", "x", one)
        sub = "d = Sub (m, x)" if self.swapped else "d = Sub (x, m)"
        add = "a = Add (e, v)" if self.first else "a = Add (v, e)"
        end = "q = Div (d, s)" if self.division == "div" else "i = Reciprocal (s) q = Mul (d, i)"
        tail = "w = Mul (q, g) y = Add (w, b)" if self.bias else "y = Mul (q, g)"
        text = f"""
        <ir_version: 8, opset_import: ["" : {self.opset}]>
        main (float[{dims}] x) => (float[?,?,?] y)
        <float two = {{{self.exponent}}}, float{self.epsilon} e = {{{values}}}, int64[1] l = {{-1}},
         float[4] g = {{1.0, 2.0, 0.5, 3.0}}, float[4] b = {{0.25, -0.5, 1.0, 0.0}}>
        {{
           {mean if self.centred else ""}
           {sub if self.centred else "d = Identity (x)"}
           p = Pow (d, two)
           {self.mean("v", "p", two)}
           {add}
           s = Sqrt (a)
           {end}
           {tail}
        }}
        """
        return parser.parse_model(text.replace("(d,", "(x,") if not self.centred else text)

    def mean(self, out: str, of: str, keepdims: int) -> str:
        if self.opset < 18:
            return f"{out} = ReduceMean <axes = [-1], keepdims = {keepdims}> ({of})"
        return f"{out} = ReduceMean <keepdims: int = {keepdims}> ({of}, l)"


def result(model: onnx.ModelProto, level: Any, x: Array) -> Array | None:
    """What onnxruntime makes of x; None where it fails."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return np.asarray(session.run(None, {"x": x})[0])
    except Exception:  # onnxruntime raises many types
        return None


def is_wrong(model: onnx.ModelProto) -> bool:
    """Whether the optimizations of onnxruntime change what a model computes."""
    levels = onnxruntime.GraphOptimizationLevel
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = (np.random.default_rng(5).standard_normal(shape) + 0.5).astype(np.float32)
    plain = result(model, levels.ORT_DISABLE_ALL, x)
    assert plain is not None
    fused = result(model, levels.ORT_ENABLE_ALL, x)
    if fused is None or fused.shape != plain.shape:
        return True
    return not np.allclose(fused, plain, rtol=1e-3, atol=1e-3, equal_nan=True)


def guard(model: onnx.ModelProto) -> Any:
    facts = Facts(Module(storage.from_proto(model)))
    return misfused(facts.module.main.nodes, facts)


def chains() -> Iterator[Chain]:
    """Every property by itself, and pairs of them, as a layer norm and as an RMS norm."""
    single: list[dict[str, Any]] = [
        {},
        {"exponent": 3.0},
        {"exponent": 4.0},
        {"keepdims": (1, 0)},
        {"epsilon": "[1]"},
        {"epsilon": "[4]"},
        {"first": True},
        {"wide": True},
        {"division": "reciprocal"},
        {"bias": False},
    ]
    own: list[dict[str, Any]] = [{"keepdims": (0, 1)}, {"keepdims": (0, 0)}, {"swapped": True}]
    for centred in (True, False):
        known = single + own if centred else single
        for opset in (13, 17, 18):
            for change in known:
                yield replace(Chain(centred, opset=opset), **change)
        for one, other in itertools.combinations(known[1:], 2):
            if not one.keys() & other.keys():
                yield replace(Chain(centred), **one, **other)


@pytest.mark.parametrize("chain", dict.fromkeys(chains()), ids=str)
def test_what_is_flagged_is_wrong_and_what_is_wrong_is_flagged(chain: Chain) -> None:
    model = chain.model()
    assert (guard(model) is not None) == is_wrong(model)


def test_some_are_wrong_and_some_are_not() -> None:
    flagged = [guard(chain.model()) is not None for chain in dict.fromkeys(chains())]
    assert 20 < sum(flagged) < len(flagged) - 20


@pytest.mark.parametrize(
    "chain",
    [
        Chain(exponent=4.0),
        Chain(keepdims=(0, 1)),
        Chain(keepdims=(1, 0)),
        Chain(first=True, exponent=3.0),
        Chain(swapped=True, exponent=4.0),
        Chain(wide=True),
        Chain(centred=False, wide=True),
        Chain(centred=False, epsilon="[4]"),
    ],
    ids=str,
)
def test_the_guarded_chain_is_left_alone(chain: Chain) -> None:
    model = chain.model()
    assert is_wrong(model)
    written = run(model, LowerNorms()).stored.complete()
    assert guard(written) is None
    assert not is_wrong(written)


def test_the_row_of_a_near_miss_warns() -> None:
    facts = Facts(Module(storage.from_proto(Chain(exponent=4.0).model())))
    (norm,) = find_norms(facts)
    assert not norm.recognised
    assert "the exponent 4 is taken for 2" in norm.warning
    (norm,) = find_norms(Facts(Module(storage.from_proto(Chain().model()))))
    assert norm.recognised
    assert not norm.warning
