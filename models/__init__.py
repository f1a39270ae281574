"""The models that tests and benchmarks use, as recipes: nothing binary but the demonstration.

`RECIPES` builds with onnx alone and gives the same bytes everywhere; `models.exported` builds real
architectures with torch; `models.large` streams a model of any size to disk; `models.spellings` has
a thousand small ones with what a recogniser should say of each. `manifest.json` holds one row for
each recipe and export, as `tools/make_models.py` wrote them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import onnx
from onnx import TensorProto

from models import batchnorm, reduced
from models.demo import demo


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Attributes:
        title: What it is, in a line.
        build: Returns a fresh ModelProto, the same each time.
        rejected: Why onnxruntime's CPU provider cannot load the model, legal though it is; None
            where it can.
        committed: Whether the file itself is in the repository.
    """

    title: str
    build: Callable[[], onnx.ModelProto]
    rejected: str | None = None
    committed: bool = False


def serialise(model: onnx.ModelProto) -> bytes:
    """Return a model's bytes, the same for the same model."""
    return model.SerializeToString(deterministic=True)


RECIPES: Final[dict[str, Recipe]] = {}


def _add(name: str, title: str, make: Callable[..., onnx.ModelProto], **options: Any) -> None:
    rejected, committed = options.pop("rejected", None), options.pop("committed", False)
    RECIPES[name] = Recipe(title, partial(make, name, **options), rejected, committed)


_pair = batchnorm.conv_batch_norm
_add("demo", "MobileNetV2 x0.25, re-identification", demo, committed=True)
for _rank in (1, 2, 3):
    _add(f"conv{_rank}d", f"Conv -> BN, {_rank}-D", _pair, rank=_rank)
    _add(
        f"conv_transpose{_rank}d",
        f"ConvTranspose -> BN, {_rank}-D",
        _pair,
        rank=_rank,
        transposed=True,
    )
_add("conv_no_bias", "Conv without bias -> BN", _pair, bias=False)
_add("conv_empty_bias", "Conv with an empty bias slot -> BN", batchnorm.empty_bias)
_add("conv_strided", "Conv, stride 2 -> BN", _pair, stride=2)
_add("conv_grouped", "Conv, 2 groups -> BN", _pair, groups=2)
_add("conv_depthwise", "depthwise Conv -> BN", _pair, channels=(6, 6), groups=6)
_add("conv_multiplier", "depthwise Conv, multiplier 2 -> BN", _pair, channels=(4, 8), groups=4)
for _rank in (1, 2, 3):
    _add(
        f"conv_transpose{_rank}d_grouped",
        f"ConvTranspose, {_rank}-D, 2 groups -> BN",
        _pair,
        rank=_rank,
        transposed=True,
        groups=2,
        stride=2,
    )
_add(
    "conv_transpose_depthwise",
    "depthwise ConvTranspose -> BN",
    _pair,
    channels=(6, 6),
    groups=6,
    transposed=True,
)
for _opset in (7, 9, 11, 14, 15, 20, 22, 23):
    _add(f"conv_op{_opset}", f"Conv -> BN, opset {_opset}", _pair, opset=_opset)
_add("conv_float16", "Conv -> BN, float16", _pair, dtype=TensorProto.FLOAT16)
_add(
    "conv_bfloat16",
    "Conv -> BN, bfloat16",
    _pair,
    dtype=TensorProto.BFLOAT16,
    opset=22,
    rejected="no bfloat16 Conv on the CPU",
)
_add(
    "conv_float64",
    "Conv -> BN, float64",
    _pair,
    dtype=TensorProto.DOUBLE,
    rejected="no float64 Conv on the CPU",
)
_add("conv_mixed", "float16 Conv -> BN with float32 parameters", batchnorm.mixed_types)
_add("conv_shared_weight", "one Conv weight, three BN", batchnorm.shared_weight)
_add("conv_shared_result", "a Conv result that a shortcut reads too", batchnorm.shared_result)
_add("conv_output", "a Conv result that is an output", batchnorm.shared_result, as_output=True)
_add(
    "conv_training",
    "BN in training mode",
    batchnorm.training_mode,
)
_add("conv_dynamic_scale", "BN with a computed gamma", batchnorm.dynamic_scale)
_add("conv_zero_variance", "BN with an infinite scale", batchnorm.zero_variance)
for _spelling in ("node", "identity", "input"):
    _add(
        f"conv_constants_{_spelling}",
        f"Conv -> BN, parameters by {_spelling}",
        batchnorm.spelled_constants,
        spelling=_spelling,
    )
_add("conv_chain", "Conv -> BN -> BN -> Relu -> BN -> Conv", batchnorm.chain)
_add("conv_in_if", "Conv -> BN in both branches of an If", batchnorm.in_if)
_add("conv_in_loop", "Conv -> BN in a Loop body", batchnorm.in_loop)
_add("conv_in_scan", "Conv -> BN in a Scan body", batchnorm.in_scan)
_add("conv_in_function", "Conv -> BN in model-local functions", batchnorm.in_function)
_add("quantized_conv", "Conv between QuantizeLinear pairs -> BN", batchnorm.quantized_conv)
_add("quantized_matmul", "Conv -> BN -> dynamic int8 MatMul", batchnorm.dynamically_quantized)
_add("random_noise", "Conv -> BN -> unseeded noise", batchnorm.random_noise)
_add("labels", "Conv -> BN -> logits and ArgMax", batchnorm.labels)
_add("no_nodes", "a graph with no nodes", batchnorm.no_nodes)
_add("odd_sizes", "a scalar, a tensor without elements", batchnorm.odd_sizes)
_add("densenet", "DenseNet-BC, 6 layers of growth 8", reduced.densenet)
_add("resnet_v2", "pre-activation ResNet, 3 stages", reduced.preactivation_resnet)
_add("unet", "U-Net, 3 levels", reduced.unet)
_add("vit", "ViT, LayerNormalization", reduced.vision_transformer)
_add(
    "vit_primitive",
    "ViT, layer norms as primitives",
    reduced.vision_transformer,
    opset=13,
    norm="decomposed_layer_norm",
)
_add("bert", "BERT, post-norm, LayerNormalization", reduced.text_encoder)
_add("llama", "Llama, RMS norms as primitives", reduced.text_decoder)
