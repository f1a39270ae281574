"""Streams in reports: writers, readers, what converts, at what price, and what blocks the rest."""

from __future__ import annotations

import html
import io
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

import onnxnorm
from onnxnorm.report_markdown import render_markdown
from onnxnorm.report_terminal import render_inspect
from tests.networks import Net, transformer


def inspected(model: onnx.ModelProto, **options: Any) -> dict[str, Any]:
    return onnxnorm.inspect(model, **options).to_json()


def printed(report: dict[str, Any], *, verbose: bool = False) -> str:
    out = io.StringIO()
    render_inspect(report, Console(file=out, width=300), verbose=verbose)
    return " ".join(out.getvalue().split())


def test_a_stream_that_converts() -> None:
    report = inspected(transformer(stem="gelu"))
    (stream,) = report["streams"]
    assert stream["features"] == 16
    assert stream["norms"] == stream["converts"] == [n["output"] for n in _layer_norms(report)]
    assert stream["blocked"] == []
    assert stream["sites"] == [_layer_norms(report)[0]["site"]]
    (price,) = stream["price"]
    assert "5 converted, which saves 5 means" in price
    assert "1 centered at run time" in price
    assert price.endswith("at the price of 2")
    assert any("the linear layer" in w for w in stream["writers"])
    assert len(stream["readers"]) == 5
    text = printed(report)
    assert "16 features: 5 of 5 norms would convert" in text
    assert price in text
    assert "5 readers: " in text
    markdown = render_markdown(report)
    assert "<summary>Streams (1)</summary>" in markdown
    assert "- 16 features: 5 of 5 norms would convert\n  - " in markdown
    assert "5 converted, which saves 5 means" in markdown


def test_the_price_that_decided_is_in_every_report() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 4, 6]), 6, 8)
    for _ in range(8):  # 16 norms, and 8 token mixers whose mean only a centering takes out
        turned = net.op("Transpose", net.norm(x, 8), perm=[0, 2, 1])
        x = net.op("Add", x, net.op("Transpose", net.mlp(turned, 4), perm=[0, 2, 1]))
        x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    model = net.model(net.op("Tanh", net.linear(net.norm(x, 8), 8, 3)))
    report = inspected(model, passes="stream-fold-mean{centering=1.2}")
    (stream,) = report["streams"]
    (price,) = stream["price"]
    assert price.startswith("17 converted, which saves 17 means; 8 centered at run time (")
    assert price.endswith(
        ") at the price of 1.2 each; 8 biases added behind their norms at the price of 0.8 each"
    )
    assert price in printed(report)
    assert price in html.unescape(render_markdown(report)).replace("\\", "")
    dear = inspected(model, passes="stream-fold-mean{centering=2.5}")
    said = "costs 2.5 times what a converted norm saves"
    assert {said in b["reason"] for b in dear["streams"][0]["blocked"]} == {True}
    assert said in printed(dear, verbose=True)
    assert said in html.unescape(render_markdown(dear)).replace("\\", "")


def _layer_norms(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [n for n in report["norms"] if n["kind"] == "layer_norm"]


def test_every_norm_of_a_stream_says_what_became_of_it() -> None:
    report = inspected(transformer())
    norms = _layer_norms(report)
    assert {n["action"] for n in norms} == {"converted"}
    assert {n["into"] for n in norms} == {"rms_norm"}
    assert len({n["site"] for n in norms}) == 1
    assert "5 of 5 layer normalizations would be converted into RMS normalizations" in printed(
        report
    )


def test_a_stream_that_is_blocked_names_who_blocks_it() -> None:
    net = Net()
    x = net.op("Conv", net.input("x", ["n", 3, 6, 6]), net.matrix(8, 3, 1, 1), net.vector(8))
    deep = net.op("Conv", x, net.matrix(8, 1, 3, 3), net.vector(8), group=8, pads=[1] * 4)
    normed = net.norm(net.op("Transpose", x, perm=[0, 2, 3, 1]), 8)
    y = net.op("Add", net.op("Transpose", normed, perm=[0, 3, 1, 2]), deep)
    report = inspected(net.model(y))
    (stream,) = report["streams"]
    (blocked,) = stream["blocked"]
    said = f"the depthwise convolution '{deep}' reads this stream without a norm in front of it"
    assert (blocked["norm"], blocked["reason"], blocked["at"]) == (normed, said, deep)
    assert f"1 stays: {said}" in printed(report, verbose=True)
    (row,) = _layer_norms(report)
    assert (row["action"], row["reason"]) == ("refused", said)


def test_a_returned_hidden_state_comes_with_advice() -> None:
    report = inspected(transformer(layers=1, hidden=True))
    (stream,) = report["streams"]
    assert stream["converts"] == []
    assert {b["advice"] for b in stream["blocked"]} == {
        "If this output is not needed, leave it out of the export."
    }


def test_an_rms_stream_is_shown_and_left() -> None:
    net = Net(opset=23)
    x = net.linear(net.input("x", ["n", 5]), 5, 8)
    report = inspected(net.model(net.op("RMSNormalization", x, net.vector(8, 1.0), axis=-1)))
    (stream,) = report["streams"]
    assert stream["blocked"][0]["reason"] == "it is an RMS norm and takes no mean out"


@pytest.mark.parametrize("passes", ["none", "fold-batchnorm"])
def test_without_the_pass_streams_are_shown_all_the_same(passes: str) -> None:
    (stream,) = inspected(transformer(layers=1), passes=passes)["streams"]
    assert stream["converts"] == []
    assert {b["reason"] for b in stream["blocked"]} == {"no pass that ran changes it"}


def test_a_skipped_site_keeps_all_its_norms() -> None:
    model = transformer(layers=1)
    first = inspected(model)["norms"][0]
    result = onnxnorm.optimize(model, skip=[first["site"]], parity=False, latency=False)
    report = result.report.to_json()
    assert {n["action"] for n in _layer_norms(report)} == {"kept"}
    assert not report["streams"][0]["converts"]


def test_optimize_proves_what_it_did() -> None:
    result = onnxnorm.optimize(transformer(layers=1), latency=False, time_budget=10.0)
    report = result.report.to_json()
    assert report["parity"]["passed"]
    assert {n["action"] for n in _layer_norms(report)} == {"converted"}


def test_what_is_lowered_first_and_then_converted_is_converted() -> None:
    net = Net(opset=17, dtype=np.float16)
    x = net.op("Cast", net.linear(net.input("x", ["n", 4]), 4, 8), to=onnx.TensorProto.FLOAT)
    small = net.op("Cast", net.scalar(0.01), to=onnx.TensorProto.FLOAT)
    off = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    square = net.op("ReduceMean", net.op("Mul", off, off), axes=[-1])
    normed = net.op("Div", off, net.op("Sqrt", net.op("Add", square, small)))
    model = net.model(normed)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    report = inspected(model)
    (row,) = _layer_norms(report)
    assert (row["action"], row["into"]) == ("converted", "rms_norm")
