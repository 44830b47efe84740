"""Baselines: the parameter-efficient methods that the papers compare with, inserted into otherwise frozen towers.

    adapter       Houlsby et al. 2019            Bottleneck, behind each feed-forward network
    adaptformer   Chen et al. 2022               Bottleneck, beside it
    conv-adapter  Jie & Deng 2022                Bottleneck with a 3x3 convolution, beside it
    compacter     Karimi Mahabadi et al. 2021    Bottleneck with PHMLinear
    lora          Hu et al. 2021                 LoRA
    coop          Zhou et al. 2022               CoOp
    bitfit        Ben Zaken et al. 2022          add
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Settings

BASELINES = {  # --tune: the default of --baseline-dims, for images and words
    "adapter": (64, 64),       # widths of bottlenecks
    "adaptformer": (64, 64),
    "conv-adapter": (64, 0),
    "compacter": (1, 1),       # ranks
    "lora": (16, 16),
    "coop": (0, 8),            # prompts
    "bitfit": (),
}

TUNES = ("method", "frozen", "full", *BASELINES, *(f"method+{name}" for name in BASELINES))


def baseline_of(tune: str) -> str:
    """The baseline that a --tune names, or ""."""
    name = tune.removeprefix("method+")
    return name if name in BASELINES else ""


def dims(tune: str, tiny: bool, **own: tuple[int, int]) -> tuple[int, ...]:
    """The default of --baseline-dims. `own`: the method's own defaults, by baseline."""
    name = baseline_of(tune)
    default = BASELINES.get(name, ())
    if tiny:
        return tuple(-(-d // 4) for d in default) if name != "coop" else default
    return own.get(name.replace("-", "_"), default)


def rule(c) -> tuple[bool, str]:
    """The rule of common.check_config for baseline_dims: (whether they are possible, what they must be)."""
    given, default = c.baseline_dims, BASELINES.get(baseline_of(c.tune), ())
    if not default:
        return not given, f"left out with --tune {c.tune}"
    # a tower without a default, such as CoOp's vision tower, cannot have the baseline
    possible = len(given) == 2 and any(given) and all(d == 0 or d > 0 and u for d, u in zip(given, default))
    return possible, f"two numbers such as {','.join(map(str, default))}, 0 for none"


def prompts(c) -> int:
    """The number of CoOp's prompts, which precede the words."""
    return c.baseline_dims[1] if baseline_of(c.tune) == "coop" else 0


def prompted(tokens: Tensor, c) -> Tensor:
    """(B, L) -> (B, n + L): repeats the start token n times, as placeholders for the n prompts behind it."""
    return torch.cat([tokens[:, :1].expand(-1, prompts(c)), tokens], 1)


def add(c, vision: dict[str, nn.Module], text: dict[str, nn.Module], words: nn.Embedding) -> list[nn.Module]:
    """Inserts the baseline of c.tune into two towers. -> the new modules

    `vision`, `text`: the modules of a tower by name; `words`: the embedding of tokens. Each new module is a child of
    the module that it changes and is called by a forward hook, or is a parametrization (LoRA). So the method's code
    does not change. At the start all but CoOp's prompts leave the towers' output as it was.
    """
    name, added = baseline_of(c.tune), []
    if name == "coop":
        added.append(CoOp(words, prompts(c)))
    elif name == "bitfit":  # trains the biases, adds no module
        for m in [*vision.values(), *text.values()]:
            for kind, p in m.named_parameters(recurse=False):
                p.requires_grad_(p.requires_grad or kind.endswith("bias"))
    elif name:
        insert = add_lora if name == "lora" else partial(add_bottlenecks, name)
        for modules, dim in zip((vision, text), c.baseline_dims):
            added += insert(modules, dim) if dim else []
    return added


# CoOp


class CoOp(nn.Module):
    """Zhou et al. 2022, Eq. 2: learned vectors replace the embeddings of the n tokens behind the first."""

    def __init__(self, words: nn.Embedding, n: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(n, words.embedding_dim) * 0.02)
        words.add_module("baseline", self)
        words.register_forward_hook(lambda m, args, x: m.baseline(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n + L, C) -> the same shape; n is the number of prompts that prompted() inserted"""
        rest = x[:, 1 + len(self.vectors):]
        return torch.cat([x[:, :1], self.vectors.expand(len(x), -1, -1).to(x.dtype), rest], 1)


# LoRA


class LoRA(nn.Module):
    """Hu et al. 2021, Eq. 3: W + B A. W is divided into blocks of rows; `parts` says which of them get a B A."""

    def __init__(self, weight: Tensor, rank: int, parts: tuple[bool, ...]):
        super().__init__()
        self.parts, rows = parts, weight.shape[0] // len(parts)
        self.a = nn.Parameter(torch.empty(sum(parts), rank, weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(sum(parts), rows, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """(P * D, D') -> (P * D, D')"""
        low = iter(self.b @ self.a)                              # (D, D') for each block that is tuned
        return weight + torch.cat([next(low) if part else torch.zeros_like(rows)
                                   for part, rows in zip(self.parts, weight.chunk(len(self.parts)))])


def add_lora(modules: dict[str, nn.Module], rank: int) -> list[LoRA]:
    """Adds LoRA to the queries and values of every attention. W + B A is computed at each use and kept for backward."""
    added = []
    for name, m in modules.items():
        if isinstance(m, nn.MultiheadAttention):  # queries, keys and values are one matrix
            tensor, parts = "in_proj_weight", (True, False, True)
        elif isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] in ("q_proj", "v_proj", "query", "value"):
            tensor, parts = "weight", (True,)
        else:
            continue
        added.append(LoRA(getattr(m, tensor), rank, parts))
        nn.utils.parametrize.register_parametrization(m, tensor, added[-1])
    return added


# Bottlenecks


class PHMLinear(nn.Module):
    """Compacter (Karimi Mahabadi et al. 2021): W is a sum of n Kronecker products, each of a small matrix that all
    layers share and a matrix of low rank. (..., D) -> (..., D')

    `sharing`: the layers that share; the first of them owns the small matrices.
    """

    def __init__(self, width_in: int, width_out: int, rank: int, sharing: list[PHMLinear], n: int = 4):
        super().__init__()
        sharing.append(self)
        self.first = (sharing[0],)  # in a tuple, so that it is not registered as a child
        if sharing[0] is self:
            self.rule = nn.Parameter(torch.randn(n, n, n) * n**-0.5)
        self.s = nn.Parameter(torch.randn(n, width_in // n, rank) * (2 / width_in) ** 0.5)
        self.t = nn.Parameter(torch.randn(n, rank, width_out // n) * rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(width_out))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.einsum("nab,nir,nro->aibo", self.first[0].rule, self.s, self.t)
        return x @ w.flatten(2).flatten(0, 1) + self.bias


class Bottleneck(nn.Module):
    """Houlsby et al. 2019: down, ReLU, up. For tokens (B, N, D) or maps (B, D, H, W); a map may be subsampled by
    `stride`. With `conv`, a 3x3 convolution follows `down`, over the patches: the last tokens, as many as form a square
    (Jie & Deng 2022)."""

    def __init__(self, width: int, dim: int, linear: Callable = nn.Linear, conv: bool = False, stride: int = 1,
                 scale: float = 1.0):
        super().__init__()
        self.down, self.up, self.stride, self.scale = linear(width, dim), linear(dim, width), stride, scale
        self.conv = nn.Conv2d(dim, dim, 3, padding=1) if conv else None
        for p in self.up.parameters() if linear is nn.Linear else [self.up.t]:
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.dim() == 4
        z = F.relu(self.down(x[:, :, ::self.stride, ::self.stride].movedim(1, 3) if maps else x))  # (B, N, d)
        if self.conv is not None:
            side = math.isqrt(z.shape[1])
            rest, square = z[:, :-side * side], z[:, -side * side:].transpose(1, 2).unflatten(2, (side, side))
            z = torch.cat([rest, F.relu(self.conv(square)).flatten(2).transpose(1, 2)], 1)
        y = self.scale * self.up(z)                              # (B, N, D)
        return y.movedim(3, 1) if maps else y


FFN = {"c_fc": "c_proj", "fc1": "fc2", "linear1": "linear2", "intermediate.dense": "output.dense"}  # first, last layer


def add_bottlenecks(kind: str, modules: dict[str, nn.Module], dim: int) -> list[Bottleneck]:
    """Adds one bottleneck for each feed-forward network of a transformer, behind it or beside it (AdaptFormer,
    conv-adapter). Houlsby et al. have two in a layer, but the sizes that the papers print are those of one. In a ResNet
    they are beside the 3x3 convolutions (VL-Adapter, Sung et al. 2022): `dim` wide at the widest convolution, and
    proportionally narrower at the others."""
    ends = [(m, modules[name.removesuffix(first) + last]) for name, m in modules.items() for first, last in FFN.items()
            if name.endswith(first)]
    convs = [m for name, m in modules.items() if re.search(r"layer\d\.\d+\.conv2$", name)]
    in_convs = bool(convs) and (kind == "conv-adapter" or not ends)
    beside = in_convs or kind in ("adaptformer", "conv-adapter")
    added, sharing = [], []
    for first, last in zip(convs, convs) if in_convs else ends:
        width = last.weight.shape[0]
        if kind == "compacter":  # dim is the rank; the width is a quarter of the tower's, in multiples of n
            linear, d = partial(PHMLinear, rank=dim, sharing=sharing), -(-width // 16) * 4
        else:
            linear, d = nn.Linear, max(1, dim * width // max(m.weight.shape[0] for m in convs)) if in_convs else dim
        last.add_module("baseline", Bottleneck(
            width, d, linear, conv=kind == "conv-adapter" and not in_convs, stride=last.stride[0] if in_convs else 1,
            scale=0.1 if kind == "adaptformer" else 1.0))
        attach(first, last, beside)
        added.append(last.baseline)
    return added


def attach(first: nn.Module, last: nn.Module, beside: bool) -> None:
    """Adds the baseline's output to the output of `last`. The baseline reads that output or, if beside, the input of
    `first`."""
    if not beside:
        last.register_forward_hook(lambda m, args, y: y + m.baseline(y))
        return
    read = {}
    first.register_forward_hook(lambda m, args, y: read.update(x=args[0]))
    last.register_forward_hook(lambda m, args, y: y + m.baseline(read["x"]))
