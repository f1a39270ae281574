"""Networks whose norms have fixed statistics at inference, as their authors train them, in torch.

Each is built from its paper at a small width, in evaluation mode, with parameters that matter:
`build(name)` is the network, and `build(name, plain=True)` the same network without the part that
needs no statistics at inference, and with a bias wherever folding that part leaves one. What stays
in both is what no folding can remove: the layer norm under LayerNorm Scaling, the group RMS in
front of PowerNorm, the instance norm of IBN, the channel norm of batch-channel normalization.

Needs the extra `onnxnorm[models]`. `models/exports/` has what both exporters write of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from models.exported import Example, randomise_norms


class UnifiedNorm(nn.Module):
    """y = gamma x / sqrt(psi + eps) + beta, psi a running second moment (arXiv:2208.01313).

    In training psi is the geometric mean of the second moments of the last batches, each over all
    tokens; at inference it is the running statistic. No mean is subtracted.
    """

    def __init__(self, channels: int, window: int = 4, momentum: float = 0.9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_moment", torch.ones(channels))
        self.register_buffer("buffer", torch.ones(window, channels))
        self.epsilon, self.momentum, self.seen = 1e-5, momentum, 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of [batch, tokens, channels]."""
        batch, tokens, channels = x.shape
        maps = x.transpose(1, 2).reshape(batch, channels, tokens, 1)
        moment = self.running_moment
        if self.training:
            with torch.no_grad():
                self.buffer[self.seen % len(self.buffer)] = maps.square().mean((0, 2, 3))
                self.seen += 1
                known = self.buffer[: min(self.seen, len(self.buffer))]
                moment = known.log().mean(0).exp()
                self.running_moment.lerp_(moment, 1 - self.momentum)
        scaled = maps / (moment.view(1, channels, 1, 1) + self.epsilon).sqrt()
        scaled = scaled * self.weight.view(1, channels, 1, 1) + self.bias.view(1, channels, 1, 1)
        return scaled.reshape(batch, channels, tokens).transpose(1, 2)


class RepBatchNorm(nn.Module):
    """y = BN(x) + alpha x: what PRepBN is at inference (SLAB, arXiv:2405.11582)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of [batch, tokens, channels]."""
        maps = x.transpose(1, 2)
        return (self.bn(maps) + self.alpha * maps).transpose(1, 2)


class ProgressiveRepBatchNorm(nn.Module):
    """lambda LN(x) + (1 - lambda) RepBN(x), lambda falling to 0 while it is trained."""

    def __init__(self, channels: int, steps: int = 1000) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(channels)
        self.rep = RepBatchNorm(channels)
        self.left, self.steps = steps, steps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of [batch, tokens, channels]."""
        if not self.training:
            return self.rep(x)
        self.left = max(self.left - 1, 0)
        share = self.left / self.steps
        return share * self.layer(x) + (1 - share) * self.rep(x)


class PowerNorm(nn.Module):
    """y = gamma g(x) / sqrt(phi + eps) + beta, g a group RMS (arXiv:2003.07845).

    phi is a running second moment, g scales each group of channels of a token by its own RMS and is
    as dynamic at inference as it is in training.
    """

    def __init__(self, channels: int, groups: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_phi", torch.ones(1, channels, 1, 1))
        self.groups, self.momentum, self.epsilon = groups, momentum, 1e-5
        self.plain = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of [tokens, batch, channels]."""
        tokens, batch, channels = x.shape
        parts = x.reshape(tokens, batch, self.groups, channels // self.groups)
        moment = parts.square().mean(-1, keepdim=True)
        x = (parts / (moment + self.epsilon).sqrt()).reshape(tokens, batch, channels)
        if self.plain:
            return x
        maps = x.permute(1, 2, 0).reshape(batch, channels, tokens, 1)
        phi = self.running_phi
        if self.training:
            with torch.no_grad():
                phi = maps.square().mean((0, 2, 3), keepdim=True)
                self.running_phi.lerp_(phi, 1 - self.momentum)
        maps = maps / (phi + self.epsilon).sqrt()
        maps = self.weight.reshape(1, channels, 1, 1) * maps + self.bias.reshape(1, channels, 1, 1)
        return maps.reshape(batch, channels, tokens).permute(2, 0, 1)


class StandardizedConv2d(nn.Conv2d):
    """A convolution with (W - mean) / (std + 1e-5) per filter for its weight (arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the standardized weight."""
        weight = self.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        std = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return self._conv_forward(x, weight / std, self.bias)


class SigmaReparamLinear(nn.Linear):
    """x (gamma W / sigma(W))^T + b, sigma from one step of power iteration (arXiv:2303.06296)."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(source, target)
        self.gamma = nn.Parameter(torch.ones(1))
        self.register_buffer("u", F.normalize(torch.randn(source), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the rescaled matrix."""
        with torch.no_grad():
            v = F.normalize(self.weight.mv(self.u), dim=0)
            u = F.normalize(self.weight.T.mv(v), dim=0)
            if self.training:
                self.u.copy_(u)
        sigma = torch.einsum("d,dc,c->", v, self.weight, u)
        return F.linear(x, self.gamma / sigma * self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head attention on [batch, tokens, channels]."""

    def __init__(
        self, channels: int, heads: int, linear: Callable[..., nn.Module] = nn.Linear
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(channels, 3 * channels)
        self.out = linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; a mask is added to the scores."""
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * (channels // self.heads) ** -0.5
        if mask is not None:
            scores = scores + mask
        y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, channels))


def _mlp(channels: int, linear: Callable[..., nn.Module] = nn.Linear) -> nn.Sequential:
    return nn.Sequential(linear(channels, 2 * channels), nn.GELU(), linear(2 * channels, channels))


class _Input(nn.Module):
    """(x - mean) / std per colour, as data loaders do it, in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize an image of values in [0, 1]."""
        return (x - self.mean) / self.std


class VisionTransformer(nn.Module):
    """A ViT with any norm, in front of its branches or behind their sums."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        *,
        post: bool = False,
        linear: Callable[..., nn.Module] = nn.Linear,
        normalized: bool = True,
        channels: int = 32,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.input = _Input() if normalized else nn.Identity()
        self.patches = nn.Conv2d(3, channels, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, channels) * 0.2)
        self.norms = nn.ModuleList(norm(channels) for _ in range(2 * depth + 1))
        branches: list[nn.Module] = []
        for _ in range(depth):
            branches += [Attention(channels, 4, linear), _mlp(channels, linear)]
        self.branches = nn.ModuleList(branches)
        self.head = linear(channels, 10)
        self.post = post

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of 16 x 16."""
        x = self.patches(self.input(image)).flatten(2).transpose(1, 2) + self.position
        if self.post:
            x = self.norms[-1](x)
        for branch, norm in zip(self.branches, self.norms[:-1], strict=True):
            x = norm(x + branch(x)) if self.post else x + branch(norm(x))
        if not self.post:
            x = self.norms[-1](x)
        return self.head(x.mean(1))


class _WindowBlock(nn.Module):
    """Attention within windows of 4 x 4, shifted or not, and an MLP (Swin, arXiv:2103.14030)."""

    def __init__(
        self, channels: int, size: int, shift: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.size, self.shift = size, shift
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.attention, self.mlp = Attention(channels, 4), _mlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform [batch, size^2, channels]."""
        batch, _, channels = x.shape
        windows = self.size // 4
        y = self.norm1(x).view(batch, self.size, self.size, channels)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.view(batch, windows, 4, windows, 4, channels).transpose(2, 3)
        y = self.attention(y.reshape(-1, 16, channels))
        y = y.view(batch, windows, windows, 4, 4, channels).transpose(2, 3)
        y = y.reshape(batch, self.size, self.size, channels)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y.reshape(batch, -1, channels)
        return x + self.mlp(self.norm2(x))


class _Merge(nn.Module):
    """Four neighbours into one token of twice the channels."""

    def __init__(
        self, channels: int, size: int, norm: Callable[[int], nn.Module], bias: bool
    ) -> None:
        super().__init__()
        self.size = size
        self.norm = norm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Merge [batch, size^2, channels]."""
        batch, _, channels = x.shape
        x = x.view(batch, self.size, self.size, channels)
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = torch.cat(parts, -1).view(batch, -1, 4 * channels)
        return self.reduction(self.norm(x))


class WindowTransformer(nn.Module):
    """A Swin of two stages with any norm."""

    def __init__(self, norm: Callable[[int], nn.Module], plain: bool, channels: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, 4)
        self.norm0 = norm(channels)
        self.blocks = nn.Sequential(
            _WindowBlock(channels, 8, 2, norm),
            _Merge(channels, 8, norm, bias=plain),
            _WindowBlock(2 * channels, 4, 0, norm),
        )
        self.norm = norm(2 * channels)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of 32 x 32."""
        x = self.norm0(self.patches(image).flatten(2).transpose(1, 2))
        return self.head(self.norm(self.blocks(x)).mean(1))


class Translator(nn.Module):
    """A pre-norm text encoder on [tokens, batch, channels] with PowerNorm."""

    def __init__(self, plain: bool, channels: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, channels)
        self.norms = nn.ModuleList(PowerNorm(channels, heads) for _ in range(2 * depth + 1))
        for norm in self.norms:
            norm.plain = plain
        branches: list[nn.Module] = []
        for _ in range(depth):
            branches += [Attention(channels, heads), _mlp(channels)]
        self.branches = nn.ModuleList(branches)
        self.head = nn.Linear(channels, 50)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits for [batch, tokens]."""
        x = self.embedding(ids.transpose(0, 1))
        for place, (branch, norm) in enumerate(zip(self.branches, self.norms[:-1], strict=True)):
            y = norm(x)
            attends = place % 2 == 0
            x = x + (branch(y.transpose(0, 1)).transpose(0, 1) if attends else branch(y))
        return self.head(self.norms[-1](x))


class ScaledGPT(nn.Module):
    """A pre-norm decoder with LN(x) / sqrt(layer) (arXiv:2502.05795)."""

    def __init__(self, plain: bool, channels: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.plain = plain
        self.embedding = nn.Embedding(50, channels)
        self.position = nn.Embedding(16, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2 * depth + 1))
        branches: list[nn.Module] = []
        for _ in range(depth):
            branches += [Attention(channels, 4), _mlp(channels)]
        self.branches = nn.ModuleList(branches)
        self.head = nn.Linear(channels, 50, bias=False)
        self.register_buffer("places", torch.arange(16))
        self.register_buffer("mask", torch.full((16, 16), -1e4).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits for [batch, 16]."""
        x = self.embedding(ids) + self.position(self.places)
        for place, (branch, norm) in enumerate(zip(self.branches, self.norms[:-1], strict=True)):
            y = norm(x)
            if not self.plain:
                y = y * (1 / math.sqrt(place // 2 + 1))
            x = x + (branch(y, self.mask) if place % 2 == 0 else branch(y))
        return self.head(self.norms[-1](x))


class InstanceBatchNorm(nn.Module):
    """Instance norm on half of the channels, batch norm on the rest (arXiv:1807.09441)."""

    def __init__(self, channels: int, plain: bool) -> None:
        super().__init__()
        self.half = channels // 2
        self.instance = nn.InstanceNorm2d(self.half, affine=True)
        self.batch = nn.Identity() if plain else nn.BatchNorm2d(channels - self.half)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [batch, channels, height, width]."""
        first, second = torch.split(x, (self.half, x.shape[1] - self.half), 1)
        return torch.cat((self.instance(first.contiguous()), self.batch(second.contiguous())), 1)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and the sum, with the norms of choice."""

    def __init__(
        self,
        source: int,
        target: int,
        stride: int,
        first: Callable[[int], nn.Module],
        norm: Callable[[int], nn.Module],
        conv: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        width = target // 2
        self.conv1, self.norm1 = conv(source, width, 1), first(width)
        self.conv2, self.norm2 = conv(width, width, 3, stride, 1), norm(width)
        self.conv3, self.norm3 = conv(width, target, 1), norm(target)
        self.shortcut = nn.Identity()
        if stride > 1 or source != target:
            self.shortcut = nn.Sequential(conv(source, target, 1, stride), norm(target))

    def forward(self, x: Tensor) -> Tensor:
        """Transform [batch, channels, height, width]."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of two bottlenecks with the norms of choice."""

    def __init__(
        self,
        first: Callable[[int], nn.Module],
        norm: Callable[[int], nn.Module],
        conv: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 3, 1, 1), norm(16), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(
            Bottleneck(16, 32, 2, first, norm, conv),
            Bottleneck(32, 32, 1, first, norm, conv),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of 32 x 32."""
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


class BatchChannelNorm(nn.Module):
    """A channel norm (group norm) on a batch norm (arXiv:1903.10520)."""

    def __init__(self, channels: int, plain: bool) -> None:
        super().__init__()
        self.batch = nn.Identity() if plain else nn.BatchNorm2d(channels)
        self.channel = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [batch, channels, height, width]."""
        return self.channel(self.batch(x))


class GraphTransformer(nn.Module):
    """Attention over a node's neighbours, batch norms behind the sums (arXiv:2012.09699)."""

    def __init__(self, plain: bool, channels: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Linear(8, channels)
        self.position = nn.Linear(4, channels)
        names = ("q", "k", "v", "out")
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(channels, channels) for name in names},
                    "mlp": nn.Sequential(
                        nn.Linear(channels, 2 * channels),
                        nn.ReLU(),
                        nn.Linear(2 * channels, channels),
                    ),
                    "norm1": nn.Identity() if plain else nn.BatchNorm1d(channels),
                    "norm2": nn.Identity() if plain else nn.BatchNorm1d(channels),
                }
            )
            for _ in range(depth)
        )
        self.readout = nn.Sequential(nn.Linear(channels, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, nodes: Tensor, laplacian: Tensor, edges: Tensor) -> Tensor:
        """Score a graph: [nodes, 8], [nodes, 4] and an adjacency matrix of [nodes, nodes]."""
        h = self.embedding(nodes) + self.position(laplacian)
        count, channels = h.shape
        for layer in self.layers:
            q, k, v = (
                layer[n](h).view(count, self.heads, channels // self.heads).transpose(0, 1)
                for n in "qkv"
            )
            scores = (q @ k.transpose(1, 2) / math.sqrt(channels // self.heads)).clamp(-5, 5)
            scores = scores.exp() * edges
            y = (scores @ v) / (scores.sum(-1, keepdim=True) + 1e-6)
            y = layer["out"](y.transpose(0, 1).reshape(count, channels))
            h = layer["norm1"](h + y)
            h = layer["norm2"](h + layer["mlp"](h))
        return self.readout(h.mean(0, keepdim=True))


class Spade(nn.Module):
    """BN(x) (1 + gamma(m)) + beta(m), gamma and beta convolutions of a map (arXiv:1903.07291)."""

    def __init__(self, channels: int, labels: int, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.norm = nn.Identity() if plain else nn.BatchNorm2d(channels, affine=False)
        self.shared = nn.Sequential(nn.Conv2d(labels, 16, 3, 1, 1), nn.ReLU())
        self.gamma = nn.Conv2d(16, channels, 3, 1, 1)
        self.beta = nn.Conv2d(16, channels, 3, 1, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Modulate [batch, channels, height, width]."""
        x = self.norm(x)
        hidden = self.shared(labels)
        gamma, beta = self.gamma(hidden), self.beta(hidden)
        return x * (gamma if self.plain else 1 + gamma) + beta


class SpadeGenerator(nn.Module):
    """Two residual blocks of SPADE layers."""

    def __init__(self, plain: bool, channels: int = 16, labels: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 1, 1)
        self.norms = nn.ModuleList(Spade(channels, labels, plain) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(4))
        self.image = nn.Conv2d(channels, 3, 3, 1, 1)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Draw an image for a map of labels of the same size."""
        x = self.stem(noise)
        for block in (0, 2):
            y = x
            for layer in (block, block + 1):
                y = self.convs[layer](F.leaky_relu(self.norms[layer](y, labels), 0.2))
            x = x + y
        return self.image(F.leaky_relu(x, 0.2)).tanh()


class Brightener(nn.Module):
    """Convolutions with instance norms behind them, which ignore their biases (NoiSER)."""

    def __init__(self, plain: bool, channels: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, 1, 1, bias=not plain)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=not plain)
        self.norm1 = nn.InstanceNorm2d(channels, affine=True)
        self.norm2 = nn.InstanceNorm2d(channels, affine=True)
        self.last = nn.Conv2d(channels, 3, 3, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Brighten an image of any size."""
        x = F.leaky_relu(self.norm1(self.first(image)), 0.2)
        return self.last(F.leaky_relu(self.norm2(self.second(x)), 0.2)).tanh()


class _Shift(nn.Module):
    """A layer norm without gamma: n(x) + beta (non-scaling, arXiv:2502.01441)."""

    def __init__(self, channels: int, plain: bool) -> None:
        super().__init__()
        self.channels = channels
        self.beta = None if plain else nn.Parameter(torch.randn(channels) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        y = F.layer_norm(x, (self.channels,))
        return y if self.beta is None else y + self.beta


def _none(_: int) -> nn.Module:
    return nn.Identity()


def _image(size: int) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    return {"image": torch.rand(2, 3, size, size)}, {"image": {0: "batch"}}


def _conv(plain: bool, kind: type[nn.Conv2d] = nn.Conv2d) -> Callable[..., nn.Module]:
    def make(*sizes: int) -> nn.Module:
        return kind(*sizes, bias=plain)

    return make


def _module(name: str, plain: bool) -> nn.Module:
    modules: dict[str, Callable[[], nn.Module]] = {
        "un_vit": lambda: VisionTransformer(_none if plain else UnifiedNorm, normalized=not plain),
        "un_vit_post": lambda: VisionTransformer(
            _none if plain else UnifiedNorm, post=True, normalized=False
        ),
        "repbn_swin": lambda: WindowTransformer(_none if plain else ProgressiveRepBatchNorm, plain),
        "powernorm": lambda: Translator(plain),
        "lns_gpt": lambda: ScaledGPT(plain),
        "ibn_resnet": lambda: ResNet(
            lambda c: InstanceBatchNorm(c, plain),
            _none if plain else nn.BatchNorm2d,
            _conv(plain),
        ),
        "graph_transformer": lambda: GraphTransformer(plain),
        "ws_bcn_resnet": lambda: ResNet(
            lambda c: BatchChannelNorm(c, plain),
            lambda c: BatchChannelNorm(c, plain),
            _conv(plain, nn.Conv2d if plain else StandardizedConv2d),
        ),
        "sigma_vit": lambda: VisionTransformer(
            _none, linear=nn.Linear if plain else SigmaReparamLinear, normalized=False
        ),
        "spade": lambda: SpadeGenerator(plain),
        "noiser": lambda: Brightener(plain),
        "nonscaling_vit": lambda: VisionTransformer(lambda c: _Shift(c, plain), normalized=False),
    }
    return modules[name]()


def _inputs(name: str) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    if name in ("powernorm", "lns_gpt"):
        return {"ids": torch.randint(0, 50, (2, 16))}, {"ids": {0: "batch"}}
    if name == "graph_transformer":
        given = {
            "nodes": torch.randn(12, 8),
            "laplacian": torch.randn(12, 4),
            "edges": (torch.rand(12, 12) < 0.4).float() + torch.eye(12),
        }
        return given, {"nodes": {0: "n"}, "laplacian": {0: "n"}, "edges": {0: "n", 1: "n"}}
    if name == "spade":
        given = {"noise": torch.randn(2, 3, 16, 16), "labels": torch.rand(2, 5, 16, 16)}
        return given, {"noise": {0: "batch"}, "labels": {0: "batch"}}
    return _image(32 if name in ("repbn_swin", "ibn_resnet", "ws_bcn_resnet") else 16)


def _randomise(module: nn.Module, example: tuple[Tensor, ...], seed: int) -> None:
    """Give also those statistics and factors values that torch's own norms do not have."""
    randomise_norms(module, example, seed)
    draws = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, SigmaReparamLinear):
                # A common direction: sigma is far from zero also for vectors that are drawn anew.
                part.weight.add_(0.1)
                part.u.abs_()
        for name, tensor in [*module.named_buffers(), *module.named_parameters()]:
            leaf = name.rpartition(".")[2]
            if leaf in ("running_moment", "running_phi", "alpha", "gamma"):
                tensor.copy_(torch.rand(tensor.shape, generator=draws) + 0.5)


def build(name: str, *, plain: bool = False, seed: int = 0) -> Example:
    """Build one network in evaluation mode.

    Args:
        name: One of `models.fixed.SYSTEMS`.
        plain: Without its fixed-statistic part.
        seed: Of the weights and the example inputs.

    Raises:
        KeyError: There is no such network.
    """
    torch.manual_seed(seed)
    module = _module(name, plain).eval()
    inputs, dynamic = _inputs(name)
    _randomise(module, tuple(inputs.values()), seed)
    output: dict[str, Any] = {"outputs": ("result",)}
    return Example(module, inputs, dynamic=dynamic, **output)
