"""A rehearsal at full scale, without the data: makes a folder of RefCOCO's size, and measures the commands on it.

    python docs/rehearsal.py FOLDER --share 0.1              # makes a tenth: photographs, objects and sentences are drawn
    python docs/rehearsal.py FOLDER --share 0.1 --measure    # and measures all commands on it (Linux, macOS)
    python docs/rehearsal.py FOLDER --measure open,loader    # the whole of it; these measurements alone

Prints a row of a table (Markdown) for each command: seconds, CPU seconds of all its processes together, and the peak
memory of the largest. A failed command, or a result that differs from the one it must equal, ends it with status 1.
docs/scale.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent.parent
SPLITS = {  # RefCOCO's photographs, objects and sentences
    "train": (16994, 42404, 120624), "val": (1500, 3811, 10834), "testA": (750, 1975, 5657), "testB": (750, 1810, 5095)}
OTHERS = 7  # objects of a photograph that no sentence refers to: instances.json has them too
WIDTH, HEIGHT = 640, 480
WORDS = ("left", "right", "front", "far"), ("red", "blue", "tall", "small"), ("man", "dog", "chair", "bus")
LOADED = 1280  # objects that are loaded to measure it


# The folder


def make(folder: Path, share: float) -> None:
    """Writes refs(unc).p, instances.json and the photographs. The same share gives the same files."""
    photos, rng = folder / "images" / "train2014", np.random.default_rng(0)
    photos.mkdir(parents=True)
    (folder / "refcoco").mkdir()
    texture = Image.fromarray(rng.integers(0, 255, (80, 100, 3), dtype=np.uint8)).resize((3 * WIDTH, 3 * HEIGHT))
    images, annotations, refs, sent_id = [], [], [], 0
    for split, row in SPLITS.items():
        n_photos, n_objects, n_sentences = (max(1, int(n * share)) for n in row)
        for n in range(n_photos):
            photo = dict(id=len(images) + 1, file_name=f"COCO_train2014_{len(images) + 1:012d}.jpg", width=WIDTH,
                         height=HEIGHT)
            images.append(photo)
            x, y = rng.integers(2 * WIDTH), rng.integers(2 * HEIGHT)
            picture = texture.crop((x, y, x + WIDTH, y + HEIGHT))
            for k in [*range(n, n_objects, n_photos), *[None] * OTHERS]:
                annotation = draw_object(picture, rng) | dict(id=len(annotations) + 1, image_id=photo["id"])
                annotations.append(json.dumps(annotation))  # as text, which takes less memory
                if k is None:
                    continue
                count = n_sentences * (k + 1) // n_objects - n_sentences * k // n_objects
                sentences = [sentence(sent_id + j, rng) for j in range(count)]
                sent_id += count
                refs.append(dict(ref_id=len(refs), ann_id=annotation["id"], image_id=photo["id"], split=split,
                                 category_id=1, sentences=sentences, sent_ids=[s["sent_id"] for s in sentences],
                                 file_name=photo["file_name"].replace(".jpg", f"_{annotation['id']}.jpg")))
            picture.save(photos / photo["file_name"], quality=80)
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "refcoco" / "instances.json").write_text(
        f'{{"images": {json.dumps(images)}, "annotations": [{", ".join(annotations)}]}}')


def draw_object(picture: Image.Image, rng: np.random.Generator) -> dict:
    """A polygon of 12 to 60 corners about a centre. -> its annotation"""
    corners, radius = rng.integers(12, 61), rng.uniform(20, 110)
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    r = radius * rng.uniform(0.85, 1, corners)
    x = (rng.uniform(radius, WIDTH - radius) + r * np.cos(angle)).round(2)
    y = (rng.uniform(radius, HEIGHT - radius) + r * np.sin(angle)).round(2)
    points = np.stack([x, y], 1).ravel().tolist()
    ImageDraw.Draw(picture).polygon(points, fill=tuple(rng.integers(0, 256, 3).tolist()))
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
    return dict(segmentation=[points], area=round(area, 2), bbox=[round(v, 2) for v in box], category_id=1, iscrowd=0)


def sentence(sent_id: int, rng: np.random.Generator) -> dict:
    words = [some[n] for some, n in zip(WORDS, rng.integers(4, size=3))]
    return dict(sent_id=sent_id, sent=" ".join(words), raw=" ".join(words).title(), tokens=words)


# The measurements: each gives rows of (what, its figures, a note)

OPEN = """
import sys, data
for split in "train", "val":
    data.open_dataset("refcoco", split, sys.argv[1])
"""
LOAD = """
import sys, time, numpy, torch, common, data
items = data.TrainSet(data.open_dataset("refcoco", "train", sys.argv[1]), common.Preprocess(448))
some = [(0, int(i)) for i in numpy.random.default_rng(0).permutation(len(items))[:int(sys.argv[2])]]
begin, cpu = time.perf_counter(), time.process_time()
for batch in torch.utils.data.DataLoader(items, batch_size=32, collate_fn=data.collate, sampler=some):
    pass
seconds, cpu = ((b - a) / len(some) for a, b in ((begin, time.perf_counter()), (cpu, time.process_time())))
print(f"{len(some):,} objects: {1 / cpu:.1f} in a CPU second; scaled to the {len(items):,} of an epoch: "
      f"{seconds * len(items):.0f} s, {cpu * len(items):.0f} CPU s")
"""


def command(folder: Path, *words, until: str | None = None) -> dict:
    """Runs Python with these words. At the line of its output that begins with `until`, sends SIGTERM. -> the seconds it
    took, or until that line; CPU seconds; peak memory in MiB; its last line"""
    begin, reached, said = time.perf_counter(), None, [""]
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=HERE, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")})
    for line in process.stdout:
        said.append(line.rstrip())
        if until and reached is None and line.startswith(until):
            reached = time.perf_counter() - begin
            process.send_signal(signal.SIGTERM)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (128 + signal.SIGTERM if reached else 0) or until and not reached:
        raise SystemExit("\n".join([f"failed ({process.returncode}): {' '.join(map(str, words))[:300]}", *said[-20:]]))
    return dict(seconds=reached or time.perf_counter() - begin, cpu=used.ru_utime + used.ru_stime,
                mib=used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), said=said[-1])


def torchrun(*flags) -> list:
    return ["-m", "torch.distributed.run", *flags]


def training(data_root: Path, out: Path, *flags) -> list:
    return ["train.py", "--method", "dcris", "--backbone", "tiny", "--weights", "random", "--dataset", "refcoco",
            "--data-root", data_root, "--batch-size", 32, "--log-every", 1, "--device", "cpu", "--out", out, *flags]


def opening(folder: Path):
    shutil.rmtree(folder / "cache", ignore_errors=True)
    yield "`import data` alone", command(folder, "-c", "import data"), ""
    yield "first opening of train and val", command(folder, "-c", OPEN, folder), "the index is built"
    yield "second opening", command(folder, "-c", OPEN, folder), "the index is read"


def check(folder: Path):
    yield "`data.py --check`", command(folder, "data.py", "--check", "--data-root", folder), "no problems"


def start(folder: Path):
    out = folder / "runs" / "start"
    shutil.rmtree(out, ignore_errors=True)
    yield ("`train.py` to its first step", command(folder, *training(folder, out), until="step 1/"),
           "CPU seconds until it has saved and left")


def loader(folder: Path):
    figures = command(folder, "-c", LOAD, folder, LOADED)
    yield "loader alone, 448 px, no workers", figures, figures["said"]


def evaluation(folder: Path):
    words, files = ["evaluate.py", "--ckpt", folder / "runs" / "start", "--device", "cpu", "--json"], []
    for n, launch in (1, []), (2, torchrun("--standalone", "--nproc_per_node", 2)):
        files.append(folder / "runs" / f"val-{n}.json")
        yield f"`evaluate.py`, val, processes: {n}", command(folder, *launch, *words, files[-1]), (
            f"{json.loads(files[-1].read_text())['n']:,} sentences")
    must_be_same("the two evaluations", *(f.read_bytes() for f in files))


def resuming(folder: Path):
    small = small_folder(folder)
    whole, broken = small / "runs" / "whole", small / "runs" / "broken"
    yield "three epochs, unbroken", command(folder, *training(small, whole, "--epochs", 3)), "share 0.01"
    yield "stopped in the second epoch", command(folder, *training(small, broken, "--epochs", 3), until="step 18/"), ""
    figures = command(folder, *training(small, broken, "--epochs", 3, "--resume"))
    must_be_same("the unbroken and the resumed run", result(whole), result(broken))
    yield "continued by `--resume`", figures, "the same to the bit"


def machines(folder: Path):
    small, port = small_folder(folder), socket.create_server(("127.0.0.1", 0))
    one, two = small / "runs" / "one-machine", small / "runs" / "two-machines"
    yield "one machine, two processes", command(folder, *torchrun("--standalone", "--nproc_per_node", 2), *training(
        small, one, "--epochs", 3)), "share 0.01"
    address = f"127.0.0.1:{port.getsockname()[1]}"
    port.close()
    agent = torchrun("--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", "rehearsal",
                     "--rdzv_endpoint", address, "--local_addr", "127.0.0.1")
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda _: command(folder, *agent, *training(small, two, "--epochs", 3)), range(2))
    must_be_same("one machine and two", result(one), result(two))
    yield "two machines, a process each", dict(seconds=max(a["seconds"], b["seconds"]), cpu=a["cpu"] + b["cpu"],
                                               mib=max(a["mib"], b["mib"])), "the same to the bit"


def small_folder(folder: Path) -> Path:
    small = folder / "small"
    if not small.exists():
        make(small, 0.01)
    shutil.rmtree(small / "runs", ignore_errors=True)
    return small


def result(run: Path) -> tuple:
    """(log without times, checksums of the tensors that --resume needs: weights, optimizer, random generators)"""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    with zipfile.ZipFile(run / "resume.pt") as file:
        return ([[line.get(k) for k in ("step", "loss", "val")] for line in lines],
                {i.filename: i.CRC for i in file.infolist() if "/data/" in i.filename})


def must_be_same(what: str, a, b) -> None:
    if a != b:
        raise SystemExit(f"{what} differ")


MEASUREMENTS = dict(open=opening, check=check, start=start, loader=loader, evaluate=evaluation, resume=resuming,
                    machines=machines)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=lambda text: Path(text).resolve())
    p.add_argument("--share", type=float, default=1, help="at most 0.1, or 1: --check expects the published sizes of more")
    p.add_argument("--measure", nargs="?", const=",".join(MEASUREMENTS), type=lambda text: text.split(","),
                   help=f"{', '.join(MEASUREMENTS)} (default: all)")
    args = p.parse_args(argv)
    if not (0 < args.share <= 0.1 or args.share == 1) or not set(args.measure or ()) <= set(MEASUREMENTS):
        p.error(f"--share must be at most 0.1, or 1; --measure some of {', '.join(MEASUREMENTS)}")
    if args.measure is None:
        make(args.folder, args.share)
        return
    print("| | seconds | CPU seconds | peak MiB | load | |\n|---|---|---|---|---|---|")
    for name in args.measure:
        for what, figures, note in MEASUREMENTS[name](args.folder):
            print(f"| {what} | {figures['seconds']:.1f} | {figures['cpu']:.1f} | {figures['mib']:,.0f} | "
                  f"{os.getloadavg()[0]:.1f} | {note} |", flush=True)


if __name__ == "__main__":
    main()
