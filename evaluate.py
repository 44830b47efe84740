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
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import common
import data
from common import METHODS, Parser, Process, UserError, load_method, one_of
from toolbox import draw
from toolbox.released import is_released, load_released, unwarped
from toolbox.weights import leak

SIZES = 0, 1, 2, 5, 10, 20, 50, 100  # of objects, in per cent of the photograph
PROTOCOLS = {
    "default": "every sentence; logits resized to the photograph (bilinear), boxes cut at its border",
    "released": "every sentence; as the authors' code, probabilities are resized twice (bicubic, with align_corners, "
                "then an affine map) and boxes not cut",
    "released-val": "as their code while it trains: as released, and of each object only the first sentence",
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
    c = common.config_from_json(method.Config, info["config"], ckpt)
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
        weights = info["weights"]
        kinds = ".pth", ".pt", ".safetensors", ".spm", ".bin"
        if weights not in ("random", "pretrained") and not os.path.isdir(weights) and not all(
                w.endswith(kinds) for w in weights.split(",")):  # a checkpoint does not say what files are opened
            raise UserError(f"{ckpt}: its weights, {weights[:200]!r}, are no files of weights; --weights takes them.")
    # with trained towers the checkpoint holds everything
    model = common.build(method, c, weights if info["frozen"] else "random", info["seed"])
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


@torch.no_grad()
def evaluate_split(model, source, process: Process, batch_size: int = 16, workers: int = 0, shuffle_text: bool = False,
                   most: int | None = None, share: bool = True, by_size: bool = False, intervals: bool = False,
                   protocol: str = "default", stop: common.StopSignal | None = None,
                   details: list | None = None) -> dict:
    """Metrics of a split (see common.mask_metrics and box_metrics), or of its first `most` sentences; with `by_size`
    also a list of them, for objects of so much of the photograph's area (of whose boxes, where the answer is a box).

    They are the same on every process, for any number of processes, and with and without `share`: whether a picture is
    encoded once for all its sentences, where a method can. With `intervals` their 95 % bootstrap intervals are among
    them. `protocol`: see PROTOCOLS. Empty where a signal came (`stop`) on any process. `details` gets what they
    are made of: (number, (intersection, union) or IoU, size) of each expression.
    """
    pre = with_protocol(model.preprocess, protocol)
    items = data.EvalSet(source, pre, most, first=protocol == "released-val")
    sentences = items.sentences()
    if shuffle_text:
        sentences = others_sentences(sentences)
    was_training = model.training
    model.eval()
    if hasattr(model, "image_features"):
        rows = answers_by_picture(model, items, sentences, process, batch_size, workers, share, protocol)
    else:
        rows = answers(model, items, sentences, process, batch_size, workers, protocol)
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


def with_protocol(pre: common.Preprocess, protocol: str) -> common.Preprocess:
    """How pictures come to the canvas: a letterbox that the released code makes in its own way."""
    if pre.fit not in ("letterbox", "warp") or pre.pad_channel:
        return pre
    return replace(pre, fit="letterbox" if protocol == "default" else "warp")


def progress(loader: DataLoader, items: data.EvalSet, process: Process):
    return tqdm(loader, desc=items.source.split, leave=False, disable=not process.is_main or not sys.stderr.isatty())


def answers(model, items: data.EvalSet, sentences: list[str], process: Process, batch_size: int, workers: int,
            protocol: str):
    """(number, (intersection, union), size) of this process's share of the expressions."""
    # whole batches are dealt out, so that a batch is the same whoever computes it
    batches = [range(b, min(b + batch_size, len(items))) for b in range(0, len(items), batch_size)]
    mine = [k for b in batches[process.rank::process.world_size] for k in b]
    loader = DataLoader(Subset(items, mine), batch_size, collate_fn=data.collate, num_workers=workers)
    for batch in progress(loader, items, process):
        tokens = model.tokenize([sentences[k] for k in batch["index"]])
        logits = model(batch["image"].to(process.device), tokens.to(process.device))
        for k, one, truth in zip(batch["index"], logits.float().cpu(), batch["truth"]):
            if protocol == "default":
                mask = predicted_mask(data.from_canvas(one[0], truth.shape, model.preprocess), model.c.threshold)
            else:
                mask = unwarped(one[0].sigmoid(), truth.shape, model.preprocess) > model.c.threshold
            yield k, common.intersection_union(mask, truth), 100 * int(truth.sum()) / truth.numel()


def answers_by_picture(model, items: data.EvalSet, sentences: list[str], process: Process, batch_size: int,
                       workers: int, share: bool, protocol: str):
    """(number, IoU of boxes, size) of this process's share of the pictures. Each is encoded alone, once or for each of
    its sentences, so that the figures are the same to the last bit."""
    pictures = data.PictureSet(items)
    mine = Subset(pictures, range(process.rank, len(pictures), process.world_size))
    for p in progress(DataLoader(mine, None, num_workers=workers), items, process):
        image = p["image"][None].to(process.device)
        features = model.image_features(image) if share else None
        for b in range(0, len(p["index"]), batch_size):
            some = p["index"][b:b + batch_size]
            tokens = model.tokenize([sentences[k] for k in some]).to(process.device)
            if share:
                vision = features.repeat(len(some))
            else:
                each = [model.image_features(image) for _ in some]
                vision = type(each[0])(*map(torch.cat, zip(*each)))
            boxes = model(vision, tokens).float().cpu()
            for k, box, truth in zip(some, boxes, p["boxes"][b:b + batch_size]):
                (x1, y1, x2, y2), (height, width) = truth, p["size"]
                size = 100 * (x2 - x1) * (y2 - y1) / (height * width)
                box = data.box_from_canvas(box, p["size"], model.preprocess, cut=protocol == "default")
                yield k, common.box_iou(box, truth), size


def predicted_mask(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """Logits (H, W) on the photograph -> bool (H, W): sigmoid > threshold, strictly."""
    return logits > math.log(threshold / (1 - threshold))


def measure_split(model, source, process: Process, args: argparse.Namespace, details: list | None = None) -> dict:
    """Metrics, and with --share compare the seconds that they take either way."""
    if args.share != "on" and not hasattr(model, "image_features"):
        raise UserError(f"--share {args.share}: this method reads pictures together with the sentence, each time.")
    if args.share == "compare":  # a first batch, which takes longer, is not timed
        evaluate_split(model, source, process, args.batch_size, args.workers, most=args.batch_size)
    took = {}
    for share in dict(on=[True], off=[False], compare=[False, True])[args.share]:
        if details is not None:
            details.clear()
        begin = time.perf_counter()
        row = evaluate_split(model, source, process, args.batch_size, args.workers, args.shuffle_text, share=share,
                             by_size=args.by_size, intervals=True, protocol=args.protocol, details=details)
        took[share] = time.perf_counter() - begin, row
    if len(took) == 2:
        (apart, other), (once, row) = took[False], took[True]
        same = "the same figures" if row == other else f"other figures, {other} and {row}"
        pictures = len({source.picture(i) for i in range(len(source))})
        process.print(f"{source.split}: {row['n']} sentences about {pictures} pictures took {apart:.1f} s with a picture "
                    f"encoded for each sentence, and {once:.1f} s with each encoded once: {apart / once:.2f} times as "
                    f"fast, and {same}")
    return row


def measure(args: argparse.Namespace, process: Process) -> None:
    if args.report:
        process.on_main(lambda: common.check_place(args.report))
    model, info = load_run(args.ckpt, args.weights, process, args.dataset)
    name = args.dataset or info["dataset"]
    if name is None:
        raise UserError(f"{args.ckpt}: a released checkpoint does not say what to measure it on; give --dataset and "
                        "--data-root.")
    root = args.data_root or info["data_root"]
    splits = [args.split]
    if args.split == "all":
        splits = [s for s in data.SPLITS.get(name, ("val",)) if s != "train"]
    if args.protocol != "default" and info["method"] == "shared_ris":
        raise UserError(f"--protocol {args.protocol}: the authors of {info['method']} released no code.")
    rows, sources = [], [data.open_dataset(name, split, root, info["seed"]) for split in splits]
    origin = common.origin(args.weights) if args.weights else info.get("origin", info["weights"])
    warning = leak(info["method"], origin, name)
    if warning:
        process.print(warning)
    if info["dataset"] is None:
        process.print(f"note: {args.ckpt} does not say what it was trained on; where that was another data set, or "
                    f"several, it may have seen photographs of {name}'s val and test splits")
    trained = data.MIXED if info["dataset"] == "mixed" else (info["dataset"] or name,)
    coco = [n for n in data.SPLITS if n.startswith("refcoco")]
    if name in coco and set(trained) & set(coco) and name not in trained:
        process.print(f"note: the model was trained on {info['dataset']}, whose train split may show photographs of "
                    f"{name}'s val and test splits; mixed leaves out those of {', '.join(data.MIXED)}")
    details = [[] if args.report and n == 0 else None for n in range(len(splits))]  # of the first split alone
    for split, source, parts in zip(splits, sources, details):
        about = dict(method=info["method"], backbone=info["config"]["backbone"], dataset=name, split=split,
                     protocol=args.protocol)
        if args.shuffle_text:
            about["text"] = "shuffled"
        row = measure_split(model, source, process, args, parts)
        rows.append(about | row | (dict(leak=warning) if warning else {}))
    if process.is_main:
        if args.json != "-":
            common.print_table([{k: v for k, v in row.items() if k != "by_size"} for row in rows])
            for row in rows if args.by_size else ():
                print(f"\n{row['split']}, by the object's share of the photograph" +
                      (" (its box's)" if model.task == "box" else ""))
                common.print_table(row["by_size"])
        common.write_result(args.json, rows if args.split == "all" else rows[0])
        if args.draw:
            draw_examples(args.draw, model, sources[0], args.draw_count, protocol=args.protocol)
        if args.report:
            from toolbox.report import write_report

            write_report(args, model, info, sources[0], rows, details[0])


@torch.no_grad()
def draw_examples(file: str, model, source, count: int, most: int | None = None, protocol: str = "") -> None:
    """A sheet of `count` expressions spread over a split or its first `most`: prediction above truth, sentence, IoU."""
    items, pictures = data.EvalSet(source, model.preprocess, most), []
    sentences = items.sentences()
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
    with common.writing(file) as temporary:
        draw.grid(pictures, columns=6).save(temporary, format="PNG")


@torch.no_grad()
def ask(model, image: np.ndarray, sentence: str, threshold: float | None = None, protocol: str = "") -> dict:
    """What a model says of one picture (H, W, 3) and one sentence: its box in pixels, or its mask (H, W) with
    threshold, area, the box around it (None for an empty one) and mean confidence. `protocol`: see PROTOCOLS; that of a
    released model is "released", if it is not given."""
    device = next(model.parameters()).device
    protocol = protocol or ("released" if model.preprocess.fit == "warp" else "default")
    pre, default = with_protocol(model.preprocess, protocol), protocol == "default"
    output = model(data.to_canvas(image, pre)[None].to(device), model.tokenize([sentence]).to(device))[0].float().cpu()
    if model.task == "box":
        return dict(box=[round(v, 2) for v in data.box_from_canvas(output, image.shape[:2], pre, cut=default)])
    threshold = model.c.threshold if threshold is None else threshold
    if default:
        logits = data.from_canvas(output[0], image.shape[:2], pre)
        mask, probability = predicted_mask(logits, threshold).numpy(), logits.sigmoid().numpy()
    else:
        probability = unwarped(output[0].sigmoid(), image.shape[:2], pre).numpy()
        mask = probability > threshold
    return dict(mask=mask, area=int(mask.sum()), box=[int(v) for v in data.box_of(mask)] if mask.any() else None,
                confidence=round(float(probability[mask].mean()), 4) if mask.any() else None, threshold=threshold)


@torch.no_grad()
def attention(model, image: np.ndarray, sentence: str) -> dict[str, np.ndarray]:
    """What a model looks at in a picture (H, W, 3) for a sentence: maps (H, W) by their names."""
    device, pre = next(model.parameters()).device, model.preprocess
    maps = draw.attention_maps(model, data.to_canvas(image, pre)[None].to(device),
                               model.tokenize([sentence]).to(device))
    return {name: data.from_canvas(m[0].float().cpu(), image.shape[:2], pre).numpy() for name, m in maps.items()}


def predict(args: argparse.Namespace, process: Process) -> None:
    """One picture and one sentence, or several."""
    sentences = [data.check_sentence(text) for text in args.text]
    image = data.read_image(args.image)
    for name, flag in (args.out, "--out"), (args.attention, "--attention"):
        if name:
            picture_format(Path(name), flag)
    model, info = load_run(args.ckpt, args.weights, process, args.dataset)
    if model.task == "box" and (args.mask or args.threshold is not None):
        raise UserError(f"--{'mask' if args.mask else 'threshold'}: {info['method']} answers with a box, not a mask.")
    answers = [ask(model, image, sentence, args.threshold) for sentence in sentences]
    out = Path(args.out or Path(args.image).stem + "_" + info["method"] + ".png")
    if args.attention:
        maps, file = attention(model, image, sentences[0]), Path(args.attention)
        with common.writing(file) as temporary:
            picture = draw.heat_sheet(image, maps, answers[0][model.task], sentences[0])
            picture.save(temporary, format=picture_format(file, "--attention"))
    said = write_answers(image, answers, sentences, out, Path(args.mask or out.with_name(out.stem + "_mask.png")))
    if args.json != "-":
        print(*said, f"Drawn: {out}", sep="\n")
    about = dict(image=args.image, width=image.shape[1], height=image.shape[0], overlay=str(out), method=info["method"])
    results = [dict(text=sentence) | answer for sentence, answer in zip(sentences, answers)]
    common.write_result(args.json, about | (results[0] if len(results) == 1 else dict(answers=results)))


def write_answers(image: np.ndarray, answers: list[dict], sentences: list[str], out: Path, mask: Path) -> list[str]:
    """Draws what ask() gave, together, and each mask alone, whose file then stands for it. -> what was found, a line
    for each sentence"""
    with common.writing(out) as temporary:
        picture = draw.overlay(image, [answer.get("mask", answer["box"]) for answer in answers], sentences)
        picture.save(temporary, format=picture_format(out))
    said = []
    for n, (sentence, answer) in enumerate(zip(sentences, answers), 1):
        found = f"box {answer['box']}" if answer["box"] else "nothing"
        if "mask" in answer:
            file = str(mask if len(answers) == 1 else mask.with_name(f"{mask.stem}_{n}{mask.suffix}"))
            with common.writing(file) as temporary:
                Image.fromarray(answer["mask"].astype(np.uint8) * 255).save(temporary, format="PNG")
            answer["mask"] = file
            if answer["box"]:
                found = f"{answer['area']} pixels, {found}, mean confidence {answer['confidence']}"
            found += f", mask: {file}"
        said.append(f"{sentence!r}: {found}.")
    return said


def picture_format(path: Path, flag: str = "--out") -> str:
    """The format that a file name asks for. Raises UserError for a name Pillow cannot write."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in ("PNG", "JPEG", "WEBP"):
        raise UserError(f"{flag} {path}: a name that ends in .png, .jpg or .webp is needed.")
    return name


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(__doc__)
    p.add_argument("--ckpt", metavar="RUN", required=True, help="a run folder or a checkpoint file of train.py, a "
                   "checkpoint of DETRIS's or ETRIS's authors, or hf:OWNER/REPOSITORY/FILE on the Hugging Face hub")
    p.add_argument("--weights", help="towers, if they lie elsewhere than when the run was trained")
    p.add_argument("--device", default="auto", **one_of("auto", "cuda", "cpu"))
    p.add_argument("--json", metavar="FILE", help="- for standard output, and then nothing else goes there")
    p.add_argument("--dataset", help=f"default: the run's; one of {', '.join(data.DATASETS)}")
    p.add_argument("--data-root", help="folder of a REFER data set; default: the run's")
    split = p.add_argument_group("metrics of a split")
    split.add_argument("--split", default="val", help="val (the default), testA, testB, test, train, or all (but train)")
    split.add_argument("--shuffle-text", action="store_true", help="give each picture another's sentence")
    split.add_argument("--protocol", default="default", **one_of(*PROTOCOLS),
                       help="; ".join(f"{name}: {what}" for name, what in PROTOCOLS.items()))
    split.add_argument("--by-size", action="store_true", help="also by the object's share of the photograph")
    split.add_argument("--share", default="on", **one_of("on", "off", "compare"),
                       help="boxes: encode a picture once for all its sentences (on), for each (off), or time both")
    split.add_argument("--batch-size", type=int, default=16)
    split.add_argument("--workers", type=int, default=0, help="processes that read data")
    split.add_argument("--report", metavar="FILE.html", help="a page with figures, charts and examples, in one file")
    split.add_argument("--report-count", type=int, default=60, help="its examples: the best, the median and the worst")
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
    page.add_argument("--serve", action="store_true", help="a page on 127.0.0.1 for photographs of yours (needs gradio)")
    page.add_argument("--port", type=int, help="default: a free one from 7860 on")
    args = p.parse_args(argv)
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
    if min(args.batch_size, args.draw_count, args.report_count) < 1 or args.workers < 0:
        p.error("--batch-size, --draw-count and --report-count must be positive, --workers not negative")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    backbone = "" if is_released(args.ckpt) else common.read_checkpoint(args.ckpt, tensors=False)[0]["config"].get("backbone")
    process = common.start(tiny=str(backbone).startswith("tiny"), device=args.device)
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
