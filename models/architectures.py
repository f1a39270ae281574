"""The real architectures: what they are called, what they are fed, how they are exported.

Nothing here imports torch, so that the list can be read without it; `models.exported` builds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Exporter = Literal["dynamo", "torchscript"]
Flavour = Literal["kept", "folded"]

# The torchscript path ends at opset 20. The dynamo path builds at opset 18 and converts from there,
# which down to 11, 14 and 17 seldom succeeds; asking all the same records which do.
OPSETS: Final[dict[Exporter, tuple[int, ...]]] = {
    "torchscript": (11, 14, 17, 20),
    "dynamo": (11, 14, 17, 18, 20, 23),
}
# For networks of more than 100 MB a file.
FEWER_OPSETS: Final[dict[Exporter, tuple[int, ...]]] = {
    "torchscript": (17, 20),
    "dynamo": (17, 18, 23),
}


@dataclass(frozen=True)
class Architecture:
    """One real network, randomly initialised from its published configuration.

    Attributes:
        name: What `--only` takes and what the file is called.
        title: What people call it.
        batch_norm: Whether it has BatchNormalization, so that the two flavours differ: "kept"
            leaves the nodes in the graph, "folded" lets the exporter fold what it can.
        large: Whether to export at `FEWER_OPSETS` only.
    """

    name: str
    title: str
    batch_norm: bool = False
    large: bool = False

    def variants(self) -> tuple[tuple[Exporter, int, Flavour], ...]:
        """Return every (exporter, opset, flavour) that this architecture is exported as."""
        flavours: tuple[Flavour, ...] = ("kept", "folded") if self.batch_norm else ("folded",)
        return tuple(
            (exporter, opset, flavour)
            for exporter, opsets in (FEWER_OPSETS if self.large else OPSETS).items()
            for opset in opsets
            for flavour in flavours
        )


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    Architecture("resnet50", "ResNet-50", batch_norm=True),
    Architecture("mobilenetv3", "MobileNetV3-Large", batch_norm=True),
    Architecture("densenet121", "DenseNet-121", batch_norm=True),
    Architecture("vit_s", "ViT-S/16"),
    Architecture("deit_s", "DeiT-S/16, distilled"),
    Architecture("swin_t", "Swin-T"),
    Architecture("convnext_t", "ConvNeXt-T"),
    Architecture("bert6", "BERT, 6 layers", large=True),
    Architecture("gpt2_6", "GPT-2, 6 layers", large=True),
    Architecture("t5_small", "T5-small, encoder and decoder", large=True),
    Architecture("whisper_tiny", "Whisper-tiny, encoder and decoder", large=True),
    Architecture("llama_s", "a Llama-style decoder, 6 layers of 512"),
)
