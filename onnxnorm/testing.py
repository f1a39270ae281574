"""What a pass's tests need: text models in, text models out, and proof that both agree.

    assert_rewrites(before, after, FoldBatchnorm())
    assert_refuses(before, FoldBatchnorm(), "training_mode is set")

Models are written in ONNX's text form (onnx.parser). Public, because authors of passes need it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import parser, printer

from onnxnorm import staging, storage, verifier
from onnxnorm.facts import Facts
from onnxnorm.module import SITE_KEY, Module
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.rewrite import Pass
from onnxnorm.sizes import find_sizes
from onnxnorm.storage import Stored


def run(model: str | onnx.ModelProto, *passes: Pass) -> Run:
    """Run passes to a fixed point on a model in memory.

    Raises:
        OnnxNormError: As `Pipeline.run` does.
    """
    return Pipeline(passes).run(_stored(model))


def assert_rewrites(
    before: str | onnx.ModelProto, after: str | onnx.ModelProto, *passes: Pass, parity: bool = True
) -> Run:
    """Assert that passes turn one model into the other, and that both agree.

    The graphs are compared as text, initializers sorted by name and value_info left out; the
    result must satisfy onnx.checker wherever `before` does, running the passes again must change
    nothing, and the outputs must agree in onnxruntime within the derived tolerance.

    Raises:
        AssertionError: One of these does not hold.
    """
    done = run(before, *passes)
    assert text(done.stored) == text(_stored(after)), f"\n{text(done.stored)}"
    assert_sound(before, done, *passes)
    if parity:
        assert_parity(before, done.stored.complete())
    return done


def assert_sound(before: str | onnx.ModelProto, done: Run, *passes: Pass) -> None:
    """Assert that a run's result is valid and that the passes change nothing in it.

    Raises:
        AssertionError: One of these does not hold.
    """
    if verifier.checker_complaint(_stored(before)) is None:
        assert verifier.checker_complaint(done.stored) is None
    again = Pipeline(passes).run(storage.from_proto(done.stored.complete()))
    assert not again.applied, "running the passes on their own result changed it again"
    sites = {r.site for r in done.applied}
    for node in _all_nodes(done.stored.proto):
        named = [e.value for e in node.metadata_props if e.key == SITE_KEY]
        assert len(named) <= 1, f"{node.name} names several sites: {named}"
        assert sites.issuperset(named), f"{node.name} names {named}, which was not applied"


def assert_refuses(before: str | onnx.ModelProto, rule: Pass, *reasons: str) -> Run:
    """Assert that a pass changes nothing and gives these reasons, in any order.

    Raises:
        AssertionError: It changed something, or a reason is missing.
    """
    stored = _stored(before)
    done = Pipeline([rule]).run(stored)
    assert not done.applied, f"{rule.name} was applied at {[r.site for r in done.applied]}"
    assert done.stored is stored
    given = [r.reason for r in done.remarks]
    for reason in reasons:
        assert any(reason in g for g in given), f"no remark says {reason!r}: {given}"
    return done


def assert_parity(
    before: str | onnx.ModelProto,
    after: str | onnx.ModelProto,
    *,
    seed: int = 0,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> None:
    """Assert |after - truth| <= 2 |before - truth| + 4 ulp, as `onnxnorm.parity` derives it.

    Raises:
        AssertionError: An output does not agree.
        ParityError: onnxruntime cannot run `before`.
    """
    from onnxnorm.parity import ParityChecker

    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        staging.save(_stored(before), first)
        staging.save(_stored(after), second)
        with ParityChecker(first, seed=seed, shapes=shapes) as checker:
            result = checker.check(second)
    assert result.passed, result.to_json()


def operators(stored: Stored) -> Counter[tuple[str, tuple[int | None, ...] | None]]:
    """What a model runs: how often each operator gives a result of each shape.

    Sizes that differ from run to run are None, as is a shape whose rank is not known. Constants and
    what only moves constants do not count. Two models with equal counts do the same work.
    """
    facts = Facts(Module(stored))
    sizes = find_sizes(facts)
    found: Counter[tuple[str, tuple[int | None, ...] | None]] = Counter()
    for node in facts.module.nodes():
        if all(facts.constant(v) is not None for v in node.outputs if v.name):
            continue
        dims = sizes.of(node.outputs[0])
        shape = None if dims is None else tuple(d if isinstance(d, int) else None for d in dims)
        found[node.op, shape] += 1
    return found


def text(stored: Stored) -> str:
    """A graph in text form: what a golden is compared with."""
    graph = onnx.GraphProto()
    graph.CopyFrom(stored.complete().graph)
    ordered = sorted(graph.initializer, key=lambda t: t.name)
    tensors = [onnx.TensorProto.FromString(t.SerializeToString()) for t in ordered]
    del graph.initializer[:]
    graph.initializer.extend(_in_decimal(t) for t in tensors)
    del graph.value_info[:]
    return str(printer.to_text(graph))


def _in_decimal(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The tensor with its values in typed fields, which is how the parser stores them."""
    if not tensor.HasField("raw_data"):
        return tensor
    values = onnx.numpy_helper.to_array(tensor)
    return onnx.helper.make_tensor(
        tensor.name, tensor.data_type, list(tensor.dims), values.flatten()
    )


def _stored(model: str | onnx.ModelProto) -> Stored:
    return storage.from_proto(parser.parse_model(model) if isinstance(model, str) else model)


def _all_nodes(model: onnx.ModelProto) -> Sequence[onnx.NodeProto]:
    found: list[onnx.NodeProto] = []
    frontier = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    while frontier:
        node = frontier.pop()
        found.append(node)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                frontier += attribute.g.node
            for graph in attribute.graphs:
                frontier += graph.node
    return found
