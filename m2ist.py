"""M2IST: Multi-Modal Interactive Side-Tuning for Efficient Referring Expression Comprehension (Liu, Liu, Huang et al.,
2024, https://arxiv.org/abs/2407.01131). It predicts a box.

DETR encodes the image and BERT the sentence. Both stay frozen and run without gradients. Beside each encoder runs a
side network of small adapters (M3ISA): an IEA reads the attention output of a layer, a VEA or LEA reads the output of
its feed-forward network. The IEAs of both encoders share one up-projection, which connects the modalities. A
vision-language (V-L) encoder fuses the results, and a head regresses the box from its [REG] token.

    Sec. III-A a         vision encoder                DETR, M2IST.encode_image
    Sec. III-A b         language encoder              bert_sublayers, M2IST.encode_text
    Sec. III-A c         V-L encoder, head             M2IST.forward
    Eq. 1, Fig. 2 right  VEA, LEA                      Experts
    Eq. 2-5, Fig. 2      IEA                           IEA
    Sec. III-B b, Fig. 2 side networks                 M3ISA, M2IST.side_network
    Eq. 6                loss                          M2IST.loss
    Fig. 1               what is trained               Config.tune (a: full, b: adapter, c: method)
    Fig. 3, Table VII    forms of insertion            M2IST.add_sublayer, Config.insertion
    Fig. 4               attention of [REG]            toolbox/attention.py
    Tables I, II, IV-X   their rows                    toolbox/tables.py

The side stream. The paper describes it in words only (Sec. III-B b): the adapters' outputs are added along with the
original tokens, the result to the output of the encoder, and LayerNorm is not shown. Config.side is one of three
readings. f is what the V-L encoder receives; in language, LEA takes the place of VEA:

    paper   f = e + LN(z + sum over i of (IEA_i(a_i) + VEA_i(m_i)))           LN has no parameters
    public  f = e + z + sum over i of (IEA_i(a_i) - a_i + VEA_i(m_i) - m_i)   as the vision branch of the public code
    added   f = e + sum over i of (IEA_i(a_i) - a_i + VEA_i(m_i) - m_i)       up-projections start at 0

e: output of the frozen encoder. z: the tokens that enter it, without positions. a_i, m_i: outputs of attention and of
the feed-forward network in the i-th layer with adapters, before residual and norm. Eq. 1, 4 and 5 contain x + ..., so
"paper" adds a_i and m_i themselves. "added" starts exactly as --tune frozen, which has f = e.

Deviations:
    where               | the paper                  | here                           | the public code
    --------------------+----------------------------+--------------------------------+---------------------------------
    side stream         | in words                   | Config.side                    | public; s in VEA and LEA only
    input of IEA (text) | output of attention        | before residual and norm       | after residual and norm
    LayerNorm of M3ISA  | not shown                  | paper: over the sum            | per adapter; BERT's cancels s
    order in Eq. 2, 3   | not legible                | shared channels last           | shared channels last
    parallel (Fig. 3 b) | x + in Eq. 1, 4, 5         | dropped: the layer has its own | not released
    language layers     | 7 to 12 (Table VIII)       | 7 to 12                        | 1 to 6, their norms run twice
    BERT's token types  | not mentioned              | added, as in BERT              | left out
    biases of adapters  | none in Eq. 1 to 3         | start at 0                     | in vision, start in 0..1
    init of adapters    | Kaiming normal             | Kaiming normal                 | Xavier; text, shared N(0, 0.02)
    init of the rest    | Xavier (V-L encoder)       | and PyTorch's for proj., head  | as here for the V-L encoder
    size of adapters    | 3.19 M                     | 2.96 M                         | 2.99 M; 0.2 M counted twice
    Table IX, C_i       | 64, 128, 256: 2.00 to 3.19 | a larger C_i has fewer         | C_d = 32, 64, 128 would fit
    frozen encoders     | frozen                     | in eval mode                   | dropout stays on
    --tune full         | fully fine-tuned           | not stem, layer1, BatchNorms   | as here (TransVG)
    Eq. 6               | smooth L1; no lambda given | L1, lambda 1 (Config.box_loss) | L1, lambda 1
    epochs on RefCOCOg  | 90                         | 90                             | 120 or 180
    augmentation        | not described              | TransVG's, corrected (augment.py) | TransVG's
    words against crops | not described              | also center, upper, edge, ...  | left, right, top, bottom, middle
    color jitter        | not described              | before resizing                | after resizing
    precision           | not stated                 | bf16 on a GPU (memory differs) | fp32

Eq. 6: the public code has L1, as TransVG's, so the printed figures very likely come from L1. Boxes lie in 0..1, where
smooth L1 is always quadratic: an error of 0.05 costs 0.001, but 0.05 with L1. With lambda 1, GIoU would dominate.

`tiny` belongs to this project: it adds positions to the tokens, and token_loss makes [REG] attend to the object. Its
side stream is "public", which learns most at this size (docs/study.md). Its words, and those of --weights random, are
numbered by checksum.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Dropout, FrozenBatchNorm, MultiheadAttention, Preprocess, TrainConfig, check_config, dice_loss,
                    freeze, in_full_precision, recompute, recomputed)
from toolbox import baselines
from toolbox.tokenizers import CLS, SEP, bert_vocabulary, bert_wordpieces, no_vocabulary
from toolbox.weights import check_released, load_detr_and_bert

BACKBONES = {  # Sec. III-A
    "detr-resnet-50": dict(
        detr=dict(block="Bottleneck", blocks=(3, 4, 6, 3), stage="layer4", dim=256, heads=8, ffn=2048, layers=6,
                  dropout=0.1),
        bert=dict(num_hidden_layers=12, max_position_embeddings=512),
        frozen=("conv1", "layer1")),  # with --tune full too, as in TransVG
    "tiny": dict(
        detr=dict(block="BasicBlock", blocks=(1, 1, 1, 1), stage="layer2", dim=64, heads=2, ffn=128, layers=2,
                  dropout=0.0),
        bert=dict(vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                  max_position_embeddings=512, initializer_range=0.125, hidden_dropout_prob=0.0,
                  attention_probs_dropout_prob=0.0),
        frozen=()),
}
STRIDES = dict(layer1=4, layer2=8, layer3=16, layer4=32)
VARIANTS = ("m2ist",)
TUNES = baselines.TUNES
ADAPTERS = Literal["iea", "vea+lea", "vea", "lea", "none"]


@dataclass(frozen=True)
class Config(TrainConfig):
    """Every setting, with the paper's default. `config()` gives the settings of a backbone and data set."""

    backbone: str = "detr-resnet-50"        # Sec. IV-B
    variant: str = "m2ist"
    tune: str = "method"                    # Table V (a): frozen, only the V-L encoder is trained; Table I: full
    # architecture
    image_size: int = 640                   # side of the canvas in pixels, a multiple of 32
    words: int = 20                         # longest sentence in wordpieces, with [CLS] and [SEP]; 40 for RefCOCOg
    insertion: Literal["side", "parallel", "sequential"] = "side"  # where M3ISA is inserted, Fig. 3, Table VII
    side: Literal["paper", "public", "added"] = "paper"  # form of the side stream (docstring); added starts as frozen
    mha_adapter: ADAPTERS = "iea"           # adapters that read attention outputs, Tables V and VI
    ffn_adapter: ADAPTERS = "vea+lea"       # adapters that read feed-forward outputs, Tables V and VI
    vision_layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # DETR layers with M3ISA, counted from 0
    text_layers: tuple[int, ...] = (6, 7, 8, 9, 10, 11)  # BERT layers paired with them in this order, Table VIII
    adapter_dim: int = 128                  # C_d, bottleneck width of VEA and LEA, Table II
    iea_dim: int = 128                      # C_d, bottleneck width of IEA
    interaction_dim: int = 256              # C_i, channels that both modalities share in IEA, Table IX
    adapter_scale: float = 0.1              # s, scale of all adapters, Sec. IV-B
    vl_dim: int = 256                       # C_p, width of the V-L encoder, Sec. III-A
    vl_heads: int = 8                       # attention heads of the V-L encoder
    vl_ffn: int = 2048                      # hidden width of its feed-forward networks
    vl_layers: int = 6                      # layers of the V-L encoder, Sec. III-A
    vl_dropout: float = 0.1                 # dropout in the V-L encoder
    vl_position: Literal["attention", "content"] = "attention"  # add positions to queries, keys; content: to tokens too
    box_loss: Literal["l1", "smooth-l1"] = "l1"  # first term of Eq. 6, which prints smooth-l1
    giou: float = 1.0                       # lambda of Eq. 6, weight of GIoU
    token_loss: float = 0.0                 # weight of a loss on which image tokens lie in the box (not in the paper)
    # training
    augment: bool = True                    # random scale, crop, color jitter and flip, as in TransVG
    every_sentence: bool = True             # as in TransVG
    epochs: int = 90                        # Sec. IV-B, RefCOCO+: 180
    batch_size: int = 64                    # Table I
    optimizer: Literal["adam", "adamw"] = "adamw"  # Sec. IV-B
    adapter_lr: float = 0.1                 # Sec. IV-B: 1e-5 for M3ISA
    tower_lr: float = 0.1                   # as in TransVG
    weight_decay: float = 1e-4              # Sec. IV-B
    milestones: tuple[int, ...] = (60,)     # Sec. IV-B, RefCOCO+: 120


REFCOCO_PLUS = dict(epochs=180, milestones=(120,))  # Sec. IV-B
TINY = dict(image_size=64, words=12, side="public", vision_layers=(0, 1), text_layers=(0, 1), adapter_dim=32,
            iea_dim=32, interaction_dim=32,
            vl_dim=64, vl_heads=2, vl_ffn=128, vl_layers=2, vl_dropout=0.0, vl_position="content",
            token_loss=1.0, augment=False, steps=4000, batch_size=32, lr=1e-3, adapter_lr=1.0, tower_lr=0.5,
            weight_decay=0.01, schedule="cosine", milestones=(), warmup=200, clip_norm=1.0, val_every=500)
NO_ADAPTERS = dict(mha_adapter="none", ffn_adapter="none")
BASELINE_DIMS = dict(adapter=(128, 128), adaptformer=(128, 128), lora=(55, 55), conv_adapter=(128, 0))  # Table I


def config(backbone: str = "detr-resnet-50", variant: str = "m2ist", dataset: str = "refcoco", **flags) -> Config:
    """The settings of a backbone and data set, overridden by `flags`."""
    tune = flags.get("tune", "method")
    c = dict(backbone=backbone, variant=variant)
    c |= dict(words=40) if dataset.startswith("refcocog") or dataset == "mixed" else {}
    c |= REFCOCO_PLUS if dataset == "refcoco+" else {}
    c |= TINY if backbone == "tiny" else {}
    c |= {} if tune.startswith("method") else NO_ADAPTERS
    c = Config(**(c | dict(baseline_dims=baselines.dims(tune, backbone == "tiny", **BASELINE_DIMS)) | flags))
    detr, bert = BACKBONES[backbone]["detr"], BACKBONES[backbone]["bert"]
    stride, longest = STRIDES[detr["stage"]], bert["max_position_embeddings"] - baselines.prompts(c)
    depth = bert["num_hidden_layers"]

    def rising(chosen: tuple[int, ...], n: int) -> bool:
        return list(chosen) == sorted(set(chosen) & set(range(n)))

    check_config(
        c, baseline_dims=baselines.rule(c),
        vision_layers=(rising(c.vision_layers, detr["layers"]), f"rising numbers, 0 to {detr['layers'] - 1}"),
        image_size=(c.image_size % stride == 0, f"a multiple of {stride}"),
        words=(3 <= c.words <= longest, f"3 to {longest} wordpieces, what BERT reads"),
        text_layers=(rising(c.text_layers, depth) and len(c.text_layers) == len(c.vision_layers),
                     f"rising numbers, 0 to {depth - 1}, one for each of vision_layers"),
        interaction_dim=(c.interaction_dim <= detr["dim"], f"at most {detr['dim']}, the width of the vision encoder"),
        vl_heads=(lambda: c.vl_dim % c.vl_heads == 0, f"a divisor of vl_dim, {c.vl_dim}"),
        tune=(c.tune.startswith("method") or c.mha_adapter == c.ffn_adapter == "none",
              "method, or mha_adapter and ffn_adapter none"))
    return c


# Adapters, M3ISA (Sec. III-B a). `branch`: "vision" or "text"; `widths`: channels of each


def linear(c: Config, width_in: int, width_out: int, up: bool = False) -> nn.Linear:
    """Kaiming normal weights (Sec. IV-B), but zeros in an up-projection of the form "added". The bias starts at 0."""
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.weight) if up and c.side == "added" else nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Experts(nn.Module):
    """Intra-modality adapters: VEA for "vision", LEA for "text", or one of the two."""

    def __init__(self, c: Config, widths: dict[str, int]):
        super().__init__()
        self.s = c.adapter_scale
        self.down = nn.ModuleDict({branch: linear(c, w, c.adapter_dim) for branch, w in widths.items()})
        self.up = nn.ModuleDict({branch: linear(c, c.adapter_dim, w, up=True) for branch, w in widths.items()})

    def change(self, x: Tensor, branch: str) -> Tensor:
        return self.s * self.up[branch](F.relu(self.down[branch](x)))

    def forward(self, x: Tensor, branch: str) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        return x + self.change(x, branch)                        # Eq. 1


class IEA(nn.Module):
    """Interaction Expert Adapter. Both branches share the up-projection to the last C_i channels."""

    def __init__(self, c: Config, widths: dict[str, int]):
        super().__init__()
        self.s, d = c.adapter_scale, c.iea_dim
        self.down = nn.ModuleDict({branch: linear(c, w, d) for branch, w in widths.items()})
        self.shared = linear(c, d, c.interaction_dim, up=True)
        self.up = nn.ModuleDict({branch: linear(c, d, w - c.interaction_dim, up=True)
                                 for branch, w in widths.items() if w > c.interaction_dim})

    def change(self, x: Tensor, branch: str) -> Tensor:
        z = F.relu(self.down[branch](x))                         # (B, N, C_d)
        f = self.shared(z)                                       # (B, N, C_i)
        if branch in self.up:  # not where C = C_i
            f = torch.cat([self.up[branch](z), f], -1)           # (B, N, C)  Eq. 2 (vision), 3 (text)
        return self.s * f

    def forward(self, x: Tensor, branch: str) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        return x + self.change(x, branch)                        # Eq. 4 (vision), 5 (text)


class M3ISA(nn.Module):
    """The adapters of a pair of layers: `mha` reads attention outputs, `ffn` outputs of feed-forward networks."""

    def __init__(self, c: Config, widths: dict[str, int]):
        super().__init__()
        experts = dict(vision="vea", text="lea")
        self.mha, self.ffn = (
            IEA(c, widths) if kind == "iea" else Experts(c, {b: w for b, w in widths.items() if experts[b] in kind})
            for kind in (c.mha_adapter, c.ffn_adapter))

    def of(self, branch: str) -> list[Experts | IEA | None]:
        """The adapters of a branch, [mha, ffn]; None where it has none."""
        return [m if branch in m.down else None for m in (self.mha, self.ffn)]


# Encoders (Sec. III-A)


class EncoderLayer(nn.Module):
    """A post-norm transformer layer of DETR and of the V-L encoder. Positions are added to queries and keys."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.self_attn = MultiheadAttention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def sublayers(self, pos: Tensor, pad: Tensor):
        """-> (attention, norm, feed-forward network, norm); pos (.., N, C), pad (B, N), True = padding"""
        def attend(x: Tensor) -> Tensor:
            q = x + pos
            return self.dropout(self.self_attn(q, q, x, pad)[0])

        def ffn(x: Tensor) -> Tensor:
            return self.dropout(self.linear2(F.relu(self.dropout(self.linear1(x)))))

        return attend, self.norm1, ffn, self.norm2

    def forward(self, x: Tensor, pos: Tensor, pad: Tensor) -> Tensor:
        attend, norm1, ffn, norm2 = self.sublayers(pos, pad)
        x = norm1(x + attend(x))
        return norm2(x + ffn(x))


def bert_sublayers(layer: nn.Module, pad: Tensor):
    """The same for a layer of transformers' BertModel: (attention, norm, feed-forward network, norm)"""
    attention, final = layer.attention, layer.output

    def attend(x: Tensor) -> Tensor:
        y = attention.self(x, attention_mask=~pad[:, None, None])[0]
        return attention.output.dropout(attention.output.dense(y))

    def ffn(x: Tensor) -> Tensor:
        return final.dropout(final.dense(layer.intermediate(x)))

    return attend, attention.output.LayerNorm, ffn, final.LayerNorm


class DETR(nn.Module):
    """DETR's ResNet, 1x1 convolution and encoder layers. Modules have DETR's names without prefixes."""

    def __init__(self, block: str, blocks: tuple[int, ...], stage: str, dim: int, heads: int, ffn: int, layers: int,
                 dropout: float):
        super().__init__()
        from torchvision.models import resnet  # slow, and --help does without

        body = resnet.ResNet(getattr(resnet, block), blocks, norm_layer=FrozenBatchNorm)
        body = OrderedDict(body.named_children())
        names = list(body)
        self.body = nn.Sequential(OrderedDict((n, body[n]) for n in names[:names.index(stage) + 1]))
        self.body.to(memory_format=torch.channels_last)  # faster, the same numbers
        last = body[stage][-1]
        width = (last.conv3 if block == "Bottleneck" else last.conv2).out_channels
        self.input_proj = nn.Conv2d(width, dim, 1)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ffn, dropout) for _ in range(layers))

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 4, S, S) -> tokens and their positions, both (B, N, C), and padding (B, N)"""
        z = self.body(images[:, :3].contiguous(memory_format=torch.channels_last))  # (B, 2048, S/32, S/32)
        pad = F.interpolate(images[:, 3:], z.shape[-2:])[:, 0] > 0.5  # (B, S/32, S/32), nearest
        z = self.input_proj(z).flatten(2).transpose(1, 2)        # (B, N, C)
        return z, sine_positions(pad, z.shape[2]), pad.flatten(1)


def sine_positions(pad: Tensor, dim: int) -> Tensor:
    """DETR's positions of a grid with padding (B, H, W): rows and columns are counted without padding and scaled to
    2 pi. Half of the channels for y, half for x, sine and cosine interleaved. -> (B, H * W, dim)"""
    valid = (~pad).float()
    period = 1e4 ** (torch.arange(0, dim // 2, 2, device=pad.device) * 2 / dim)
    halves = []
    for axis in 1, 2:
        at = valid.cumsum(axis)
        at = 2 * torch.pi * at / (at.narrow(axis, at.shape[axis] - 1, 1) + 1e-6)  # (B, H, W)
        angle = at[..., None] / period                           # (B, H, W, dim / 4)
        halves.append(torch.stack([angle.sin(), angle.cos()], 4).flatten(3))
    return torch.cat(halves, 3).flatten(1, 2)


class Encoded(NamedTuple):
    """Outputs of an encoder for B inputs of N tokens, which the side network reads. M = 0 without side networks."""

    tokens: Tensor     # (B, N, C)     z, input of the first layer, without positions
    attention: Tensor  # (B, M, N, C)  a_i, attention outputs of the M layers with adapters
    ffn: Tensor        # (B, M, N, C)  m_i, outputs of their feed-forward networks
    output: Tensor     # (B, N, C)     e, output of the last layer
    pad: Tensor        # (B, N)        True = padding

    def to(self, device, non_blocking: bool = False) -> Encoded:
        return Encoded(*(t.to(device, non_blocking=non_blocking) for t in self))

    def repeat(self, n: int) -> Encoded:
        """The same image for n sentences; B must be 1."""
        return Encoded(*(t.repeat(n, *[1] * (t.dim() - 1)) for t in self))


# Model


class M2IST(nn.Module):
    """Frozen encoders, side networks, V-L encoder and box head. `c`: from config(). `weights`: "pretrained", "random",
    or two comma-separated files, DETR's and BERT's. Raises UserError for missing or wrong files."""

    task = "box"

    def __init__(self, c: Config, weights: str = "random"):
        super().__init__()
        self.c = c
        self.detr, self.bert = build_encoders(c.backbone, weights)
        detr = BACKBONES[c.backbone]["detr"]
        widths = dict(vision=detr["dim"], text=self.bert.config.hidden_size)
        self.visu_proj, self.text_proj = (nn.Linear(w, c.vl_dim) for w in widths.values())
        n = 1 + baselines.prompts(c) + c.words + (c.image_size // STRIDES[detr["stage"]]) ** 2
        self.reg = nn.Embedding(1, c.vl_dim)
        self.vl_position = nn.Embedding(n, c.vl_dim)
        self.vl_encoder = nn.ModuleList(EncoderLayer(c.vl_dim, c.vl_heads, c.vl_ffn, c.vl_dropout)
                                        for _ in range(c.vl_layers))
        self.head = nn.Sequential(nn.Linear(c.vl_dim, c.vl_dim), nn.ReLU(), nn.Linear(c.vl_dim, c.vl_dim), nn.ReLU(),
                                  nn.Linear(c.vl_dim, 4))
        # adapters come last, so that every way to tune starts from the same head
        pairs = len(c.vision_layers) if c.tune.startswith("method") else 0
        self.m3isa = nn.ModuleList(M3ISA(c, widths) for _ in range(pairs))
        self.preprocess = Preprocess(c.image_size, interpolation="bilinear", pad_channel=True, augment=c.augment)
        if c.tune != "full":
            freeze(self.detr)
            freeze(self.bert)
        for name in BACKBONES[c.backbone]["frozen"]:
            getattr(self.detr.body, name).requires_grad_(False)
        if c.checkpointing:
            blocks = [block for stage in self.detr.body if isinstance(stage, nn.Sequential) for block in stage]
            recomputed(*blocks, *self.vl_encoder)
        self.baseline = baselines.add(c, dict(self.detr.named_modules()), dict(self.bert.named_modules()),
                                      self.bert.embeddings.word_embeddings)
        inserted = pairs > 0 and c.insertion != "side"
        self.encoders_need_grad = c.tune == "full" or baselines.baseline_of(c.tune) != "" or inserted
        self.features_key = "" if self.encoders_need_grad else str(c.vision_layers)

    def parts(self) -> dict[str, list[nn.Module]]:
        return dict(backbone=[self.detr, self.bert], adapter=[self.m3isa, *self.baseline],
                    head=[self.visu_proj, self.text_proj, self.reg, self.vl_position, self.vl_encoder, self.head])

    def tokenize(self, sentences: Iterable[str]) -> Tensor:
        """Lower-case wordpieces of BERT: [CLS], words, [SEP], zeros. Words that do not fit are cut. -> (B, words)"""
        if not hasattr(self, "wordpieces"):  # not in __init__: a checkpoint may load another vocabulary
            self.wordpieces = bert_wordpieces(self.bert.vocabulary)
        rows = [[CLS, *ids[:self.c.words - 2], SEP] for ids in self.wordpieces(list(sentences))]
        return baselines.prompted(torch.tensor([ids + [0] * (self.c.words - len(ids)) for ids in rows]), self.c)

    # Encoders (Sec. III-A a, b)

    def encode_image(self, images: Tensor) -> Encoded:
        """Normalised images and a channel that is 1 in the padding (B, 4, S, S)"""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoders_need_grad):
            z, pos, pad = self.detr.tokens(images)               # (B, N, C_v), (B, N, C_v), (B, N)
            layers = [layer.sublayers(pos, pad) for layer in self.detr.layers]
            return self.encode(z, layers, "vision", self.c.vision_layers, pad)

    image_features = encode_image

    def encode_text(self, tokens: Tensor) -> Encoded:
        """Token ids (B, L), 0 = padding"""
        pad = tokens == 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoders_need_grad):
            z = self.bert.embeddings(tokens)                     # (B, L, C_l)
            layers = [bert_sublayers(layer, pad) for layer in self.bert.encoder.layer]
            return self.encode(z, layers, "text", self.c.text_layers, pad)

    def encode(self, z: Tensor, layers: list, branch: str, with_adapters: tuple[int, ...], pad: Tensor) -> Encoded:
        """Runs the sublayers of a post-norm encoder over tokens z (B, N, C)."""
        x, attention, ffn = z, [], []
        pairs = dict(zip(with_adapters, self.m3isa))
        for i, (attend, norm1, feed_forward, norm2) in enumerate(layers):
            mha_adapter, ffn_adapter = pairs[i].of(branch) if i in pairs else (None, None)
            if self.c.checkpointing:
                attend, feed_forward = (partial(recompute, [f]) for f in (attend, feed_forward))
            a = attend(x)                                        # (B, N, C)
            x = norm1(self.add_sublayer(x, a, mha_adapter, branch))
            m = feed_forward(x)                                  # (B, N, C)
            x = norm2(self.add_sublayer(x, m, ffn_adapter, branch))
            if i in pairs and self.c.insertion == "side":
                attention.append(a)
                ffn.append(m)
        none = x.new_zeros(len(x), 0, *x.shape[1:])
        attention, ffn = (torch.stack(outputs, 1) if outputs else none for outputs in (attention, ffn))
        return Encoded(z, attention, ffn, x, pad)

    def add_sublayer(self, x: Tensor, y: Tensor, adapter: nn.Module | None, branch: str) -> Tensor:
        """The residual x + y around y = sublayer(x), with the adapter inserted as in Fig. 3."""
        if adapter is None or self.c.insertion == "side":
            return x + y                                         # Fig. 3 (c)
        if self.c.insertion == "sequential":
            return x + adapter(y, branch)                        # Fig. 3 (a)
        return adapter(x, branch) + y                            # Fig. 3 (b): x + of the adapter is the residual

    # Side networks (Sec. III-B b)

    def side_network(self, e: Encoded, branch: str) -> Tensor:
        """What the V-L encoder receives, f of the module docstring (B, N, C)"""
        if self.c.insertion != "side":
            return e.output
        inputs = [(m, x) for i, pair in enumerate(self.m3isa)
                  for m, x in zip(pair.of(branch), (e.attention[:, i], e.ffn[:, i])) if m is not None]
        if not inputs:
            return e.output
        if self.c.side == "paper":
            h = sum((m(x, branch) for m, x in inputs), e.tokens)
            return e.output + F.layer_norm(h, h.shape[-1:])
        f = e.output + e.tokens if self.c.side == "public" else e.output
        return sum((m.change(x, branch) for m, x in inputs), f)

    # V-L encoder and head (Sec. III-A c)

    def forward(self, images: Tensor | Encoded, tokens: Tensor) -> Tensor:
        """Images (B, 4, S, S) or the result of encode_image, token ids (B, L) -> boxes (B, 4): centre x, centre y,
        width, height, normalised by S. In training with token_loss, N logits of the image tokens are appended."""
        vision = images if isinstance(images, Encoded) else self.encode_image(images)
        text = self.encode_text(tokens)
        f_v, f_l = self.side_network(vision, "vision"), self.side_network(text, "text")
        b, n = vision.pad.shape
        reg = self.reg.weight.expand(b, 1, -1)                   # (B, 1, C_p)
        x = torch.cat([reg, self.text_proj(f_l), self.visu_proj(f_v)], 1)  # (B, 1 + L + N, C_p)
        pad = torch.cat([vision.pad.new_zeros(b, 1), text.pad, vision.pad], 1)
        pos = self.vl_position.weight                            # (1 + L + N, C_p)
        if self.c.vl_position == "content":
            x = x + pos
        for layer in self.vl_encoder:
            x = layer(x, pos, pad)
        with in_full_precision(x):
            boxes = self.head(x[:, 0].float()).sigmoid()         # (B, 4)
        if self.training and self.c.token_loss:
            logits = x[:, -n:] @ x[:, 0, :, None] / self.c.vl_dim ** 0.5  # (B, N, 1)
            return torch.cat([boxes, logits[..., 0]], 1)         # (B, 4 + N)
        return boxes

    # Loss (Sec. III-B c)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Output of forward and target boxes (B, 4) -> scalar: summed over coordinates, mean over samples"""
        from torchvision.ops import box_convert, generalized_box_iou_loss

        boxes, logits = output[:, :4].float(), output[:, 4:].float()
        distance = F.l1_loss if self.c.box_loss == "l1" else F.smooth_l1_loss
        corners = [box_convert(b, "cxcywh", "xyxy") for b in (boxes, target)]
        loss = distance(boxes, target, reduction="none").sum(1).mean() \
            + self.c.giou * generalized_box_iou_loss(*corners, reduction="mean")  # Eq. 6
        if logits.numel():
            inside = tokens_in_boxes(target, logits.shape[1])
            bce = F.binary_cross_entropy_with_logits(logits, inside)
            loss = loss + self.c.token_loss * (bce + dice_loss(logits, inside))
        return loss


def tokens_in_boxes(boxes: Tensor, n: int) -> Tensor:
    """1 for each of n tokens, a square grid, whose centre lies in the box (B, 4), else 0. -> (B, n)"""
    side = int(n ** 0.5)
    at = (torch.arange(side, device=boxes.device) + 0.5) / side
    x, y, w, h = boxes[..., None].unbind(1)                      # (B, 1)
    inside = ((at - y).abs() < h / 2)[:, :, None] & ((at - x).abs() < w / 2)[:, None]  # (B, side, side)
    return inside.flatten(1).float()


Model = M2IST  # the name that train.py and evaluate.py use


# Weights


def build_encoders(backbone: str, weights: str) -> tuple[DETR, nn.Module]:
    """DETR's encoder and transformers' BERT, random or from released files. BERT's vocab.txt must lie beside its file.
    """
    from transformers import BertConfig, BertModel  # slow, and --help does without

    config = BertConfig(**BACKBONES[backbone]["bert"])
    detr = DETR(**BACKBONES[backbone]["detr"])
    bert = BertModel(config, add_pooling_layer=False)
    vocabulary = no_vocabulary(config.vocab_size)
    if weights != "random":
        check_released(backbone, weights)
        vocabulary = bert_vocabulary(load_detr_and_bert(detr, bert, weights), config.vocab_size)
    bert.register_buffer("vocabulary", vocabulary)
    return detr, bert
