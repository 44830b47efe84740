"""What the four methods share and no paper defines: settings of training, processes, metrics, run folders, checkpoints.

A method file (dcris.py, etris.py, m2ist.py, shared_ris.py) has

    BACKBONES, VARIANTS, TUNES   the values of --backbone, --variant and --tune; the first is the default
    Config(TrainConfig)          every setting, with the paper's default
    config(backbone, variant, dataset, **flags) -> Config    the settings that fit these names, and over them `flags`
    Model(config, weights)       an nn.Module with
        .task                    "mask" or "box"
        .preprocess              Preprocess: how a photograph comes to the canvas, a square of S pixels a side
        .tokenize(sentences)     list of str -> token ids (B, L)
        .forward(images, tokens) (B, 3, S, S), (B, L) -> mask logits (B, 1, h, w) over the canvas, or boxes (B, 4):
                                 centre x, centre y, width, height, normalised by S
        .loss(output, target)    target: masks (B, S, S) in 0..1, or boxes (B, 4) -> scalar
        .parts()                 {"backbone" | "adapter" | "head": [modules]}, the order in which they are initialised
        .baseline                modules that a --tune such as lora added (toolbox/baselines.py)
    and, where the image encoder does not read the sentence,
        .image_features(images)  accepted by forward in the place of images; .repeat(n): the same for n sentences
        .features_key            identifies these features beside the frozen weights; "" where training changes them
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

METHODS = ("dcris", "etris", "m2ist", "shared_ris")


class UserError(Exception):
    """A mistake that the user can correct. Commands print its sentence without a traceback and exit with status 2."""


def first_line(e: BaseException) -> str:
    """The first line of an error's message, or the error itself where it has none."""
    return (str(e) or repr(e)).splitlines()[0][:200]


@dataclass(frozen=True)
class Preprocess:
    """How a method wants its images.

    `size`: side of the square canvas in pixels. `fit`: "letterbox" (aspect kept, centred, padded with the mean colour),
    "warp" (the same as the released code does it) or "stretch". `interpolation`: "bilinear" or "bicubic". `mean` and
    `std` normalise RGB values in 0..1. `pad_channel`: a fourth channel, 1 in the padding. `augment`: whether training
    augments (toolbox/augment.py).
    """

    size: int
    fit: str = "letterbox"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pad_channel: bool = False
    augment: bool = False


def load_method(name: str):
    """The module of a method. Its backbone library is imported here and not before."""
    return importlib.import_module(name)


# Blocks that no paper claims


def in_full_precision(x: Tensor):
    """A context without AMP on x's device: 16 bits are too few for logits and coordinates."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()


def sine_1d(n: int, dim: int, like: Tensor) -> Tensor:
    """Sine positions, sine and cosine interleaved, on the device and in the dtype of `like`. -> (n, dim)"""
    i = torch.arange(0, dim, 2, device=like.device, dtype=torch.float32)
    angle = torch.arange(n, device=like.device).float()[:, None] * torch.exp(i * (-torch.log(torch.tensor(1e4)) / dim))
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1).to(like.dtype)


def sine_2d(h: int, w: int, dim: int, like: Tensor) -> Tensor:
    """Half of the channels for x, half for y. -> (h * w, dim)"""
    x, y = sine_1d(w, dim // 2, like), sine_1d(h, dim // 2, like)
    return torch.cat([x[None].expand(h, -1, -1), y[:, None].expand(-1, w, -1)], 2).flatten(0, 1)


def recompute(layers: list[Callable], *inputs, **named):
    """Calls layers in turn, the first with the inputs, each other with the result of the one before. What they need in
    backward is computed again then, not kept. Buffers, such as BatchNorm's statistics, move once."""
    def run(*inputs, **named):
        x = layers[0](*inputs, **named)
        for layer in layers[1:]:
            x = layer(x)
        return x

    @contextmanager
    def again():
        before = [b.clone() for b in buffers]
        try:
            yield
        finally:
            for b, old in zip(buffers, before):
                b.copy_(old)

    if not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return run(*inputs, **named)
    owners = [getattr(layer, "__self__", layer) for layer in layers]  # of a bound method
    buffers = [b for owner in owners if isinstance(owner, nn.Module) for b in owner.buffers()]
    return checkpoint(run, *inputs, **named, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


def recomputed(*blocks: nn.Module) -> None:
    """--checkpointing: what these blocks need in backward is computed again then, not kept."""
    for block in blocks:
        block.forward = partial(recompute, [block.forward])


class Recomputed(nn.Sequential):
    """A Sequential that keeps for backward what its convolutions give. What is between them, such as a map that is
    enlarged, is computed again."""

    def forward(self, x: Tensor) -> Tensor:
        part = []
        for m in self.modules():
            if not isinstance(m, nn.Sequential):
                part.append(m)
            if isinstance(m, nn.Conv2d):  # which backward does not compute again: it is the end of a part
                x, part = recompute(part, x), []
        return x


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention of tokens (B, N, C), without weights unless they are asked for. PyTorch's transposes the
    tokens; with weights that are frozen it then takes a product for each token, not one for all. With dropout there is
    no fused kernel on a CPU, and it keeps three maps (B, heads, N, M); here they are computed again in backward."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__(dim, heads, dropout, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = False, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """key_padding_mask: (B, M), True = padding; attn_mask: added to the scores"""
        if need_weights:
            return super().forward(q, k, v, key_padding_mask, attn_mask=attn_mask)
        mask = attn_mask if key_padding_mask is None else ~key_padding_mask[:, None, None]
        if q.is_cuda or not (self.training and self.dropout):
            y = self.attend(q, k, v, mask, F.scaled_dot_product_attention)
        else:
            y = recompute([self.attend], q, k, v, mask, plain_attention)
        return self.out_proj(y), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Callable) -> Tensor:
        """All but the last layer. (B, N, C), twice (B, M, C) -> (B, N, C)"""
        parts = zip((q, k, v), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(*part).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return attention(q, k, v, mask, self.dropout if self.training else 0.0).transpose(1, 2).flatten(2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """F.scaled_dot_product_attention, not fused; mask: True where a key takes part"""
    a = q * q.shape[3] ** -0.5 @ k.transpose(2, 3)               # (B, heads, N, M)
    if mask is not None:
        a = a.masked_fill(~mask, -torch.inf)
    return Dropout(p)(a.softmax(3)) @ v


class Dropout(nn.Dropout):
    """nn.Dropout that keeps a byte for each value, as PyTorch's does on a GPU; on a CPU it keeps a float."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not (self.training and self.p):
            return super().forward(x)
        # 16 random bits for each value, as torch.rand takes twice as long
        bits = torch.randint(-2**63, 2**63 - 1, (x.numel() // 4 + 1,), device=x.device).view(torch.int16)
        dropped = bits[:x.numel()].view(x.shape) < round(self.p * 2**16) - 2**15
        return torch.where(dropped, 0, x).div_(1 - self.p)


class FrozenBatchNorm(nn.Module):
    """BatchNorm of a map with constant statistics: a scale and a shift, for which backward needs no map. All of its
    tensors are buffers."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in dict(weight=1, bias=0, running_mean=0, running_var=1).items():
            self.register_buffer(name, torch.full((width,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = (t.to(x.dtype)[:, None, None] for t in (scale, shift))
        return torch.addcmul(shift, x, scale, out=None if torch.is_grad_enabled() else x)  # x: what a convolution gave


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), which keeps one tensor for backward, not two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x).div_(1.702)


def freeze(tower: nn.Module) -> None:
    """Nothing of a tower is trained: no gradients, and it stays in eval mode. Its tensors and their names stay."""
    tower.requires_grad_(False).eval().train = lambda mode=True: tower
    computed_as = dict(MultiheadAttention=MultiheadAttention, BatchNorm2d=FrozenBatchNorm, QuickGELU=QuickGELU)
    for m in tower.modules():
        m.__class__ = computed_as.get(type(m).__name__, type(m))


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice of the sigmoid, smoothed by one pixel, a mean over samples; both (B, ...), target in 0..1."""
    p, t = logits.sigmoid().flatten(1), target.flatten(1)
    return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


# Settings


@dataclass(frozen=True)
class TrainConfig:
    """The settings that all methods have. The comment beside a field is its line of --help; a method's own comment on
    the same field (its source in the paper) is appended."""

    backbone: str = ""
    variant: str = ""
    tune: str = "method"
    baseline_dims: tuple[int, ...] = ()     # vision,text: widths, ranks or prompts of the baseline that --tune names
    every_sentence: bool = False            # an epoch has every sentence of each object, not one drawn at random
    epochs: int = 50                        # passes over the training split
    steps: int = 0                          # optimizer steps; 0: as many as the epochs have
    batch_size: int = 32                    # of all processes together
    optimizer: typing.Literal["adam", "adamw"] = "adam"
    lr: float = 1e-4                        # learning rate
    adapter_lr: float = 1.0                 # learning rate of the adapters, times lr
    tower_lr: float = 1.0                   # learning rate of what is trained in the towers, times lr
    beta2: float = 0.999                    # second beta of Adam
    weight_decay: float = 0.0               # of all trained parameters
    schedule: typing.Literal["step", "cosine"] = "step"  # step: x 0.1 at each milestone; cosine: to 0 over the run
    milestones: tuple[int, ...] = ()        # epochs at which the step schedule drops
    warmup: int = 0                         # steps over which the rate rises linearly
    clip_norm: float = 0.0                  # largest norm of the gradient; 0: not clipped
    checkpointing: bool = False             # compute the layers again in backward, which saves memory and takes time
    val_every: int = 0                      # steps between validations; 0: an epoch


def check_config(c: TrainConfig, **rules: tuple[bool | Callable[[], bool], str]) -> None:
    """Raises UserError for an impossible setting, and names it. A rule is (whether the field's value is possible, what
    it must be), the first a function where it divides by another field."""
    positive = "batch_size", "epochs", "lr", "image_size", "decoder_layers"
    for name, kind in typing.get_type_hints(type(c)).items():
        value, must = getattr(c, name), ""
        if typing.get_origin(kind) is typing.Literal and value not in typing.get_args(kind):
            must = f"one of {', '.join(typing.get_args(kind))}"
        elif kind in (int, float) and not 0 <= value < float("inf"):
            must = "0 or more"
        elif value == 0 and (name in positive or name.endswith(("_dim", "_heads", "_ffn"))):
            must = "positive"
        elif name == "threshold" and not 0 < value < 1:
            must = "between 0 and 1"
        elif (name.endswith("_dropout") or name in ("drop_path", "beta2")) and value >= 1:
            must = "below 1"
        elif typing.get_origin(kind) is tuple and name != "baseline_dims" and (
                len(set(value)) < len(value) or min(value, default=0) < 0):
            must = "different numbers, none of them negative"
        if must:
            refuse(name, value, must)
    for name, (possible, must) in rules.items():
        if not (possible() if callable(possible) else possible):
            refuse(name, getattr(c, name), must)


def refuse(name: str, value, must: str) -> typing.NoReturn:
    value = ",".join(map(str, value)) if isinstance(value, tuple) else value
    raise UserError(f"--{name.replace('_', '-')} {value}: must be {must}.")


# Processes


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, thing) -> list:
        """The same thing of every process, in the order of ranks, on every process."""
        if self.world_size == 1:
            return [thing]
        things = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    def on_main(self, make: Callable):
        """Calls make() on the main process alone. -> what it returns, on every process; so are errors raised"""
        result = error = None
        if self.is_main:
            try:
                result = make()
            except UserError as e:
                error = e
            except OSError as e:
                error = UserError(f"{e.filename or ''}: {e.strerror}.")
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result

    def print(self, *words) -> None:
        """On the main process, to standard error."""
        if self.is_main:
            print(*words, file=sys.stderr, flush=True)


ALONE = Process(0, 1, torch.device("cpu"))


def start(tiny: bool = False, device: str = "auto") -> Process:
    """Joins torchrun's group (NCCL on CUDA, gloo on CPU) or stands alone. Raises UserError where the device is missing,
    or where the environment has only some of what torchrun sets."""
    rank, world, local = (environment(k, d) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if world > 1 and missing:
        raise UserError(f"WORLD_SIZE={world} is set in the environment, but {missing[0]} is not: unset WORLD_SIZE to "
                        "run alone, or start with torchrun, which sets both.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; --device cpu runs without.")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch finds no Apple GPU here; --device cpu runs without.")
    if device == "mps" and world > 1:
        raise UserError("--device mps: there is one such device, for one process; start without torchrun.")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: there are {torch.cuda.device_count()} GPUs, one for each process.")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    elif device == "cpu" and tiny and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a tiny model gains nothing from a second thread, and loses much on a busy machine
    # one attention for training and evaluation; the fast path rounds otherwise and hides from FLOP counters
    torch.backends.mha.set_fastpath_enabled(False)
    if world > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        except (RuntimeError, ValueError) as e:
            raise UserError(f"the {world} processes cannot be joined at MASTER_ADDR={os.environ['MASTER_ADDR']}, "
                            f"MASTER_PORT={os.environ['MASTER_PORT']}: {first_line(e)}.") from None
    return Process(rank, world, torch.device(device))


def environment(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UserError(f"{name}={os.environ[name]} is set in the environment, and is no number: unset it.") from None


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
        with open(temporary, "rb+") as f:  # Windows syncs only what may be written
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


def cache_file(name: str) -> Path:
    """Where a file lies that can be made anew. Raises UserError where there is no home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        raise UserError("there is no home folder for a cache; XDG_CACHE_HOME can name one")
    return Path(home) / "refpapers" / name


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
        temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def trains_towers(model: nn.Module) -> bool:
    """Whether most of the towers' matrices are trained: all but some that nothing reads, or a first stage."""
    trains = [p.requires_grad for p in parameters(model)["backbone"] if p.dim() > 1]
    return 2 * sum(trains) > len(trains)


def trained_names(model: nn.Module) -> set[str]:
    """What a checkpoint holds: trainable parameters, and the buffers of the modules that own them (BatchNorm); all
    where the towers are trained, so that the checkpoint needs no other file."""
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
    """sha256 of all that is not trained: the frozen towers that a checkpoint needs. "" where it holds them itself."""
    if trains_towers(model):
        return ""
    digest, trained = hashlib.sha256(), trained_names(model)
    for k, v in sorted(model.state_dict().items()):
        if k not in trained:
            digest.update(k.encode() + v.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def checksum(info: dict, state: dict[str, Tensor]) -> str:
    """sha256 of a checkpoint's metadata and tensors, by which a damaged one is recognised."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for k, v in sorted(state.items()):
        digest.update(f"{k} {v.dtype} {tuple(v.shape)}".encode())
        digest.update(v.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: str | Path, state: dict[str, Tensor], info: dict) -> None:
    """Tensors as safetensors; `info` (method, ...) and a checksum of all as JSON in its metadata."""
    data = save(state, {"refpapers": json.dumps(info | dict(sha256=checksum(info, state)))})
    with writing(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: str | Path, tensors: bool = True) -> tuple[dict, dict[str, Tensor]]:
    """(info, state) as write_tensors wrote them; the state is empty, and not checked, without `tensors`. Raises
    UserError for another file, and for a damaged one."""
    try:
        with safe_open(path, "pt") as f:
            info = json.loads((f.metadata() or {}).get("refpapers", "null"))
            state = {k: f.get_tensor(k) for k in f.keys()} if tensors else {}
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is not a whole safetensors file: {str(e)[:200]}") from None
    if not isinstance(info, dict) or not isinstance(expected := info.pop("sha256", None), str):
        raise UserError(f"{path} was not written by this project: its metadata has no checksum.")
    if tensors and checksum(info, state) != expected:
        raise UserError(f"{path} is damaged: its tensors are not those that were written (their checksum differs).")
    return info, state


def read_checkpoint(path: str, tensors: bool = True) -> tuple[dict, dict[str, Tensor]]:
    """(info, state) of a run folder or its model.safetensors; the state is empty without `tensors`. Raises UserError
    for anything else, and for a damaged file."""
    file = Path(path) / "model.safetensors" if os.path.isdir(path) else Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no checkpoint here; give a run folder with a model.safetensors, or such a file.")
    info, state = read_tensors(file, tensors)
    needed = dict(method=str, config=dict, weights=str, seed=int, frozen=str, dataset=str, data_root=(str, type(None)))
    if not all(isinstance(info.get(k), kind) for k, kind in needed.items()) or not 0 <= info["seed"] < 2**31:
        raise UserError(f"{file} was not written by this project's train.py, or by an older version: its metadata is "
                        "incomplete.")
    return info, state


def check_trained(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Raises UserError unless a checkpoint has every tensor that this model trains, and no other."""
    every = model.state_dict()
    own = {k: every[k] for k in trained_names(model)}
    odd = own.keys() ^ state.keys() | {k for k in own.keys() & state.keys() if not same_shape(k, own[k], state[k])}
    if odd:
        raise UserError(f"{where} does not fit this model: {len(odd)} tensors differ, such as {min(odd)}.")


def same_shape(name: str, a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape or name.endswith("_extra_state")  # a tokenizer's file, of any length


def load_trained(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Loads a checkpoint's tensors. Raises UserError where they are not those that the model trains."""
    check_trained(model, state, where)
    model.load_state_dict(state, strict=False)


# Counting


def count(modules: list[nn.Module] | nn.Module, trainable: bool = False) -> int:
    """Number of parameters, each once."""
    modules = modules if isinstance(modules, list) else [modules]
    seen = {id(p): p for m in modules for p in m.parameters() if p.requires_grad or not trainable}
    return sum(p.numel() for p in seen.values())


def parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each of parts(), each once: those of a baseline lie within the towers, and are adapters."""
    parts = {name: [p for m in modules for p in m.parameters()] for name, modules in model.parts().items()}
    adapters = {id(p) for p in parts["adapter"]}
    return parts | dict(backbone=[p for p in parts["backbone"] if id(p) not in adapters])
