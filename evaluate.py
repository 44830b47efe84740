"""Measures a trained model, or asks it about one picture.

    python evaluate.py --ckpt RUN --split all              # oIoU, mIoU, Pr@X of every split; of boxes Acc@0.5, mIoU
    torchrun --nproc_per_node 2 evaluate.py --ckpt RUN --split testA       # the same numbers
    python evaluate.py --ckpt RUN --shuffle-text                           # each picture with another's sentence
    python evaluate.py --ckpt RUN --by-size                                # also by the size of the object
    python evaluate.py --ckpt RUN --image a.jpg --text "left dog" --text "the cat" --out a.png
    python evaluate.py --ckpt RUN --image a.jpg --text "left dog" --attention look.png
    python evaluate.py --ckpt RUN --serve                                  # a page to do so in a browser
    python evaluate.py --ckpt RUN --report FILE.html                       # figures, charts and examples in one page
    python evaluate.py --efficiency --method dcris --backbone dinov2-base --vary tune
    python evaluate.py --tables                            # the papers' tables: commands, our sizes beside theirs

Every sentence of a split counts once, at the photograph's own resolution, however many processes there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import common
import costs
import data
import draw
from common import METHODS, Process, UserError, load_method

SIZES = 0, 1, 2, 5, 10, 20, 50, 100  # of objects, in per cent of the photograph
PROTOCOLS = {
    "default": "every sentence; logits resized to the photograph (bilinear), boxes cut at its border",
    "released": "every sentence; as the authors' code, probabilities are resized twice (bicubic, with align_corners, "
                "then an affine map) and boxes not cut",
    "released-val": "as their code while it trains: as released, and of each object only the first sentence",
}
MAIN_METRIC = dict(mask="mIoU", box="Acc@0.5")  # what the best step is chosen by


def is_released(ckpt: str) -> bool:
    """Whether --ckpt names a file that torch.save wrote, as the methods' authors did; ours are safetensors."""
    if ckpt.startswith("hf:") or not os.path.isfile(ckpt):
        return ckpt.startswith("hf:")
    with open(ckpt, "rb") as f:
        return f.read(2) in (b"PK", b"\x80\x02", b"\x80\x04")


TRAINED_ON = {"mix": "mixed", "refcocog_g|google": "refcocog_google", "cocog|gref|umd": "refcocog_umd",
              r"coco\+|refcocop|plus": "refcoco+"}  # what the path of a released file says


def load_released(ckpt: str, dataset: str | None, process: Process) -> tuple[torch.nn.Module, dict]:
    """(model in eval mode, what load_run says of one) for a checkpoint that DETRIS's or ETRIS's authors released, or
    hf:OWNER/REPOSITORY/FILE on the Hugging Face hub. Raises UserError for any other file.

    The data set it was trained on, by its path or else `dataset`, tells how many words it reads.
    """
    file = ckpt
    if ckpt.startswith("hf:"):
        owner, repo, name = (ckpt.removeprefix("hf:").split("/", 2) + ["", ""])[:3]
        if not name:
            raise UserError(f"--ckpt {ckpt}: hf:OWNER/REPOSITORY/FILE is needed, as hf:thuteam/DETRIS/FILE.")
        file = common.fetch(f"{owner}/{repo}", name, "--ckpt takes the file itself")
    state = common.read_weights(file)
    trained = next((name for pattern, name in TRAINED_ON.items() if re.search(pattern, ckpt.lower())), dataset)
    for name in METHODS:
        method = load_method(name)
        try:
            found = method.released(state, trained or "refcoco") if hasattr(method, "released") else None
        except (UserError, LookupError, TypeError, ValueError) as e:
            raise UserError(f"{ckpt} is not whole, or not as the authors of {name} released it: "
                            f"{common.first_line(e)}.") from None
        if found:
            c, state = found
            model = method.Model(c, "random")
            common.load_exactly(model, state, file, f"the released {method.Model.__name__} with {c.backbone}")
            model.preprocess = replace(model.preprocess, fit="warp")
            process.say(f"{ckpt}: released weights of {name} ({c.variant}), {c.backbone}, {c.image_size} pixels, "
                        f"{c.words} tokens")
            return model.to(process.device).eval(), dict(
                method=name, config=dataclasses.asdict(c), dataset=None, data_root=None, seed=0, weights=ckpt)
    raise UserError(f"{ckpt} is neither a run of train.py (of which a folder or its model.safetensors is wanted) nor a "
                    "checkpoint that the authors of DETRIS or ETRIS released.")


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
    return tqdm(loader, desc=items.source.split, leave=False, disable=process.rank > 0 or not sys.stderr.isatty())


def answers(model, items: data.EvalSet, sentences: list[str], process: Process, batch_size: int, workers: int,
            protocol: str):
    """(number, (intersection, union), size) of this process's share of the expressions."""
    # whole batches are dealt out, so that a batch is the same whoever computes it
    batches = [range(b, min(b + batch_size, len(items))) for b in range(0, len(items), batch_size)]
    mine = [k for b in batches[process.rank::process.world] for k in b]
    loader = DataLoader(Subset(items, mine), batch_size, collate_fn=data.collate, num_workers=workers)
    for batch in progress(loader, items, process):
        tokens = model.tokenize([sentences[k] for k in batch["index"]])
        logits = model(batch["image"].to(process.device), tokens.to(process.device))
        for k, one, truth in zip(batch["index"], logits.float().cpu(), batch["truth"]):
            if protocol == "default":
                mask = predicted_mask(data.from_canvas(one[0], truth.shape, model.preprocess), model.c.threshold)
            else:
                mask = data.released_from_canvas(one[0].sigmoid(), truth.shape, model.preprocess) > model.c.threshold
            yield k, common.intersection_union(mask, truth), 100 * int(truth.sum()) / truth.numel()


def answers_by_picture(model, items: data.EvalSet, sentences: list[str], process: Process, batch_size: int,
                       workers: int, share: bool, protocol: str):
    """(number, IoU of boxes, size) of this process's share of the pictures. Each is encoded alone, once or for each of
    its sentences, so that the figures are the same to the last bit."""
    pictures = data.PictureSet(items)
    mine = Subset(pictures, range(process.rank, len(pictures), process.world))
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
        process.say(f"{source.split}: {row['n']} sentences about {pictures} pictures took {apart:.1f} s with a picture "
                    f"encoded for each sentence, and {once:.1f} s with each encoded once: {apart / once:.2f} times as "
                    f"fast, and {same}")
    return row


def measure(args: argparse.Namespace, process: Process) -> None:
    if args.report:
        process.first_alone(lambda: common.check_place(args.report))
    model, info = load_run(args.ckpt, args.weights, process, args.dataset)
    name = args.dataset or info["dataset"]
    if name is None:
        raise UserError(f"{args.ckpt}: a released checkpoint does not say what to measure it on; give --dataset and "
                        "--data-root.")
    root = args.data_root or info["data_root"]
    splits = [args.split]
    if args.split == "all":
        splits = [s for s in data.SPLITS.get(name, ("val",)) if s != "train"]
    if args.protocol != "default" and not hasattr(load_method(info["method"]), "RELEASED_CODE"):
        raise UserError(f"--protocol {args.protocol}: the authors of {info['method']} released no code.")
    rows, sources = [], [data.open_dataset(name, split, root, info["seed"]) for split in splits]
    origin = common.origin(args.weights) if args.weights else info.get("origin", info["weights"])
    leak = common.leak(load_method(info["method"]), origin, name)
    if leak:
        process.say(leak)
    if info["dataset"] is None:
        process.say(f"note: {args.ckpt} does not say what it was trained on; where that was another data set, or "
                    f"several, it may have seen photographs of {name}'s val and test splits")
    trained = data.MIXED if info["dataset"] == "mixed" else (info["dataset"] or name,)
    coco = [n for n in data.SPLITS if n.startswith("refcoco")]
    if name in coco and set(trained) & set(coco) and name not in trained:
        process.say(f"note: the model was trained on {info['dataset']}, whose train split may show photographs of "
                    f"{name}'s val and test splits; mixed leaves out those of {', '.join(data.MIXED)}")
    details = [[] if args.report and n == 0 else None for n in range(len(splits))]  # of the first split alone
    for split, source, parts in zip(splits, sources, details):
        about = dict(method=info["method"], backbone=info["config"]["backbone"], dataset=name, split=split,
                     protocol=args.protocol)
        if args.shuffle_text:
            about["text"] = "shuffled"
        row = measure_split(model, source, process, args, parts)
        rows.append(about | row | (dict(leak=leak) if leak else {}))
    if process.rank == 0:
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
def write_report(args: argparse.Namespace, model, info: dict, source, rows: list[dict], details: list) -> None:
    """--report: a page about the first split that was measured, and the figures of all."""
    items = data.EvalSet(source, model.preprocess, first=args.protocol == "released-val")
    sentences = others_sentences(items.sentences()) if args.shuffle_text else items.sentences()
    scores, sizes = ([row[n] for row in details] for n in (1, 2))
    ious = common.mask_ious(scores)[2].tolist() if model.task == "mask" else scores
    places = [m[0].lower() if (m := data.PLACE.search(s)) else "none" for s in sentences]
    examples = []
    for k, group in tqdm(draw.chosen(ious, args.report_count).items(), "pictures", leave=False, disable=None):
        record, pictures = items.record(k), {}
        truth = record.mask if model.task == "mask" else record.box
        answer = ask(model, record.image, sentences[k], protocol=args.protocol)
        for name, what in ("truth", truth), ("prediction", answer[model.task]):
            pictures[name] = draw.data_url(draw.overlay(record.image, [what], least=draw.SIDE))
        examples.append(pictures | dict(n=k, iou=ious[k], group=group, sentence=sentences[k],
                                        id=source.describe(items.pairs[k][0])))
    run = Path(args.ckpt)
    of_what = "object's" if model.task == "mask" else "object's box's"
    charts = draw.charts(ious, sizes, sentences, places, SIZES, of_what) + draw.curves(
        (run if run.is_dir() else run.parent) / "log.jsonl", MAIN_METRIC[model.task])
    facts = {k: v for k, v in info.items() if k != "config"} | info["config"]
    if info["dataset"] is None:  # a released file does not say how it was trained
        facts = {k: info["config"][k] for k in ("backbone", "variant", "image_size", "words")}
    facts |= {f"{k} parameters": f"{sum(p.numel() for p in ps):,}" for k, ps in common.parameters(model).items()}
    title = f"{info['method']} ({info['config']['backbone']}) on {source.name} {source.split}: {args.ckpt}"
    if args.shuffle_text:
        title += " (sentences shuffled)"
    shown = [{k: v for k, v in row.items() if k not in ("by_size", "leak")} for row in rows]
    draw.write_page(args.report, title, shown, charts, examples, facts | dict(measured_with=common.versions()))


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
        probability = data.released_from_canvas(output[0].sigmoid(), image.shape[:2], pre).numpy()
        mask = probability > threshold
    return dict(mask=mask, area=int(mask.sum()), box=[int(v) for v in data.box_of(mask)] if mask.any() else None,
                confidence=round(float(probability[mask].mean()), 4) if mask.any() else None, threshold=threshold)


@torch.no_grad()
def attention(model, image: np.ndarray, sentence: str) -> dict[str, np.ndarray]:
    """What a model looks at in a picture (H, W, 3) for a sentence: maps (H, W) by their names."""
    device, pre, maps = next(model.parameters()).device, model.preprocess, {}
    model(data.to_canvas(image, pre)[None].to(device), model.tokenize([sentence]).to(device), maps)
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


def serve(args: argparse.Namespace, process: Process) -> None:
    """A page on this machine: drop a photograph, write sentences, move the threshold, take overlay and masks."""
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        os.environ |= dict(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)  # nothing leaves, nothing stays
        try:
            import gradio
        except ImportError:
            raise UserError('--serve needs gradio: pip install "gradio>=6".') from None
        model, info = load_run(args.ckpt, args.weights, process, args.dataset)
        title = f"{info['method']} ({info['config']['backbone']})"
        page = serve_page(gradio, model, title, folder)
        try:
            page.launch(server_name="127.0.0.1", server_port=args.port, share=False, max_file_size="20mb", quiet=True,
                        theme=gradio.themes.Default(font="system-ui", font_mono="monospace"), prevent_thread_lock=True)
        except OSError:
            raise UserError(f"--port {args.port or '7860 to 7959'} is in use; give another.") from None
        process.say(f"{title}: {page.local_url} (Ctrl-C ends it)")
        page.block_thread()


def serve_page(gradio, model, title: str, folder: str):
    """The page, a gradio.Blocks; what it draws goes to a folder."""
    def answer(photograph: str | None, text: str, threshold: float):
        """-> the overlay, what was found, and their files"""
        try:
            sentences = [data.check_sentence(line) for line in text.splitlines() if line.strip()]
            if photograph is None or not sentences:
                raise UserError("a photograph and a sentence are needed.")
            image, here = data.read_image(photograph), Path(tempfile.mkdtemp(dir=folder))
            answers = [ask(model, image, s, threshold if model.task == "mask" else None) for s in sentences]
            said = write_answers(image, answers, sentences, here / "overlay.png", here / "mask.png")
        except UserError as e:
            said = str(e).replace(str(photograph), Path(photograph or "").name)
            raise gradio.Error(said, print_exception=False) from None
        said = [re.sub(", mask: .*", "", line) for line in said]
        return str(here / "overlay.png"), "\n".join(said), sorted(map(str, here.iterdir()))

    with gradio.Blocks(title=title, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column():
                given = [gradio.Image(type="filepath", label="photograph", sources=["upload", "clipboard"]),
                         gradio.Textbox(lines=3, label="sentences, one in a line"),
                         gradio.Slider(0.05, 0.95, getattr(model.c, "threshold", 0.5), step=0.01, label="threshold",
                                       visible=model.task == "mask")]
                button = gradio.Button("Mark", variant="primary")
            with gradio.Column():
                shown = [gradio.Image(label="answer", format="png"), gradio.Textbox(label="found", lines=2),
                         gradio.File(label="to take", file_count="multiple")]
        for event in button.click, given[2].release, given[1].submit:
            event(answer, given, shown, concurrency_id="model", concurrency_limit=1, api_name=False)
    return page


def picture_format(path: Path, flag: str = "--out") -> str:
    """The format that a file name asks for. Raises UserError for a name Pillow cannot write."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in ("PNG", "JPEG", "WEBP"):
        raise UserError(f"{flag} {path}: a name that ends in .png, .jpg or .webp is needed.")
    return name


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--ckpt", metavar="RUN", help="a run folder or a checkpoint file of train.py, a checkpoint of "
                   "DETRIS's or ETRIS's authors, or hf:OWNER/REPOSITORY/FILE, one on the Hugging Face hub")
    p.add_argument("--weights", help="towers, if they lie elsewhere than when the run was trained")
    p.add_argument("--dataset", help=f"default: the run's; one of {', '.join(data.DATASETS)}")
    p.add_argument("--data-root", help="folder of a REFER data set; default: the run's")
    p.add_argument("--split", default="val", help="val, testA, testB, test, train, or all (but train)")
    p.add_argument("--shuffle-text", action="store_true", help="give each picture another's sentence")
    p.add_argument("--protocol", default="default", choices=PROTOCOLS,
                   help="; ".join(f"{name}: {what}" for name, what in PROTOCOLS.items()))
    p.add_argument("--by-size", action="store_true", help="also by the share of the photograph that the object takes")
    p.add_argument("--workers", type=int, default=0, help="processes that read data")
    p.add_argument("--share", default="on", choices=("on", "off", "compare"),
                   help="boxes: a picture is encoded once for all its sentences; off: for each; compare: both, timed")
    p.add_argument("--report", metavar="FILE.html", help="a page with figures, charts and examples, in one file")
    p.add_argument("--report-count", type=int, default=60, help="its examples: the best, the median and the worst")
    p.add_argument("--draw", metavar="FILE.png", help="draw predictions over the split's pictures")
    p.add_argument("--draw-count", type=int, default=12)
    p.add_argument("--image", help="a picture of yours, with --text")
    p.add_argument("--text", action="append", help="a sentence about it; again for another, in another colour")
    p.add_argument("--attention", metavar="FILE.png", help="with --image: what the model looks at, part by part")
    p.add_argument("--serve", action="store_true", help="a page on 127.0.0.1 for photographs of yours (needs gradio)")
    p.add_argument("--port", type=int, help="of --serve; default: a free one from 7860 on")
    p.add_argument("--out", metavar="FILE.png", help="the picture with its mask or box")
    p.add_argument("--mask", metavar="FILE.png", help="the mask alone, in the picture's size")
    p.add_argument("--efficiency", action="store_true", help="parameters, FLOPs, bytes for backward, of the optimizer "
                   "and of a checkpoint")
    p.add_argument("--time", type=int, nargs="?", const=5, default=0, metavar="N",
                   help="with --efficiency: seconds too, the median of N times (5)")
    p.add_argument("--tables", action="store_true", help="the papers' tables: how to train a row, our sizes and theirs")
    p.add_argument("--vary", default=[], type=lambda s: s.replace("-", "_").split(","), metavar="SETTING,...",
                   help="with --efficiency: a row for each value of tune, insertion, ...")
    p.add_argument("--method", choices=METHODS)
    p.add_argument("--backbone")
    p.add_argument("--variant")
    p.add_argument("--tune")
    p.add_argument("--json", metavar="FILE", help="- for standard output, and then nothing else goes there")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    known, _ = p.parse_known_args(argv)
    if known.efficiency and known.method:
        common.add_config_flags(p, load_method(known.method).Config)
    if not known.efficiency:  # with it these two are settings of the method
        p.add_argument("--threshold", type=float, help="on the sigmoid, for --image; default: the method's")
        p.add_argument("--batch-size", type=int, default=16)
    args = p.parse_args(argv)
    if bool(args.ckpt) + args.efficiency + args.tables != 1:
        p.error("give one of --ckpt RUN, --efficiency and --tables")
    mode = "ckpt" if args.ckpt else "tables" if args.tables else "efficiency"
    names = {"method", "backbone", "variant", "tune"}
    settings = {k for k in vars(args) if p.get_default(k) is common.MISSING}
    fits = dict(ckpt=vars(args).keys() - names - {"vary", "time"}, tables={"method"},
                efficiency=names | {"vary", "time"} | settings)[mode]
    for name, value in vars(args).items():
        if value != p.get_default(name) and name not in fits | {mode, "json", "device"}:
            p.error(f"--{name.replace('_', '-')} does not go with --{mode}" +
                    ("; a checkpoint knows its own" if name in names else ""))
    for name in ("backbone", "variant") if args.efficiency and not args.method else ():
        if getattr(args, name):
            p.error(f"--{name} goes with --method")
    methods = [load_method(n) for n in ([args.method] if args.method else METHODS if args.tune else [])]
    for name in ("backbone", "variant", "tune") if methods else ():
        known = dict.fromkeys(n for m in methods for n in getattr(m, name.upper() + "S"))
        if getattr(args, name) not in (None, *known):
            p.error(f"--{name} {getattr(args, name)}: there are {', '.join(known)}")
    of_split = dict(report=bool(args.report), share=args.share != "on", by_size=args.by_size,
                    protocol=args.protocol != "default")
    if any(of_split.values()) and (not args.ckpt or args.image):
        p.error(f"--{max(of_split, key=of_split.get).replace('_', '-')} goes with a split's metrics")
    if args.ckpt and args.threshold is not None and not args.image:
        p.error("--threshold goes with --image; metrics are measured at the method's own")
    alone = {"ckpt", "serve", "port", "weights", "dataset", "device"}
    if args.serve and any(v != p.get_default(k) for k, v in vars(args).items() if k not in alone):
        p.error("--serve goes with --ckpt and --port alone")
    for name, wanted, there in (("attention", "image", args.image), ("port", "serve", args.serve)):
        if getattr(args, name) is not None and not there:
            p.error(f"--{name} goes with --{wanted}")
    if args.attention and len(args.text or []) > 1:
        p.error("--attention goes with one --text")
    if args.port is not None and not 0 < args.port < 65536:
        p.error(f"--port {args.port}: 1 to 65535")
    if (args.image is None) != (args.text is None):
        p.error("--image and --text go together")
    if args.ckpt and args.threshold is not None and not 0 < args.threshold < 1:
        p.error(f"--threshold {args.threshold}: a number between 0 and 1")
    if args.ckpt and args.batch_size < 1 or args.workers < 0 or args.time < 0 or \
            min(args.draw_count, args.report_count) < 1:
        p.error("--batch-size, --draw-count and --report-count must be positive, --workers and --time not negative")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    backbone = args.backbone
    if args.ckpt and not is_released(args.ckpt):
        backbone = common.read_checkpoint(args.ckpt, tensors=False)[0]["config"].get("backbone")
    process = common.start(tiny=str(backbone).startswith("tiny"), device=args.device)
    if args.efficiency:
        costs.show_efficiency(args, process)
    elif args.tables:
        costs.show_tables(args, process)
    elif args.image or args.serve:
        if process.rank == 0:
            predict(args, process) if args.image else serve(args, process)
    else:
        measure(args, process)


if __name__ == "__main__":
    common.run_command(main)
