"""Norms with fixed statistics are free: what is left is the network without them.

The graphs are those that both torch exporters write (models/exports/), in training form.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from functools import cache

import pytest
from onnx import TensorProto

from models import skeletons
from models.architectures import Exporter
from models.fixed import EXPORTERS, SYSTEMS, System, file_name
from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.norms import find_norms
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.registry import select
from onnxnorm.testing import assert_parity, assert_sound, operators
from tools import make_exports

CASES = [
    pytest.param(system, exporter, id=f"{system.name}-{exporter}")
    for system in SYSTEMS
    for exporter in EXPORTERS
]


@cache
def optimized(name: str) -> Run:
    """A graph after all passes that run by default."""
    return Pipeline(select(None)).run(storage.from_proto(skeletons.load(name)))


@pytest.mark.parametrize(("system", "exporter"), CASES)
def test_the_outputs_agree(system: System, exporter: Exporter) -> None:
    name = file_name(system.name, exporter)
    model, done = skeletons.load(name), optimized(name)
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, *select(None))


@pytest.mark.parametrize(("system", "exporter"), CASES)
def test_no_node_is_left_of_the_fixed_part(system: System, exporter: Exporter) -> None:
    done = optimized(file_name(system.name, exporter))
    left = {n.kind for n in find_norms(Facts(Module(done.stored)))} - {"softmax"}
    assert left <= set(system.remains), [r.reason for r in done.remarks if r.reason]


@pytest.mark.parametrize(("system", "exporter"), CASES)
def test_it_runs_nothing_that_the_network_without_it_does_not(
    system: System, exporter: Exporter
) -> None:
    done, bare = (
        operators(optimized(file_name(system.name, exporter, plain=plain)).stored)
        for plain in (False, True)
    )
    assert done <= bare  # it may be less: a bias behind the norm goes on into its readers


@pytest.mark.parametrize(("system", "exporter"), CASES)
def test_it_has_no_bias_that_the_network_without_it_lacks(
    system: System, exporter: Exporter
) -> None:
    done, bare = (
        optimized(file_name(system.name, exporter, plain=plain)).stored.proto.graph
        for plain in (False, True)
    )
    inputs = [Counter((n.op_type, len(n.input)) for n in g.node) for g in (done, bare)]
    assert inputs[0] <= inputs[1]


@pytest.mark.parametrize(("system", "exporter"), CASES)
def test_the_training_form_has_what_the_plain_twin_lacks(
    system: System, exporter: Exporter
) -> None:
    given, bare = (
        storage.from_proto(skeletons.load(file_name(system.name, exporter, plain=plain)))
        for plain in (False, True)
    )
    if system.name == "noiser":  # biases, which are no nodes
        count = [sum(len(n.input) for n in s.proto.graph.node) for s in (given, bare)]
        assert count[0] > count[1]
    else:  # of two, dynamo computes the weights itself, and folds the batch norms
        done = exporter == "dynamo" and system.name in ("sigma_vit", "ws_bcn_resnet")
        assert bool(operators(given) - operators(bare)) != done


@pytest.mark.parametrize("name", [file_name(s.name, e) for s in SYSTEMS for e in EXPORTERS])
def test_a_skeleton_is_a_text_that_stays_the_same(name: str) -> None:
    text = (skeletons.FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    model = skeletons.restore(text)
    again = skeletons.restore(skeletons.strip(model))
    assert again.graph.node == model.graph.node
    assert [t.dims for t in again.graph.initializer] == [t.dims for t in model.graph.initializer]
    assert text.isascii()
    assert len(text) < 60_000


def test_every_text_is_of_a_system() -> None:
    names = {
        f"{file_name(s.name, e, plain=plain)}.txt"
        for s in SYSTEMS
        for e in EXPORTERS
        for plain in (False, True)
    }
    assert {p.name for p in skeletons.FOLDER.iterdir()} == names


def test_drawn_weights_are_like_those_that_were_exported() -> None:
    model = skeletons.restore(
        "float 100 0.5 2 0.25 w\n<ir_version: 8, opset_import: ['' : 17]>\n"
        "main (float[n,100] x) => (float[n,100] y) { y = Mul (x, w) }".replace("'", '"')
    )
    (tensor,) = model.graph.initializer
    assert tensor.data_type == TensorProto.FLOAT
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    assert abs(values).min() >= 0.5
    assert abs(values).max() < 2
    assert 10 < (values < 0).sum() < 40


@pytest.mark.export
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize(("system", "exporter"), CASES)
def test_the_exporters_still_write_it_so(system: System, exporter: Exporter) -> None:
    for plain in (False, True):
        model = make_exports.exported(system.name, exporter, plain=plain)
        kept = skeletons.load(file_name(system.name, exporter, plain=plain))
        assert [n.op_type for n in model.graph.node] == [n.op_type for n in kept.graph.node]
        done = Pipeline(select(None)).run(storage.from_proto(model))
        assert_parity(model, done.stored.complete())
