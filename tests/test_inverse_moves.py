"""Moves that undo each other, and those that only look like it."""

from __future__ import annotations

import pytest
from onnx import parser

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.inverse_moves import undone
from onnxnorm.module import Module
from onnxnorm.sizes import find_sizes
from onnxnorm.transfer import Transfer

WORDS = {
    "swap": "Transpose <perm = [0, 2, 1]>",
    "turn": "Transpose <perm = [1, 2, 0]>",
    "back": "Transpose <perm = [2, 0, 1]>",
    "flip": "Transpose <perm = [1, 0, 2]>",
}


def found(body: str, x: str = "N,L,6") -> tuple[str, str] | None:
    """The pair around the Mul of a graph."""
    for word, meaning in WORDS.items():
        body = body.replace(word, meaning)
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[{x}] x) => (float y)
    <float two = {{2.0}}, int64[1] last = {{-1}}, int64[4] four = {{0, 0, 2, 3}},
     int64[3] three = {{0, 0, 6}}, int64[3] other = {{0, 0, 3}}>
    {{ {body} y = ReduceSum <keepdims = 0> (z) }}
    """
    facts = Facts(Module(storage.from_proto(parser.parse_model(text))))
    (node,) = [n for n in facts.module.nodes() if n.op == "Mul"]
    pair = undone(node.inputs[0], node.outputs[0], Transfer(facts, find_sizes(facts)))
    return None if pair is None else (pair[0].name, pair[1].name)


@pytest.mark.parametrize(
    ("body", "pair"),
    [
        ("a = swap (x) m = Mul (a, two) z = swap (m)", "xz"),
        ("a = turn (x) m = Mul (a, two) z = back (m)", "xz"),
        ("a = Unsqueeze (x, last) m = Mul (a, two) z = Squeeze (m, last)", "xz"),
        ("a = Reshape (x, four) m = Mul (a, two) z = Reshape (m, three)", "xz"),
        (
            ("b = Relu (x) t = swap (b) a = Unsqueeze (t, last) m = Mul (a, two)"
            " c = Squeeze (m, last) z = swap (c)"),
            "bz",
        ),
        # an inner pair, where the outer one is none
        (
            ("t = flip (x) a = Unsqueeze (t, last) m = Mul (a, two)"
            " c = Squeeze (m, last) z = swap (c)"),
            "tc",
        ),
        # another order back
        ("a = turn (x) m = Mul (a, two) z = turn (m)", ""),
        # what is between is read by others
        (
            ("a = swap (x) m = Mul (a, two) z = swap (m)"
            " r = Relu (a)"),
            "",
        ),
        # no moves at all
        ("a = Relu (x) m = Mul (a, two) z = Relu (m)", ""),
    ],
)  # fmt: skip
def test_pairs(body: str, pair: str) -> None:
    assert found(body) == (tuple(pair) or None)


def test_sizes_that_are_equal_by_chance_are_not_enough() -> None:
    # The same shape comes back, with its entries in another order.
    body = "a = swap (x) m = Mul (a, two) z = Reshape (m, three)"
    assert found(body, x="N,6,6") is None
