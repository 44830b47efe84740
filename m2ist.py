"""M2IST: Multi-Modal Interactive Side-Tuning for Efficient Referring Expression Comprehension (Liu, Liu, Huang et al.,
arXiv:2407.01131). The answer is a box.

Two frozen encoders, DETR's for the picture and BERT for the sentence, are read once, without a graph. Beside each
runs a side network of small adapters: an IEA for what a layer's attention gives, whose last up-projection both
encoders share, and a VEA or LEA for what its feed-forward network gives. Gradients flow through these alone. A
vision-language encoder reads both results behind a [REG] token, which becomes the box.

    Sec. III-A a         vision encoder                DETR, M2IST.encode_image
    Sec. III-A b         language encoder              bert_sublayers, M2IST.encode_text
    Sec. III-A c         vision-language encoder       M2IST.forward
    Sec. III-B, Eq. 1    VEA, LEA                      Experts
    Sec. III-B, Eq. 2-5  IEA                           IEA
    Sec. III-B b         side networks                 M3ISA, M2IST.side
    Sec. III-B c, Eq. 6  loss                          M2IST.loss
    Fig. 3, Table VII    forms of insertion            M2IST.inserted, Config.insertion
    Tables I to X        their rows                    TABLES; Config.tune, .mha_adapter, .ffn_adapter, ...

The side networks, for layer i of vision (v) and its partner in language (l); the paper has no formula for them:

    h^0 = z                                  the encoder's first tokens, without positions
    h^i = h^(i-1) + IEA_i(a_i) + VEA_i(m_i)  a_i, m_i: attention and feed-forward, before residual and norm; LEA for l
    f   = e + LN(h^6)                        e: what the frozen encoder gives in the end; LN without parameters
    f_v = [z_v W_v, z_v W_shared], f_l = [z_l W_l, z_l W_shared] in Eq. 2 and 3: what is shared comes last

Deviations (the paper is silent, contradicts its printed figures, or its public code does otherwise):
  * h as above: with s = 0 it is the first tokens and all that the paired layers' sublayers would add to them. The
    public code reads BERT's attention after its norm, and leaves out the skips of Eq. 1, 4 and 5 and the s of the IEAs.
  * The paper "does not show the LayerNorm"; ours is one over the whole of h, as its scale depends on the weights. The
    public code puts BERT's frozen norms behind each adapter of the text, where they cancel s.
  * Language layers are 7 to 12, as in Table VIII; the public code has 1 to 6, and runs their norms twice.
  * Projections have biases, which start at 0; weights are Kaiming normal. The public code's are Xavier, N(0, 0.02) and
    biases up to 1. 2.96 M are trained in the adapters; the printed 3.19 M are met by counting 0.2 M twice (TABLES).
  * Frozen encoders are in eval mode; the public code leaves their dropout on. --tune full trains as TransVG does:
    without the ResNet's stem and first stage, and all its BatchNorms frozen.
  * lambda is not printed: 1, the public code's, which has L1 where Eq. 6 has smooth L1 (smooth_l1_beta 0).
  * An epoch is every sentence once, as in TransVG, and so are the augmentations, whose mistakes data.py mends.
  * `tiny` is this project's: it is trained from scratch, adds positions to the tokens themselves (vl_position), and
    learns by a loss on tokens too (token_loss), without which it hardly looks at the picture. Its words have no
    vocabulary but are numbered by their checksum, as they are for --weights random.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d, box_convert, generalized_box_iou_loss
from transformers import BertConfig, BertModel

from common import Preprocess, TrainConfig, check_config, dice_loss, in_full_precision
from toolbox import baselines, tokenizers, weights as released

BACKBONES = {  # Sec. III-A
    "detr-resnet-50": dict(
        detr=dict(resnet=(Bottleneck, (3, 4, 6, 3)), stage="layer4", dim=256, heads=8, ffn=2048, layers=6, dropout=0.1),
        bert=dict(), frozen=("conv1", "layer1")),  # in full tuning, by TransVG
    "tiny": dict(
        detr=dict(resnet=(BasicBlock, (1, 1, 1, 1)), stage="layer2", dim=64, heads=2, ffn=128, layers=2, dropout=0.0),
        bert=dict(vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                  initializer_range=0.125, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        frozen=()),
}
STRIDES = dict(layer1=4, layer2=8, layer3=16, layer4=32)
VARIANTS = ("m2ist",)
TUNES = baselines.TUNES
MIX = Literal["iea", "vea+lea", "vea", "lea", "none"]


@dataclass(frozen=True)
class Config(TrainConfig):
    """Every setting of the paper. `config()` gives the ones of a backbone and data set."""

    backbone: str = "detr-resnet-50"        # Sec. IV-B
    variant: str = "m2ist"
    tune: str = "method"                    # Table V; "frozen" = row (a), the V-L encoder alone; "full" = Table I
    # architecture
    image_size: int = 640                   # pixels, a multiple of 32
    words: int = 20                         # wordpieces with [CLS] and [SEP]; 40 for RefCOCOg
    insertion: Literal["side", "parallel", "sequential"] = "side"  # Table VII
    mha_adapter: MIX = "iea"                # Tables V and VI: what reads the attention's outputs
    ffn_adapter: MIX = "vea+lea"            # and the feed-forward networks'
    vision_layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)   # Table VIII, counted from 0, paired in this order with
    text_layers: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    adapter_dim: int = 128                  # C_d of VEA and LEA, Table II
    iea_dim: int = 128                      # C_d of IEA
    interaction_dim: int = 256              # C_i, Table IX
    adapter_scale: float = 0.1              # s
    zero_init: bool = False                 # up-projections start at 0: not the paper's
    vl_dim: int = 256                       # C_p
    vl_heads: int = 8
    vl_ffn: int = 2048
    vl_layers: int = 6
    vl_dropout: float = 0.1
    vl_position: Literal["attention", "content"] = "attention"  # queries and keys; content: the tokens themselves too
    giou: float = 1.0                       # lambda of Eq. 6
    smooth_l1_beta: float = 1.0             # where the square ends; 0: L1
    token_loss: float = 0.0                 # weight of a loss by which [REG] marks tokens in the box: not the paper's
    # training (Sec. IV-B)
    augment: bool = True                    # TransVG's scales, crops, colours and flips
    every_sentence: bool = True             # in an epoch; else one of each object
    epochs: int = 90
    batch_size: int = 64                    # of all processes together
    optimizer: Literal["adam", "adamw"] = "adamw"
    adapter_lr: float = 0.1                 # times lr, for M3ISA
    tower_lr: float = 0.1                   # times lr, for encoders that are trained, as TransVG
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = (60,)


def config(backbone: str = "detr-resnet-50", variant: str = "m2ist", dataset: str = "refcoco", **flags) -> Config:
    """The settings of a backbone and data set, and over them what the user set."""
    c = dict(backbone=backbone, variant=variant)
    if dataset.startswith("refcocog") or dataset == "mixed":
        c |= dict(words=40)
    if dataset == "refcoco+":
        c |= dict(epochs=180, milestones=(120,))
    if backbone == "tiny":
        c |= dict(image_size=64, words=12, vision_layers=(0, 1), text_layers=(0, 1), adapter_dim=32, iea_dim=32,
                  interaction_dim=32, vl_dim=64, vl_heads=2, vl_ffn=128, vl_layers=2, vl_dropout=0.0,
                  vl_position="content", token_loss=1.0, augment=False, steps=5000, batch_size=16, lr=5e-4,
                  adapter_lr=2.0, tower_lr=2.0, weight_decay=0.01, schedule="cosine", milestones=(), warmup=50,
                  clip_norm=1.0, val_every=500)
    tune, wide = flags.get("tune", "method"), (128, 128)  # C_d, Sec. IV-C
    c |= dict(baseline_dims=baselines.dims(tune, backbone == "tiny", adapter=wide, adaptformer=wide, lora=(55, 55),
                                          conv_adapter=(128, 0)))
    if not tune.startswith("method"):
        c |= dict(mha_adapter="none", ffn_adapter="none")
    c = Config(**(c | flags))
    detr, text_layers = BACKBONES[backbone]["detr"], BertConfig(**BACKBONES[backbone]["bert"]).num_hidden_layers
    layers, dim, stride = detr["layers"], detr["dim"], STRIDES[detr["stage"]]

    def rising(chosen: tuple[int, ...], n: int) -> bool:
        return list(chosen) == sorted(set(chosen) & set(range(n)))

    check_config(
        c, baseline_dims=baselines.rule(c), vision_layers=(rising(c.vision_layers, layers), f"rising numbers, 0 to {layers - 1}"),
        image_size=(c.image_size % stride == 0, f"a multiple of {stride}"),
        words=(3 <= c.words <= 512 - baselines.prompts(c), f"3 to {512 - baselines.prompts(c)} wordpieces, what BERT reads"),
        text_layers=(rising(c.text_layers, text_layers) and len(c.text_layers) == len(c.vision_layers),
                     f"rising numbers, 0 to {text_layers - 1}, one for each of vision_layers"),
        interaction_dim=(c.interaction_dim <= dim, f"at most {dim}, the width of the vision encoder"),
        vl_heads=(lambda: c.vl_dim % c.vl_heads == 0, f"a divisor of vl_dim, {c.vl_dim}"),
        tune=(c.tune.startswith("method") or c.mha_adapter == c.ffn_adapter == "none",
              "method, where there are adapters"))
    return c


# M3ISA (Sec. III-B a)


def linear(width_in: int, width_out: int, zero: bool = False) -> nn.Linear:
    """Kaiming normal (Sec. IV-B), no bias at first; or all zeros."""
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.weight) if zero else nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Experts(nn.Module):
    """VEA for "vision", LEA for "text", or one of them: Eq. 1."""

    def __init__(self, c: Config, widths: dict[str, int]):
        super().__init__()
        self.s = c.adapter_scale
        self.down = nn.ModuleDict({branch: linear(w, c.adapter_dim) for branch, w in widths.items()})
        self.up = nn.ModuleDict({branch: linear(c.adapter_dim, w, c.zero_init) for branch, w in widths.items()})

    def added(self, x: Tensor, branch: str) -> Tensor:
        """(B, N, C) -> what Eq. 1 adds to x"""
        return self.s * self.up[branch](F.relu(self.down[branch](x)))  # Eq. 1


class IEA(nn.Module):
    """Interaction Expert Adapter, Eq. 2 to 5: the last C_i channels of both branches come from one up-projection."""

    def __init__(self, c: Config, widths: dict[str, int]):
        super().__init__()
        self.s, d = c.adapter_scale, c.iea_dim
        self.down = nn.ModuleDict({branch: linear(w, d) for branch, w in widths.items()})
        self.shared = linear(d, c.interaction_dim, c.zero_init)
        self.up = nn.ModuleDict({branch: linear(d, w - c.interaction_dim, c.zero_init)
                                 for branch, w in widths.items() if w > c.interaction_dim})

    def added(self, x: Tensor, branch: str) -> Tensor:
        """(B, N, C) -> what Eq. 4 (vision) or 5 (text) adds to x"""
        z = F.relu(self.down[branch](x))                         # (B, N, C_d)
        f = [up(z) for name, up in self.up.items() if name == branch] + [self.shared(z)]
        return self.s * torch.cat(f, -1)                         # (B, N, C)  Eq. 2 to 5


def adapters(mix: str, c: Config, widths: dict[str, int]) -> nn.Module | None:
    if mix == "iea":
        return IEA(c, widths)
    widths = {branch: w for branch, w in widths.items() if dict(vision="vea", text="lea")[branch] in mix}
    return Experts(c, widths) if widths else None


class M3ISA(nn.Module):
    """The adapters of one pair of layers: `mha` for the attention's outputs, `ffn` for the feed-forward network's."""

    def __init__(self, c: Config, widths: dict[str, int]):
        super().__init__()
        self.mha, self.ffn = (adapters(mix, c, widths) for mix in (c.mha_adapter, c.ffn_adapter))


# Encoders (Sec. III-A)


class EncoderLayer(nn.Module):
    """DETR's transformer layer: post-norm, positions added to queries and keys. Also that of the V-L encoder."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def sublayers(self, pos: Tensor, pad: Tensor):
        """Its four steps: attention, norm, feed-forward network, norm; pos (.., N, C), pad (B, N), True = padding."""
        def attend(x: Tensor) -> Tensor:
            q = x + pos
            return self.dropout(self.self_attn(q, q, x, key_padding_mask=pad, need_weights=False)[0])

        def ffn(x: Tensor) -> Tensor:
            return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))

        return attend, self.norm1, ffn, self.norm2

    def forward(self, x: Tensor, pos: Tensor, pad: Tensor) -> Tensor:
        attend, norm1, ffn, norm2 = self.sublayers(pos, pad)
        x = norm1(x + attend(x))
        return norm2(x + ffn(x))


def bert_sublayers(layer: nn.Module, pad: Tensor):
    """The same four steps of a layer of transformers' BertModel."""
    attention, out, final = layer.attention.self, layer.attention.output, layer.output

    def attend(x: Tensor) -> Tensor:
        heads = attention.num_attention_heads
        q, k, v = (proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for proj in (attention.query, attention.key, attention.value))  # (B, heads, L, C / heads)
        dropout = attention.dropout.p if attention.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, ~pad[:, None, None], dropout)
        return out.dropout(out.dense(y.transpose(1, 2).flatten(2)))

    def ffn(x: Tensor) -> Tensor:
        return final.dropout(final.dense(layer.intermediate(x)))

    return attend, out.LayerNorm, ffn, final.LayerNorm


class DETR(nn.Module):
    """DETR's ResNet, 1x1 convolution and encoder layers, under its names but for their prefixes."""

    def __init__(self, resnet, stage: str, dim: int, heads: int, ffn: int, layers: int, dropout: float):
        super().__init__()
        block, blocks = resnet
        body = OrderedDict(ResNet(block, blocks, norm_layer=FrozenBatchNorm2d).named_children())
        names = list(body)
        self.body = nn.Sequential(OrderedDict((n, body[n]) for n in names[:names.index(stage) + 1]))
        self.body.to(memory_format=torch.channels_last)  # faster, the same numbers
        last = body[stage][-1]
        width = (last.conv3 if block is Bottleneck else last.conv2).out_channels
        self.input_proj = nn.Conv2d(width, dim, 1)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ffn, dropout) for _ in range(layers))

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 4, S, S) -> tokens and their positions, both (B, N, C), and padding (B, N)"""
        z = self.body(images[:, :3].contiguous(memory_format=torch.channels_last))  # (B, 2048, S/32, S/32)
        pad = F.interpolate(images[:, 3:], z.shape[-2:])[:, 0] > 0.5  # (B, S/32, S/32), nearest
        z = self.input_proj(z).flatten(2).transpose(1, 2)        # (B, N, C)
        return z, sine_positions(pad, z.shape[2]), pad.flatten(1)


def sine_positions(pad: Tensor, dim: int) -> Tensor:
    """DETR's: rows and columns counted where there is no padding (B, H, W), scaled to 2 pi; half of the channels for y,
    half for x, sine and cosine interleaved. -> (B, H * W, dim)"""
    there = (~pad).float()
    period = 1e4 ** (torch.arange(0, dim // 2, 2, device=pad.device) * 2 / dim)
    halves = []
    for axis in 1, 2:
        at = there.cumsum(axis)
        at = 2 * torch.pi * at / (at.narrow(axis, at.shape[axis] - 1, 1) + 1e-6)  # (B, H, W)
        angle = at[..., None] / period                           # (B, H, W, dim / 4)
        halves.append(torch.stack([angle.sin(), angle.cos()], 4).flatten(3))
    return torch.cat(halves, 3).flatten(1, 2)


class Encoded(NamedTuple):
    """What an encoder gives for B inputs of N tokens: all that a side network reads. M is 0 without side networks."""

    tokens: Tensor     # (B, N, C)     z, without positions
    attention: Tensor  # (B, M, N, C)  a_i of the M layers with adapters
    ffn: Tensor        # (B, M, N, C)  m_i
    output: Tensor     # (B, N, C)     e
    pad: Tensor        # (B, N)        True = padding

    def to(self, device, non_blocking: bool = False) -> Encoded:
        return Encoded(*(t.to(device, non_blocking=non_blocking) for t in self))

    def repeat(self, n: int) -> Encoded:
        """The same input n times, for n sentences about one picture; B must be 1."""
        return Encoded(*(t.repeat(n, *[1] * (t.dim() - 1)) for t in self))


# The model


class M2IST(nn.Module):
    """The whole model: frozen encoders, side networks, V-L encoder, box head. `c` comes from config(); `weights` is
    "pretrained", "random", or comma-separated files of the encoders. Raises UserError where they are missing or do
    not fit."""

    task = "box"

    def __init__(self, c: Config, weights: str = "random"):
        super().__init__()
        self.c = c
        self.detr, self.bert = build_encoders(c.backbone, weights)
        detr = BACKBONES[c.backbone]["detr"]
        widths = dict(vision=detr["dim"], text=self.bert.config.hidden_size)
        pairs = len(c.vision_layers) if c.tune.startswith("method") else 0
        self.m3isa = nn.ModuleList(M3ISA(c, widths) for _ in range(pairs))
        self.visu_proj, self.text_proj = (nn.Linear(w, c.vl_dim) for w in widths.values())
        n = 1 + baselines.prompts(c) + c.words + (c.image_size // STRIDES[detr["stage"]]) ** 2
        self.reg = nn.Embedding(1, c.vl_dim)
        self.vl_position = nn.Embedding(n, c.vl_dim)
        self.vl_encoder = nn.ModuleList(EncoderLayer(c.vl_dim, c.vl_heads, c.vl_ffn, c.vl_dropout)
                                        for _ in range(c.vl_layers))
        self.head = nn.Sequential(nn.Linear(c.vl_dim, c.vl_dim), nn.ReLU(), nn.Linear(c.vl_dim, c.vl_dim), nn.ReLU(),
                                  nn.Linear(c.vl_dim, 4))
        self.preprocess = Preprocess(c.image_size, interpolation="bilinear", pad_channel=True, augment=c.augment)
        for encoder in self.detr, self.bert:
            encoder.requires_grad_(c.tune == "full")
        for name in BACKBONES[c.backbone]["frozen"]:
            getattr(self.detr.body, name).requires_grad_(False)
        self.baseline = baselines.add(c, dict(self.detr.named_modules()), dict(self.bert.named_modules()), self.bert.embeddings.word_embeddings)
        # through the encoders
        self.graph = c.tune == "full" or baselines.baseline_of(c.tune) != "" or pairs > 0 and c.insertion != "side"
        self.features_key = "" if self.graph else str(c.vision_layers)

    def parts(self) -> dict[str, list[nn.Module]]:
        """What the parameter tables count."""
        return dict(backbone=[self.detr, self.bert], adapter=[self.m3isa, *self.baseline],
                    head=[self.visu_proj, self.text_proj, self.reg, self.vl_position, self.vl_encoder, self.head])

    def train(self, mode: bool = True) -> M2IST:
        super().train(mode)
        if self.c.tune != "full":  # frozen is frozen: no dropout either
            self.detr.eval()
            self.bert.eval()
        return self

    def tokenize(self, sentences: Iterable[str]) -> Tensor:
        """BERT's wordpieces in lower case: [CLS], words, [SEP], zeros; cut to `words` with [SEP] kept. -> (B, words)"""
        if not hasattr(self, "wordpieces"):  # made here, after a checkpoint may have brought its vocabulary
            self.wordpieces = tokenizers.bert_wordpieces(self.bert.vocabulary)
        rows = [[tokenizers.CLS, *ids[:self.c.words - 2], tokenizers.SEP] for ids in self.wordpieces(list(sentences))]
        return baselines.prompted(torch.tensor([ids + [0] * (self.c.words - len(ids)) for ids in rows]), self.c)

    def run(self, x: Tensor, layers: list, branch: str, where: tuple[int, ...], pad: Tensor) -> Encoded:
        """A post-norm encoder over tokens x (B, N, C), whose layers `where` have M3ISA in or beside them."""
        tokens, attention, ffn = x, [], []
        for i, (attend, norm1, feed_forward, norm2) in enumerate(layers):
            isa = self.m3isa[where.index(i)] if self.m3isa and i in where else None
            a = attend(x)                                        # (B, N, C)
            x = norm1(x + self.inserted(isa and isa.mha, x, a, branch))
            m = feed_forward(x)                                  # (B, N, C)
            x = norm2(x + self.inserted(isa and isa.ffn, x, m, branch))
            if isa is not None and self.c.insertion == "side":
                attention.append(a)
                ffn.append(m)
        none = x.new_zeros(len(x), 0, *x.shape[1:])
        attention, ffn = (torch.stack(states, 1) if states else none for states in (attention, ffn))
        return Encoded(tokens, attention, ffn, x, pad)

    def inserted(self, mix: nn.Module | None, x: Tensor, y: Tensor, branch: str) -> Tensor:
        """y = sublayer(x) with its adapter (a) behind or (b) beside the sublayer; (c) leaves it alone (Fig. 3)."""
        if mix is None or branch not in mix.down or self.c.insertion == "side":
            return y
        return y + mix.added(y if self.c.insertion == "sequential" else x, branch)

    def encode_image(self, images: Tensor) -> Encoded:
        """(B, 4, S, S): normalised pictures, and a channel that is 1 in the padding"""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.graph):
            z, pos, pad = self.detr.tokens(images)
            layers = [layer.sublayers(pos, pad) for layer in self.detr.layers]
            return self.run(z, layers, "vision", self.c.vision_layers, pad)

    image_features = encode_image  # what evaluate.py makes once for all sentences about a picture

    def encode_text(self, tokens: Tensor) -> Encoded:
        """(B, L)"""
        pad = tokens == 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.graph):
            x = self.bert.embeddings(tokens)                     # (B, L, C_l)
            layers = [bert_sublayers(layer, pad) for layer in self.bert.encoder.layer]
            return self.run(x, layers, "text", self.c.text_layers, pad)

    def side(self, e: Encoded, branch: str) -> Tensor:
        """The encoder's output with that of its side network (B, N, C)"""
        h, used = e.tokens, False
        if self.c.insertion == "side":
            for i, isa in enumerate(self.m3isa):
                for mix, x in (isa.mha, e.attention), (isa.ffn, e.ffn):
                    if mix is not None and branch in mix.down:
                        h, used = h + x[:, i] + mix.added(x[:, i], branch), True  # Eq. 1, 4, 5
        return e.output + F.layer_norm(h, h.shape[-1:]) if used else e.output

    def forward(self, images: Tensor | Encoded, tokens: Tensor, maps: dict[str, Tensor] | None = None) -> Tensor:
        """Pictures (B, 4, S, S) or what encode_image gave for them, tokens (B, L) -> boxes (B, 4): centre x, centre y,
        width and height, in sides of the canvas

        `maps` gets the attention of [REG] over the picture in each layer of the V-L encoder (Fig. 4).
        """
        vision = images if isinstance(images, Encoded) else self.encode_image(images)
        text = self.encode_text(tokens)
        f_v, f_l = self.side(vision, "vision"), self.side(text, "text")
        b = len(tokens)
        reg = self.reg.weight.expand(b, 1, -1)                   # (B, 1, C_p)
        x = torch.cat([reg, self.text_proj(f_l), self.visu_proj(f_v)], 1)  # (B, 1 + L + N, C_p)
        pad = torch.cat([vision.pad.new_zeros(b, 1), text.pad, vision.pad], 1)
        pos = self.vl_position.weight                            # (1 + L + N, C_p)
        if self.c.vl_position == "content":
            x = x + pos
        for i, layer in enumerate(self.vl_encoder, 1):
            if maps is not None:
                weights = layer.self_attn(x + pos, x + pos, x, key_padding_mask=pad)[1]  # (B, 1 + L + N, 1 + L + N)
                maps[f"[REG], V-L layer {i}"] = square(weights[:, 0, -vision.pad.shape[1]:])
            x = layer(x, pos, pad)
        with in_full_precision(x):
            boxes = self.head(x[:, 0].float()).sigmoid()         # (B, 4)
        if self.training and self.c.token_loss:
            marks = x[:, -vision.pad.shape[1]:] @ x[:, 0, :, None] / self.c.vl_dim ** 0.5  # (B, N, 1)
            return torch.cat([boxes, marks[..., 0]], 1)          # (B, 4 + N)
        return boxes

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Eq. 6 over boxes (B, 4) as forward gives them: smooth L1, a sum over coordinates, and lambda GIoU; means over
        samples."""
        boxes, marks = output[:, :4].float(), output[:, 4:].float()
        l1 = F.smooth_l1_loss(boxes, target, beta=self.c.smooth_l1_beta, reduction="none").sum(1).mean()
        corners = [box_convert(b, "cxcywh", "xyxy") for b in (boxes, target)]
        loss = l1 + self.c.giou * generalized_box_iou_loss(*corners, reduction="mean")  # Eq. 6
        if marks.numel():
            inside = tokens_in_boxes(target, marks.shape[1])
            bce = F.binary_cross_entropy_with_logits(marks, inside)
            loss = loss + self.c.token_loss * (bce + dice_loss(marks, inside))
        return loss


def square(tokens: Tensor) -> Tensor:
    """(B, N) -> (B, H, W), for a square canvas"""
    side = int(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side))


def tokens_in_boxes(boxes: Tensor, n: int) -> Tensor:
    """1 for each of n tokens, a square grid of them, whose middle lies in the box (B, 4), else 0. -> (B, n)"""
    side = int(n ** 0.5)
    at = (torch.arange(side, device=boxes.device) + 0.5) / side
    x, y, w, h = boxes[..., None].unbind(1)                      # (B, 1)
    inside = ((at - y).abs() < h / 2)[:, :, None] & ((at - x).abs() < w / 2)[:, None]  # (B, side, side)
    return inside.flatten(1).float()


Model = M2IST  # the name by which train.py and evaluate.py know it


# Weights


def build_encoders(backbone: str, weights: str) -> tuple[DETR, BertModel]:
    """DETR's encoder and BERT, random or from files that Facebook, TransVG, Google or the Hugging Face hub publish.

    `weights`: "random", "pretrained" (the hub's cache, or downloaded) or two files with a comma between; BERT's has
    its vocab.txt beside it.
    """
    config = BertConfig(**BACKBONES[backbone]["bert"])
    detr = DETR(**BACKBONES[backbone]["detr"])
    bert = BertModel(config, add_pooling_layer=False)
    vocabulary = tokenizers.no_vocabulary(config.vocab_size)
    if weights != "random":
        released.check_released(backbone, weights)
        vocabulary = tokenizers.bert_vocabulary(released.load_detr_and_bert(detr, bert, weights), config.vocab_size)
    bert.register_buffer("vocabulary", vocabulary)
    return detr, bert
