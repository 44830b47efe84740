"""Measures a trained model, or asks it about one picture.

    python evaluate.py --ckpt RUN --split all              # oIoU, mIoU, Pr@X of every split; of boxes Acc@0.5, mIoU
    torchrun --nproc_per_node 2 evaluate.py --ckpt RUN --split testA       # the same numbers
    python evaluate.py --ckpt RUN --shuffle-text                           # each picture with another's sentence
    python evaluate.py --ckpt RUN --by-size                                # also by the size of the object
    python evaluate.py --ckpt RUN --image a.jpg --text "left dog" --out a.png
    python evaluate.py --efficiency --method dcris --backbone dinov2-base --vary tune
    python evaluate.py --tables                            # the papers' tables: commands, our sizes beside theirs

Every sentence of a split counts once, at the photograph's own resolution, however many processes there are.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import common
import data
from common import Process, UserError

METHODS = ("dcris", "etris", "m2ist", "shared_ris")
SIZES = 0, 1, 2, 5, 10, 20, 50, 100  # of objects, in per cent of the photograph
PROTOCOLS = {
    "default": "every sentence; logits resized to the photograph (bilinear), boxes cut at its border",
    "released": "every sentence; as the authors' code, probabilities are resized twice (bicubic, with align_corners, "
                "then an affine map) and boxes not cut",
    "released-val": "as their code while it trains: as released, and of each object only the first sentence",
}
MAIN_METRIC = dict(mask="mIoU", box="Acc@0.5")  # what the best step is chosen by


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
                   protocol: str = "default", stop: common.StopSignal | None = None) -> dict:
    """Metrics of a split (see common.mask_metrics and box_metrics), or of its first `most` sentences; with `by_size`
    also a list of them, for objects of so much of the photograph's area (of whose boxes, where the answer is a box).

    They are the same on every process, for any number of processes, and with and without `share`: whether a picture is
    encoded once for all its sentences, where a method can. With `intervals` their 95 % bootstrap intervals are among
    them. `protocol`: see PROTOCOLS. Empty where a signal came (`stop`) on any process.
    """
    items = data.EvalSet(source, model.preprocess, most, first=protocol == "released-val")
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


def measure_split(model, source, process: Process, args: argparse.Namespace) -> dict:
    """Metrics, and with --share compare the seconds that they take either way."""
    if args.share != "on" and not hasattr(model, "image_features"):
        raise UserError(f"--share {args.share}: this method reads pictures together with the sentence, each time.")
    if args.share == "compare":  # a first batch, which takes longer, is not timed
        evaluate_split(model, source, process, args.batch_size, args.workers, most=args.batch_size)
    took = {}
    for share in dict(on=[True], off=[False], compare=[False, True])[args.share]:
        begin = time.perf_counter()
        row = evaluate_split(model, source, process, args.batch_size, args.workers, args.shuffle_text, share=share,
                             by_size=args.by_size, intervals=True, protocol=args.protocol)
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
    model, info = load_run(args.ckpt, args.weights, process)
    name = args.dataset or info["dataset"]
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
    trained = data.MIXED if info["dataset"] == "mixed" else (info["dataset"],)
    coco = [n for n in data.SPLITS if n.startswith("refcoco")]
    if name in coco and set(trained) & set(coco) and name not in trained:
        process.say(f"note: the model was trained on {info['dataset']}, whose train split may show photographs of "
                    f"{name}'s val and test splits; mixed leaves out those of {', '.join(data.MIXED)}")
    for split, source in zip(splits, sources):
        about = dict(method=info["method"], backbone=info["config"]["backbone"], dataset=name, split=split,
                     protocol=args.protocol)
        if args.shuffle_text:
            about["text"] = "shuffled"
        row = measure_split(model, source, process, args)
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
            draw_examples(args.draw, model, sources[0], args.draw_count)


@torch.no_grad()
def draw_examples(file: str, model, source, count: int) -> None:
    """A sheet of `count` expressions spread over a split: prediction above truth, sentence and IoU."""
    items, pictures = data.EvalSet(source, model.preprocess), []
    sentences = items.sentences()
    for k in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int):
        sentence, record = sentences[k], items.record(int(k))
        answer = ask(model, record.image, sentence)
        if model.task == "mask":
            truth, draw = record.mask, common.overlay
            i, u = common.intersection_union(*map(torch.from_numpy, (answer["mask"], truth)))
            iou = i / max(u, 1)
        else:
            truth, draw, iou = record.box, common.overlay_box, common.box_iou(answer["box"], record.box)
        pair = [draw(record.image, what, text, least=320) for what, text in
                ((answer[model.task], f"{sentence} (IoU {100 * iou:.0f})"), (truth, "truth"))]
        for picture in pair:
            picture.thumbnail((480, 480))
        pictures.append(common.grid(pair, columns=1))
    with common.writing(file) as temporary:
        common.grid(pictures, columns=6).save(temporary, format="PNG")


@torch.no_grad()
def ask(model, image: np.ndarray, sentence: str, threshold: float | None = None) -> dict:
    """What a model says of one picture (H, W, 3) and one sentence: its box in pixels, or its mask (H, W) with
    threshold, area, the box around it (None for an empty one) and mean confidence."""
    device, pre = next(model.parameters()).device, model.preprocess
    output = model(data.to_canvas(image, pre)[None].to(device), model.tokenize([sentence]).to(device))[0].float().cpu()
    if model.task == "box":
        return dict(box=[round(v, 2) for v in data.box_from_canvas(output, image.shape[:2], pre)])
    threshold = model.c.threshold if threshold is None else threshold
    logits = data.from_canvas(output[0], image.shape[:2], pre)
    mask, probability = predicted_mask(logits, threshold).numpy(), logits.sigmoid().numpy()
    return dict(mask=mask, area=int(mask.sum()), box=[int(v) for v in data.box_of(mask)] if mask.any() else None,
                confidence=round(float(probability[mask].mean()), 4) if mask.any() else None, threshold=threshold)


def predict(args: argparse.Namespace, process: Process) -> None:
    """One picture and one sentence."""
    sentence = data.check_sentence(args.text)
    image = data.read_image(args.image)
    model, info = load_run(args.ckpt, args.weights, process)
    if model.task == "box" and (args.mask or args.threshold is not None):
        raise UserError(f"--{'mask' if args.mask else 'threshold'}: {info['method']} answers with a box, not a mask.")
    answer = ask(model, image, sentence, args.threshold)
    out = Path(args.out or Path(args.image).stem + "_" + info["method"] + ".png")
    drawn = common.overlay if model.task == "mask" else common.overlay_box
    with common.writing(out) as temporary:
        drawn(image, answer[model.task], sentence).save(temporary, format=picture_format(out))
    result = dict(image=args.image, text=sentence, width=image.shape[1], height=image.shape[0], overlay=str(out),
                  method=info["method"]) | answer
    found = f"box {answer['box']}" if answer["box"] else "nothing"
    if model.task == "mask":
        result["mask"] = str(args.mask or out.with_name(out.stem + "_mask.png"))
        with common.writing(result["mask"]) as temporary:
            Image.fromarray(answer["mask"].astype(np.uint8) * 255).save(temporary, format="PNG")
        if answer["box"]:
            found = f"{answer['area']} pixels, {found}, mean confidence {answer['confidence']}"
    if args.json != "-":
        print(f"{sentence!r}: {found}. Drawn: {out}" + (f", mask: {result['mask']}" if "mask" in result else ""))
    common.write_result(args.json, result)


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
        if args.tune not in (None, *method.TUNES):
            continue  # Shared-RIS has no adapters beside which a baseline could stand
        for backbone in [args.backbone] if args.backbone else method.BACKBONES:
            names, same = (backbone, args.variant or method.VARIANTS[0], "refcoco"), []
            for flags in varied(args, method, names):
                c = method.config(*names, **flags)
                process.say(f"building {name} {backbone} (--tune {c.tune}) with random weights ...")
                model = common.build(method, c, "random", 0).to(process.device)
                about = dict(method=name, backbone=backbone, variant=c.variant, tune=c.tune)
                about |= {k: getattr(c, k) for k in args.vary} | dict(image_size=model.preprocess.size)
                same.append(about | common.efficiency(model, args.time) | dict(paper=common.printed(method, c)))
            rows += beside_full(same)
    if process.rank == 0:
        if args.json != "-":
            for key in dict.fromkeys((row["method"], row["backbone"]) for row in rows):
                print_efficiency([row for row in rows if (row["method"], row["backbone"]) == key])
        common.write_result(args.json, rows)


def beside_full(rows: list[dict]) -> list[dict]:
    """With each row's share of what full tuning keeps for backward, where that is among them, and of its memory in the
    paper."""
    full = next((row for row in rows if row["tune"] == "full"), None)
    for row in rows if full else ():
        row["saved_percent_of_full"] = round(100 * row["saved_bytes_per_image"] / full["saved_bytes_per_image"], 1)
        theirs = [r["paper"].get("GB at 64") for r in (row, full)]
        row["paper_memory_percent_of_full"] = round(100 * theirs[0] / theirs[1], 1) if all(theirs) else None
    return rows


def print_efficiency(rows: list[dict]) -> None:
    """One backbone of a method, for people."""
    hidden = "method", "backbone", "variant", "params_total", "device", "paper", "parts"
    first = rows[0]
    print(f"{first['method']} {first['backbone']}" + f" ({first['variant']})" * (first["variant"] != first["method"]) +
          f", on {first['device']}; bytes and seconds are those of one image; 1 multiply-add = 2 FLOPs")
    hidden += tuple(k for k in first if all(row[k] is None for row in rows))
    common.print_table([{k: "" if v is None else v for k, v in row.items() if k not in hidden} for row in rows])
    for n, row in enumerate(rows, 1):
        which = f"  row {n}: " if len(rows) > 1 else "  "
        print(which + f"{row['params_total']:,} parameters: " + ", ".join(map(part_line, *zip(*row["parts"].items()))))
        if row["paper"]:
            print(which + "the paper: " + ", ".join(f"{k} {v}" for k, v in row["paper"].items()))
    print()


def part_line(name: str, part: dict) -> str:
    said = ([f"{part['params']:,}"] if "params" in part else []) + (
        [f"{part['gflops']:.2f} GFLOPs"] if "gflops" in part else [])
    return f"{name} {' with '.join(said)}"


def show_tables(args: argparse.Namespace, process: Process) -> None:
    """Every row of the papers' tables that describes a configuration."""
    rows = [row for name in ([args.method] if args.method else METHODS) for row in table_rows(name)]
    if process.rank == 0:
        if args.json != "-":
            for key in dict.fromkeys((row["method"], row["table"]) for row in rows):
                print_rows([row for row in rows if (row["method"], row["table"]) == key])
            print("Our sizes are exact for the command; a * has a note. The figures behind them are the papers', "
                  "measured by their authors; columns with + or g are of --dataset refcoco+ and refcocog_umd or "
                  "refcocog_google. For DATA see the README.")
        common.write_result(args.json, rows)


@lru_cache(maxsize=None)
def row_sizes(name: str, c) -> dict[str, float]:
    """common.sizes of a configuration, built on the meta device; `percent` of the towers that is tuned, and for
    Shared-RIS, whose tables have them, multiply-adds."""
    with torch.device("meta"):
        model = load_method(name).Model(c, "random")
    sizes = common.sizes(model)
    sizes["percent"] = 100 * sizes["tuned"] / sizes["backbone"]
    if name == "shared_ris":
        sizes |= {f"{part}_gmacs": n / 2 for part, n in common.forward_gflops(model).items()}
    return sizes


def table_rows(paper: str) -> list[dict]:
    """The rows of a paper's tables."""
    out = []
    for number, table in load_method(paper).TABLES.items():
        for row in table.rows:
            name = row.flags.get("method", paper)
            sizes = row_sizes(name, common.row_config(load_method(name), row, table)[0])
            match = all(common.agrees(sizes[k], p) for k, p in row.printed.items()) if row.printed else None
            out.append(dict(method=paper, table=number, row=row.name, command=common.train_command(paper, row, table),
                            ours={k: round(sizes[k], 2) for k in row.printed or ("tuned", "head")}, printed=row.printed,
                            match=match, note=row.note, quoted=dict(zip(table.columns, row.quoted))))
    return out


def print_rows(rows: list[dict]) -> None:
    """A table, for people: the sizes, the figures that the paper quotes, the command; notes below."""
    print(f"{rows[0]['method']}, Table {rows[0]['table']}")
    shown = []
    for row in rows:
        sizes = ", ".join(f"{k} {n:,}" for k, n in row["ours"].items())
        theirs = ", ".join(row["printed"].values()) or "-"
        same = "" if not row["printed"] else "=" if row["match"] else "differs"
        shown.append({"row": row["row"], "ours": sizes, "printed": theirs, "": same + "*" * bool(row["note"])}
                     | {k: "" if v is None else f"{v:.2f}" for k, v in row["quoted"].items()}
                     | {"command": row["command"]})
    common.print_table(shown, left=("row", "command"))
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        print("  * " + ", ".join(row["row"] for row in rows if row["note"] == note) + ": " + note)
    print()


def varied(args: argparse.Namespace, method, names: tuple[str, str, str]) -> list[dict]:
    """The flags of a configuration, and with --vary also those of one for each other value of these settings."""
    flags = common.config_flags(args, method.Config) | dict(tune=args.tune or method.TUNES[0])
    out = [flags]
    for name in args.vary:
        values = [t for t in method.TUNES if "+" not in t] if name == "tune" else common.choices(method.Config, name)
        out += [flags | {name: v} for v in values if v != getattr(method.config(*names, **flags), name)]
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--ckpt", metavar="RUN", help="a run folder or a checkpoint file of train.py")
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
    p.add_argument("--draw", metavar="FILE.png", help="draw predictions over the split's pictures")
    p.add_argument("--draw-count", type=int, default=12)
    p.add_argument("--image", help="a picture of yours, with --text")
    p.add_argument("--text", help="a sentence about it")
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
    of_split = dict(share=args.share != "on", by_size=args.by_size, protocol=args.protocol != "default")
    if any(of_split.values()) and (not args.ckpt or args.image):
        p.error(f"--{max(of_split, key=of_split.get).replace('_', '-')} goes with a split's metrics")
    if args.ckpt and args.threshold is not None and not args.image:
        p.error("--threshold goes with --image; metrics are measured at the method's own")
    if (args.image is None) != (args.text is None):
        p.error("--image and --text go together")
    if args.ckpt and args.threshold is not None and not 0 < args.threshold < 1:
        p.error(f"--threshold {args.threshold}: a number between 0 and 1")
    if args.ckpt and args.batch_size < 1 or args.workers < 0 or args.draw_count < 1 or args.time < 0:
        p.error("--batch-size and --draw-count must be positive, --workers and --time not negative")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    backbone = args.backbone
    if args.ckpt:
        backbone = common.read_checkpoint(args.ckpt, tensors=False)[0]["config"].get("backbone")
    process = common.start(tiny=str(backbone).startswith("tiny"), device=args.device)
    if args.efficiency:
        show_efficiency(args, process)
    elif args.tables:
        show_tables(args, process)
    elif args.image:
        if process.rank == 0:
            predict(args, process)
    else:
        measure(args, process)


if __name__ == "__main__":
    common.run_command(main)
