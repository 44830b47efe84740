"""CLIP's image towers in stages, for ETRIS (Sec. 3.1), and DINOv2 in their place (DCRIS, Table 2).

A tower holds no parameters: these stay in `visual`, a module of the model. Every tower has

    mean_std                 of RGB values
    widths, strides          of the maps of stages 2, 3 and 4: channels, pixels to a place
    out_width                channels of end()
    start(images)            (B, 3, H, W) -> what stage 2 reads
    stages                   three modules, each from the output of the one before
    as_map(x, grid)          -> (B, C, h, w); grid: h, w
    add(x, f_v)              features x with a map f_v added
    end(x, grid)             the output of stage 4 as a map, projected to the space of the sentence
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolbox.weights import check_released, load_clip, load_dinov2_and_clip

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of RGB values
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ResNetTower:
    """CLIP's ResNet; features are maps (B, C, h, w)."""

    mean_std = CLIP

    def __init__(self, visual: nn.Module, blocks: tuple[int, ...], sentence_width: int):
        base = visual.conv3.out_channels
        self.visual, self.stages = visual, (visual.layer2, visual.layer3, visual.layer4)
        self.widths, self.strides, self.out_width = (8 * base, 16 * base, 32 * base), (8, 16, 32), sentence_width

    def start(self, images: Tensor) -> Tensor:
        return self.visual.layer1(self.visual.stem(images))      # (B, C, H/4, W/4)

    def as_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x

    def add(self, x: Tensor, f_v: Tensor) -> Tensor:
        return x + f_v

    def end(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return attention_pool(self.visual.attnpool, x)           # (B, C', H/32, W/32)


class ViTTower:
    """CLIP's ViT, of which `blocks` end the stages; features are tokens (B, 1 + N, C), the class token first."""

    mean_std, prefix = CLIP, 1                                   # prefix: tokens that belong to no place
    patches, layers = "conv1", "transformer.resblocks"

    def __init__(self, visual: nn.Module, blocks: tuple[int, ...], sentence_width: int):
        conv, layers = visual.get_submodule(self.patches), visual.get_submodule(self.layers)
        self.visual, self.stages = visual, [nn.Sequential(*layers[a:b]) for a, b in zip((0, *blocks), blocks)]
        self.widths, self.strides, self.out_width = (conv.out_channels,) * 3, conv.stride[:1] * 3, sentence_width

    def start(self, images: Tensor) -> Tensor:
        visual = self.visual
        x = visual.conv1(images)                                 # (B, C, H/p, W/p)
        positions = resized(visual.positional_embedding, x.shape[-2:])
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        return visual.ln_pre(x + positions)                      # (B, 1+N, C)

    def as_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x[:, self.prefix:].transpose(1, 2).unflatten(2, grid)  # (B, C, H/p, W/p)

    def add(self, x: Tensor, f_v: Tensor) -> Tensor:
        return x + F.pad(f_v.flatten(2).transpose(1, 2), (0, 0, self.prefix, 0))

    def end(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.as_map(self.visual.ln_post(x) @ self.visual.proj, grid)  # (B, C', H/p, W/p)


class DINOv2Tower(ViTTower):
    """DINOv2 with four registers behind the class token. It has no projection to the sentence's space."""

    mean_std, prefix = IMAGENET, 5
    patches, layers = "embeddings.patch_embeddings.projection", "encoder.layer"

    def __init__(self, visual: nn.Module, blocks: tuple[int, ...], sentence_width: int):
        super().__init__(visual, blocks, visual.config.hidden_size)

    def start(self, images: Tensor) -> Tensor:
        return self.visual.embeddings(images)                    # (B, 5+N, C)

    def end(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.as_map(self.visual.layernorm(x), grid)       # (B, C, H/p, W/p)


TOWERS = dict(resnet=ResNetTower, vit=ViTTower, dinov2=DINOv2Tower)


def attention_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """CLIP's attention pool with each place as a query, without the mean, as in CRIS. (B, C, H, W) -> (B, C', H, W)

    `connect`: the branch that ETRIS's public code adds.
    """
    grid = tuple(x.shape[-2:])
    y = x.flatten(2).transpose(1, 2) + resized(pool.positional_embedding, grid)[1:]  # (B, N, C)
    q, k, v = (p(y).unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for p in (pool.q_proj, pool.k_proj, pool.v_proj))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, C)
    y = pool.c_proj(y).transpose(1, 2).unflatten(2, grid)        # (B, C', H, W)
    return F.relu(y + pool.connect(x)) if hasattr(pool, "connect") else y


def resized(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positional embeddings (1 + n, C), the first of the class token, for another grid. -> (1 + H*W, C)"""
    side = int((len(table) - 1) ** 0.5)
    if grid == (side, side):
        return table
    places = F.interpolate(table[1:].T.unflatten(1, (side, side))[None], grid, mode="bicubic")
    return torch.cat([table[:1], places[0].flatten(1).T])


def build_clip(backbone: str, weights: str, kind: str, clip: dict, hub: str = "") -> nn.Module:
    """open_clip's CLIP with the config `clip`; of the kind dinov2 with DINOv2 as its image tower.

    `weights`: "random", "pretrained" (of the hub's repository `hub`) or a file; for DINOv2 its file and CLIP's.
    """
    import open_clip  # slow, and --help does without

    check_released(backbone, weights)
    model = open_clip.CLIP(**clip)
    if kind == "dinov2":
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        del model.visual
        dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, image_size=518))
        if weights != "random":
            load_dinov2_and_clip(dino, model, weights, hub, backbone)
        model.visual = dino
        return model
    if kind == "resnet":  # a training step on a CPU takes 4 % (RN101) to 12 % (tiny) less time
        model.visual.to(memory_format=torch.channels_last)
    if weights != "random":
        load_clip(model, weights, hub, backbone)
    return model
