"""What to train of a pretrained model: a study over lunch, on two CPU cores.

    python docs/study.py                      # DCRIS: towers from shapes, adapted to shapes-shift; 15 runs, 3 seeds
    python docs/study.py --method etris --tunes frozen,bitfit,lora,method,full --seeds 0,1

For each seed a tiny model is trained on `shapes`; its towers are then adapted to the shifted set in each way, with a
new head. Every run is one of train.py in runs/study, two at a time; what is there already is not trained again, so that
the same command continues. Prints a table (Markdown), and draws the val metric over trained parameters and over bytes
kept for backward (needs matplotlib), each seed, mean and standard deviation.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).resolve().parent.parent
METRIC = dict(dcris="mIoU", etris="mIoU", shared_ris="mIoU", m2ist="Acc@0.5")
AS_IS = "none (as it is)"


def integers(text: str) -> list[int]:
    return [int(t) for t in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--method", default="dcris", choices=METRIC)
    p.add_argument("--tunes", default="frozen,lora,adapter,method,full", type=lambda s: s.split(","))
    p.add_argument("--seeds", default="0,1,2", type=integers)
    p.add_argument("--steps", type=int, help="of each run; default: the method's (2,400 for dcris)")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    p.add_argument("--out", default="runs/study", help="folder of the runs")
    p.add_argument("--plot", help="default: study.png in --out")
    args = p.parse_args(argv)
    args.out = Path(args.out).resolve()
    if args.jobs < 1 or args.steps is not None and args.steps < 1:
        p.error("--steps and --jobs must be positive")
    sys.path.insert(0, str(HERE))
    known = importlib.import_module(args.method).TUNES
    for name, values in ("seeds", args.seeds), ("tunes", args.tunes):
        if len(set(values)) < len(values):
            p.error(f"--{name}: each once")
    if not set(args.tunes) <= set(known):
        p.error(f"--tunes: {args.method} has {', '.join(known)}")
    args.plot = Path(args.plot or args.out / "study.png")
    try:
        for folder in args.out, args.plot.parent:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        p.error(f"{e.filename}: {e.strerror}")
    return args


def command(program: str, *flags) -> str:
    """Runs one of the programs, one thread each; its standard output. Exits with its last line where it fails."""
    words = [sys.executable, *program.split(), *map(str, flags)]
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        said = (done.stderr.strip() or "no word").splitlines()[-1]
        raise SystemExit(f"study: {program} {' '.join(map(str, flags))} ended with {done.returncode}: {said}")
    return done.stdout


def train(args: argparse.Namespace, run: Path, *flags) -> None:
    """One run, or the rest of one."""
    command("train.py", "--method", args.method, "--out", run, "--log-every", 100, *flags,
            *(["--steps", args.steps] if args.steps else []), *(["--resume"] if (run / "config.json").exists() else []))
    print(f"{run.name}: {json.loads((run / 'metrics.json').read_text())[METRIC[args.method]]:.1f}", flush=True)


def adapted(args: argparse.Namespace, tune: str, seed: int) -> Path:
    return Path(f"{towers(args, seed)}-{tune}")


def towers(args: argparse.Namespace, seed: int) -> Path:
    return args.out / f"{args.method}-{seed}{f'-{args.steps}steps' if args.steps else ''}"


def all_runs(args: argparse.Namespace) -> None:
    def pretrain(seed: int) -> None:
        train(args, towers(args, seed), "--dataset", "shapes", "--seed", seed)

    def adapt(which: tuple[int, str]) -> None:
        seed, tune = which
        train(args, adapted(args, tune, seed), "--dataset", "shapes-shift", "--weights", towers(args, seed),
              "--tune", tune, "--seed", seed)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(pretrain, args.seeds))
        list(pool.map(adapt, [(seed, tune) for seed in args.seeds for tune in args.tunes]))


def results(args: argparse.Namespace) -> list[dict]:
    """A row for each way to tune, the model as it is first: trained parameters, bytes, the metric of each seed."""
    name = METRIC[args.method]
    as_is = [command("evaluate.py", "--ckpt", towers(args, seed), "--dataset", "shapes-shift", "--json", "-")
             for seed in args.seeds]
    rows = [dict(tune=AS_IS, trained=0, beside_head=0, saved=0, values=[json.loads(row)[name] for row in as_is])]
    for tune in args.tunes:
        cost, = json.loads(command("-m toolbox.costs", "--method", args.method, "--backbone", "tiny",
                                   "--tune", tune, "--json", "-"))
        values = [json.loads((adapted(args, tune, seed) / "metrics.json").read_text())[name] for seed in args.seeds]
        rows.append(dict(tune=tune, trained=cost["params_trainable"], saved=cost["saved_bytes_per_image"],
                         beside_head=cost["params_trainable"] - cost["params_head"], values=values))
    return rows


def print_markdown(rows: list[dict], metric: str) -> None:
    print(f"| `--tune` | trained parameters | saved per image | val {metric}: mean (standard deviation) | each seed |\n"
          "|---|---|---|---|---|")
    for row in rows:
        spread = f" ({stdev(row['values']):.1f})" if len(row["values"]) > 1 else ""
        saved = f"{row['saved'] / 2**20:.2f} MiB" if row["saved"] else ""
        print(f"| {row['tune']} | {row['trained']:,} | {saved} | {mean(row['values']):.1f}{spread} | "
              f"{', '.join(f'{v:.1f}' for v in row['values'])} |")


def plot(rows: list[dict], metric: str, title: str, file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    as_is, rows = rows[0], rows[1:]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, (key, unit, name) in zip(panels, (("beside_head", 1, "parameters trained beside the head"),
                                                ("saved", 2**20, "MiB kept for backward, per image"))):
        for n, row in enumerate(rows):
            x, y, color, seeds = row[key] / unit, mean(row["values"]), f"C{n}", len(row["values"])
            axis.plot([x] * seeds, row["values"], "o", color=color, markersize=4, alpha=0.5)
            axis.errorbar([x], [y], stdev(row["values"]) if seeds > 1 else 0, fmt="D", color=color, markersize=7,
                          capsize=4, label=f"{row['tune']}: {y:.1f}")
        axis.set_xlabel(name)
        axis.grid(alpha=0.25)
        axis.margins(x=0.12)
    most = max(row["beside_head"] for row in rows)
    panels[0].set_xscale("symlog", linthresh=1000)
    panels[0].set_xlim(-400, max(10_000, 2 * most))
    panels[0].set_xticks([t for t in (0, 1e3, 1e4, 1e5, 1e6, 1e7) if t <= 2 * most])
    panels[0].set_ylabel(f"val {metric} on shapes-shift")
    panels[1].legend(title=f"--tune, and its mean\n(as it is: {mean(as_is['values']):.1f})", loc="center left",
                     bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title)
    temporary = file.with_name(f".{file.name}.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, file)
    print(f"drawn: {file}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    all_runs(args)
    rows, metric = results(args), METRIC[args.method]
    print_markdown(rows, metric)
    (args.out / "study.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, metric, f"{args.method}, tiny: towers trained on shapes, adapted to shapes-shift; "
         f"seeds {', '.join(map(str, args.seeds))}, their mean and standard deviation", args.plot)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here")
