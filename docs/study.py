"""The papers in miniature: what is frozen, what is trained, and what each part of the adapters brings.

    python docs/study.py                             # four methods, three seeds
    python docs/study.py --method dcris --seeds 0    # one method, one seed
    python docs/study.py --method etris --rows frozen,method --dataset shapes-shift --steps 300

For each seed the tiny towers of a method are pretrained without the task (toolbox/pretrain.py). Every row of a seed is
then one run of train.py on --dataset, with the same towers, initial head and order of batches. There is one
validation, at the last step: no step is chosen by what it is measured on. Each row is measured on --pictures of val,
with two sentences each, and compared with another row, sentence by sentence. Intervals are 95 % bootstrap intervals:
seeds are drawn anew, then the pictures of each. With three seeds they tend to be too narrow.

The same command goes on where it was stopped. --out gets the runs, study.json, a plot of each method (pip install
matplotlib), and 3 GB of features that M2IST's frozen encoders give.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import common  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from common import ALONE, METHODS, UserError, load_method  # noqa: E402
from data import SHAPE_SETS  # noqa: E402
from toolbox import costs, tables  # noqa: E402
from toolbox.cli import Parser, integers, one_of  # noqa: E402
from toolbox.shapes import Shapes  # noqa: E402

# Of DCRIS and ETRIS fewer than the first commands have. M2IST is on a plateau in its first 1,000 steps.
STEPS = dict(dcris=500, etris=500, m2ist=4000, shared_ris=1800)
COLUMN = dict(dcris="val", etris="oIoU", m2ist="val", shared_ris="mIoU")  # of the paper's tables
RESAMPLES = 2000


class Row(NamedTuple):
    name: str
    flags: dict                     # of train.py
    base: str = ""                  # the row that it is compared with
    paper: tuple[str, str] = ()     # the paper's table and row (toolbox/tables.py)


def main_rows(table: str, *names: str, frozen: tuple[str, str] = ()) -> list[Row]:
    """The rows of a paper's main table; `names`: what the paper calls them; `frozen`: where it is in another table."""
    tunes = ("method", "lora", "adapter", "full")
    return [Row("frozen", dict(tune="frozen"), paper=frozen or (table, "Fix Backbone")),
            *(Row(tune, dict(tune=tune), "frozen", (table, name)) for tune, name in zip(tunes, names))]


ROWS = {
    "dcris": [
        *main_rows("2", "DCRIS-B", "LoRA", "Adapter", "Full-Tuning"),
        Row("no-dense", {}, "method"),
        Row("others-words", {}, "method")],
    "etris": [
        *main_rows("2", "ETRIS", "LoRA", "Adapter", "Full-Tuning"),
        Row("bridger-2", dict(bridger_stages="2"), "method", ("4", "2 -> n, 1")),
        Row("bridger-4", dict(bridger_stages="4"), "method", ("4", "n -> n, 1")),
        Row("bridgers-2-3", dict(bridger_stages="2,3"), "method", ("4", "2 -> n, 2"))],
    "m2ist": [
        *main_rows("I", "M2IST", "LoRA", "Adapter", "Fully fine-tuning", frozen=("V", "(a) none")),
        Row("lea", dict(mha_adapter="none", ffn_adapter="lea"), "method", ("V", "(b) LEA")),
        Row("vea", dict(mha_adapter="none", ffn_adapter="vea"), "method", ("V", "(c) VEA")),
        Row("lea-vea", dict(mha_adapter="none"), "method", ("V", "(d) LEA, VEA")),
        Row("iea", dict(ffn_adapter="none"), "method", ("V", "(e) IEA")),
        Row("side-paper", dict(side="paper"), "method"),
        Row("side-added", dict(side="added"), "method"),
        Row("frozen-tokens", dict(tune="frozen"), "frozen")],
    "shared_ris": [
        Row("frozen", dict(tune="frozen")),
        Row("method", {}, "frozen", ("VII", "(b) Shared self-attention")),
        Row("cross", dict(fpn_fusion="cross"), "method", ("VII", "(b) Cross-attention")),
        Row("neither", dict(stages="", shared_layers="0"), "method", ("III", "neither")),
        Row("dual-encoder", {}, "method")],
}


# Rows that no setting makes


def without_dense(model: nn.Module) -> None:
    """DCRIS without the densely connected module: F_dense = F_v in Eq. 1."""
    for adapter in model.visual_adapters.values():
        adapter.dense = nn.Identity()


def others_words(model: nn.Module) -> None:
    """DCRIS whose vision adapters read the sentence of another picture. All else reads the picture's own."""
    def exchange(module, args):
        x, f_t, pad, grid = args
        half = len(f_t) // 2  # far enough: val has the two sentences of a picture beside each other
        return x, f_t.roll(half, 0), pad.roll(half, 0), grid

    for adapter in model.visual_adapters.values():
        adapter.register_forward_pre_hook(exchange)


def dual_encoder(model: nn.Module) -> None:
    """Shared-RIS whose encoder reads picture and sentence one without the other: they meet in the FPN."""
    encode = model.beit3.encode

    def apart(v, t, tokens):
        alone = encode(v, t[:, :0], tokens[:, :0]), encode(v[:, :0], t, tokens)
        return [(of_v, of_t) for (of_v, _), (_, of_t) in zip(*alone)]

    model.beit3.encode = apart


def tokens_too(model: nn.Module) -> None:
    """M2IST without adapters, whose head also receives the tokens that enter the encoders, as with --side public."""
    model.side_network = lambda e, branch: e.output + e.tokens


CHANGES = {"no-dense": without_dense, "others-words": others_words, "frozen-tokens": tokens_too,
           "dual-encoder": dual_encoder}


def changed(model_class: type, change: Callable[[nn.Module], None]) -> type:
    class Changed(model_class):
        def __init__(self, *args):
            super().__init__(*args)
            change(self)

    return Changed


# Runs


def scores_file(args: argparse.Namespace, method: str, row: Row, seed: int) -> Path:
    """In the folder of the run."""
    run = f"{method}-{args.dataset}-{args.steps or STEPS[method]}steps-{row.name}-{seed}"
    return args.out / run / f"val-{args.pictures}.json"


def train_and_measure(args: argparse.Namespace, method: str, row: Row, seed: int) -> None:
    """One run, or the rest of one. Its scores: for each sentence the IoU, for boxes whether it is 0.5 or more."""
    module, file, steps = load_method(method), scores_file(args, method, row, seed), args.steps or STEPS[method]
    if row.name in CHANGES:
        module.Model = changed(module.Model, CHANGES[row.name])
    flags = row.flags | dict(method=method, dataset=args.dataset, weights="pretrained", seed=seed, steps=steps,
                             val_every=steps, out=file.parent, workers=0, device="cpu")
    if method == "m2ist" and row.flags.get("tune", "method") in ("frozen", "method"):
        flags |= dict(cache_features=args.out / "features")
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    if train.main([*words, "--resume"]):
        raise KeyboardInterrupt  # it was stopped, and has saved
    model, _ = evaluate.load_run(str(file.parent), None, ALONE)
    details = []
    evaluate.evaluate_split(model, Shapes(args.dataset, "val", seed, images=args.pictures), ALONE, details=details)
    found = [one for _, one, _ in details]
    scores = common.mask_ious(found)[2] if model.task == "mask" else np.array(found) >= 0.5
    saved = costs.saved_bytes(model.train(), *costs.blank(model, 2)) // 2
    common.write_json(file, dict(trained=common.count(model, trainable=True), saved=saved,
                                 scores=scores.astype(float).round(4).tolist()))


def start(*words) -> None:
    """One of the programs, in a process of its own. Raises UserError with its last line where it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        said = (done.stderr.strip() or "no word").splitlines()[-1]
        raise UserError(f"{' '.join(map(str, words))} ended with {done.returncode}: {said}")


def all_runs(args: argparse.Namespace, method: str, rows: list[Row]) -> None:
    def run(one: tuple[Row, int]) -> None:
        file = scores_file(args, method, *one)
        if not file.exists():
            row, seed = one
            start(__file__, "--one", "--method", method, "--rows", row.name, "--seeds", seed, "--out", args.out,
                  "--dataset", args.dataset, "--pictures", args.pictures,
                  *(["--steps", args.steps] if args.steps else []))
        print(f"{file.parent.name}: {100 * np.mean(json.loads(file.read_text())['scores']):.1f}", file=sys.stderr,
              flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, [(row, seed) for row in rows for seed in args.seeds]))


# Results


def bootstrap(scores: dict[int, np.ndarray]) -> tuple[float, float]:
    """95 % interval of the mean over seeds and pictures; `scores`: of each seed's pictures, which are its own. Seeds
    are drawn anew with replacement, then the pictures of each that was drawn."""
    rng, values = np.random.default_rng(0), np.stack([scores[seed] for seed in sorted(scores)])
    seeds, pictures = values.shape
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(seeds, size=seeds)
        means.append(values[drawn[:, None], rng.integers(pictures, size=(seeds, pictures))].mean())
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def paper_figure(method: str, row: Row) -> float | None:
    """What the paper prints of a row, in its own metric on its own data."""
    if not row.paper:
        return None
    number, name = row.paper
    table = tables.TABLES[method][number]
    printed, = (tables.printed_cells(table, r)[1] for r in table.rows if r.name == name)
    return float(printed[COLUMN[method]])


def verdict(paper: float | None, low: float, high: float) -> str:
    """Whether an interval of a difference shows the sign that the paper's has."""
    if not paper:
        return ""
    if paper < 0:
        low, high = -high, -low
    return "seen" if low > 0 else "the opposite, at this size" if high < 0 else "not seen at this size"


def results(args: argparse.Namespace, method: str, rows: list[Row]) -> list[dict]:
    """Rows as study.json has them; per cent."""
    found, scores, papers = [], {}, {row.name: paper_figure(method, row) for row in ROWS[method]}
    for row in rows:
        runs = {seed: json.loads(scores_file(args, method, row, seed).read_text()) for seed in args.seeds}
        own = scores[row.name] = {seed: 100 * np.array(run["scores"]).reshape(args.pictures, -1).mean(1)
                                  for seed, run in runs.items()}
        means = {seed: float(values.mean()) for seed, values in own.items()}
        first = runs[args.seeds[0]]
        one = dict(method=method, row=row.name, flags=row.flags, dataset=args.dataset,
                   steps=args.steps or STEPS[method], trained=first["trained"], saved_bytes_per_image=first["saved"],
                   metric=evaluate.MAIN_METRIC[load_method(method).Model.task], pictures=args.pictures, seeds=means,
                   mean=float(np.mean(list(means.values()))), interval=bootstrap(own), base=row.base)
        if row.base in scores:
            paired = {seed: own[seed] - scores[row.base][seed] for seed in args.seeds}
            paper = papers[row.name], papers[row.base]
            paper = None if None in paper else round(paper[0] - paper[1], 2)
            interval = bootstrap(paired)
            one |= dict(difference=float(np.mean(list(paired.values()))), difference_interval=interval,
                        paper_difference=paper, verdict=verdict(paper, *interval))
        found.append(one)
    return found


def difference(row: dict) -> str:
    if "difference" not in row:
        return ""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(row["difference"], *row["difference_interval"])


def print_markdown(rows: list[dict]) -> None:
    first = rows[0]
    print(f"\n{first['method']} on {first['dataset']}: {first['steps']} steps, seeds "
          f"{', '.join(map(str, first['seeds']))}, {first['pictures']} pictures of val for each\n\n"
          f"| row | trained parameters | kept for backward, a picture | {first['metric']} | each seed | difference, "
          "95 % interval | the paper's difference | the paper's sign |\n|---|---|---|---|---|---|---|---|")
    for row in rows:
        to = f"{difference(row)} to {row['base']}" if "difference" in row else ""
        paper = "" if row.get("paper_difference") is None else f"{row['paper_difference']:+.2f}"
        print(f"| {row['row']} | {row['trained']:,} | {row['saved_bytes_per_image'] / 2**20:.2f} MiB | "
              f"{row['mean']:.1f} | {', '.join(f'{v:.1f}' for v in row['seeds'].values())} | {to} | {paper} | "
              f"{row.get('verdict', '')} |", flush=True)


def plot(rows: list[dict], file: Path) -> None:
    """Left: the rows with their intervals and seeds; right: over the bytes kept for backward."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = rows[0]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 2.4 + 0.36 * len(rows)), width_ratios=(3, 2),
                                            layout="constrained")
    for n, row in enumerate(rows):
        mean, (low, high), mib = row["mean"], row["interval"], row["saved_bytes_per_image"] / 2**20
        color = "tab:gray" if not row["base"] else "tab:blue" if row["base"] == "frozen" else "tab:orange"
        ends = [[mean - low], [high - mean]]
        left.plot(list(row["seeds"].values()), [n] * len(row["seeds"]), "o", color=color, markersize=4, alpha=0.4)
        left.errorbar(mean, n, xerr=ends, fmt="D", color=color, capsize=4)
        left.annotate(difference(row), (1.02, n), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        right.errorbar(mib, mean, yerr=ends, fmt="D", color=color, capsize=3, alpha=0.8)
        right.annotate(str(n + 1), (mib, mean), xytext=(6, 4), textcoords="offset points", color=color)
    left.set_yticks(range(len(rows)), [f"{row['row']}  {n}" for n, row in enumerate(rows, 1)])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel(f"val {first['metric']}: mean, 95 % interval, each seed")
    left.annotate("paired difference", (1.02, 1.02), xycoords="axes fraction", fontsize=9)
    right.set_xlabel("MiB kept for backward, per picture")
    right.set_ylabel(f"val {first['metric']}")
    right.margins(x=0.18)
    right.locator_params(axis="x", nbins=6)
    for axis in left, right:
        axis.grid(alpha=0.25)
    figure.suptitle(f"{first['method']}, tiny, {first['steps']} steps on {first['dataset']}, seeds "
                    f"{', '.join(map(str, first['seeds']))}. Blue: difference to frozen; orange: to method")
    with common.writing(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
    print(f"drawn: {file}", file=sys.stderr)


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(__doc__)
    p.add_argument("--method", **one_of(*METHODS), help="default: all four, one after another")
    p.add_argument("--rows", type=lambda s: s.split(","), metavar="ROW,...", help="of the method; default: all")
    p.add_argument("--seeds", default=(0, 1, 2), type=integers, metavar="N,...", help="default: 0,1,2")
    p.add_argument("--dataset", **one_of(*SHAPE_SETS), default="shapes", help="(default: shapes)")
    p.add_argument("--steps", type=int, default=0, help="of each run; default: " +
                   ", ".join(f"{method} {steps}" for method, steps in STEPS.items()))
    p.add_argument("--pictures", type=int, default=2000, help="of val (default: 2000)")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    p.add_argument("--out", default="runs/study", help="folder (default: runs/study)")
    p.add_argument("--one", action="store_true", help="the first row and seed, in this process: what the study starts")
    args = p.parse_args(argv)
    args.out = Path(args.out).resolve()
    if args.steps < 0 or min(args.pictures, args.jobs) < 1:
        p.error("--pictures and --jobs must be positive, --steps not negative")
    if not args.seeds or len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        p.error("--seeds must be different numbers, none of them negative")
    if args.rows and not args.method:
        p.error("--rows needs --method")
    names = [row.name for row in ROWS[args.method]] if args.method else []
    if not set(args.rows or ()) <= set(names):
        p.error(f"--rows {','.join(args.rows)}: {args.method} has {', '.join(names)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    common.check_place(args.out / "study.json")
    found = []
    for method in [args.method] if args.method else METHODS:
        rows = [row for row in ROWS[method] if not args.rows or row.name in args.rows]
        if args.one:
            return train_and_measure(args, method, rows[0], args.seeds[0])
        all_runs(args, method, rows)
        found.append(results(args, method, rows))
        print_markdown(found[-1])
        plot(found[-1], args.out / f"{method}.png")
        common.write_json(args.out / "study.json", sum(found, []))


if __name__ == "__main__":
    common.run_command(main)
