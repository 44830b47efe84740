"""Measures a trained model, or asks it about one picture.

    python evaluate.py --ckpt RUN --split all                              # oIoU, mIoU, Pr@X of every split
    torchrun --nproc_per_node 2 evaluate.py --ckpt RUN --split testA       # the same numbers
    python evaluate.py --ckpt RUN --shuffle-text                           # each picture with another's sentence
    python evaluate.py --ckpt RUN --image a.jpg --text "left dog" --out a.png
    python evaluate.py --efficiency --method dcris --backbone dinov2-base

Every sentence of a split counts once, at the photograph's own resolution, however many processes there are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import common
import data
from common import Process, UserError

METHODS = ("dcris", "etris")


def load_method(name: str):
    """The module of a method. Its backbone library is imported here and not before."""
    return importlib.import_module(name)


def load_run(ckpt: str, weights: str | None, process: Process) -> tuple[torch.nn.Module, dict]:
    """(model in eval mode, what its checkpoint says of itself). Raises UserError where the two do not fit."""
    info, state = common.read_checkpoint(ckpt)
    if info["method"] not in METHODS:
        raise UserError(f"{ckpt}: method {info['method']!r} is none of {', '.join(METHODS)}.")
    method = load_method(info["method"])
    c = common.config_from_json(method.Config, info["config"], ckpt)
    if c.backbone not in method.BACKBONES or c.variant not in method.VARIANTS or c.tune not in method.TUNES:
        raise UserError(f"{ckpt}: its backbone {c.backbone}, variant {c.variant} or tune {c.tune} is unknown here.")
    # with trained towers the checkpoint holds everything
    model = common.build(method, c, (weights or info["weights"]) if info["frozen"] else "random", info["seed"])
    common.load_trained(model, state, ckpt)
    if info["frozen"] != common.fingerprint(model):
        raise UserError(f"{ckpt}: its frozen towers ({info['weights']}) are not the ones built here; "
                        "--weights takes the files or the run that it was trained on.")
    return model.to(process.device).eval(), info


class Sentences(Dataset):
    """An EvalSet whose pictures get the sentences of others, for the language-blind figure."""

    def __init__(self, items: data.EvalSet, sentences: list[str], seed: int = 0):
        order = np.random.default_rng(seed).permutation(len(items))
        self.items, self.sentences = items, sentences
        self.other = np.empty(len(items), dtype=int)
        self.other[order] = np.roll(order, 1)  # one cycle through all: nobody keeps their own

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> dict:
        return self.items[k] | dict(sentence=self.sentences[self.other[k]])


@torch.no_grad()
def evaluate_split(model, source, process: Process, batch_size: int = 16, workers: int = 0,
                   shuffle_text: bool = False, most: int | None = None) -> dict:
    """Metrics of a split (see common.mask_metrics), or of its first `most` sentences.

    They are the same on every process and for any number of processes.
    """
    items = data.EvalSet(source, model.preprocess)
    n = min(len(items), len(items) if most is None else most)
    shown = Sentences(items, items.sentences()) if shuffle_text else items
    # whole batches are dealt out, so that a batch is the same whoever computes it
    batches = [range(b, min(b + batch_size, n)) for b in range(0, n, batch_size)][process.rank::process.world]
    mine = [k for b in batches for k in b]
    loader = DataLoader(Subset(shown, mine), batch_size, collate_fn=data.collate, num_workers=workers)
    was_training, rows = model.training, []
    model.eval()
    for batch in tqdm(loader, desc=source.split, leave=False, disable=process.rank > 0 or not sys.stderr.isatty()):
        logits = model(batch["image"].to(process.device), model.tokenize(batch["sentence"]).to(process.device))
        for k, one, truth in zip(batch["index"], logits.float().cpu(), batch["truth"]):
            mask = predicted_mask(one[0], truth.shape, model)
            rows.append((k, *common.intersection_union(mask, truth)))
    model.train(was_training)
    rows = sorted(row for part in process.gather(rows) for row in part)
    assert [k for k, _, _ in rows] == list(range(n)), f"{source.name} {source.split}: not every sentence counted once"
    return common.mask_metrics([(i, u) for _, i, u in rows])


def predicted_mask(logits: torch.Tensor, size: tuple[int, int], model, threshold: float | None = None) -> torch.Tensor:
    """Logits (h, w) over the canvas -> bool (H, W) on the photograph: sigmoid > threshold, strictly."""
    t = model.c.threshold if threshold is None else threshold
    return data.from_canvas(logits, tuple(size), model.preprocess) > math.log(t / (1 - t))


def print_table(rows: list[dict]) -> None:
    """Dicts of one kind as a table on standard output."""
    names = list(rows[0])
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(n), *(len(c[i]) for c in cells)) for i, n in enumerate(names)]
    for line in [names, *cells]:
        print("  ".join(c.rjust(w) for c, w in zip(line, widths)))


def write_result(file: str | None, value) -> None:
    if file == "-":
        print(json.dumps(value, indent=1))
    elif file:
        common.write_json(file, value)


def measure(args: argparse.Namespace, process: Process) -> None:
    model, info = load_run(args.ckpt, args.weights, process)
    name = args.dataset or info["dataset"]
    root = args.data_root or info["data_root"]
    splits = [args.split]
    if args.split == "all":
        splits = [s for s in data.SPLITS.get(name, ("val",)) if s != "train"]
    rows, sources = [], [data.open_dataset(name, split, root, info["seed"]) for split in splits]
    for split, source in zip(splits, sources):
        about = dict(method=info["method"], backbone=info["config"]["backbone"], dataset=name, split=split)
        if args.shuffle_text:
            about["text"] = "shuffled"
        rows.append(about | evaluate_split(model, source, process, args.batch_size, args.workers, args.shuffle_text))
    if process.rank == 0:
        if args.json != "-":
            print_table(rows)
        write_result(args.json, rows if args.split == "all" else rows[0])
        if args.draw:
            draw_examples(args.draw, model, sources[0], args.draw_count)


@torch.no_grad()
def draw_examples(file: str, model, source, count: int) -> None:
    """A sheet of `count` expressions spread over a split: prediction above truth, sentence and IoU."""
    items, pictures, device = data.EvalSet(source, model.preprocess), [], next(model.parameters()).device
    for k in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int):
        item = items[int(k)]
        logits = model(item["image"][None].to(device), model.tokenize([item["sentence"]]).to(device))[0, 0]
        truth = item["truth"]
        mask = predicted_mask(logits.float().cpu(), truth.shape, model)
        i, u = common.intersection_union(mask, truth)
        photo = items.record(int(k)).image
        pair = [common.overlay(photo, m.numpy(), text, least=320) for m, text in
                ((mask, f"{item['sentence']} (IoU {100 * i / max(u, 1):.0f})"), (truth, "truth"))]
        for picture in pair:
            picture.thumbnail((480, 480))
        pictures.append(common.grid(pair, columns=1))
    with common.writing(file) as temporary:
        common.grid(pictures, columns=6).save(temporary, format="PNG")


@torch.no_grad()
def predict(args: argparse.Namespace, process: Process) -> None:
    """One picture and one sentence."""
    sentence = data.check_sentence(args.text)
    image = data.read_image(args.image)
    model, info = load_run(args.ckpt, args.weights, process)
    canvas = data.to_canvas(image, model.preprocess)[None].to(process.device)
    logits = model(canvas, model.tokenize([sentence]).to(process.device))[0, 0].float().cpu()
    threshold = model.c.threshold if args.threshold is None else args.threshold
    probability = data.from_canvas(logits, image.shape[:2], model.preprocess).sigmoid().numpy()
    mask = predicted_mask(logits, image.shape[:2], model, threshold).numpy()
    box = [int(v) for v in data.box_of(mask)] if mask.any() else None
    out = Path(args.out or Path(args.image).stem + "_" + info["method"] + ".png")
    mask_out = Path(args.mask or out.with_name(out.stem + "_mask.png"))
    with common.writing(out) as temporary:
        common.overlay(image, mask, sentence).save(temporary, format=picture_format(out))
    with common.writing(mask_out) as temporary:
        Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, format="PNG")
    result = dict(image=args.image, text=sentence, width=image.shape[1], height=image.shape[0], area=int(mask.sum()),
                  box=box, confidence=round(float(probability[mask].mean()), 4) if mask.any() else None,
                  threshold=threshold, overlay=str(out), mask=str(mask_out), method=info["method"])
    if args.json != "-":
        found = f"{result['area']} pixels, box {box}, mean confidence {result['confidence']}" if box else "nothing"
        print(f"{sentence!r}: {found}. Drawn: {out}, mask: {mask_out}")
    write_result(args.json, result)


def picture_format(path: Path) -> str:
    """The format that a file name asks for. Raises UserError for a name Pillow cannot write."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in ("PNG", "JPEG", "WEBP"):
        raise UserError(f"--out {path}: a name that ends in .png, .jpg or .webp is needed.")
    return name


def show_efficiency(args: argparse.Namespace, process: Process) -> None:
    rows = []
    for name in [args.method] if args.method else METHODS:
        method = load_method(name)
        flags = common.config_flags(args, method.Config)
        for backbone in [args.backbone] if args.backbone else method.BACKBONES:
            names = dict(backbone=backbone, variant=args.variant or method.VARIANTS[0], dataset="refcoco")
            c = method.config(**names, tune=args.tune or method.TUNES[0], **flags)
            process.say(f"building {name} {backbone} with random weights ...")
            model = common.build(method, c, "random", 0).to(process.device)
            about = dict(method=name, backbone=backbone, variant=names["variant"], tune=c.tune,
                         image_size=model.preprocess.size)
            row = about | common.efficiency(model) | dict(paper=method.printed(c))
            rows.append(row)
    if process.rank == 0:
        if args.json != "-":
            for row in rows:
                paper = row.pop("paper")
                print_table([{k: v for k, v in row.items() if k != "device"}])
                print(f"  on {row['device']}; 1 multiply-add = 2 FLOPs\n  the paper prints {paper or 'nothing'}\n")
                row["paper"] = paper
        write_result(args.json, rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--ckpt", metavar="RUN", help="a run folder or a checkpoint file of train.py")
    p.add_argument("--weights", help="towers, if they lie elsewhere than when the run was trained")
    p.add_argument("--dataset", help=f"default: the run's; one of {', '.join(data.DATASETS)}")
    p.add_argument("--data-root", help="folder of a REFER data set; default: the run's")
    p.add_argument("--split", default="val", help="val, testA, testB, test, train, or all (but train)")
    p.add_argument("--shuffle-text", action="store_true", help="give each picture another's sentence")
    p.add_argument("--workers", type=int, default=0, help="processes that read data")
    p.add_argument("--draw", metavar="FILE.png", help="draw predictions over the split's pictures")
    p.add_argument("--draw-count", type=int, default=12)
    p.add_argument("--image", help="a picture of yours, with --text")
    p.add_argument("--text", help="a sentence about it")
    p.add_argument("--out", metavar="FILE.png", help="the picture with its mask")
    p.add_argument("--mask", metavar="FILE.png", help="the mask alone, in the picture's size")
    p.add_argument("--efficiency", action="store_true", help="parameters, FLOPs, memory, time")
    p.add_argument("--method", choices=METHODS)
    p.add_argument("--backbone")
    p.add_argument("--variant")
    p.add_argument("--tune")
    p.add_argument("--json", metavar="FILE", help="- for standard output, and then nothing else goes there")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    known, _ = p.parse_known_args(argv)
    if known.efficiency:
        method = load_method(known.method or METHODS[0])
        common.add_config_flags(p, method.Config)
        for name, given, names in (("backbone", known.backbone, method.BACKBONES),
                                   ("variant", known.variant, method.VARIANTS), ("tune", known.tune, method.TUNES)):
            if given is not None and given not in names:
                p.error(f"--{name} {given}: {method.__name__} has {', '.join(names)}")
    else:  # with --efficiency these two are settings of the method
        p.add_argument("--threshold", type=float, help="on the sigmoid, for --image; default: the method's")
        p.add_argument("--batch-size", type=int, default=16)
    args = p.parse_args(argv)
    if bool(args.ckpt) == args.efficiency:
        p.error("give --ckpt RUN, or --efficiency")
    ignored = [n for n in ("method", "backbone", "variant", "tune") if args.ckpt and getattr(args, n)]
    if ignored:
        p.error(f"--{ignored[0]} goes with --efficiency; a checkpoint knows its own")
    if args.ckpt and args.threshold is not None and not args.image:
        p.error("--threshold goes with --image; metrics are measured at the method's own")
    if (args.image is None) != (args.text is None):
        p.error("--image and --text go together")
    if args.ckpt and args.threshold is not None and not 0 < args.threshold < 1:
        p.error(f"--threshold {args.threshold}: a number between 0 and 1")
    if args.ckpt and args.batch_size < 1 or args.workers < 0 or args.draw_count < 1:
        p.error("--batch-size and --draw-count must be positive, --workers not negative")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    backbone = common.read_checkpoint(args.ckpt, tensors=False)[0]["config"].get("backbone") if args.ckpt else args.backbone
    process = common.start(tiny=str(backbone).startswith("tiny"), device=args.device)
    if args.efficiency:
        show_efficiency(args, process)
    elif args.image:
        if process.rank == 0:
            predict(args, process)
    else:
        measure(args, process)


if __name__ == "__main__":
    common.run_command(main)
