"""Pretrains the tiny towers of a method as those of its paper were, in miniature and without the task.

    python -m toolbox.pretrain --method dcris                    # into the cache, where train.py finds it
    python -m toolbox.pretrain --method dcris --seed 1 --out towers.safetensors

Pictures are of the kind of `shapes`, from other random numbers, with one to four things in each. A caption speaks of
the whole picture. No sentence comes with the mask or the box of what it refers to.

    dcris       vision, without text: masked patches, and what is in the picture, in the place of DINOv2 (Oquab et al.
                2023); text, without pictures: the next word, and the words of the sentence, in the place of CLIP's
    etris       captions against pictures (CLIP, Radford et al. 2021), which are partly masked (FLIP, Li et al. 2023)
                and restored (MAE, He et al. 2022): from the contrast alone, maps know little of places; and the
                next word, for which CLIP's text transformer is causal (Sec. 2.4)
    m2ist       all objects, their boxes and classes (DETR, Carion et al. 2020; the tokens of the encoder are the
                queries, all those in a box predict it); masked words (BERT, Devlin et al. 2019)
    shared_ris  a masked block of patches (what lies there, in the place of a tokenizer's codes) and masked words of a
                picture and its caption, read together; masked words of captions alone (BEiT-3, Wang et al. 2022)
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock  # a requirement of torch
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import ALONE, METHODS, Preprocess, Process, TrainConfig, UserError, load_method
from data import normalise, to_canvas
from toolbox.cli import Parser, one_of
from toolbox.shapes import (ADJECTIVES, COLOURS, PLACE_WORDS, PLACES, RELATIONS, SHAPES, SIZES, Thing, draw_scene,
                            place_things)
from toolbox.tokenizers import SEP

VERSION = 3  # of what is done here: the cache keeps towers of one version apart from those of another
PICTURES, LONGEST = 6000, 28  # tokens of a caption
CLASSES = {" ".join(c): n for n, c in enumerate(itertools.product(SIZES, COLOURS, SHAPES))}
BERT_MASK = SEP + 1

# Pictures and captions


class Scenes:
    """Pictures and what is in them, drawn from a stock."""

    def __init__(self, seed: int, pre: Preprocess):
        self.seed, self.pre, self.rng = seed, pre, np.random.default_rng([seed, 100])
        self.place, self.picture = (cache(f) for f in (self._place, self._picture))

    def _place(self, number: int) -> tuple[list[Thing], np.random.Generator]:
        rng = np.random.default_rng([self.seed, 100, number])  # no split of `shapes` has the number 100
        things = place_things(rng)
        return things[:rng.integers(1, len(things) + 1)], rng

    def _picture(self, number: int) -> np.ndarray:
        things, rng = self._place(number)
        return draw_scene(things, 64, "shapes", rng)[0]

    def draw(self, n: int) -> tuple[Tensor, list[list[Thing]]]:
        """-> images (n, C, S, S) on the canvas of the method, what is in each"""
        numbers = self.rng.integers(PICTURES, size=n).tolist()
        images = [to_canvas(self.picture(number), self.pre) for number in numbers]
        return normalise(torch.stack(images), self.pre), [self.place(number)[0] for number in numbers]

    def things(self, n: int) -> list[list[Thing]]:
        """The same without the pictures."""
        return [self.place(number)[0] for number in self.rng.integers(PICTURES, size=n).tolist()]

    def captions(self, scenes: list[list[Thing]]) -> list[str]:
        return [caption(things, self.rng) for things in scenes]


def caption(things: list[Thing], rng: np.random.Generator) -> str:
    """A sentence about a picture: up to three of its things, each with its place in it, or beside another, or alone."""
    said = []
    for k in rng.permutation(len(things))[:3]:
        t, others = things[k], [o for n, o in enumerate(things) if n != k]
        name, kind = t.named(ADJECTIVES[rng.choice(4, p=(0.1, 0.15, 0.15, 0.6))]), rng.random()
        if kind < 0.6:
            axis = rng.integers(2)
            at, *rest = ((o.x, o.y)[axis] for o in (t, *others))
            place = side_of(at - 0.5, axis)
            forms = 3 if all((o > at) == (at < 0.5) for o in rest) else 2  # the third says "leftmost"
            said.append(PLACE_WORDS[place][rng.integers(forms)].format(name))
        elif kind < 0.85 and others:
            o = others[rng.integers(len(others))]
            axis = int(abs(t.y - o.y) > abs(t.x - o.x))
            words = next(w for w, p in RELATIONS.items() if p == side_of((t.x - o.x, t.y - o.y)[axis], axis))
            said.append(f"the {name} {words} the {o.named(ADJECTIVES[rng.integers(4)])}")
        else:
            said.append(f"the {name}")
    return " and ".join(said)


def side_of(difference: float, axis: int) -> str:
    return next(place for place, direction in PLACES.items() if direction == (axis, 1 if difference > 0 else -1))


def class_of(t: Thing) -> int:
    return CLASSES[t.named(("size", "colour"))]


# What is learnt: a recipe yields its stages one after another


@dataclass
class Stage:
    name: str
    steps: int
    lr: float
    modules: list[nn.Module]         # what is trained
    loss: Callable[[], Tensor]       # of a new batch


def masked_patches(predicted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of pixels predicted (B, N, 3 * p * p) for images (B, C, S, S), where mask (B, N) is True."""
    p = images.shape[-1] // math.isqrt(mask.shape[1])
    pixels = F.unfold(images[:, :3], p, stride=p).transpose(1, 2)  # (B, N, 3 * p * p)
    return (predicted - pixels)[mask].square().mean()


def next_or_masked(x: Tensor, table: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """Cross-entropy of x (B, L, C) against the embeddings of the words in this batch, few of the table's (rows, C);
    where (B, L): the words to predict"""
    used, number = tokens.unique(return_inverse=True)
    return F.cross_entropy(x[where] @ table[used].T, number[where])


def dcris(model, scenes: Scenes) -> Iterator[Stage]:
    vision, text = model.vision, model.text
    width, p = vision.config.hidden_size, vision.config.patch_size
    tags, pixels = nn.Linear(width, len(CLASSES)), nn.Linear(width, 3 * p * p)

    def see() -> Tensor:
        images, things = scenes.draw(48)
        (hidden, shown), things = images.chunk(2), things[24:]
        mask = torch.rand(24, (images.shape[-1] // p) ** 2) < 0.4
        there = torch.zeros(24, len(CLASSES))
        for row, scene in zip(there, things):
            row[[class_of(t) for t in scene]] = 1
        x = vision(hidden, bool_masked_pos=mask).last_hidden_state[:, -mask.shape[1]:]  # (B, N, D)
        cls = vision(shown).last_hidden_state[:, 0]              # (B, D)
        return masked_patches(pixels(x), hidden, mask) + 5 * F.binary_cross_entropy_with_logits(tags(cls), there)

    yield Stage("vision", 500, 1.5e-3, [vision, tags, pixels], see)
    bag = nn.Linear(text.text_projection.shape[1], text.token_embedding.num_embeddings)

    def read() -> Tensor:
        tokens = model.tokenize(scenes.captions(scenes.things(64)))
        f_t, f_s, pad = model.encode_text(tokens)                # (B, L, C), (B, C'), (B, L)
        used, number = tokens.unique(return_inverse=True)
        there = torch.zeros(len(tokens), len(used)).scatter_(1, number, 1)
        of_bag = F.binary_cross_entropy_with_logits(F.linear(f_s, bag.weight[used], bag.bias[used]), there)
        return next_or_masked(f_t[:, :-1], text.token_embedding.weight, tokens[:, 1:], ~pad[:, 1:]) + 5 * of_bag

    yield Stage("text", 400, 2e-3, [text, bag], read)


def etris(model, scenes: Scenes) -> Iterator[Stage]:
    clip, tower, side = model.clip, model.tower, 8
    pixels = nn.Linear(tower.widths[0] + tower.widths[1] + tower.out_width, 3 * (model.c.image_size // side) ** 2)

    def pair() -> Tensor:
        images, things = scenes.draw(64)
        tokens = model.tokenize(scenes.captions(things))
        mask = torch.rand(64, side * side) < 0.3
        hidden = F.interpolate(mask.view(64, 1, side, side).float(), images.shape[-2:])
        maps, f_t, f_s, pad = model.encode(images * (1 - hidden), tokens)
        f_v = maps[2].mean((2, 3))                               # (B, C'): the mean of places for the class token
        logits = clip.logit_scale.exp() * F.normalize(f_v, dim=1) @ F.normalize(f_s, dim=1).T  # (B, B)
        right = torch.arange(64)
        contrast = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        x = torch.cat([F.interpolate(m, (side, side)) for m in maps], 1).flatten(2).transpose(1, 2)  # (B, 64, C)
        return contrast + masked_patches(pixels(x), images, mask) \
            + next_or_masked(f_t[:, :-1], clip.token_embedding.weight, tokens[:, 1:], ~pad[:, 1:])

    yield Stage("pictures and captions", 220, 1.5e-3, [clip, pixels], pair)


def m2ist(model, scenes: Scenes) -> Iterator[Stage]:
    from torchvision.ops import box_convert, generalized_box_iou_loss  # slow, and --help does without

    detr, bert, none = model.detr, model.bert, len(CLASSES)
    width = detr.input_proj.out_channels
    kinds, boxes = nn.Linear(width, none + 1), nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    weight = torch.ones(none + 1)
    weight[none] = 0.1                                           # as in DETR

    def detect() -> Tensor:
        images, things = scenes.draw(32)
        x = model.encode_image(images).output                    # (B, N, C)
        side = math.isqrt(x.shape[1])
        at = (torch.arange(side) + 0.5) / side
        centres = torch.stack([at.repeat(side), at.repeat_interleave(side)], 1)  # (N, 2) x, y
        logits = kinds(x)                                        # (B, N, 41)
        found = (boxes(x) + F.pad(torch.logit(centres), (0, 2))).sigmoid()  # (B, N, 4)
        of = torch.tensor([b for b, scene in enumerate(things) for _ in scene])  # (M,), M objects of all pictures
        kind = torch.tensor([class_of(t) for scene in things for t in scene])    # (M,)
        truth = torch.tensor([[t.x, t.y, 2 * t.radius, 2 * t.radius] for scene in things for t in scene]).float()
        # Each token inside an object's box predicts it (FCOS, Tian et al. 2019). With one token for each object, as in
        # DETR, shapes are told apart much later. Boxes hardly overlap.
        inside = (centres - truth[:, None, :2]).abs().amax(2) < truth[:, None, 2] / 2  # (M, N)
        which, token = inside.nonzero(as_tuple=True)             # (P,), P pairs of an object and a token
        target = torch.full(logits.shape[:2], none)
        target[of[which], token] = kind[which]
        mine, truth = found[of[which], token], truth[which]      # (P, 4)
        corners = [box_convert(box, "cxcywh", "xyxy") for box in (mine, truth)]
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight) \
            + 5 * (mine - truth).abs().sum(1).mean() + 2 * generalized_box_iou_loss(*corners, reduction="mean")

    yield Stage("detection", 800, 1e-3, [detr, kinds, boxes], detect)

    def fill() -> Tensor:
        tokens = model.tokenize(scenes.captions(scenes.things(64)))
        mask = (torch.rand(tokens.shape) < 0.2) & (tokens > SEP)
        x = model.encode_text(tokens.masked_fill(mask, BERT_MASK)).output  # (B, L, C)
        return next_or_masked(x, bert.embeddings.word_embeddings.weight, tokens, mask)

    yield Stage("masked words", 600, 1e-3, [bert], fill)


def codes_of(things: list[Thing], grid: int) -> Tensor:
    """What lies at the centre of each patch, or a quarter of a patch beside it: the number of its class, or one more
    than these for nothing. -> (grid * grid,)"""
    at = (torch.arange(grid) + 0.5) / grid
    codes = torch.full((grid, grid), len(CLASSES))
    for t in things:
        distance = ((at - t.y)[:, None].square() + (at - t.x).square()).sqrt()
        codes[distance < t.radius + 0.25 / grid] = class_of(t)
    return codes.flatten()


def blocks(n: int, grid: int, share: float = 0.4) -> Tensor:
    """A block of neighbouring patches in each picture, True, as in BEiT-3. -> (n, grid * grid)"""
    at = (torch.arange(grid) + 0.5) / grid
    height = share ** torch.rand(n, 1)
    width = share / height
    top, left = torch.rand(n, 1) * (1 - height), torch.rand(n, 1) * (1 - width)
    rows, columns = (at > top) & (at < top + height), (at > left) & (at < left + width)
    return (rows[:, :, None] & columns[:, None]).flatten(1)


def shared_ris(model, scenes: Scenes) -> Iterator[Stage]:
    beit3 = model.beit3
    width, grid = beit3.proj.out_channels, beit3.grid
    codes, blank = nn.Linear(width, len(CLASSES) + 1), beit3.text_embed.num_embeddings - 9  # a row that no word has
    positions = beit3.embed_positions.A.weight[3:]
    # As smooth as those of BEiT-3: random ones do not become so in this time.
    positions.data.copy_(math.sqrt(2) * common.sine_2d(grid, grid, width, positions))

    def some_hidden(described: list[list[Thing]]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = model.tokenize(scenes.captions(described))
        words = (torch.rand(tokens.shape) < 0.25) & (tokens > 3)
        return tokens, words, tokens.masked_fill(words, blank)

    def encode(v: Tensor, t: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return beit3.layer_norm(*beit3.encode(v, t, tokens)[-1])

    def loss_of_words(t: Tensor, tokens: Tensor, words: Tensor) -> Tensor:
        return next_or_masked(t / math.sqrt(width), beit3.text_embed.weight, tokens, words)

    def fill() -> Tensor:
        images, things = scenes.draw(24)
        mask = blocks(24, grid)
        tokens, words, shown = some_hidden(things)
        v, t = beit3.embed(images, shown)
        v = torch.cat([v[:, :1], torch.where(mask[..., None], beit3.mask_token + positions, v[:, 1:])], 1)
        v, t = encode(v, t, tokens)                              # (B, n_v, d), (B, n_t, d)
        seen = torch.stack([codes_of(scene, grid) for scene in things])  # (B, n)
        pairs = F.cross_entropy(codes(v[:, 1:])[mask], seen[mask]) + loss_of_words(t, tokens, words)
        tokens, words, shown = some_hidden(scenes.things(32))    # text alone
        _, t = beit3.embed(images[:1], shown)
        _, t = encode(t[:, :0], t, tokens)
        return pairs + loss_of_words(t, tokens, words)

    yield Stage("masked pictures and words", 600, 1.5e-3, [beit3, codes], fill)


RECIPES = dict(dcris=dcris, etris=etris, m2ist=m2ist, shared_ris=shared_ris)


def fit(stage: Stage, steps: int) -> None:
    """AdamW with warm-up and cosine."""
    parameters = [p for m in stage.modules for p in m.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, stage.lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 50) * 0.5 * (1 + math.cos(math.pi * n / steps)))
    mean = 0.0
    bar = tqdm(range(steps), f"pretraining, {stage.name}", disable=not sys.stderr.isatty())
    for step in bar:
        loss = stage.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 50)
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)


def make(method: str, backbone: str, image_size: int, seed: int, steps: int = 0) -> dict[str, Tensor]:
    """The towers, by the names of their tensors in the model. The caller's random numbers stay as they were. `steps`:
    of each stage; 0: the recipe's."""
    module, threads = load_method(method), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), interruptible():
        torch.manual_seed(seed)
        torch.set_num_threads(1)  # sums depend on the number of threads
        model = module.Model(module.config(backbone, tune="full", image_size=image_size, words=LONGEST), "random")
        for stage in RECIPES[method](model.train(), Scenes(seed, model.preprocess)):
            fit(stage, steps or stage.steps)
        torch.set_num_threads(threads)
    return towers_of(model)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once, also in train.py, which saves first: there is nothing to save yet."""
    before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, how in before.items():
            signal.signal(s, how)


# Files


def tower_names(model: nn.Module) -> dict[str, str]:
    """The names of the towers' tensors, and theirs in this model: LoRA renames some. A baseline's own tensors lie among
    them and are left out, as is the convolution that the released ETRIS adds to CLIP."""
    towers, added = (tuple(n + "." for n, m in model.named_modules() if any(m is one for one in model.parts()[part]))
                     for part in ("backbone", "adapter"))
    names = [k for k in model.state_dict() if k.startswith(towers) and not k.startswith(added) and ".connect." not in k]
    return {without_lora(k): k for k in names}


def without_lora(name: str) -> str:
    """The name of a tensor before LoRA's parametrization, which renames the weight that it changes."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)


def towers_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[own].cpu().contiguous() for name, own in tower_names(model).items()}


def load(model: nn.Module, towers: dict[str, Tensor], where: str = "pretrained") -> None:
    """Puts such towers into a model of any --tune. Raises UserError where a tensor is missing or one too many."""
    names, own = tower_names(model), model.state_dict()
    odd = names.keys() ^ towers.keys() | {
        k for k in names.keys() & towers.keys() if not common.same_shape(k, own[names[k]], towers[k])}
    if odd:
        raise UserError(f"--weights {where}: its towers do not fit these settings: {len(odd)} tensors differ, such as "
                        f"{min(odd)}.")
    model.load_state_dict({names[k]: v for k, v in towers.items()}, strict=False)


def read(file: str | Path, **wanted) -> dict[str, Tensor]:
    """The towers of a file. Raises UserError where it is damaged, or not of the `wanted` method, backbone, ..."""
    info, towers = common.read_tensors(file)
    for name, value in wanted.items():
        if info.get(name) != value:
            raise UserError(f"{file} holds towers of {name} {info.get(name)}, not {value}.")
    return towers


def describe(method: str, c: TrainConfig, seed: int) -> dict:
    """What pretrained towers depend on."""
    sizes = hashlib.sha256(repr(load_method(method).BACKBONES[c.backbone]).encode()).hexdigest()[:8]
    return dict(method=method, backbone=c.backbone, image_size=c.image_size, seed=seed, version=VERSION, sizes=sizes)


def cache_file(info: dict) -> Path:
    return common.cache_file("-".join(map(str, info.values())) + ".safetensors")


def pretrained(method: str, c: TrainConfig, seed: int, process: Process = ALONE) -> dict[str, Tensor]:
    """The towers of a method's tiny backbone: from the cache, or made by the first process while the others wait."""
    return process.on_main(lambda: cached(describe(method, c, seed), process.print))


def cached(info: dict, say: Callable[[str], None]) -> dict[str, Tensor]:
    names = [info[k] for k in ("method", "backbone", "image_size", "seed")]
    try:
        file = cache_file(info)
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock")
        lock.acquire()  # another command may be making them
    except (OSError, UserError) as e:
        say(f"pretraining {info['method']}'s tiny towers for this command alone, as there is no cache: {e}")
        return make(*names)
    try:
        with suppress(UserError):
            return read(file, **info)
        say(f"pretraining {info['method']}'s tiny towers, some minutes on a CPU, kept in {file}")
        towers = make(*names)
        try:
            common.write_tensors(file, towers, info)
        except UserError as e:
            say(f"{e} The run goes on with these towers; the next one makes them anew.")
        return towers
    finally:
        lock.release()


def main(argv: list[str] | None = None) -> None:
    p = Parser(__doc__)
    p.add_argument("--method", required=True, **one_of(*METHODS))
    p.add_argument("--backbone", default="tiny", help="tiny, of etris also tiny-vit (default: tiny)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=0, help="of each stage, for a trial with --out (default: the recipe's)")
    p.add_argument("--out", metavar="FILE", help="for --weights FILE (default: the cache, for --weights pretrained)")
    args = p.parse_args(argv)
    module = load_method(args.method)
    tiny = [b for b in module.BACKBONES if b.startswith("tiny")]
    if args.backbone not in tiny:
        p.error(f"--backbone {args.backbone}: must be one of {', '.join(tiny)}; the others have released weights")
    if not 0 <= args.seed < 2**31 or args.steps < 0 or args.steps and not args.out:
        p.error("--seed must be 0 to 2147483647, --steps not negative, and --steps needs --out")
    c = module.config(args.backbone)
    info = describe(args.method, c, args.seed)
    if args.out:
        common.check_place(args.out)
        common.write_tensors(args.out, make(args.method, c.backbone, c.image_size, args.seed, args.steps), info)
    else:
        pretrained(args.method, c, args.seed)
    print(args.out or cache_file(info))


if __name__ == "__main__":
    common.run_command(main)
