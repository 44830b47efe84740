"""What all four methods share and no paper defines.

Weights and freezing, baselines, flags, processes, metrics, run folders. Nothing in here imports a method
or the data module.

What train.py and evaluate.py ask of a method file, whichever it is:

    BACKBONES, VARIANTS, TUNES   the names that --backbone, --variant and --tune take; the first is the default
    Config, config(backbone, variant, dataset, **flags)   every setting, and the ones that fit these names
    TABLES                       the paper's tables by number, each row a configuration, its printed sizes and figures
    Model(config, weights)       an nn.Module with
        .task                    "mask" or "box", its answer
        .preprocess              the Preprocess it wants for its pictures
        .tokenize(sentences)     list of str -> token ids (B, L)
        .forward(images, tokens) (B, 3, S, S), (B, L) -> mask logits (B, 1, h, w) that cover the canvas,
                                 or boxes (B, 4): centre x, centre y, width, height, in sides of the canvas;
                                 with a dict as `maps`, it also gets what the method looks at: (B, h, w) by names
        .loss(output, target)    and masks (B, S, S) in 0..1, or boxes (B, 4) likewise -> scalar
        .parts()                 {"backbone" | "adapter" | "head": [modules]}, what is counted under each name
        .baseline                what --tune lora and the like added, [modules] (see add_baseline)
    and where pictures are read without the sentence
        .image_features(images)  what forward takes in their place; .repeat(n) is the same for n sentences
        .features_key            a name for these features beside the frozen weights, "" where training changes them
    leak(weights, dataset)       optional: a warning where weights were trained on a data set's val or test pictures
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import typing
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn


METHODS = ("dcris", "etris", "m2ist", "shared_ris")


class UserError(Exception):
    """A mistake the user can mend. The commands print its sentence, without a traceback, and exit with 2."""


def first_line(e: BaseException) -> str:
    """What an error says, or its kind where it says nothing."""
    return (str(e) or repr(e)).splitlines()[0][:200]


@dataclass(frozen=True)
class Preprocess:
    """How a method wants its pictures.

    `size` is the side of the square canvas in pixels; `fit` is "letterbox" (aspect kept, centred, padded
    with the mean colour), "warp" (the same as the released code does it) or "stretch"; `interpolation` is "bilinear"
    or "bicubic"; `mean` and `std`
    normalise RGB values in 0..1. `pad_channel`: a fourth channel that is 1 in the padding. `augment`: as data.augment
    in training.
    """

    size: int
    fit: str = "letterbox"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pad_channel: bool = False
    augment: bool = False


class Row(typing.NamedTuple):
    """A row of a paper's table that describes a configuration.

    `flags`: those of train.py that make it, `method`, `backbone`, `variant` and `dataset` among them; `printed`: the
    sizes that the paper prints, as it prints them (see sizes); `quoted`: the figures in its other columns, measured by
    its authors, None where our copy of the paper has none; `note`: why ours are not the printed sizes, or the row not
    quite the paper's.
    """

    name: str
    flags: dict
    printed: dict[str, str]
    quoted: tuple[float | None, ...] = ()
    note: str = ""


class Table(typing.NamedTuple):
    columns: tuple[str, ...]  # of Row.quoted
    rows: list[Row]
    dataset: str = "refcoco"


def load_method(name: str):
    """The module of a method. Its backbone library is imported here and not before."""
    return importlib.import_module(name)


# Weights


def fetch(repo: str, name: str, else_: str = "--weights FILE[,FILE] takes files, and --weights random or --backbone "
          "tiny needs none") -> str:
    """Path of a file of the Hugging Face hub, from its cache or downloaded. Raises UserError without either."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        return hf_hub_download(repo, name, local_files_only=True)
    except EntryNotFoundError:  # not in the cache
        pass
    except ValueError as e:  # of the hub's own kind for names that cannot be
        raise UserError(f"{name} of {repo}: {first_line(e)}.") from None
    missing = (f"{name} of {repo} is not on this machine and {constants.ENDPOINT} cannot be reached. With a network: "
               f"hf download {repo} {name}. Without one, {else_}.")
    try:  # one quick look, since the hub's own retries take over a minute
        if constants.HF_HUB_OFFLINE:
            raise UserError(missing)
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        raise UserError(missing) from None
    try:
        return hf_hub_download(repo, name)
    except (RepositoryNotFoundError, EntryNotFoundError, OSError) as e:
        raise UserError(f"{name} of {repo} could not be downloaded: {first_line(e)}.") from None


def download(url: str) -> str:
    """Path of a released file, from torch.hub's cache or downloaded into it. Raises UserError without either."""
    from filelock import FileLock  # torch needs it too

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # one of several processes downloads it
            if not path.exists():
                with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:
                    size = answer.headers.get("Content-Length")
                part = path.with_name(path.name + ".part")
                torch.hub.download_url_to_file(url, str(part))
                if size and part.stat().st_size != int(size):
                    raise OSError(f"{part.stat().st_size:,} of {int(size):,} bytes came")
                os.replace(part, path)
    except OSError as e:
        raise UserError(f"{path} is not there and {url} cannot be downloaded ({e}). With a network: curl -fL -o {path} "
                        f"{url}. Without one, --weights FILE takes a file, and --weights random or --backbone tiny "
                        "needs none.") from None
    return str(path)


def read_weights(path: str) -> dict[str, Tensor]:
    """State dict of a .safetensors, .pth or TorchScript file, without wrappers such as {"model": ...} or "module."."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such weights file.")
    try:
        if str(path).endswith(".safetensors"):
            state = load_file(path)
        else:
            try:
                # DETR's files keep their flags, others figures as numpy has them
                scalar = np.float64(0).__reduce__()[0]
                numbers = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)), scalar,
                           (scalar, "numpy.core.multiarray.scalar")]  # its name before numpy 2
                with torch.serialization.safe_globals([argparse.Namespace, *numbers]):
                    state = torch.load(path, map_location="cpu", weights_only=True)
            except RuntimeError as e:  # OpenAI's CLIP files are TorchScript archives
                if "TorchScript" not in str(e):
                    raise
                state = torch.jit.load(path, map_location="cpu").state_dict()
    except Exception as e:  # whatever a broken or foreign file makes the readers say
        why = re.sub(r"\x1b\[\d+m", "", first_line(e))  # torch prints in bold
        why = "it holds something else than tensors" if why.startswith("Weights only load failed") else why
        raise UserError(f"{path} cannot be read as weights: {why}") from None
    for wrapper in "state_dict", "model", "module":
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict (names and tensors).")
    return {k.removeprefix("module."): v for k, v in state.items()}


def load_exactly(module: nn.Module, state: dict[str, Tensor], path: str, what: str) -> None:
    """Copies `state` into `module`. Raises UserError that lists what is missing, left over or of another shape."""
    own = module.state_dict()
    wrong = [f"{n} missing: {sorted(m)[0]}, ..." for m in [own.keys() - state.keys()] if (n := len(m))]
    wrong += [f"{n} unexpected: {sorted(m)[0]}, ..." for m in [state.keys() - own.keys()] if (n := len(m))]
    wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
              for k in own.keys() & state.keys() if own[k].shape != state[k].shape][:1]
    if wrong:
        raise UserError(f"{path} does not hold {what}: {'; '.join(wrong)}.")
    module.load_state_dict(state)


def renamed(state: dict[str, Tensor], renames: list[tuple]) -> dict[str, Tensor]:
    """Each name after all of these (pattern, replacement), one after another."""
    out = {}
    for k, v in state.items():
        for pattern, name in renames:
            k = re.sub(pattern, name, k)
        out[k] = v
    return out


# of CRIS's head, as the files of ETRIS and DETRIS name it -> as etris.py and dcris.py do
CRIS_HEAD = [(r"^neck\.fusion([345])\.multihead_attn\.", lambda m: f"neck.fusion.{int(m[1]) - 3}."),
             (r"^neck\.f([345])_proj\.", lambda m: f"neck.f_proj.{int(m[1]) - 3}."),
             (r"^neck\.coordconv\.0\.conv1\.", "neck.coordconv.0.conv."),
             (r"^(decoder\.layers\.\d+)\.multihead_attn\.", r"\1.cross_attn.")]


def layers_of(state: dict[str, Tensor], pattern: str) -> tuple[int, ...]:
    """The numbers that a pattern finds in the names of tensors."""
    return tuple(sorted({int(m[1]) for k in state if (m := re.match(pattern, k))}))


def clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's weights in fp32, without the notes that OpenAI's archives keep among them."""
    notes = "input_resolution", "context_length", "vocab_size"
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items() if k not in notes}


def dinov2_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """DINOv2's weights under Meta's names, or older or newer transformers' ones, with the names that `model` has."""
    if "blocks.0.attn.qkv.weight" in state:  # Meta's file: query, key and value in one matrix
        for k in [k for k in state if ".attn.qkv." in k]:
            for name, part in zip("qkv", state.pop(k).chunk(3)):
                state[k.replace("attn.qkv", f"attention.{name}_proj")] = part
    renames = [("blocks.", "encoder.layer."), ("attn.proj", "attention.o_proj"),
               ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
               ("patch_embed.proj", "embeddings.patch_embeddings.projection")]
    old = [("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
           ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj")]
    top = {"cls_token": "cls_token", "mask_token": "mask_token", "register_tokens": "register_tokens",
           "pos_embed": "position_embeddings"}
    before_5 = "encoder.layer.0.attention.q_proj.weight" not in model.state_dict()  # transformers had the old names
    out = {}
    for k, v in state.items():
        k = k.removeprefix("dinov2_with_registers.")
        k = f"embeddings.{top[k]}" if k in top else k
        k = "layernorm" + k.removeprefix("norm") if k.startswith("norm.") else k
        for a, b in renames + old:
            k = k.replace(a, b)
        for a, b in old if before_5 else ():
            k = k.replace(b, a)
        out[k] = v.float()
    return out


def bert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's weights as the hub has them, with transformers' names and without the pooler and the heads."""
    out = {}
    for k, v in state.items():
        k = k.removeprefix("bert.").replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        if not k.startswith(("cls.", "pooler.")) and not k.endswith("position_ids"):
            out[k] = v.float()
    return out


def detr_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DETR's ResNet, projection and encoder, under DETR's names or older or newer transformers' ones -> as m2ist.DETR
    names them. The decoder and the heads are left out by name; anything else stays, to be told of."""
    renames = [
        (r"^model\.", ""), (r"^(backbone\.0\.body|backbone\.conv_encoder\.model|backbone\.model)\.", "body."),
        (r"^body\.embedder\.embedder\.convolution", "body.conv1"),
        (r"^body\.embedder\.embedder\.normalization", "body.bn1"),
        (r"^body\.encoder\.stages\.(\d)\.layers\.", lambda m: f"body.layer{int(m[1]) + 1}."),
        (r"\.shortcut\.convolution", ".downsample.0"), (r"\.shortcut\.normalization", ".downsample.1"),
        (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
        (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
        (r"^input_projection\.", "input_proj."), (r"^(transformer\.)?encoder\.layers\.", "layers."),
        (r"\.o_proj\.", ".out_proj."), (r"\.self_attn_layer_norm\.", ".norm1."), (r"\.final_layer_norm\.", ".norm2."),
        (r"\.(mlp\.)?fc([12])\.", r".linear\2.")]
    rest = re.compile(r"(model\.)?(transformer\.)?(decoder|class_embed|bbox_embed|query_embed|class_labels_classifier|"
                      r"query_position_embeddings|bbox_predictor)\.|.*\.num_batches_tracked$")
    out = {k: v.float() for k, v in renamed({k: v for k, v in state.items() if not rest.match(k)}, renames).items()}
    for k in [k for k in out if ".q_proj." in k]:  # nn.MultiheadAttention has query, key and value in one matrix
        names = [k.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
        if all(n in out for n in names):
            out[k.replace(".q_proj.", ".in_proj_")] = torch.cat([out.pop(n) for n in names])
    return out


def load_dinov2_and_clip(vision: nn.Module, text: nn.Module, weights: str, hub: str, what: str) -> None:
    """DINOv2 with registers, and the text half of CLIP ViT-B/16: "pretrained" (the hub's cache, or downloaded) or two
    files with a comma between, in any order. Raises UserError for anything else."""
    files, loaded = weights.split(","), set()
    if weights == "pretrained":
        files = [fetch(hub, "model.safetensors"),
                 fetch("timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors")]
    for file in files:
        state = read_weights(file)
        if "token_embedding.weight" in state:
            state = {k: v for k, v in clip_state(state).items() if not k.startswith("visual.")}
            load_exactly(text, state, file, "the text half of CLIP ViT-B/16")
            loaded.add("CLIP")
        else:
            load_exactly(vision, dinov2_state(state, vision), file, f"{what} (DINOv2 with registers)")
            loaded.add("DINOv2")
    if len(loaded) < 2 or len(files) > 2:
        raise UserError(f"--weights {weights}: two files are needed, one of DINOv2 with registers and one of CLIP "
                        f"ViT-B/16, with a comma between; found {' and '.join(sorted(loaded))}.")


def beit3_state(state: dict[str, Tensor], path: str, grid: int) -> dict[str, Tensor]:
    """BEiT-3's weights without its heads, as shared_ris.BEiT3 names them, with positions for grid x grid patches."""
    heads = re.compile(r"(mlm_head|mim_head|language_head|vision_head)\.|logit_scale$")
    state = {re.sub(r"^(encoder|vision_embed)\.", "", name): v.float() for k, v in state.items()
             if not heads.match(name := k.removeprefix("beit3."))}
    positions = state.get(key := "embed_positions.A.weight")
    rows = len(positions) if positions is not None and positions.dim() == 2 else 0
    side = math.isqrt(max(1, rows - 3))
    if rows != side ** 2 + 3:
        raise UserError(f"{path} does not hold BEiT-3: its positions, encoder.{key}, are not those of a square.")
    rest, square = positions[:3], positions[3:].view(1, side, side, -1).permute(0, 3, 1, 2)
    if side != grid:  # as BEiT-3's authors do: bicubic, not antialiased
        square = F.interpolate(square, (grid, grid), mode="bicubic")
    state[key] = torch.cat([rest, square.flatten(2)[0].T])
    return state


# Blocks that no paper claims


def in_full_precision(x: Tensor):
    """A context without AMP on x's device: 16 bits are too few for logits and coordinates."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()


def sine_1d(n: int, dim: int, like: Tensor) -> Tensor:
    """Sine positions, sine and cosine interleaved. -> (n, dim)"""
    i = torch.arange(0, dim, 2, device=like.device, dtype=torch.float32)
    angle = torch.arange(n, device=like.device).float()[:, None] * torch.exp(i * (-torch.log(torch.tensor(1e4)) / dim))
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1).to(like.dtype)


def sine_2d(h: int, w: int, dim: int, like: Tensor) -> Tensor:
    """Half of the channels for x, half for y. -> (h * w, dim)"""
    x, y = sine_1d(w, dim // 2, like), sine_1d(h, dim // 2, like)
    return torch.cat([x[None].expand(h, -1, -1), y[:, None].expand(-1, w, -1)], 2).flatten(0, 1)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice of the sigmoid, smoothed by one pixel, a mean over samples; both (B, ...), target in 0..1."""
    p, t = logits.sigmoid().flatten(1), target.flatten(1)
    return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


CLS, SEP = 101, 102  # in BERT's vocabulary
LONGEST_WORDPIECE = 32  # bytes


def bert_vocabulary(path: str, size: int) -> Tensor:
    """vocab.txt as a (size, LONGEST_WORDPIECE) uint8, so that it travels with the weights. Raises UserError for another
    model's."""
    try:
        words = [w.encode() for w in Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: BERT's vocabulary, a vocab.txt beside its weights, cannot be read ({e}).") from None
    if len(words) != size or words[CLS:SEP + 1] != [b"[CLS]", b"[SEP]"] or max(map(len, words)) > LONGEST_WORDPIECE:
        raise UserError(f"{path} is not the vocabulary of bert-base-uncased, {size:,} wordpieces.")
    padded = b"".join(w.ljust(LONGEST_WORDPIECE, b"\0") for w in words)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(size, LONGEST_WORDPIECE)


def numbered_words(sentence: str, first: int, n: int) -> list[int]:
    """For want of a vocabulary: each lower-case word and sign has its checksum for a number, in first .. first + n - 1,
    which is enough to learn from."""
    return [first + zlib.crc32(w.encode()) % n for w in re.findall(r"\w+|[^\w\s]", sentence.lower())]


def bert_wordpieces(vocabulary: Tensor) -> Callable[[list[str]], list[list[int]]]:
    """Sentences -> ids of lower-case wordpieces; of numbered_words, with a vocabulary of zeros."""
    first, n = SEP + 2, len(vocabulary)
    if not vocabulary.any():
        return lambda sentences: [numbered_words(s, first, n - first) for s in sentences]
    from tokenizers import BertWordPieceTokenizer  # transformers needs it too

    words = [bytes(row).rstrip(b"\0").decode() for row in vocabulary.cpu().numpy()]
    tokenizer = BertWordPieceTokenizer({w: i for i, w in enumerate(words)}, lowercase=True)
    return lambda sentences: [e.ids for e in tokenizer.encode_batch(sentences, add_special_tokens=False)]


PAD = 1  # in BEiT-3's vocabulary, where 0 and 2 are start and end, 3 an unknown piece


class SentencePieces(nn.Module):
    """BEiT-3's tokenizer for a table of `rows` embeddings. Its model, the file beit3.spm, is a part of the state dict,
    so that it travels with the weights.

    Without a file it gives numbered_words. Raises UserError for a file that is missing, broken or another model's.
    """

    def __init__(self, path: str, rows: int):
        super().__init__()
        self.rows, self.model, self.processor = rows, b"", None
        if path:
            try:
                model = Path(path).read_bytes()
            except OSError as e:
                raise UserError(f"{path}: BEiT-3's tokenizer, the file beit3.spm released with its weights, cannot be "
                                f"read ({e.strerror}).") from None
            self.load(model, path)
            # <mask> comes after the pieces, and eight rows are unused
            if not self.processor or self.processor.get_piece_size() != rows - 10 or self.processor.unk_id() != 0:
                raise UserError(f"{path} is not BEiT-3's tokenizer, beit3.spm with its {rows - 10:,} pieces.")

    def load(self, model: bytes, path: str) -> None:
        self.model, self.processor = model, None
        if model:
            try:
                from sentencepiece import SentencePieceProcessor
            except ImportError:
                raise UserError("BEiT-3's tokenizer needs sentencepiece: pip install sentencepiece.") from None
            try:
                self.processor = SentencePieceProcessor(model_proto=model)
            except RuntimeError:
                raise UserError(f"{path} is not BEiT-3's tokenizer, nor any sentencepiece model.") from None

    def get_extra_state(self) -> Tensor:
        return torch.from_numpy(np.frombuffer(self.model, dtype=np.uint8).copy())

    def set_extra_state(self, state: Tensor) -> None:
        self.load(state.cpu().numpy().tobytes(), "what this checkpoint holds")

    def tokenize(self, sentences: list[str], length: int) -> Tensor:
        """Start, pieces, end, PAD up to the longest sentence; cut to `length` with the end kept. -> (B, L)"""
        if self.processor:
            ids = [[i + 1 if i else 3 for i in row] for row in self.processor.encode(sentences)]
        else:  # the first four rows and the last nine are no words
            ids = [numbered_words(s, 4, self.rows - 13) for s in sentences]
        ids = [torch.tensor([0, *row[:length - 2], 2]) for row in ids]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)


@lru_cache
def clip_tokenizer():
    import open_clip

    return open_clip.SimpleTokenizer()


def clip_tokens(sentences: list[str], length: int, rows: int = 49408) -> Tensor:
    """CLIP's BPE in lower case: start, words, end, zeros; cut to `length` with the end kept. -> (B, length)

    For a table of fewer `rows` than CLIP's, the last two are start and end, and rare words fold onto the others.
    """
    tokens = clip_tokenizer()(sentences, context_length=length)
    if rows < 49408:
        tokens = torch.where(tokens >= 49406, tokens - 49408 + rows,
                             torch.where(tokens < rows - 2, tokens, 1 + tokens % (rows - 3)))
    return tokens


# Baselines: what the papers compare with, put into towers that are else frozen

BASELINES = {  # --tune: the default of --baseline-dims, for pictures and words
    "adapter": (64, 64),       # widths of bottlenecks
    "adaptformer": (64, 64),
    "conv-adapter": (64, 0),
    "compacter": (1, 1),       # ranks
    "lora": (16, 16),
    "coop": (0, 8),            # prompts
    "bitfit": (),
}
COMBINED = tuple(f"method+{name}" for name in BASELINES)  # beside a method's own adapters


def baseline_of(tune: str) -> str:
    """The name of the baseline in a --tune, or ""."""
    name = tune.removeprefix("method+")
    return name if name in BASELINES else ""


def baseline_dims(tune: str, tiny: bool, **own: tuple[int, int]) -> tuple[int, ...]:
    """The default of --baseline-dims, in which a method may have its `own`."""
    name = baseline_of(tune)
    dims = BASELINES.get(name, ())
    if tiny:
        return tuple(-(-d // 4) for d in dims) if name != "coop" else dims
    return own.get(name.replace("-", "_"), dims)


def prompts(c) -> int:
    """How many prompts stand before the words (CoOp)."""
    return c.baseline_dims[1] if baseline_of(c.tune) == "coop" else 0


def prompted(tokens: Tensor, c) -> Tensor:
    """(B, L) -> (B, n + L): room for the prompts, behind the start token, which stands there n times."""
    return torch.cat([tokens[:, :1].expand(-1, prompts(c)), tokens], 1)


def named(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_modules())


def add_baseline(c, vision: dict[str, nn.Module], text: dict[str, nn.Module], words: nn.Embedding) -> list[nn.Module]:
    """Puts the baseline of c.tune into towers, given as their modules by name; `words` embeds tokens. -> what is new.

    The new modules are children of those they change, called through forward hooks, and LoRA's are parametrizations:
    a method's own code stays as it is. All start as nothing, but for CoOp's prompts.
    """
    name, added = baseline_of(c.tune), []
    if name == "coop":
        added.append(CoOp(words, prompts(c)))
    elif name == "bitfit":  # Ben Zaken et al. 2022: the biases are trained, and nothing is added
        for m in [*vision.values(), *text.values()]:
            for kind, p in m.named_parameters(recurse=False):
                p.requires_grad_(p.requires_grad or kind.endswith("bias"))
    elif name:
        add = add_lora if name == "lora" else partial(add_bottlenecks, name)
        for modules, dim in zip((vision, text), c.baseline_dims):
            added += add(modules, dim) if dim else []
    return added


class CoOp(nn.Module):
    """Zhou et al. 2022, Eq. 2: learnt vectors in the place of the embeddings of the tokens behind the first."""

    def __init__(self, words: nn.Embedding, n: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(n, words.embedding_dim) * 0.02)
        words.add_module("baseline", self)
        words.register_forward_hook(lambda m, args, x: m.baseline(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n + L, C), n of which prompted() made room for"""
        rest = x[:, 1 + len(self.vectors):]
        return torch.cat([x[:, :1], self.vectors.expand(len(x), -1, -1).to(x.dtype), rest], 1)


class LoRA(nn.Module):
    """Hu et al. 2021, Eq. 3: W + B A for each block of W's rows that `parts` says."""

    def __init__(self, weight: Tensor, rank: int, parts: tuple[bool, ...]):
        super().__init__()
        self.parts, rows = parts, weight.shape[0] // len(parts)
        self.a = nn.Parameter(torch.empty(sum(parts), rank, weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(sum(parts), rows, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """(P * D, D') -> (P * D, D')"""
        low = iter(self.b @ self.a)                              # (D, D') of each block that learns
        return weight + torch.cat([next(low) if part else torch.zeros_like(rows)
                                   for part, rows in zip(self.parts, weight.chunk(len(self.parts)))])


def add_lora(modules: dict[str, nn.Module], rank: int) -> list[LoRA]:
    """To the queries and values of every attention. W + B A is made at each use, and kept for backward."""
    added = []
    for name, m in modules.items():
        if isinstance(m, nn.MultiheadAttention):  # queries, keys and values in one matrix
            tensor, parts = "in_proj_weight", (True, False, True)
        elif isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] in ("q_proj", "v_proj", "query", "value"):
            tensor, parts = "weight", (True,)
        else:
            continue
        added.append(LoRA(getattr(m, tensor), rank, parts))
        nn.utils.parametrize.register_parametrization(m, tensor, added[-1])
    return added


class PHMLinear(nn.Module):
    """Compacter (Karimi Mahabadi et al. 2021): W is a sum of n Kronecker products, each of a small matrix, which all
    layers share, with one of a low rank. (..., D) -> (..., D')

    `sharing`: the layers that share; the first of them keeps the small matrices.
    """

    def __init__(self, width_in: int, width_out: int, rank: int, sharing: list[PHMLinear], n: int = 4):
        super().__init__()
        sharing.append(self)
        self.first = (sharing[0],)  # in a tuple, so as not to be a child
        if sharing[0] is self:
            self.rule = nn.Parameter(torch.randn(n, n, n) * n**-0.5)
        self.s = nn.Parameter(torch.randn(n, width_in // n, rank) * (2 / width_in) ** 0.5)
        self.t = nn.Parameter(torch.randn(n, rank, width_out // n) * rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(width_out))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.einsum("nab,nir,nro->aibo", self.first[0].rule, self.s, self.t)
        return x @ w.flatten(2).flatten(0, 1) + self.bias


class Bottleneck(nn.Module):
    """Houlsby et al. 2019: down, ReLU, up. For tokens (B, N, D), or maps (B, D, H, W), of which it may skip some as its
    neighbour does (stride). With `conv` a 3x3 convolution over the last tokens that form a square (Jie & Deng 2022)."""

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
    """One for each feed-forward network of a transformer (Houlsby et al. have two in a layer; the sizes in the papers
    are those of one): behind it, or beside it (AdaptFormer, conv-adapter). A ResNet has them beside its 3x3
    convolutions (VL-Adapter, Sung et al. 2022), `dim` wide where these are widest, elsewhere in proportion."""
    ends = [(m, modules[name.removesuffix(first) + last]) for name, m in modules.items() for first, last in FFN.items()
            if name.endswith(first)]
    convs = [m for name, m in modules.items() if re.search(r"layer\d\.\d+\.conv2$", name)]
    in_convs = bool(convs) and (kind == "conv-adapter" or not ends)
    beside = in_convs or kind in ("adaptformer", "conv-adapter")
    added, sharing = [], []
    for first, last in zip(convs, convs) if in_convs else ends:
        width = last.weight.shape[0]
        if kind == "compacter":  # dim is its rank; a quarter as wide, in multiples of its n
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
    """To what `last` gives is added what its baseline makes of it, or (beside) of what `first` reads."""
    if not beside:
        last.register_forward_hook(lambda m, args, y: y + m.baseline(y))
        return
    read = {}
    first.register_forward_hook(lambda m, args, y: read.update(x=args[0]))
    last.register_forward_hook(lambda m, args, y: y + m.baseline(read.pop("x")))


# Flags


NAMES = "backbone", "variant", "tune"  # fields of every Config that the commands take themselves


def add_config_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One flag for each other field: --bridger-dim 32, --visual-layers 1,3, --mask-padding / --no-mask-padding."""
    group = parser.add_argument_group(f"settings of {config_class.__module__}.py (defaults depend on the backbone)")
    hints = typing.get_type_hints(config_class)
    for f in fields(config_class):
        if f.name in NAMES:
            continue
        kind = hints[f.name]
        flag = dict(default=MISSING, dest=f.name)
        if typing.get_origin(kind) is typing.Literal:
            flag, kind = flag | dict(choices=typing.get_args(kind)), str
        if kind is bool:
            flag |= dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is tuple:
            flag |= dict(type=integers, metavar="N,N,...")
        elif "choices" not in flag:
            flag |= dict(type=kind, metavar=kind.__name__.upper())
        group.add_argument("--" + f.name.replace("_", "-"), **flag)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(t) for t in text.split(",") if t.strip())


def choices(config_class: type, name: str) -> tuple:
    """The values of a field that has a few. Raises UserError for any other."""
    kind = typing.get_type_hints(config_class).get(name)
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    if kind is bool:
        return False, True
    raise UserError(f"--vary {name}: {config_class.__module__} has no such setting with a few values.")


def config_flags(args: argparse.Namespace, config_class: type) -> dict:
    """The fields that the user set by such a flag."""
    return {f.name: v for f in fields(config_class)
            if f.name not in NAMES and (v := getattr(args, f.name, MISSING)) is not MISSING}


def check_config(c, **rules: tuple) -> None:
    """Raises UserError for a setting that cannot be, and names it. Each of a method's own rules is a field's name with
    (whether it is fine, or a function that says so where 0 would be a divisor, what is wanted)."""
    positive = "batch_size", "epochs", "lr", "image_size"
    for name, kind in typing.get_type_hints(type(c)).items():
        value, wanted = getattr(c, name), None
        if typing.get_origin(kind) is typing.Literal and value not in typing.get_args(kind):
            wanted = " or ".join(typing.get_args(kind))
        elif kind in (int, float) and not 0 <= value < float("inf"):
            wanted = "0 or more"
        elif value == 0 and (name in positive or name.endswith(("_dim", "_heads", "_ffn")) or name == "decoder_layers"):
            wanted = "positive"
        elif name == "threshold" and not 0 < value < 1:
            wanted = "between 0 and 1"
        elif (name.endswith("_dropout") or name in ("drop_path", "beta2")) and value >= 1:
            wanted = "below 1"
        elif typing.get_origin(kind) is tuple and name != "baseline_dims" and (
                len(set(value)) < len(value) or min(value, default=0) < 0):
            wanted = "different numbers, none negative"
        if wanted:
            raise UserError(f"--{name.replace('_', '-')} {value} cannot be: {wanted}.")
    dims, usual = c.baseline_dims, BASELINES.get(baseline_of(c.tune), ())
    rules["baseline_dims"] = (
        len(dims) == len(usual) and any(dims) == any(usual) and all(d == 0 or d > 0 and u for d, u in zip(dims, usual)),
        f"two numbers such as {','.join(map(str, usual))}, 0 for none" if usual else f"none with --tune {c.tune}")
    for name, (fine, wanted) in rules.items():
        if not (fine() if callable(fine) else fine):
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)} cannot be: {wanted}.")


def config_from_json(config_class: type, values: dict, where: str):
    """Config from its fields as JSON keeps them. Raises UserError for fields this version does not know, and values of
    another kind."""
    unknown = values.keys() - {f.name for f in fields(config_class)}
    if unknown:
        raise UserError(f"{where} has settings that this version lacks: {', '.join(sorted(unknown))}.")
    hints, out = typing.get_type_hints(config_class), {}
    for name, value in values.items():
        kind = typing.get_origin(hints[name]) or hints[name]
        value = tuple(value) if isinstance(value, list) else value
        fine = value in typing.get_args(hints[name]) if kind is typing.Literal else (
            isinstance(value, (int, float)) if kind is float else type(value) is kind
            and (kind is not tuple or all(type(v) is int for v in value)))
        if not fine:
            raise UserError(f"{where} has a setting that cannot be: {name} = {str(value)[:80]!r}.")
        out[name] = value
    return config_class(**out)


# Processes


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started (one, without torchrun)."""

    rank: int
    world: int
    device: torch.device

    def gather(self, thing) -> list:
        """The same thing of every process, in rank order, on every process."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def first_alone(self, make):
        """What make() returns on the first process, which alone calls it, or its UserError, on every process."""
        return self.everywhere(make if self.rank == 0 else lambda: None, all_of=False)

    def everywhere(self, make, all_of: bool = True):
        """What make() returns here; the first UserError that any process has, on every process. Without `all_of` what
        the first process has, on every process."""
        result = error = None
        try:
            result = make()
        except UserError as e:
            error = e
        except OSError as e:
            error = UserError(f"{e.filename or ''}: {e.strerror}.")
        results = self.gather((None if all_of else result, error))
        for _, other in results:
            if other is not None:
                raise other
        return result if all_of else results[0][0]

    def say(self, *words) -> None:
        if self.rank == 0:
            print(*words, file=sys.stderr, flush=True)


def start(tiny: bool = False, device: str = "auto") -> Process:
    """Joins torchrun's group (NCCL on CUDA, gloo on CPU) or stands alone."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; --device cpu runs without.")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: {torch.cuda.device_count()} GPUs are here, one for each process.")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    elif tiny and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a tiny model gains nothing from a second thread, and loses much on a busy machine
    # one attention for training and evaluation alike; the fast path rounds otherwise and hides from FLOP counters
    torch.backends.mha.set_fastpath_enabled(False)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Process(rank, world, torch.device(device))


def run_command(main) -> None:
    """Runs main(): a UserError becomes one sentence and exit status 2, Ctrl-C status 130; no traceback for either."""
    for stream in sys.stdout, sys.stderr:  # file names may hold what is no text
        stream.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
    except UserError as e:
        # from a data worker the sentence arrives as the last line of a traceback
        print("error: " + str(e).strip().splitlines()[-1].removeprefix("common.UserError: "), file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as e:  # a name that is too long, a folder that may not be entered
        if e.filename is None:
            raise
        print(f"error: {str(e.filename)[:200]}: {e.strerror}.", file=sys.stderr)
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # at once: data workers, or other processes in a collective, would be waited for
    if dist.is_initialized():
        dist.destroy_process_group()


class StopSignal:
    """Ctrl-C and SIGTERM set `.number`, for the loop to save and leave; a second one ends the process at once.

    What comes within two seconds is the same one: torchrun and schedulers pass a signal on to whom it reached already.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0
        for s in signal.SIGINT, signal.SIGTERM:
            signal.signal(s, self.received)

    def received(self, number: int, frame) -> None:
        if self.number and time.monotonic() - self.since > 2 and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()


# Metrics


def intersection_union(prediction: Tensor, truth: Tensor) -> tuple[int, int]:
    """Pixel counts of two bool masks (H, W)."""
    return int((prediction & truth).sum()), int((prediction | truth).sum())


def mask_ious(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(intersection, union) of each expression in pixels -> intersections, unions, IoUs. Two empty masks have IoU 1."""
    i, u = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    return i, u, np.where(u > 0, i / np.maximum(u, 1), 1.0)


def mask_metrics(rows: list[tuple[int, int]]) -> dict[str, float]:
    """Percentages over expressions, each an (intersection, union) in pixels.

    oIoU (cIoU): sum of intersections / sum of unions. mIoU: mean of IoUs. Pr@X: share with IoU > X, strictly. Two
    empty masks have IoU 1.
    """
    i, u, iou = mask_ious(rows)
    metrics = dict(n=len(rows), oIoU=i.sum() / max(u.sum(), 1), mIoU=iou.mean() if len(rows) else 0.0)
    metrics |= {f"Pr@{x / 10}": (iou > x / 10).mean() if len(rows) else 0.0 for x in range(5, 10)}
    return percentages(metrics)


def box_iou(prediction: tuple, truth: tuple) -> float:
    """IoU of two boxes x1, y1, x2, y2; 0 where one has no area."""
    areas = [max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (prediction, truth)]
    sides = [max(0.0, min(prediction[k + 2], truth[k + 2]) - max(prediction[k], truth[k])) for k in (0, 1)]
    both = sides[0] * sides[1]
    return both / (sum(areas) - both) if both else 0.0


def box_metrics(ious: list[float]) -> dict[str, float]:
    """Percentages over expressions. Acc@0.5: share with IoU >= 0.5. mIoU: mean of IoUs."""
    iou, n = np.array(ious, dtype=np.float64), len(ious)
    metrics = {"n": n, "Acc@0.5": (iou >= 0.5).sum() / max(n, 1), "mIoU": iou.sum() / max(n, 1)}
    return percentages(metrics)


def interval(parts: np.ndarray, wholes: np.ndarray, pictures: list, resamples: int = 1000) -> list[float]:
    """95 % bootstrap interval, in per cent, of sum(parts) / sum(wholes) over expressions. Photographs are drawn anew,
    each with all of its expressions, which are not independent; from a fixed seed."""
    _, group = np.unique(pictures, return_inverse=True)
    parts, wholes = (np.bincount(group, values) for values in (parts, wholes))
    rng, ratios = np.random.default_rng(0), []
    for _ in range(resamples):
        drawn = rng.integers(len(parts), size=len(parts))
        ratios.append(100 * parts[drawn].sum() / max(wholes[drawn].sum(), 1e-9))
    return [round(float(v), 2) for v in np.percentile(ratios, [2.5, 97.5])]


def mask_intervals(rows: list[tuple[int, int]], pictures: list) -> dict[str, list[float]]:
    """Of mask_metrics; `pictures`: of each row."""
    i, u, iou = mask_ious(rows)
    return {"oIoU_95": interval(i, u, pictures), "mIoU_95": interval(iou, np.ones(len(iou)), pictures)}


def box_intervals(ious: list[float], pictures: list) -> dict[str, list[float]]:
    """Of box_metrics."""
    iou, one = np.array(ious, dtype=np.float64), np.ones(len(ious))
    return {"Acc@0.5_95": interval(iou >= 0.5, one, pictures), "mIoU_95": interval(iou, one, pictures)}


def percentages(metrics: dict[str, float]) -> dict[str, float]:
    """Shares as per cent, rounded to four decimals."""
    return {k: v if k == "n" else round(100 * float(v), 4) for k, v in metrics.items()}


# Run folders and checkpoints


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when all is written, so nobody finds half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())  # its bytes before its name
        os.replace(temporary, path)
    except (OSError, ValueError, RuntimeError) as e:  # Pillow raises ValueError for what a format cannot hold
        if isinstance(e, RuntimeError):  # torch.save, for what the file system said
            if not isinstance(e.__context__, OSError):
                raise
            e = e.__context__
        raise UserError(f"{path} cannot be written: {getattr(e, 'strerror', None) or e}.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_place(path: str | Path) -> None:
    """Raises UserError where a file could not be written in the end."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise UserError(f"{path} cannot be written: {path.parent}: {e.strerror}.") from None
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder.")


def write_json(path: str | Path, value) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def print_table(rows: list[dict], left: tuple[str, ...] = ()) -> None:
    """Dicts of one kind as a table on standard output; columns `left` begin at one height."""
    names = list(rows[0])
    cells = [["-".join(f"{x:.2f}" for x in v) if isinstance(v, list) else f"{v:.2f}" if isinstance(v, float) else
              f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(n), *(len(c[i]) for c in cells)) for i, n in enumerate(names)]
    for line in [names, *cells]:
        print("  ".join(c.ljust(w) if n in left else c.rjust(w) for n, c, w in zip(names, line, widths)).rstrip())


def write_result(file: str | None, value) -> None:
    if file == "-":
        print(json.dumps(value, indent=1))
    elif file:
        write_json(file, value)


def trains_towers(model: nn.Module) -> bool:
    """Whether most of the towers' matrices are trained: all but some that nothing reads, or a first stage."""
    trains = [p.requires_grad for p in parameters(model)["backbone"] if p.dim() > 1]
    return 2 * sum(trains) > len(trains)


def trained_names(model: nn.Module) -> set[str]:
    """What a checkpoint holds: trainable parameters, and the buffers of the modules that own them (BatchNorm); or all,
    where towers are trained, so that the checkpoint needs no others."""
    if trains_towers(model):
        return set(model.state_dict())
    names = set()
    for prefix, m in model.named_modules():
        own = [n for n, p in m.named_parameters(recurse=False) if p.requires_grad]
        if own:
            own += [n for n, _ in m.named_buffers(recurse=False)]
        names |= {f"{prefix}.{n}" if prefix else n for n in own}
    return names & model.state_dict().keys()  # some buffers are not kept


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors under trained_names, on the CPU."""
    names = trained_names(model)
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if k in names}


def fingerprint(model: nn.Module) -> str:
    """sha256 over everything that is not trained: which frozen towers a checkpoint needs. "" where it holds them."""
    if trains_towers(model):
        return ""
    digest, trained = hashlib.sha256(), trained_names(model)
    for k, v in sorted(model.state_dict().items()):
        if k not in trained:
            digest.update(k.encode() + v.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def checksum(info: dict, state: dict[str, Tensor]) -> str:
    """sha256 over what a checkpoint says of itself and all of its tensors, to know a damaged one."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for k, v in sorted(state.items()):
        digest.update(f"{k} {v.dtype} {tuple(v.shape)}".encode())
        digest.update(v.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(path: Path, model: nn.Module, info: dict) -> None:
    """What was trained as safetensors; `info` (method, config, weights, frozen, ...) as JSON in its metadata."""
    state = trained_state(model)
    data = save(state, {"refpapers": json.dumps(info | dict(sha256=checksum(info, state)))})
    with writing(path) as temporary:
        temporary.write_bytes(data)


def checkpoint_file(path: str) -> Path:
    """The model.safetensors of a run folder, or the file itself."""
    file = Path(path) / "model.safetensors" if os.path.isdir(path) else Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no checkpoint here; give a run folder with a model.safetensors, or such a file.")
    return file


def read_checkpoint(path: str, tensors: bool = True) -> tuple[dict, dict[str, Tensor]]:
    """(info, state) of a checkpoint of ours, the state empty without `tensors`. Raises UserError for anything else."""
    file = checkpoint_file(path)
    try:
        with safe_open(file, "pt") as f:
            info = json.loads((f.metadata() or {}).get("refpapers", "null"))
            state = {k: f.get_tensor(k) for k in f.keys()} if tensors else {}
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{file} is not a whole safetensors file: {str(e)[:200]}") from None
    needed = dict(method=str, config=dict, weights=str, seed=int, frozen=str, dataset=str, data_root=(str, type(None)),
                  sha256=str)
    if not isinstance(info, dict) or not all(isinstance(info.get(k), kind) for k, kind in needed.items()) \
            or not 0 <= info["seed"] < 2**31:
        raise UserError(f"{file} was not written by this project's train.py, or by an older one: its metadata lacks "
                        "what a checkpoint says of itself.")
    said = info.pop("sha256")
    if tensors and checksum(info, state) != said:
        raise UserError(f"{file} is damaged: its tensors are not those that train.py wrote (their checksum differs).")
    return info, state


def same_shape(name: str, a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape or name.endswith("_extra_state")  # of a tokenizer, say: of any length


def check_trained(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Raises UserError unless a checkpoint has every tensor that this model trains, and no other."""
    every, names = model.state_dict(), trained_names(model)
    own = {k: every[k] for k in names}
    odd = [k for k in own.keys() ^ state.keys()] + [k for k in own.keys() & state.keys()
                                                    if not same_shape(k, own[k], state[k])]
    if odd:
        raise UserError(f"{where} does not fit the model that is wanted: {len(odd)} tensors differ, such as "
                        f"{sorted(odd)[0]}.")


def load_trained(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Puts a checkpoint's tensors back."""
    check_trained(model, state, where)
    model.load_state_dict(state, strict=False)


def load_towers(model: nn.Module, run: str, method: str) -> None:
    """Takes the towers that another run trained. Raises UserError if it trained none, or others."""
    info, state = read_checkpoint(run)
    if info["method"] != method or info["config"]["backbone"] != model.c.backbone:
        raise UserError(f"--weights {run}: holds {info['method']} with {info['config']['backbone']}, "
                        f"not {method} with {model.c.backbone}.")
    towers = model.parts()["backbone"]
    prefixes = tuple(n + "." for n, m in model.named_modules() if any(m is t for t in towers))
    state = {k: v for k, v in state.items() if k.startswith(prefixes)}
    if not state or info["frozen"]:
        raise UserError(f"--weights {run}: that run trained no towers (it was --tune {info['config']['tune']}); "
                        "give its own --weights, or a run with --tune full.")
    own = model.state_dict()
    # LoRA has renamed what it stands before
    renamed = {re.sub(r"parametrizations\.(\w+)\.original$", r"\1", k): k for k in own}
    state = {renamed.get(k, k): v for k, v in state.items()}
    odd = sorted(k for k, v in state.items() if k not in own or not same_shape(k, own[k], v))
    if odd:
        raise UserError(f"--weights {run}: its towers do not fit these settings: {odd[0]} is "
                        f"{tuple(state[odd[0]].shape)} there.")
    model.load_state_dict(state, strict=False)


def sha256(file: str) -> str:
    with open(file, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def is_run(weights: str) -> bool:
    """Whether --weights names a run folder or its checkpoint, and not released files."""
    return os.path.isdir(weights) or os.path.basename(weights) == "model.safetensors" and "," not in weights


def build(method, config, weights: str, seed: int):
    """The method's model on random or given weights. Towers and head are drawn from `seed` alone."""
    torch.manual_seed(seed)
    model = method.Model(config, "random" if is_run(weights) else weights)
    if is_run(weights):
        load_towers(model, weights, method.__name__)
    return model


def origin(weights: str) -> str:
    """What the towers came from in the end: for a run, what its own came from."""
    if not is_run(weights):
        return weights
    info, _ = read_checkpoint(weights, tensors=False)
    return info.get("origin", info["weights"])


def leak(method, weights: str, dataset: str) -> str:
    """The method's warning that weights (see origin) were trained on a data set's val or test pictures, or ""."""
    return method.leak(weights, dataset) if hasattr(method, "leak") else ""


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version(), "torch": torch.__version__}
    for name in "torchvision", "transformers", "open_clip_torch", "sentencepiece", "numpy", "pillow":
        with suppress(PackageNotFoundError):
            out[name] = version(name)
    return out


# Counting


def count(modules: list[nn.Module] | nn.Module, trainable: bool = False) -> int:
    """Number of parameters, each once."""
    modules = modules if isinstance(modules, list) else [modules]
    seen = {id(p): p for m in modules for p in m.parameters() if p.requires_grad or not trainable}
    return sum(p.numel() for p in seen.values())


def parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Those of each of parts(), each once: a baseline's lie within the towers, and are adapters."""
    parts = {name: [p for m in modules for p in m.parameters()] for name, modules in model.parts().items()}
    adapters = {id(p) for p in parts["adapter"]}
    return parts | dict(backbone=[p for p in parts["backbone"] if id(p) not in adapters])
