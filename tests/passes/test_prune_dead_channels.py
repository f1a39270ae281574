"""Remove channels that are constant from what makes and reads them; goldens and random networks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxnorm import channels
from onnxnorm.passes import prune_dead_channels
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.passes.prune_dead_channels import PruneDeadChannels
from onnxnorm.pipeline import Run
from onnxnorm.rewrite import Pass
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests import texts
from tests.affine_networks import mobile_network, zero_residual_network
from tests.mutants import computes_the_same, mutated
from tests.networks import Net

RULE = PruneDeadChannels(multiple=1)
IMAGE = "N,2,4,4"


def graph(body: str, constants: str, x: str = IMAGE, y: str = IMAGE, opset: int = 17) -> str:
    return texts.graph(body, constants, x, y, opset)


def shapes(done: Run) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that are left."""
    return {t.name: tuple(t.dims) for t in done.stored.complete().graph.initializer}


# ** goldens **

DEAD = "float[3,2,1,1] u = {1.0, 2.0, 0.0, 0.0, 3.0, 4.0}"
NEXT = "float[2,3,1,1] v = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}"


@pytest.mark.parametrize(("dead", "bias"), [("2.0", "3.0, 8.0"), ("-2.0", "-1.0, -2.0")])
def test_a_constant_goes_through_relu_into_the_next_bias(dead: str, bias: str) -> None:
    before = graph(
        "a = Conv (x, u, b)\n r = Relu (a)\n y = Conv (r, v, c)\n",
        f"{DEAD}, {NEXT}, float[3] b = {{1.0, {dead}, -1.0}}, float[2] c = {{-1.0, -2.0}}",
    )
    after = graph(
        "a_pruned = Conv (x, u_pruned, b_pruned)\n r_pruned = Relu (a_pruned)\n"
        f" y = Conv (r_pruned, v_pruned, {'c_pruned' if dead == '2.0' else 'c'})\n",
        "float[2] b_pruned = {1.0, -1.0},"
        f" float[2] {'c_pruned' if dead == '2.0' else 'c'} = {{{bias}}},"
        " float[2,2,1,1] u_pruned = {1.0, 2.0, 3.0, 4.0},"
        " float[2,2,1,1] v_pruned = {1.0, 3.0, 4.0, 6.0}",
    )
    done = assert_rewrites(before, after, RULE)
    (site,) = done.applied
    assert (site.site, site.note) == ("prune-dead-channels:a", "1 channel of 2 values go")


def test_a_missing_bias_is_made() -> None:
    before = graph(
        "a = Conv (x, u, b)\n y = Conv (a, v)\n",
        f"{DEAD}, {NEXT}, float[3] b = {{1.0, 2.0, -1.0}}",
    )
    after = graph(
        "a_pruned = Conv (x, u_pruned, b_pruned)\n y = Conv (a_pruned, v_pruned, y_pruned)\n",
        "float[2] b_pruned = {1.0, -1.0}, float[2,2,1,1] u_pruned = {1.0, 2.0, 3.0, 4.0},"
        " float[2,2,1,1] v_pruned = {1.0, 3.0, 4.0, 6.0}, float[2] y_pruned = {4.0, 10.0}",
    )
    assert_rewrites(before, after, RULE)


def test_a_linear_layer_with_its_bias_in_an_add() -> None:
    before = graph(
        "a = MatMul (x, u)\n d = Add (a, b)\n s = Relu (d)\n e = MatMul (s, v)\n y = Add (c, e)\n",
        "float[2,3] u = {1.0, 0.0, 3.0, 4.0, 0.0, 6.0}, float[3] b = {1.0, 2.0, 3.0},"
        " float[3,2] v = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[2] c = {1.0, 1.0}",
        x="N,2",
        y="N,2",
    )
    after = graph(
        "a_pruned = MatMul (x, u_pruned)\n d_pruned = Add (a_pruned, b_pruned)\n"
        " s_pruned = Relu (d_pruned)\n e = MatMul (s_pruned, v_pruned)\n y = Add (c_pruned, e)\n",
        "float[2] b_pruned = {1.0, 3.0}, float[2] c_pruned = {7.0, 9.0},"
        " float[2,2] u_pruned = {1.0, 3.0, 4.0, 6.0}, float[2,2] v_pruned = {1.0, 2.0, 5.0, 6.0}",
        x="N,2",
        y="N,2",
    )
    assert_rewrites(before, after, RULE)


def test_a_channel_that_nobody_reads() -> None:
    before = graph(
        "a = Conv (x, u)\n r = Sigmoid (a)\n y = Conv (r, v)\n",
        "float[3,2,1,1] u = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0},"
        " float[2,3,1,1] v = {1.0, 0.0, 3.0, 4.0, 0.0, 6.0}",
    )
    after = graph(
        "a_pruned = Conv (x, u_pruned)\n r_pruned = Sigmoid (a_pruned)\n"
        " y = Conv (r_pruned, v_pruned)\n",
        "float[2,2,1,1] u_pruned = {1.0, 2.0, 5.0, 6.0},"
        " float[2,2,1,1] v_pruned = {1.0, 3.0, 4.0, 6.0}",
    )
    assert_rewrites(before, after, RULE)


def test_shapes_that_name_the_channels_follow() -> None:
    before = graph(
        "a = Conv (x, u)\n r = Reshape (a, z)\n y = Gemm <transB = 1> (r, v)\n",
        f"{DEAD}, int64[2] z = {{0, 6}}, float[1,6] v = {{1.0, 2.0, 3.0, 4.0, 5.0, 6.0}}",
        x="N,2,1,2",
        y="N,1",
    )
    after = graph(
        "a_pruned = Conv (x, u_pruned)\n r_pruned = Reshape (a_pruned, z_pruned)\n"
        " y = Gemm <transB = 1> (r_pruned, v_pruned)\n",
        "float[2,2,1,1] u_pruned = {1.0, 2.0, 3.0, 4.0},"
        " float[1,4] v_pruned = {1.0, 2.0, 5.0, 6.0}, int64[2] z_pruned = {0, 4}",
        x="N,2,1,2",
        y="N,1",
    )
    assert_rewrites(before, after, RULE)


# ** networks **


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_branches_with_a_norm_of_gamma_0_go(beta: float) -> None:
    model = zero_residual_network(beta=beta)
    done = run(model, FoldBatchnorm(), PruneDeadChannels())
    left = Counter(n.op_type for n in done.stored.proto.graph.node)
    assert (left["Conv"], left["Add"]) == (1, 0 if beta == 0.0 else 2)
    assert_parity(model, done.stored.complete())
    assert any("all 8 channels of 'batch" in r.note for r in done.applied)


@pytest.mark.parametrize("squeeze", [False, True])
def test_depthwise_channels_go_with_what_is_in_front_and_behind(squeeze: bool) -> None:
    model = mobile_network(squeeze=squeeze)
    done = run(model, RULE)
    nodes = done.stored.proto.graph.node
    groups = [a.i for n in nodes for a in n.attribute if a.name == "group" and a.i > 1]
    # 16 less 3 and 3; a constant that is not 0 varies when it is gated
    assert groups == ([12, 11] if squeeze else [10, 10])
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, RULE)


def test_widths_stay_as_aligned_as_they_were() -> None:
    model = mobile_network(size=8, dead=5)  # 32 channels, of which 10 are dead
    for multiple, width in ((1, 22), (4, 24), (8, 24), (16, 32), (48, 32)):
        done = run(model, PruneDeadChannels(multiple=multiple))
        assert (width, 1, 3, 3) in shapes(done).values()
        assert_sound(model, done, PruneDeadChannels(multiple=multiple))
    refused = [r for r in run(model, PruneDeadChannels()).remarks if r.outcome == "kept"]
    assert all("keep its width a multiple of 16" in r.reason for r in refused)
    assert len(refused) == 2


def test_a_threshold_reports_its_bound() -> None:
    net = Net()
    weight = net.random.normal(size=(4, 3, 1, 1))
    weight[1] *= 2.0**-12
    x = net.op("Conv", net.input("x", ["batch", 3, 8, 8]), net.keep(weight), net.vector(4))
    model = net.model(net.op("Conv", x, net.matrix(2, 4, 1, 1)))
    assert not run(model, RULE).applied
    done = run(model, PruneDeadChannels(multiple=1, threshold=0.01))
    (site,) = done.applied
    bound = float(np.abs(weight[1].astype(np.float32).astype(np.float64)).sum())
    assert site.note == (
        f"1 channel of 1 values go; each varies by at most {bound:.3g} times the largest input of"
        " its operator"
    )
    assert (3, 3, 1, 1) in shapes(done).values()


def test_everything_dead_leaves_one_channel() -> None:
    before = graph(
        "a = Conv (x, u, b)\n r = Sigmoid (a)\n d = Conv (r, v)\n y = Add (x, d)\n",
        f"float[3,2,1,1] u = {{0.0}}, {NEXT}, float[3] b = {{1.0, 2.0, -1.0}}".replace(
            "{0.0}", "{0.0, 0.0, 0.0, 0.0, 0.0, 0.0}"
        ),
    )
    done = run(before, RULE)
    assert (1, 2, 1, 1) in shapes(done).values()
    assert_parity(before, done.stored.complete())


# ** what stands in the way **

FIRST = "a = Conv (x, u, b)\n"
CONSTANTS = f"{DEAD}, {NEXT}, float[3] b = {{1.0, 2.0, -1.0}}, float[2] c = {{1.0, 2.0}}"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        # a constant in front of a convolution that pads
        (f"{FIRST} y = Conv <pads = [0, 0, 0, 0, 0, 0, 0, 0]> (a, v)\n", ""),
        (
            f'{FIRST} d = Conv <auto_pad = "SAME_UPPER"> (a, w)\n y = Add (d, d)\n',
            "channel 1 of 'a' is 2, and the convolution 'd' pads with 0",
        ),
        # each output position of a transposed convolution adds up its own part of the kernel
        (
            f"{FIRST} y = ConvTranspose <kernel_shape = [1, 1]> (a, t)\n",
            "adds up a different number of positions at the border",
        ),
        # a residual Add couples a dead channel with one that varies
        (
            f"{FIRST} d = Conv (x, f)\n e = Add (a, d)\n y = Conv (e, v)\n",
            "the convolution 'y' reads channel 1 of 'e', which varies",
        ),
        # grouped convolutions need groups of one size
        (
            (
                f"{FIRST} d = Concat <axis = 1> (a, a)\n e = Conv <group = 2> (d, g)\n"
                " y = Conv (e, z)\n"
            ),
            "is grouped, and every group must keep the same number of channels",
        ),
        # norms and softmax over the channels
        (f"{FIRST} d = Softmax <axis = 1> (a)\n y = Conv (d, v)\n", "treats all channels together"),
        (
            f"{FIRST} d = LayerNormalization <axis = 1> (a, s)\n y = Conv (d, v)\n",
            "treats all channels together",
        ),
        (f"{FIRST} d = LRN <size = 3> (a)\n y = Conv (d, v)\n", "treats all channels together"),
        # pieces and shuffles of channels
        (
            f"{FIRST} d, e, g3 = Split <axis = 1> (a)\n y = Conv (e, l)\n",
            "splits the channels without saying into which sizes",
        ),
        (
            (
                f"{FIRST} g4 = Concat <axis = 1> (a, a)\n d = Reshape (g4, j)\n"
                " e = Transpose <perm = [0, 2, 1, 3, 4]> (d)\n k = Reshape (e, n)\n"
                " y = Conv (k, m6)\n"
            ),
            "moves channels and other axes together",
        ),
        # a shape that tells the number of channels
        (
            (
                f"{FIRST} d = Shape (a)\n e = Gather (d, one)\n k = Cast <to = 1> (e)\n"
                " m = Mul (a, k)\n y = Conv (m, v)\n"
            ),
            "tells others the number of channels",
        ),
        # graph outputs, and reads from a body
        (f"{FIRST} d = Conv (a, v)\n y = Identity (d)\n z2 = Relu (a)\n", "is a graph output"),
        (
            (
                f"{FIRST} y = If (q) <then_branch = g1 () => (float[N,2,4,4] h1)"
                " { h1 = Conv (a, v) }, else_branch = g2 () => (float[N,2,4,4] h2)"
                " { h2 = Identity (x) }>\n"
            ),
            "reads 'a' inside a body",
        ),
        # training mode
        (
            f"{FIRST} d = Dropout (a, half, q)\n y = Conv (d, v)\n",
            "the convolution 'y' reads channel 1 of 'd', which varies",
        ),
        (
            (
                f"{FIRST} d = BatchNormalization <training_mode = 1> (a, b, b, b, b)\n"
                " y = Conv (d, v)\n"
            ),
            "takes its statistics from the batch",
        ),
    ],
)
def test_refusals(body: str, reason: str) -> None:
    more = (
        ", float[2,3,3,3] w = {" + ", ".join(["1.0"] * 54) + "}"
        ", float[3,2,1,1] t = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}"
        ", float[3,2,1,1] f = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}"
        ", float[2,3,1,1] g = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}"
        ", float[2,2,1,1] z = {1.0, 2.0, 3.0, 4.0}, float[3,4,4] s = {"
        + ", ".join(["1.0"] * 48)
        + "}, float[2,1,1,1] l = {1.0, 2.0}, int64[5] j = {0, 2, 3, 4, 4}"
        ", int64[4] n = {0, 6, 4, 4}, float[1,6,1,1] m6 = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}"
        ", int64 one = {1}, bool q = {1}, float half = {0.5}"
    )
    text = graph(body, CONSTANTS + more)
    if "z2" in body:
        text = text.replace("(float[N,2,4,4] y)", "(float[N,2,4,4] y, float[N,3,4,4] z2)")
    if reason:
        assert_refuses(text, RULE, reason)
    else:  # pads that are all zero are none
        assert run(text, RULE).applied


def test_a_linear_layer_without_a_bias_takes_no_constant() -> None:
    before = graph(
        "a = MatMul (x, u)\n d = Add (a, b)\n y = MatMul (d, v)\n",
        "float[2,3] u = {1.0, 0.0, 3.0, 4.0, 0.0, 6.0}, float[3] b = {1.0, 2.0, 3.0},"
        " float[3,2] v = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}",
        x="N,2",
        y="N,2",
    )
    assert_refuses(before, RULE, "has no bias that could take it")


def test_parameters_of_an_instance_norm_that_the_caller_may_replace() -> None:
    norm = f"{FIRST} d = InstanceNormalization (a, p, b)\n y = Conv (d, v)\n"
    text = graph(norm, CONSTANTS).replace("[N,2,4,4] x", "[N,2,4,4] x, float[3] p")
    assert_refuses(text, RULE, "has parameters that are computed")


def test_an_average_that_counts_its_padding() -> None:
    body = (
        "{f} d = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]{c}> (a)\n y = Conv (d, v)"
    )
    for counts, goes in ((", count_include_pad = 1", False), ("", True)):
        text = graph(body.format(f=FIRST, c=counts), CONSTANTS)
        assert bool(run(text, RULE).applied) is goes
        assert_parity(text, run(text, RULE).stored.complete())


# ** properties **


def random_network(seed: int, dtype: Any = np.float32) -> onnx.ModelProto:
    """A network of random operators in which about a third of the channels is dead."""
    net = Net(seed=seed, opset=20, dtype=dtype)
    choose = net.random.choice
    maps = [(net.input("x", ["batch", 3, 6, 6]), 3)]

    def weights(out: int, into: int, kernel: int) -> tuple[str, str]:
        w = net.random.normal(size=(out, into, kernel, kernel)) / np.sqrt(into * kernel * kernel)
        b = net.random.normal(size=out) * 0.5
        dead = net.random.random(out) < 0.4
        w[dead] = 0.0
        b[dead] *= choose([0.0, 0.0, -1.0, 1.0], size=int(dead.sum()))
        w[:, net.random.random(into) < 0.1] = 0.0
        return net.keep(w), net.keep(b)

    def step(x: str, c: int) -> tuple[str, int]:
        kind = choose(list(KINDS))
        out = int(choose([4, 6]))
        if kind == "padded":
            return net.op("Conv", x, *weights(out, c, 3), pads=[1] * 4), out
        if kind == "pointwise":
            return net.op("Conv", x, *weights(out, c, 1)[: int(choose([1, 2]))]), out
        if kind == "valid":
            y = net.op("Conv", x, *weights(out, c, 3))
            return net.op("Pad", y, net.ints(0, 0, 1, 1, 0, 0, 1, 1)), out
        if kind == "depthwise":
            return net.op("Conv", x, *weights(c, 1, 3), pads=[1] * 4, group=c), c
        if kind == "activation":
            return net.op(str(choose(["Relu", "Sigmoid", "Tanh", "LeakyRelu", "Gelu"])), x), c
        if kind == "joined":
            others = [m for m, n in maps if n == c]
            return net.op(
                str(choose(["Add", "Add", "Mul", "Sub", "Max"])), x, str(choose(others))
            ), c
        if kind == "concat":
            other, n = maps[int(choose(len(maps)))]
            return net.op("Concat", x, other, axis=1), c + n
        if kind == "gated":
            gate = net.op("Relu", net.op("Conv", net.op("GlobalAveragePool", x), *weights(4, c, 1)))
            return net.op("Mul", x, net.op("Sigmoid", net.op("Conv", gate, *weights(c, 4, 1)))), c
        # onnxruntime 1.31 fuses Pad into MaxPool, which then pads with -infinity in place of 0.
        if kind == "pool" and not x.startswith("pad"):
            name = str(choose(["MaxPool", "AveragePool"]))
            return net.op(name, x, kernel_shape=[3, 3], pads=[1] * 4), c
        if kind == "norm":
            gamma = net.random.normal(size=c) * (net.random.random(c) > 0.4)
            statistics = [net.vector(c), net.vector(c), net.keep(0.5 + net.random.random(c))]
            return net.op("BatchNormalization", x, net.keep(gamma), *statistics), c
        if kind == "pieces" and c > 1:
            first = int(choose(range(1, c)))
            a, b = net.many("Split", x, net.ints(first, c - first), outputs=2, axis=1)
            y = net.op("Concat", b, net.op("Relu", a), axis=1)
            low, high = (int(v) for v in sorted(choose(range(c + 1), size=2, replace=False)))
            bounds = (net.ints(low - c if low else 0), net.ints(high if high < c else 2**31))
            return net.op("Slice", y, *bounds, net.ints(1)), high - low
        if kind == "rows":
            part = net.op("Slice", x, net.ints(0), net.ints(3), net.ints(2))
            return net.op("Concat", part, part, axis=2), c
        y = net.op("Transpose", x, perm=[0, 2, 3, 1])
        w = net.random.normal(size=(c, 5)) * (net.random.random(5) > 0.4)
        y = net.op("MatMul", y, net.keep(w))
        y = net.op("Add", y, net.vector(5)) if choose(2) else y
        return net.op("Transpose", y, perm=[0, 3, 1, 2]), 5

    for _ in range(int(choose(range(4, 12)))):
        recent = maps[-3:]
        maps.append(step(*recent[int(choose(len(recent)))]))
    x, c = maps[-1]
    if choose(2):
        y = net.op("Gemm", net.op("Flatten", x), net.matrix(c * 36, 4), net.vector(4))
    else:
        pooled = net.op("GlobalAveragePool", x)
        flat = net.op("Reshape", pooled, net.ints(0, int(choose([c, -1]))))
        y = net.op("Gemm", flat, net.matrix(c, 4), net.vector(4))
    other = maps[int(choose(range(1, len(maps))))][0]
    return net.model(y, *([net.op("Relu", other)] if choose(3) == 0 else []))


KINDS = (
    "padded", "padded", "pointwise", "valid", "depthwise", "activation", "activation", "joined",
    "concat", "gated", "pool", "norm", "pieces", "rows", "tokens",
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), folded=st.booleans(), multiple=st.sampled_from([1, 2]))
def test_random_networks_agree(seed: int, folded: bool, multiple: int) -> None:
    model = random_network(seed)
    rules: list[Pass] = [FoldBatchnorm(), FoldAffine()] if folded else []
    rules.append(PruneDeadChannels(multiple=multiple))
    done = run(model, *rules)
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, *rules)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([np.float16, np.float64, ml_dtypes.bfloat16]),
)
def test_types_stay(seed: int, dtype: Any) -> None:
    model = random_network(seed, dtype)
    done = run(model, RULE)
    kinds = {t.data_type for t in done.stored.complete().graph.initializer} - {7}
    assert kinds == {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}
    assert_sound(model, done, RULE)
    if dtype is np.float16:  # onnxruntime has no convolution in the others on the CPU
        assert_parity(model, done.stored.complete())


# ** mutants **

MUTANTS = {
    "the bias that is not shifted": (
        prune_dead_channels, "(constant, passed / place.gain, dtype)",
        "(constant, passed * 0.0, dtype)"),
    "the kept channels go": (
        prune_dead_channels, "array = np.compress(~mask, array, axis=axis)",
        "array = np.compress(mask, array, axis=axis)"),
    "a constant of which a border is 0": (
        prune_dead_channels, 'return "pads with 0"', 'return ""'),
    "channels that vary": (
        prune_dead_channels, "            if not np.isfinite(known[at]):", "            if False:"),
    "what is blocked goes": (
        prune_dead_channels, "        self.gone[list(self.reasons)] = False", "        pass"),
    "a branch that is not constant": (
        prune_dead_channels, "bool(np.isfinite(kept.of(v)).all())",
        "bool(np.isfinite(kept.of(v)).any())"),
    "a shape of the old width": (
        channels, "found[at] = int((~gone[labels]).sum()) * factor", "pass"),
    "a piece from another place": (
        channels, "return known[start : start + size]", "return known[-size:]"),
    "a row with one zero": (
        channels, "found[at] = not np.any(weight[at])", "found[at] = True"),
    "zero times what varies": (
        channels, "result = np.where(zero, 0.0, result)", "result = np.where(zero, 1.0, result)"),
    "the bias of a dead filter": (
        channels, "return np.where(dead, bias, np.nan)", "return np.where(dead, 0.0, np.nan)"),
    "a depthwise convolution that pads": (
        channels, "        if pads(node):\n ", "        if False:\n "),
    "a border of zeros": (
        channels, '        if node.op in ("Pad", "ReduceSum"):', "        if False:"),
}  # fmt: skip


def agrees(rule: PruneDeadChannels) -> bool:
    """Whether a pass is right on networks that need everything in it."""
    models = [random_network(seed) for seed in SEEDS]
    models.append(zero_residual_network(beta=0.5, alive=1))
    crashes = (IndexError, ValueError)
    return all(computes_the_same(model, rule, crashes=crashes) for model in models)


SEEDS = (7, 44, 18, 54)  # networks that every mutant but one gets wrong somewhere


def test_what_the_mutants_are_held_against_agrees() -> None:
    assert agrees(RULE)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, old, new = MUTANTS[name]
    names = mutated(source, old, new)
    if source is channels:
        for role in ("find_coupling", "Kept", "zero_rows"):
            monkeypatch.setattr(prune_dead_channels, role, names[role])
        assert not agrees(RULE)
    else:
        assert not agrees(names["PruneDeadChannels"](multiple=1))
