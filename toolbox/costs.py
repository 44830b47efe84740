"""What the methods cost: parameters, FLOPs, bytes, seconds.

    python -m toolbox.costs --method M [--backbone B] [--tune T] [any setting] [--vary tune,...] [--time] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
import typing

import numpy as np
import torch
from torch import Tensor, nn

import common
from common import METHODS, Process, UserError, count, parameters, run_command, trained_state
from toolbox import runs
from toolbox.cli import Parser, add_config_flags, config_flags, one_of, print_table, write_result


def saved_bytes(model: nn.Module, images: Tensor, tokens: Tensor, target: Tensor) -> int:
    """Bytes that one training forward keeps for backward: unique storages, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages = {}

    def keep(t: Tensor) -> None:  # a graph that keeps t itself may hold itself, and is then never freed
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            storages[s.data_ptr()] = s  # held, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):
        model.loss(model(images, tokens), target)
    return sum(s.nbytes() for s in storages.values())


SENTENCE = "the small red circle on the left of the large blue square above the cross next to it"  # 18 words: 20 tokens


def blank(model: nn.Module, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n black pictures, SENTENCE as tokens, and a target."""
    device, size = next(model.parameters()).device, model.preprocess.size
    images = torch.zeros(n, 4 if model.preprocess.pad_channel else 3, size, size, device=device)
    target = torch.full((n, size, size) if model.task == "mask" else (n, 4), 0.5, device=device)
    return images, model.tokenize([SENTENCE] * n).to(device), target


@torch.no_grad()
def forward_gflops(model: nn.Module) -> dict[str, float]:
    """GFLOPs of one picture and SENTENCE (1 multiply-add = 2 FLOPs), in eval mode, which it leaves on: of each part
    under its name in the model, of a `baseline`, of the `rest`, the products that are taken outside modules, such as
    those of an attention written out, and their `total`. A model on the meta device will do."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    images, tokens, _ = blank(model.eval(), 1)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into it, nor into all fused attentions
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images, tokens)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    prefix = type(model).__name__ + "."
    calls = {name.removeprefix(prefix): sum(ops.values()) / 1e9 for name, ops in counter.get_flop_counts().items()
             if name.startswith(prefix)}
    within = {id(m) for m in model.baseline}
    baseline = {name: calls[name] for name, m in model.named_modules() if id(m) in within and name in calls}
    out = {}
    for part, _ in model.named_children():
        inside = [name for name in calls if name.startswith(part + ".") or name == part]
        top = [name for name in inside if not any(name.startswith(other + ".") for other in inside)]
        out[part] = sum(calls[name] for name in top) - sum(calls[name] for name in baseline if name in inside)
    total = counter.get_total_flops() / 1e9
    out |= dict(baseline=sum(baseline.values()), rest=total - sum(out.values()) - sum(baseline.values()), total=total)
    return {name: round(n, 3) for name, n in out.items() if round(n, 3) or name == "total"}


def efficiency(model: nn.Module, timed: int = 0) -> dict:
    """What a model costs, for one image: parameters, GFLOPs, bytes kept for backward, bytes of Adam's state and of a
    checkpoint; with `timed`, the median of so many times, in seconds, and on CUDA the peak of memory."""
    images, tokens, target = blank(model, 2)
    device = images.device
    parts = {name: sum(p.numel() for p in parameters) for name, parameters in parameters(model).items()}
    gflops, baseline = forward_gflops(model), count(model.baseline)
    own = {id(p) for m in model.baseline for p in m.parameters()}
    by_part = {name: dict(params=sum(p.numel() for p in m.parameters() if id(p) not in own))
               for name, m in model.named_children() if count(m)}
    by_part |= dict(baseline=dict(params=baseline)) if baseline else {}
    for name, n in gflops.items():
        if name != "total":
            by_part.setdefault(name, {})["gflops"] = n
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    out = dict(
        params_total=count(model), params_trainable=count(model, trainable=True), params_adapter=parts["adapter"],
        params_head=parts["head"], params_backbone=parts["backbone"],
        adapter_percent_of_backbone=round(100 * parts["adapter"] / parts["backbone"], 4), parts=by_part,
        gflops_forward=gflops["total"], saved_bytes_per_image=saved_bytes(model, images, tokens, target) // 2,
        optimizer_bytes=sum(2 * p.nbytes + 4 for p in trained),  # two moments, and a count of steps
        checkpoint_bytes=sum(t.nbytes for t in trained_state(model).values()))  # without its header, the tensors' names
    out |= times(model, images, tokens, target, timed) if timed else dict(step_seconds_per_image=None)
    names = dict(cuda=torch.cuda.get_device_name, cpu=lambda: f"cpu, {torch.get_num_threads()} threads")
    return out | dict(device=names.get(device.type, lambda: device.type)())


def times(model: nn.Module, images: Tensor, tokens: Tensor, target: Tensor, n: int) -> dict[str, float]:
    """Medians of n after a first that does not count: seconds per image of a forward, and of a training step but for
    the optimizer's; the peak of memory is that of these steps, on CUDA."""
    kind, medians = images.device.type, {}
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def forward() -> None:
        with torch.no_grad():
            model(images, tokens)

    def step() -> None:
        model.loss(model(images, tokens), target).backward()
        model.zero_grad()

    for name, run in ("forward_seconds_per_image", forward), ("step_seconds_per_image", step):
        model.train(run is step)
        seconds = []
        for _ in range(n + 1):
            begin = time.perf_counter()
            run()
            if kind != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - begin)
        medians[name] = round(float(np.median(seconds[1:])) / len(images), 4)
    return medians | (dict(cuda_peak_mib=round(torch.cuda.max_memory_allocated() / 2**20)) if kind == "cuda" else {})


def show_efficiency(args: argparse.Namespace, process: Process) -> None:
    from toolbox.tables import printed  # which counts with this module

    rows = []
    for name in [args.method] if args.method else common.METHODS:
        method = common.load_method(name)
        if args.tune not in (None, *method.TUNES):
            continue  # Shared-RIS has no adapters beside which a baseline could stand
        for backbone in [args.backbone] if args.backbone else method.BACKBONES:
            names, same = (backbone, args.variant or method.VARIANTS[0], "refcoco"), []
            for flags in varied(args, method, names):
                c = method.config(*names, **flags)
                process.print(f"building {name} {backbone} (--tune {c.tune}) with random weights ...")
                model = runs.build(method, c, "random", 0).to(process.device)
                about = dict(method=name, backbone=backbone, variant=c.variant, tune=c.tune)
                about |= {k: getattr(c, k) for k in args.vary} | dict(image_size=model.preprocess.size)
                same.append(about | efficiency(model, args.time) | dict(paper=printed(method, c)))
            rows += beside_full(same)
            if process.is_main and args.json != "-":
                print_efficiency(same)
    if process.is_main:
        write_result(args.json, rows)


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
    print_table([{k: "" if v is None else v for k, v in row.items() if k not in hidden} for row in rows])
    for n, row in enumerate(rows, 1):
        which = f"  row {n}: " if len(rows) > 1 else "  "
        parts = [f"{name} {part.get('params', 0):,} with {part.get('gflops', 0):.2f} GFLOPs"
                 for name, part in row["parts"].items()]
        print(which + f"{row['params_total']:,} parameters: " + ", ".join(parts))
        if row["paper"]:
            printed = [f"{k} {v}" for k, v in row["paper"].items() if k not in ("tables", "notes")]
            where = f"(Table {', '.join(row['paper']['tables'])})"
            print(which + "the paper: " + "; ".join([f"{', '.join(printed)} {where}", *row["paper"]["notes"]]))
    print()


def varied(args: argparse.Namespace, method, names: tuple[str, str, str]) -> list[dict]:
    """The flags of a configuration, and with --vary also those of one for each other value of these settings."""
    flags = config_flags(args, method.Config) | dict(tune=args.tune or method.TUNES[0])
    out = [flags]
    for name in args.vary:
        kind = typing.get_type_hints(method.Config).get(name)
        values = (False, True) if kind is bool else ()
        if name == "tune":
            values = [t for t in method.TUNES if "+" not in t]
        elif typing.get_origin(kind) is typing.Literal:
            values = typing.get_args(kind)
        if not values:
            raise UserError(f"--vary {name}: {method.__name__} has no such setting with a few values.")
        out += [flags | {name: v} for v in values if v != getattr(method.config(*names, **flags), name)]
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(__doc__)
    p.add_argument("--method", **one_of(*METHODS), help="default: all four")
    p.add_argument("--backbone", help="default: all of the method")
    p.add_argument("--variant", help="default: the paper's")
    p.add_argument("--tune", help="default: method")
    p.add_argument("--vary", default=[], type=lambda s: s.replace("-", "_").split(","), metavar="SETTING,...",
                   help="a row for each value of tune, insertion, ...")
    p.add_argument("--time", type=int, nargs="?", const=5, default=0, metavar="N",
                   help="seconds too, the median of N times (5)")
    p.add_argument("--json", metavar="FILE", help="- for standard output, and then nothing else goes there")
    p.add_argument("--device", default="auto", **one_of("auto", "cuda", "mps", "cpu"))
    known, _ = p.parse_known_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])
    methods = [common.load_method(n) for n in ([known.method] if known.method else METHODS)]
    for name in "backbone", "variant", "tune":
        values = dict.fromkeys(n for m in methods for n in getattr(m, name.upper() + "S"))
        if getattr(known, name) not in (None, *values):
            p.error(f"--{name} {getattr(known, name)}: must be one of {', '.join(values)}")
        if getattr(known, name) and not known.method and name != "tune":
            p.error(f"--{name} needs --method")
    if known.method:
        method = methods[0]
        add_config_flags(p, method.config(known.backbone or next(iter(method.BACKBONES)),
                                                 known.variant or method.VARIANTS[0], tune=known.tune or "method"))
    args = p.parse_args(argv)
    if args.time < 0:
        p.error(f"--time {args.time}: must be 0 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    show_efficiency(args, common.start(tiny=str(args.backbone).startswith("tiny"), device=args.device))


if __name__ == "__main__":
    run_command(main)
