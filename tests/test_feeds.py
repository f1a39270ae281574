"""Inputs: deterministic, varied, within what consumers allow, and the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxnorm.errors import UsageError
from onnxnorm.feeds import Feed, candidates, make_feeds, smaller


def info(name: str, kind: int, shape: Sequence[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    inputs: Sequence[onnx.ValueInfoProto],
    nodes: Sequence[onnx.NodeProto] = (),
    weights: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()]
    outputs = [onnx.ValueInfoProto(name=o) for n in nodes for o in n.output]
    return helper.make_model(helper.make_graph(list(nodes), "g", list(inputs), outputs, tensors))


IMAGE = [info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])]
FLOAT = [info("x", TensorProto.FLOAT, ["N", 4])]


def test_the_same_seed_gives_the_same_inputs_and_another_gives_others() -> None:
    first, again, other = (make_feeds(model(IMAGE), seed=s) for s in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a.values["image"], b.values["image"])
        assert a.description == b.description
        assert not np.array_equal(a.values["image"], c.values["image"])


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
def test_samples_share_runs_where_the_first_axis_is_symbolic(count: int) -> None:
    feeds = make_feeds(model(IMAGE), count=count)
    assert sum(feed.samples for feed in feeds) == count
    assert [feed.values["image"].shape[0] for feed in feeds] == [f.samples for f in feeds]


def test_a_fixed_batch_has_one_run_per_sample_each_of_another_distribution() -> None:
    feeds = make_feeds(model([info("x", TensorProto.FLOAT, [1, 1000])]))
    assert len(feeds) == 8
    deviations = {round(float(feed.values["x"].std()), 2) for feed in feeds}
    assert len(deviations) >= 6


def test_symbolic_axes_have_two_sizes_and_one_size_per_run() -> None:
    inputs = [info("ids", TensorProto.INT64, ["batch", "seq"]),
              info("mask", TensorProto.INT64, ["batch", "seq"])]  # fmt: skip
    feeds = make_feeds(model(inputs))
    assert all(feed.values["ids"].shape == feed.values["mask"].shape for feed in feeds)
    assert len({feed.values["ids"].shape[1] for feed in feeds}) == 2


def test_a_sum_of_symbols_is_their_sum() -> None:
    inputs = [info("ids", TensorProto.INT64, ["batch", "seq"]),
              info("past", TensorProto.FLOAT, ["batch", 2, "past_len", 8]),
              info("mask", TensorProto.INT64, ["batch", "past_len + seq"])]  # fmt: skip
    for feed in make_feeds(model(inputs)):
        sizes = {name: value.shape for name, value in feed.values.items()}
        assert sizes["mask"][1] == sizes["ids"][1] + sizes["past"][2]


def test_unnamed_axes_of_the_same_place_agree() -> None:
    inputs = [info(name, TensorProto.INT64, [None, None]) for name in ("ids", "mask", "types")]
    for feed in make_feeds(model(inputs)):
        assert len({value.shape for value in feed.values.values()}) == 1


@pytest.mark.parametrize("through", [[], ["Cast"], ["Cast", "Identity"]])
def test_indices_stay_within_the_table(through: list[str]) -> None:
    nodes, name = [], "ids"
    for op in through:
        attributes: dict[str, Any] = {"to": TensorProto.INT64} if op == "Cast" else {}
        nodes.append(helper.make_node(op, [name], [name + "_"], **attributes))
        name += "_"
    nodes.append(helper.make_node("Gather", ["table", name], ["y"]))
    ids = [info("ids", TensorProto.INT32, ["N", 64])]
    feeds = make_feeds(model(ids, nodes, {"table": np.zeros((3, 2), np.float32)}))
    values = np.concatenate([feed.values["ids"].reshape(-1) for feed in feeds])
    assert set(values.tolist()) == {0, 1, 2}


def test_positions_shifted_before_the_table_leave_room_for_the_shift() -> None:
    nodes = [helper.make_node("Add", ["p", "two"], ["q"]),
             helper.make_node("Gather", ["table", "q"], ["y"])]  # fmt: skip
    weights = {"table": np.zeros((6, 2), np.float32), "two": np.int64(2)}
    inputs = [info("p", TensorProto.INT64, ["N", 64])]
    for feed in make_feeds(model(inputs, nodes, weights)):
        assert feed.values["p"].max() < 4


def test_one_hot_depth_bounds_its_indices() -> None:
    node = helper.make_node("OneHot", ["i", "depth", "v"], ["y"])
    weights = {"depth": np.int64(5), "v": np.zeros(2, np.float32)}
    for feed in make_feeds(model([info("i", TensorProto.INT64, [64])], [node], weights)):
        assert 0 <= feed.values["i"].min() <= feed.values["i"].max() < 5


def test_masks_are_ones_with_zeros_at_the_end_and_plain_ones_as_a_fallback() -> None:
    inputs = [info("attention_mask", TensorProto.INT64, ["batch", "seq"])]
    *_, last = make_feeds(model(inputs))
    mask = last.values["attention_mask"]
    assert set(np.unique(mask)) == {0, 1}
    assert np.all(np.diff(mask, axis=1) <= 0)
    assert np.all(mask[:, 0] == 1)
    kinds = list(candidates(model(inputs)))
    assert any(all(np.all(f.values["attention_mask"] == 1) for f in feeds) for feeds in kinds)


def test_positions_count_up() -> None:
    inputs = [info("position_ids", TensorProto.INT64, ["batch", "seq"])]
    for feed in make_feeds(model(inputs)):
        positions = feed.values["position_ids"]
        np.testing.assert_array_equal(positions[0], np.arange(positions.shape[1]))


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
              np.int8, np.uint8, np.int32, np.bool_, np.complex64]
)  # fmt: skip
def test_every_dtype_is_the_inputs_own(dtype: Any) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for feed in make_feeds(model([info("x", kind, ["N", 3])])):
        assert feed.values["x"].dtype == np.dtype(dtype)


def test_strings_scalars_empty_and_missing_inputs() -> None:
    inputs = [info("s", TensorProto.STRING, [2]), info("f", TensorProto.FLOAT, []),
              info("e", TensorProto.FLOAT, [0, 3])]  # fmt: skip
    values = make_feeds(model(inputs))[0].values
    assert all(isinstance(text, str) for text in values["s"])
    assert values["f"].shape == ()
    assert values["e"].shape == (0, 3)
    assert make_feeds(model([]))[0].values == {}


def test_sequences_are_lists_of_tensors() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [3]))
    values = make_feeds(model([helper.make_value_info("s", kind)]))[0].values["s"]
    assert [item.shape for item in values] == [(3,), (3,)]


def test_initializers_that_are_inputs_are_not_fed() -> None:
    inputs = [*FLOAT, info("w", TensorProto.FLOAT, [4])]
    assert list(make_feeds(model(inputs, (), {"w": np.zeros(4, np.float32)}))[0].values) == ["x"]


def test_fall_backs_end_in_zeros_and_are_all_different() -> None:
    kinds = list(candidates(model(IMAGE)))
    texts = [" ".join(feed.description for feed in feeds) for feeds in kinds]
    assert len(set(texts)) == len(texts)
    assert any(not np.any(feeds[0].values["image"]) for feeds in kinds)
    assert any(np.all(feeds[0].values["image"] == 1) for feeds in kinds)
    assert any(feeds[0].values["image"].shape[2] == 224 for feeds in kinds)


def test_given_shapes_are_honoured_and_bind_their_symbols() -> None:
    inputs = [info("a", TensorProto.FLOAT, ["N", "S"]), info("b", TensorProto.FLOAT, ["N", "S", 2])]
    for feed in make_feeds(model(inputs), shapes={"a": (2, 7)}):
        assert feed.values["a"].shape == (2, 7)
        assert feed.values["b"].shape == (2, 7, 2)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"y": (1, 4)}, "no input of the model"),
        ({"x": (1, 4, 1)}, "3 axes"),
        ({"x": (1, 5)}, "axis 1 of 'x' the size 5"),
        ({"x": (-1, 4)}, "the size -1"),
        ({"x": (2, 4), "z": (3,)}, "the axis 'N' the sizes 2 and 3"),
    ],
)
def test_shapes_that_do_not_fit_are_usage_errors(
    shapes: dict[str, tuple[int, ...]], reason: str
) -> None:
    inputs = [*FLOAT, info("z", TensorProto.FLOAT, ["N"])]
    with pytest.raises(UsageError, match=reason) as caught:
        make_feeds(model(inputs), shapes=shapes)
    assert str(caught.value).count("\n") == 1


def test_own_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    x = np.arange(8, dtype=np.float64).reshape(2, 4)
    np.savez(path, x=x)
    (feed,) = make_feeds(model(FLOAT), arrays=path)
    assert feed.values["x"].dtype == np.float32
    np.testing.assert_array_equal(feed.values["x"], x)
    assert len(list(candidates(model(FLOAT), arrays=path))) == 1


def test_own_bfloat16_arrays_keep_their_bits(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    x = np.array([1.5, -2.0]).astype(ml_dtypes.bfloat16)
    np.savez(path, x=x)
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    (feed,) = make_feeds(model([info("x", kind, [2])]), arrays=path)
    np.testing.assert_array_equal(feed.values["x"].astype(float), [1.5, -2.0])


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "no array for input 'x'"),
        ({"x": np.zeros((2, 4), np.float32), "z": np.zeros(1)}, "'z', which is no input"),
        ({"x": np.zeros((8, 2, 4), np.float32)}, r"shape \[8, 2, 4\]"),
        ({"x": np.zeros((2, 5), np.float32)}, r"shape \[2, 5\]"),
        ({"x": np.zeros((2, 4), np.int64)}, "dtype int64"),
    ],
)
def test_own_arrays_that_do_not_fit_are_usage_errors(
    arrays: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(UsageError, match=reason):
        make_feeds(model(FLOAT), arrays=path)


@pytest.mark.parametrize("content", [None, b"", b"not a zip file", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_npz_is_a_usage_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"no such file|no \.npz file") as refused:
        make_feeds(model(FLOAT), arrays=path)
    assert "pickle" not in str(refused.value)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match=r"no .npz file of plain arrays"):
        make_feeds(model(FLOAT), arrays=path)


def test_smaller_keeps_the_first_sample() -> None:
    feed = Feed({"x": np.arange(6).reshape(3, 2)}, "three", 3)
    assert smaller(feed).values["x"].tolist() == [[0, 1]]
    assert smaller(smaller(feed)).samples == 1


def test_the_states_of_a_recurrent_model_may_have_a_batch_of_one() -> None:
    inputs = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [None, None]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, None, 8]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    node = helper.make_node("Identity", ["input"], ["y"])
    proto = helper.make_model(helper.make_graph([node], "g", inputs, outputs))
    shapes = {
        (feed.values["input"].shape[1], feed.values["state"].shape)
        for feeds in candidates(proto)
        for feed in feeds
    }
    assert {(256, (2, 1, 8)), (16000, (2, 1, 8))} <= shapes


@pytest.mark.parametrize("shape", [None, ["N", "C", "H", "W"], [None] * 4])
def test_channels_are_those_of_the_weight(shape: Sequence[Any] | None) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["m"]),
        helper.make_node("Conv", ["m", "w"], ["y"], group=2),
    ]
    weights = {"s": np.float32(2.0), "w": np.zeros((4, 5, 3, 3), np.float32)}
    proto = model([info("x", TensorProto.FLOAT, shape)], nodes, weights)
    assert {feed.values["x"].shape[1] for feeds in candidates(proto) for feed in feeds} == {10}
    (given, *_) = make_feeds(proto, shapes={"x": (1, 3, 8, 8)})
    assert given.values["x"].shape == (1, 3, 8, 8)


def cache_shapes(node: onnx.NodeProto, *producers: onnx.NodeProto, **kinds: Any) -> set[Any]:
    """Return the shapes that two caches 'k' and 'v' of an attention operator are given."""
    names = ("batch_size", "kv_heads", "past_sequence_length", "kv_cache_dim")
    inputs = [info(n, TensorProto.FLOAT, s) for n, s in kinds.pop("inputs", {}).items()]
    inputs += [info(name, TensorProto.FLOAT, names) for name in ("k", "v")]
    (first, *_) = make_feeds(model(inputs, [*producers, node], kinds))
    return {first.values[name].shape[1::2] for name in ("k", "v")}


def test_caches_have_the_heads_of_the_attention_that_reads_them() -> None:
    # GroupQueryAttention of packed projections: 4 heads of queries and 2 of keys and of values
    grouped: dict[str, Any] = {"domain": "com.microsoft", "num_heads": 4, "kv_num_heads": 2}
    packed = ["qkv", "", "", "k", "v", "lengths", "total"]
    node = helper.make_node("GroupQueryAttention", packed, ["y", "", ""], **grouped)
    project = helper.make_node("MatMul", ["x", "w"], ["p"])
    biased = helper.make_node("Add", ["p", "b"], ["qkv"])
    x, w, b = {"x": [1, 5, 6]}, np.zeros((6, 80), np.float32), np.zeros(80, np.float32)
    assert cache_shapes(node, project, biased, inputs=x, w=w, b=b) == {(2, 10)}
    quantized: dict[str, Any] = {"domain": "com.microsoft", "N": 80, "K": 6}
    project = helper.make_node("MatMulNBits", ["x", "w", "s"], ["qkv"], **quantized)
    assert cache_shapes(node, project, inputs=x, w=w, s=b) == {(2, 10)}

    apart = ["q", "key", "value", "k", "v", "lengths", "total"]
    node = helper.make_node("GroupQueryAttention", apart, ["y", "", ""], **grouped)
    shapes = {"q": [1, 5, 40], "key": [1, 5, 20], "value": [1, 5, 20]}
    assert cache_shapes(node, inputs=shapes) == {(2, 10)}

    each = ["q", "key", "value", "", "", "", "k", "v"]
    heads: dict[str, Any] = {"domain": "com.microsoft", "num_heads": 4}
    node = helper.make_node("MultiHeadAttention", each, ["y", "", ""], **heads)
    assert cache_shapes(node, inputs={n: [1, 5, 40] for n in shapes}) == {(4, 10)}

    standard = ["q", "key", "value", "", "k", "v"]
    node = helper.make_node("Attention", standard, ["y"], q_num_heads=4, kv_num_heads=2)
    assert cache_shapes(node, inputs=shapes) == {(2, 10)}
    node = helper.make_node("Attention", standard, ["y"])
    ranked = {"q": [1, 4, 5, 10], "key": [1, 2, 5, 10], "value": [1, 2, 5, 12]}
    assert cache_shapes(node, inputs=ranked) == {(2, 10), (2, 12)}


def test_a_sliding_cache_holds_its_window_and_counts_for_no_total() -> None:
    window: dict[str, Any] = {"sliding_window_cache": 1, "local_window_size": 7}
    inputs = [
        info("ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        info("mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        info("k0", TensorProto.FLOAT, ["batch_size", 2, "past_sliding_length", 4]),
        info("k1", TensorProto.FLOAT, ["batch_size", 2, "past_sequence_length", 4]),
    ]
    heads: dict[str, Any] = {"domain": "com.microsoft", "num_heads": 4, "kv_num_heads": 2}
    nodes = [
        helper.make_node("GroupQueryAttention", ["q", "", "", "k0"], ["y0"], **heads, **window),
        helper.make_node("GroupQueryAttention", ["q", "", "", "k1"], ["y1"], **heads),
    ]
    for feed in make_feeds(model(inputs, nodes)):
        shapes = {name: value.shape for name, value in feed.values.items()}
        assert shapes["k0"][2] == 7
        assert shapes["k1"][2] in {3, 6}
        assert shapes["mask"][1] == shapes["k1"][2] + shapes["ids"][1]
    (feed, *_) = make_feeds(model(inputs, nodes), shapes={"k0": (1, 2, 9, 4)})
    assert feed.values["k0"].shape == (1, 2, 9, 4)


def test_no_choice_of_sizes_fills_the_memory() -> None:
    proto = model([info("x", TensorProto.FLOAT, ["N", "C", "H", "W"])])
    assert max(sum(f.values["x"].size for f in feeds) for feeds in candidates(proto)) <= 1 << 26
