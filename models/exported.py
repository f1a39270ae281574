"""Build the real architectures in torch and export them, with norm parameters that matter.

Weights are random: nothing is downloaded. A freshly initialised network hides folding errors,
because gamma is 1, beta is 0, and a BatchNorm remembers mean 0 and variance 1; so every norm gets
gamma in [0.5, 1.5] with a few negative entries, a random beta, and running statistics that are
those of real activations, then perturbed.

What keeps BatchNormalization in the file: with the torchscript exporter,
`training=TrainingMode.PRESERVE` on a module in evaluation mode (the default runs a peephole that
folds Conv + BatchNorm) together with `do_constant_folding=False`; with the dynamo exporter,
`optimize=False` (the default runs onnxscript's optimizer, whose default rules fold it).

Needs the extra `onnxnorm[models]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import timm
import torch
import transformers
from torch import Tensor, nn

from models.architectures import ARCHITECTURES, Exporter, Flavour


@dataclass(frozen=True)
class Example:
    """A module in evaluation mode with one call of it.

    Attributes:
        module: Takes the tensors of `inputs` in order and returns one tensor or a tuple.
        inputs: Example inputs by name.
        outputs: Names for the outputs.
        dynamic: For each input, the axes that may vary and what they are called.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]


class _Call(nn.Module):
    """A module whose forward is a function of positional tensors; exporters want no keywords."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self._call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self._call(self.inner, *inputs)


def randomise_norms(module: nn.Module, example: tuple[Tensor, ...], seed: int = 0) -> None:
    """Give every norm gamma, beta, running mean and running variance that are not trivial.

    gamma ~ U[0.5, 1.5], one in 32 negated; beta ~ U[-0.3, 0.3]; the running statistics are those
    of one batch, the mean moved by up to 0.3 standard deviations and the variance scaled by
    U[0.5, 1.5], so that activations keep the scale that a trained network gives them.

    Args:
        module: Changed in place and left in evaluation mode.
        example: One batch of inputs.
        seed: Of every draw.
    """
    draws = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=draws) * (high - low) + low

    batch_norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for part in module.modules():
            name, weight = type(part).__name__, getattr(part, "weight", None)
            if "Norm" in name and isinstance(weight, Tensor) and weight.ndim == 1:
                sign = torch.where(uniform(weight, 0.0, 1.0) < 1 / 32, -1.0, 1.0)
                weight.copy_(uniform(weight, 0.5, 1.5) * sign)
            bias = getattr(part, "bias", None)
            if isinstance(bias, Tensor) and bias.ndim == 1:
                bias.copy_(uniform(bias, -0.3, 0.3))
        for path, parameter in module.named_parameters():
            if path.endswith(".gamma"):  # LayerScale starts at 1e-6 and would hide its branch
                parameter.copy_(uniform(parameter, 0.1, 0.5))
        module.eval()
        for norm in batch_norms:
            norm.train()
            norm.momentum = 1.0
        if batch_norms:
            module(*example)
        module.eval()
        for norm in batch_norms:
            spread = norm.running_var.sqrt()
            norm.running_mean += spread * uniform(spread, -0.3, 0.3)
            norm.running_var *= uniform(spread, 0.5, 1.5)


_VISION: Final = {
    "resnet50": "resnet50",
    "mobilenetv3": "mobilenetv3_large_100",
    "densenet121": "densenet121",
    "vit_s": "vit_small_patch16_224",
    "deit_s": "deit_small_distilled_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "convnext_t": "convnext_tiny",
}


def _vision(name: str, fused_attention: bool) -> Example:
    timm.layers.set_fused_attn(fused_attention)
    module = timm.create_model(_VISION[name], pretrained=False)
    if hasattr(module, "set_distilled_training"):
        module.set_distilled_training(False)
    image = torch.randn(2, 3, 224, 224)
    return Example(module, {"image": image}, ("logits",), {"image": {0: "batch"}})


def _tokens(vocabulary: int, length: int = 64) -> Tensor:
    return torch.randint(3, vocabulary, (2, length))


def _bert() -> Example:
    config = transformers.BertConfig(num_hidden_layers=6)
    ids = _tokens(config.vocab_size)
    mask = torch.ones_like(ids)
    mask[1, 48:] = 0
    axes = {0: "batch", 1: "sequence"}
    return Example(
        _Call(
            transformers.BertModel(config),
            lambda m, i, a: tuple(m(input_ids=i, attention_mask=a, return_dict=True).values())[:2],
        ),
        {"input_ids": ids, "attention_mask": mask},
        ("last_hidden_state", "pooler_output"),
        {"input_ids": axes, "attention_mask": axes},
    )


def _decoder(model: nn.Module, vocabulary: int) -> Example:
    ids = _tokens(vocabulary)
    axes = {0: "batch", 1: "sequence"}
    return Example(
        _Call(model, lambda m, i, a: m(input_ids=i, attention_mask=a, use_cache=False).logits),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        ("logits",),
        {"input_ids": axes, "attention_mask": axes},
    )


def _gpt2() -> Example:
    config = transformers.GPT2Config(n_layer=6)
    return _decoder(transformers.GPT2LMHeadModel(config), config.vocab_size)


def _llama() -> Example:
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    return _decoder(transformers.LlamaForCausalLM(config), config.vocab_size)


def _t5() -> Example:
    config = transformers.T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)
    axes = {0: "batch", 1: "sequence"}
    return Example(
        _Call(
            transformers.T5ForConditionalGeneration(config),
            lambda m, i, d: m(input_ids=i, decoder_input_ids=d, use_cache=False).logits,
        ),
        {
            "input_ids": _tokens(config.vocab_size),
            "decoder_input_ids": _tokens(config.vocab_size, 24),
        },
        ("logits",),
        {"input_ids": axes, "decoder_input_ids": {0: "batch", 1: "target"}},
    )


def _whisper() -> Example:
    config = transformers.WhisperConfig(
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
    )

    def call(model: nn.Module, features: Tensor, ids: Tensor) -> Tensor:
        # Without a mask transformers looks for packed sequences, by an operator that the
        # torchscript exporter does not know.
        mask = torch.ones_like(ids)
        out = model(
            input_features=features,
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            use_cache=False,
        )
        logits: Tensor = out.logits
        return logits

    return Example(
        _Call(transformers.WhisperForConditionalGeneration(config), call),
        {
            "input_features": torch.randn(2, config.num_mel_bins, 3000),
            "decoder_input_ids": _tokens(config.vocab_size, 24),
        },
        ("logits",),
        {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "target"}},
    )


_TEXT: Final[dict[str, Callable[[], Example]]] = {
    "bert6": _bert,
    "gpt2_6": _gpt2,
    "t5_small": _t5,
    "whisper_tiny": _whisper,
    "llama_s": _llama,
}


def build(name: str, fused_attention: bool = True, seed: int = 0) -> Example:
    """Build one architecture with random weights, in evaluation mode.

    Args:
        name: One of `models.architectures.ARCHITECTURES`.
        fused_attention: Whether to call torch's one attention operator, which the torchscript
            exporter knows from opset 14 on.
        seed: Of the weights, the norms and the example inputs.

    Raises:
        KeyError: There is no such architecture.
    """
    if name not in {a.name for a in ARCHITECTURES}:
        raise KeyError(name)
    torch.manual_seed(seed)
    example = _vision(name, fused_attention) if name in _VISION else _TEXT[name]()
    if isinstance(example.module, _Call) and not fused_attention:
        example.module.inner.set_attn_implementation("eager")
    randomise_norms(example.module, tuple(example.inputs.values()), seed)
    return example


def export(example: Example, path: Path, exporter: Exporter, opset: int, flavour: Flavour) -> None:
    """Write an example as ONNX, in one file where it is below 2 GB.

    Args:
        example: What `build` returned.
        path: Where to; its folder must exist.
        exporter: "dynamo" or "torchscript".
        opset: Asked for; the dynamo exporter may leave another one, which the caller reads back.
        flavour: "kept" leaves BatchNormalization in the graph, "folded" lets the exporter fold.
    """
    inputs, names = tuple(example.inputs.values()), list(example.inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            torch.onnx.export(
                example.module,
                inputs,
                path,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=list(example.outputs),
                dynamic_shapes=(tuple(dict(example.dynamic[n]) for n in names),)
                if isinstance(example.module, _Call)
                else tuple(dict(example.dynamic[n]) for n in names),
                optimize=flavour == "folded",
                external_data=False,
                verbose=False,
            )
        else:
            kept = flavour == "kept"
            mode = torch.onnx.TrainingMode.PRESERVE if kept else torch.onnx.TrainingMode.EVAL
            torch.onnx.export(
                example.module,
                inputs,
                path,
                dynamo=False,
                opset_version=opset,
                input_names=names,
                output_names=list(example.outputs),
                dynamic_axes={n: dict(axes) for n, axes in example.dynamic.items()},
                training=mode,
                do_constant_folding=not kept,
            )
