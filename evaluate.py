"""Measures a trained model, or asks it about one picture.

    python evaluate.py --ckpt RUN --split all              # oIoU, mIoU, Pr@X of every split; of boxes Acc@0.5, mIoU
    torchrun --nproc_per_node 2 evaluate.py --ckpt RUN --split testA       # the same numbers
    python evaluate.py --ckpt RUN --shuffle-text                           # each picture with another's sentence
    python evaluate.py --ckpt RUN --by-size                                # also by the size of the object
    python evaluate.py --ckpt RUN --image a.jpg --text "left dog" --text "the cat" --out a.png
    python evaluate.py --ckpt RUN --image a.jpg --text "left dog" --attention look.png
    python evaluate.py --ckpt RUN --serve                                  # a page to do so in a browser
    python evaluate.py --ckpt RUN --report FILE.html                       # figures, charts and examples in one page

Every sentence of a split counts once, at the photograph's own resolution, however many processes there are.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import common
import data
from common import METHODS, Process, UserError, load_method
from toolbox import draw, runs
from toolbox.cli import Parser, config_from_json, one_of, print_table, write_result
from toolbox.released import cut_at_canvas, is_released, load_released, unwarped, whole_pixels
from toolbox.weights import leak

SIZES = 0, 1, 2, 5, 10, 20, 50, 100  # of objects, in per cent of the photograph
PROTOCOLS = {
    "default": "logits are resized to the photograph, boxes cut at its border",
    "released": "as the authors' code: masks by its own letterbox and way back, boxes cut at the canvas's border",
    "released-val": "as their code while it trains: as released, and for masks only the first sentence of an object",
}
MAIN_METRIC = dict(mask="mIoU", box="Acc@0.5")  # what the best step is chosen by


def load_run(ckpt: str, weights: str | None, process: Process,
             dataset: str | None = None) -> tuple[torch.nn.Module, dict]:
    """(model in eval mode, what its checkpoint says of itself). Raises UserError where the two do not fit."""
    if is_released(ckpt):
        if weights:
            raise UserError(f"--weights: {ckpt} has its own.")
        return load_released(ckpt, dataset, process)
    info, state = common.read_checkpoint(ckpt)
    if info["method"] not in METHODS:
        raise UserError(f"{ckpt}: method {info['method']!r} is none of {', '.join(METHODS)}.")
    method = load_method(info["method"])
    c = config_from_json(method.Config, info["config"], ckpt)
    if c.backbone not in method.BACKBONES or c.variant not in method.VARIANTS or c.tune not in method.TUNES:
        raise UserError(f"{ckpt}: its backbone {c.backbone}, variant {c.variant} or tune {c.tune} is unknown here.")
    try:  # without memory, as its settings may ask for any
        rest = {k: v for k, v in vars(c).items() if k not in ("backbone", "variant")}
        c = method.config(c.backbone, c.variant, info["dataset"], **rest)  # which refuses what cannot be
        with torch.device("meta"):
            common.check_trained(method.Model(c, "random"), state, "it")
    except UserError as e:
        raise UserError(f"{ckpt}: {e}") from None
    except Exception as e:
        raise UserError(f"{ckpt}: its settings make no model: {common.first_line(e)}.") from None
    if info["frozen"] and not weights:
        weights = runs.weights_of(ckpt, info)
        kinds = ".pth", ".pt", ".safetensors", ".spm", ".bin"
        if weights not in ("random", "pretrained") and not os.path.isdir(weights) and not all(
                w.endswith(kinds) for w in weights.split(",")):  # a checkpoint does not say what files are opened
            raise UserError(f"{ckpt}: its weights, {weights[:200]!r}, are no files of weights; --weights takes them.")
    # with trained towers the checkpoint holds everything
    model = runs.build(method, c, weights if info["frozen"] else "random", info["seed"], process)
    common.load_trained(model, state, ckpt)
    if info["frozen"] != common.fingerprint(model):
        raise UserError(f"{ckpt}: its frozen towers ({info['weights']}) are not the ones built here; "
                        "--weights takes the files or the run that it was trained on.")
    return model.to(process.device).eval(), info


def others_sentences(sentences: list[str], seed: int = 0) -> list[str]:
    """Each expression gets another's sentence, for the language-blind figure."""
    order, out = np.random.default_rng(seed).permutation(len(sentences)), list(sentences)
    for k, other in zip(order, np.roll(order, 1)):  # one cycle through all: nobody keeps their own
        out[k] = sentences[other]
    return out


def protocol_of(model) -> str:
    """The protocol of a model unless --protocol is given: that of the code whose letterbox it was trained with."""
    return "released" if model.preprocess.fit == "warp" else "default"


def with_protocol(pre: common.Preprocess, protocol: str) -> common.Preprocess:
    """How pictures come to the canvas: a letterbox that the released code makes in its own way."""
    if pre.fit not in ("letterbox", "warp") or pre.pad_channel:
        return pre
    return replace(pre, fit="letterbox" if protocol == "default" else "warp")


def expressions(model, source, protocol: str, most: int | None = None,
                shuffle_text: bool = False) -> tuple[data.EvalSet, list[str]]:
    """What a protocol counts of a split, or the first `most` of it, and the sentence that each is asked with."""
    first = protocol == "released-val" and model.task == "mask"  # M2IST's code validates on every sentence
    items = data.EvalSet(source, with_protocol(model.preprocess, protocol), most, first)
    sentences = items.sentences()
    return items, others_sentences(sentences) if shuffle_text else sentences


@torch.no_grad()
def evaluate_split(model, source, process: Process, batch_size: int = 16, workers: int = 0, shuffle_text: bool = False,
                   most: int | None = None, by_size: bool = False, intervals: bool = False, protocol: str | None = None,
                   stop: common.StopSignal | None = None, details: list | None = None) -> dict:
    """Metrics of a split (see common.mask_metrics and box_metrics), or of its first `most` sentences; with `by_size`
    also a list of them, for objects of so much of the photograph's area (of whose boxes, where the answer is a box).

    They are the same on every process, and for any number of processes. With `intervals` their 95 % bootstrap intervals
    are among them. `protocol`: see PROTOCOLS; None for the model's own. Empty where a signal came (`stop`) on any
    process. `details` gets what they are made of: (number, (intersection, union) or IoU, size) of each expression.
    """
    protocol = protocol or protocol_of(model)
    items, sentences = expressions(model, source, protocol, most, shuffle_text)
    was_training = model.training
    model.eval()
    answer = answers_by_picture if hasattr(model, "image_features") else answers
    rows = answer(model, items, sentences, process, batch_size, workers, protocol)
    mine = list(itertools.takewhile(lambda _: stop is None or not stop.number, rows))
    gathered = process.gather((mine, stop is not None and stop.number))
    model.train(was_training)
    if any(stopped for _, stopped in gathered):
        return {}
    rows = sorted(row for part, _ in gathered for row in part)
    numbers, scores, sizes = ([row[n] for row in rows] for n in range(3))
    assert numbers == list(range(len(items))), f"{source.name} {source.split}: not every sentence counted once"
    if details is not None:
        details += rows
    metrics = common.mask_metrics if model.task == "mask" else common.box_metrics
    result = metrics(scores)
    if intervals:
        pictures = [source.picture(i) for i, _ in items.pairs]
        result |= (common.mask_intervals if model.task == "mask" else common.box_intervals)(scores, pictures)
    if by_size:
        groups = np.digitize(sizes, SIZES[1:-1])  # from the first number on, below the second
        result["by_size"] = [
            {"size": f"{SIZES[g]}-{SIZES[g + 1]} %"} | metrics([s for s, n in zip(scores, groups) if n == g])
            for g in np.unique(groups)]
    return result


def batches(items, batch_size: int | None, workers: int, process: Process, collate=None):
    """Batches, or single items, with a bar of progress. The generator of its own leaves the global one, from which
    training draws its dropout, as it was."""
    loader = DataLoader(items, batch_size, collate_fn=collate, num_workers=workers, generator=torch.Generator())
    return tqdm(loader, leave=False, disable=not process.is_main or not sys.stderr.isatty())


def answers(model, items: data.EvalSet, sentences: list[str], process: Process, batch_size: int, workers: int,
            protocol: str):
    """(number, (intersection, union), size) of this process's share of the expressions."""
    # whole batches are dealt out, so that a batch is the same whoever computes it
    every = [range(b, min(b + batch_size, len(items))) for b in range(0, len(items), batch_size)]
    mine = [k for b in every[process.rank::process.world_size] for k in b]
    for batch in batches(Subset(items, mine), batch_size, workers, process, data.collate):
        tokens = model.tokenize([sentences[k] for k in batch["index"]])
        images = data.normalise(batch["image"].to(process.device), items.preprocess)
        logits = model(images, tokens.to(process.device)).float().cpu()
        for k, one, truth in zip(batch["index"], logits, batch["truth"]):
            mask, _ = mask_on_photograph(one[0], truth.shape, model, model.c.threshold, protocol)
            yield k, common.intersection_union(mask, truth), 100 * int(truth.sum()) / truth.numel()


def answers_by_picture(model, items: data.EvalSet, sentences: list[str], process: Process, batch_size: int,
                       workers: int, protocol: str):
    """(number, IoU of boxes, size) of this process's share of the pictures. Each is encoded once for all its sentences,
    and alone, so that the figures depend neither on the number of processes nor on what else is in the split."""
    pictures = data.PictureSet(items)
    mine = Subset(pictures, range(process.rank, len(pictures), process.world_size))
    for p in batches(mine, None, workers, process):
        features = model.image_features(data.normalise(p["image"][None].to(process.device), items.preprocess))
        for b in range(0, len(p["index"]), batch_size):
            some = p["index"][b:b + batch_size]
            tokens = model.tokenize([sentences[k] for k in some]).to(process.device)
            boxes = model(features.repeat(len(some)), tokens).float().cpu()
            for k, box, truth in zip(some, boxes, p["boxes"][b:b + batch_size]):
                (x1, y1, x2, y2), (height, width) = truth, p["size"]
                size = 100 * (x2 - x1) * (y2 - y1) / (height * width)
                if protocol != "default":
                    truth = whole_pixels(truth)
                yield k, common.box_iou(box_on_photograph(box, p["size"], model, protocol), truth), size


def mask_on_photograph(logits: Tensor, size: tuple[int, int], model, threshold: float,
                       protocol: str) -> tuple[Tensor, Tensor]:
    """Logits (h, w) over the canvas -> (mask, probability), both (H, W)."""
    if protocol == "default":
        logits = data.from_canvas(logits, size, model.preprocess)
        return predicted_mask(logits, threshold), logits.sigmoid()
    probability = unwarped(logits.sigmoid(), size, model.preprocess)
    return probability > threshold, probability


def predicted_mask(logits: Tensor, threshold: float) -> Tensor:
    """Logits (H, W) on the photograph -> bool (H, W): sigmoid > threshold, strictly."""
    return logits > math.log(threshold / (1 - threshold))


def box_on_photograph(box: Tensor, size: tuple[int, int], model, protocol: str) -> tuple[float, float, float, float]:
    """(4,) in sides of the canvas -> x1, y1, x2, y2 in the photograph's pixels."""
    if protocol == "default":
        return data.box_from_canvas(box, size, model.preprocess)
    return data.box_from_canvas(cut_at_canvas(box), size, model.preprocess, cut=False)


def measure(args: argparse.Namespace, process: Process) -> None:
    """Metrics of a split, or of all, as a table, as JSON and, where asked for, as a sheet and a page."""
    for file in {args.report, args.draw, args.json} - {None, "-"}:  # known before hours of measuring
        process.on_main(lambda: common.check_place(file))
    if args.draw:
        draw.picture_format(args.draw, "--draw")
    model, info = load_run(args.ckpt, args.weights, process, args.dataset)
    name, protocol = args.dataset or info["dataset"], args.protocol or protocol_of(model)
    if name is None:
        raise UserError(f"{args.ckpt}: a released checkpoint does not say what to measure it on; give --dataset and "
                        "--data-root.")
    if protocol != "default" and info["method"] == "shared_ris":
        raise UserError(f"--protocol {protocol}: the authors of {info['method']} released no code.")
    splits = [args.split]
    if args.split == "all":
        splits = [s for s in data.SPLITS.get(name, ("val",)) if s != "train"]
    root = args.data_root or info["data_root"]
    sources = [data.open_dataset(name, split, root, info["seed"], model.task) for split in splits]
    warning = leak(info["method"], runs.origin(args.weights) if args.weights else
                   info.get("origin", info["weights"]), name)
    for note in filter(None, (warning, overlap(args.ckpt, info["dataset"], name))):
        process.print(note)
    rows, details = [], []  # details of the first split alone
    for source in sources:
        row = dict(method=info["method"], backbone=info["config"]["backbone"], dataset=name, split=source.split,
                   protocol=protocol) | (dict(text="shuffled") if args.shuffle_text else {})
        row |= evaluate_split(model, source, process, args.batch_size, args.workers, args.shuffle_text,
                              by_size=args.by_size, intervals=True, protocol=protocol,
                              details=None if rows else details)
        rows.append(row | (dict(leak=warning) if warning else {}))
    if process.is_main:
        write_results(args, model, info, sources[0], rows, details)


def write_results(args: argparse.Namespace, model, info: dict, source, rows: list[dict], details: list) -> None:
    """`source` and `details`: of the first split, which is drawn and reported."""
    if args.json != "-":
        print_table([{k: v for k, v in row.items() if k != "by_size"} for row in rows])
        for row in rows if args.by_size else ():
            print(f"\n{row['split']}, by the object's share of the photograph" +
                  (" (its box's)" if model.task == "box" else ""))
            print_table(row["by_size"])
    write_result(args.json, rows if args.split == "all" else rows[0])
    if args.draw:
        draw_examples(args.draw, model, source, args.draw_count, protocol=rows[0]["protocol"])
    if args.report:
        from toolbox.report import write_report

        write_report(args, model, info, source, rows, details)


def overlap(ckpt: str, trained: str | None, name: str) -> str:
    """A note where a model may have been trained on photographs of a data set's val and test splits, or ""."""
    if trained is None:
        return (f"note: {ckpt} does not say what it was trained on; where that was another data set, or several, it "
                f"may have seen photographs of {name}'s val and test splits")
    seen = data.MIXED if trained == "mixed" else (trained,)
    if name not in seen and name.startswith("refcoco") and any(s.startswith("refcoco") for s in seen):
        return (f"note: the model was trained on {trained}, whose train split may show photographs of {name}'s val and "
                f"test splits; mixed leaves out those of {', '.join(data.MIXED)}")
    return ""


@torch.no_grad()
def draw_examples(file: str, model, source, count: int, most: int | None = None, protocol: str | None = None) -> None:
    """A sheet of `count` expressions spread over a split or its first `most`: prediction above truth, sentence, IoU."""
    (items, sentences), pictures = expressions(model, source, protocol or protocol_of(model), most), []
    for k in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int):
        sentence, record = sentences[k], items.record(int(k))
        answer = ask(model, record.image, sentence, protocol=protocol)
        if model.task == "mask":
            truth = record.mask
            i, u = common.intersection_union(*map(torch.from_numpy, (answer["mask"], truth)))
            iou = i / max(u, 1)
        else:
            truth, iou = record.box, common.box_iou(answer["box"], record.box)
        pair = [draw.overlay(record.image, [what], [text], least=320) for what, text in
                ((answer[model.task], f"{sentence} (IoU {100 * iou:.0f})"), (truth, "truth"))]
        for picture in pair:
            picture.thumbnail((480, 480))
        pictures.append(draw.grid(pair, columns=1))
    draw.save(draw.grid(pictures, columns=6), file)


@torch.no_grad()
def ask(model, image: np.ndarray, sentence: str, threshold: float | None = None, protocol: str | None = None) -> dict:
    """What a model says of one picture (H, W, 3) and one sentence: its box in pixels, or its mask (H, W) with
    threshold, area, the box around it (None for an empty one) and mean confidence. `protocol`: see evaluate_split."""
    device, protocol = next(model.parameters()).device, protocol or protocol_of(model)
    pre = with_protocol(model.preprocess, protocol)
    images = data.normalise(data.to_canvas(image, pre)[None].to(device), pre)
    output = model(images, model.tokenize([sentence]).to(device))[0].float().cpu()
    if model.task == "box":
        return dict(box=[round(v, 2) for v in box_on_photograph(output, image.shape[:2], model, protocol)])
    threshold = model.c.threshold if threshold is None else threshold
    mask, probability = (x.numpy() for x in mask_on_photograph(output[0], image.shape[:2], model, threshold, protocol))
    return dict(mask=mask, area=int(mask.sum()), box=[int(v) for v in data.box_of(mask)] if mask.any() else None,
                confidence=round(float(probability[mask].mean()), 4) if mask.any() else None, threshold=threshold)


def predict(args: argparse.Namespace, process: Process) -> None:
    """One picture and one sentence, or several. Where no file is named, the picture goes to the current folder."""
    sentences = [data.check_sentence(text) for text in args.text]
    image = data.read_image(args.image)
    for flag, formats in ("out", ("PNG", "JPEG", "WEBP")), ("attention", ("PNG", "JPEG", "WEBP")), ("mask", ("PNG",)):
        if getattr(args, flag):
            draw.picture_format(getattr(args, flag), f"--{flag}", formats)
    model, info = load_run(args.ckpt, args.weights, process, args.dataset)
    if model.task == "box" and (args.mask or args.threshold is not None):
        raise UserError(f"--{'mask' if args.mask else 'threshold'}: {info['method']} answers with a box, not a mask.")
    answers = [ask(model, image, sentence, args.threshold) for sentence in sentences]
    if args.attention:
        from toolbox.attention import attention_sheet

        draw.save(attention_sheet(model, image, sentences[0], answers[0][model.task]), args.attention)
    out = args.out
    if not (args.out or args.mask or args.attention):
        out = f"{Path(args.image).stem}_{info['method']}.png"
    said = draw.draw_answers(image, answers, sentences, out, args.mask)
    if args.json != "-":
        print(*said, *(f"Drawn: {file}" for file in (out, args.attention) if file), sep="\n")
    about = dict(image=args.image, width=image.shape[1], height=image.shape[0], overlay=out, method=info["method"])
    results = [dict(text=sentence) | answer for sentence, answer in zip(sentences, answers)]
    write_result(args.json, about | (results[0] if len(results) == 1 else dict(answers=results)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(__doc__)
    p.add_argument("--ckpt", metavar="RUN", required=True, help="a run folder or a checkpoint file of train.py, a "
                   "checkpoint of DETRIS's or ETRIS's authors, or hf:OWNER/REPOSITORY/FILE on the Hugging Face hub")
    p.add_argument("--weights", help="towers, if they lie elsewhere than when the run was trained")
    p.add_argument("--device", default="auto", **one_of("auto", "cuda", "mps", "cpu"))
    p.add_argument("--json", metavar="FILE", help="- for standard output, and then nothing else goes there")
    p.add_argument("--dataset", help=f"default: the run's; one of {', '.join(data.DATASETS)}")
    p.add_argument("--data-root", help="folder of a REFER data set; default: the run's")
    split = p.add_argument_group("metrics of a split")
    split.add_argument("--split", default="val", help="val (default), testA, testB, test, train, or all (but train)")
    split.add_argument("--shuffle-text", action="store_true", help="give each picture another's sentence")
    split.add_argument("--protocol", **one_of(*PROTOCOLS), help="; ".join(f"{k}: {v}" for k, v in PROTOCOLS.items()) +
                       " (default: default, or released for a model that was trained so)")
    split.add_argument("--by-size", action="store_true", help="also by the object's share of the photograph")
    split.add_argument("--batch-size", type=int, default=16)
    split.add_argument("--workers", type=int, default=0, help="processes that read data")
    split.add_argument("--report", metavar="FILE.html", help="a page with figures, charts and examples, in one file")
    split.add_argument("--draw", metavar="FILE.png", help="draw predictions over the split's pictures")
    split.add_argument("--draw-count", type=int, default=12)
    one = p.add_argument_group("one picture")
    one.add_argument("--image", help="a picture of yours, with --text")
    one.add_argument("--text", action="append", help="a sentence about it; again for another, in another colour")
    one.add_argument("--threshold", type=float, help="on the sigmoid; default: the method's")
    one.add_argument("--out", metavar="FILE.png", help="the picture with its mask or box")
    one.add_argument("--mask", metavar="FILE.png", help="the mask alone, in the picture's size")
    one.add_argument("--attention", metavar="FILE.png", help="what the model looks at, part by part")
    page = p.add_argument_group("a page in the browser")
    page.add_argument("--serve", action="store_true", help="on 127.0.0.1, for photographs of yours (needs gradio)")
    page.add_argument("--port", type=int, help="default: a free one from 7860 on")
    args = p.parse_args(argv)
    check(args, p, split, one, page)
    return args


def check(args: argparse.Namespace, p: Parser, split, one, page) -> None:
    """Raises UserError for flags that do not go together, and for impossible values."""
    if (args.image is None) != (args.text is None):
        p.error("--image and --text go together")
    mode = page if args.serve else one if args.image else split
    for group in {split, one, page} - {mode}:
        for action in group._group_actions:
            if getattr(args, action.dest) != p.get_default(action.dest):
                p.error(f"{action.option_strings[0]} does not go with {mode.title}")
    if args.attention and len(args.text) > 1:
        p.error("--attention goes with one --text")
    if args.port is not None and not 0 < args.port < 65536:
        p.error(f"--port {args.port}: must be 1 to 65535")
    if args.threshold is not None and not 0 < args.threshold < 1:
        p.error(f"--threshold {args.threshold}: must be between 0 and 1")
    if min(args.batch_size, args.draw_count) < 1 or args.workers < 0:
        p.error("--batch-size and --draw-count must be positive, --workers not negative")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = {} if is_released(args.ckpt) else common.read_checkpoint(args.ckpt, tensors=False)[0]["config"]
    process = common.start(tiny=str(config.get("backbone")).startswith("tiny"), device=args.device)
    if args.serve or args.image:
        if process.is_main and args.serve:
            from toolbox.serve import serve

            serve(args, process)
        elif process.is_main:
            predict(args, process)
    else:
        measure(args, process)


if __name__ == "__main__":
    common.run_command(main)
