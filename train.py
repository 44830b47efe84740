"""Trains one of the methods.

    python train.py --method dcris                                       # built-in shapes, tiny towers, one CPU core
    python train.py --method dcris --dataset refcoco --data-root DATA    # one GPU
    torchrun --nproc_per_node 8 train.py --method dcris --dataset refcoco --data-root DATA
    python train.py ... --resume                                         # the same command, where it stopped

The run folder gets config.json (every setting), log.jsonl, model.safetensors (what was trained, best on val), resume.pt
(what --resume needs), metrics.json, curves.png and samples.png (a few predictions on val). Every setting of the method
is a flag: --method X --help lists them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
import data
from common import METHODS, Process, UserError, load_method
from evaluate import MAIN_METRIC, draw_examples, evaluate_split
from toolbox import baselines, draw, runs
from toolbox.cli import Parser, add_config_flags, config_flags, one_of
from toolbox.features import cache_features
from toolbox.weights import leak

SAVE_MINUTES = 10  # between two savings, where validations are further apart


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, common.TrainConfig]:
    """(arguments, the method's Config)"""
    p = Parser(__doc__)
    p.add_argument("--method", required=True, **one_of(*METHODS))
    p.add_argument("--dataset", default="shapes", help=f"{', '.join(data.DATASETS)} (default: shapes)")
    p.add_argument("--data-root", help="folder of the data set (docs/data.md has its layout)")
    p.add_argument("--val-split", default="val", **one_of("val", "train"),
                   help="split that the best step is chosen by; train: learning by heart (default: val)")
    p.add_argument("--backbone", help="default: tiny for shapes, otherwise the paper's")
    p.add_argument("--variant", help="default: the paper's")
    p.add_argument("--tune", help="method (as the paper), frozen (head alone), full (everything), "
                   f"{', '.join(baselines.BASELINES)}, or one of these with the method's adapters: method+lora")
    p.add_argument("--weights", default="pretrained", help="pretrained (default; tiny: made in two minutes, and kept), "
                   "random, file[,file], or a run folder")
    p.add_argument("--out", help="run folder (default: runs/METHOD-DATASET)")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--amp", default="auto", **one_of("auto", "bf16", "fp16", "off"), help="auto: off on a CPU")
    p.add_argument("--accumulate", type=int, default=1, help="parts of a batch, one after another, to save memory")
    p.add_argument("--workers", type=int, default=default_workers(),
                   help="processes that read data, for each process that trains (default: %(default)s)")
    p.add_argument("--cache-features", metavar="memory|FOLDER",
                   help="keep the frozen encoder's output for each image, where it does not read the sentence")
    p.add_argument("--log-every", type=int, default=50, help="steps (default: 50)")
    p.add_argument("--device", default="auto", **one_of("auto", "cuda", "mps", "cpu"),
                   help="auto: cuda where there is one, else cpu")
    words = sys.argv[1:] if argv is None else argv
    if "--method" not in " ".join(words):
        p.parse_args(words)  # --help, or the error that there is no method
    args, _ = p.parse_known_args([w for w in words if w not in ("-h", "--help")])
    method = load_method(args.method)
    backbone = args.backbone or ("tiny" if args.dataset.startswith("shapes") else next(iter(method.BACKBONES)))
    variant, tune = args.variant or method.VARIANTS[0], args.tune or method.TUNES[0]
    for name, value, values in (("backbone", backbone, method.BACKBONES), ("variant", variant, method.VARIANTS),
                                ("tune", tune, method.TUNES)):
        if value not in values:
            p.error(f"--{name} {value}: must be one of {', '.join(values)}")
    add_config_flags(p, method.config(backbone, variant, args.dataset, tune=tune))
    args = p.parse_args(words)
    if args.accumulate < 1 or args.log_every < 1 or args.workers < 0 or not 0 <= args.seed < 2**31:
        p.error("--accumulate and --log-every must be positive, --workers not negative, --seed 0 to 2147483647")
    args.backbone, args.variant, args.tune = backbone, variant, tune
    flags = config_flags(args, method.Config)
    if "epochs" in flags:
        flags.setdefault("steps", 0)  # tiny has a number of steps
    return args, method.config(backbone, variant, args.dataset, tune=tune, **flags)


def default_workers() -> int:
    """One of the CPUs that this process and the others of this machine share is left for training."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cpus // common.environment("LOCAL_WORLD_SIZE", 1) - 1))


@dataclass
class Progress:
    """What a run is saved with beside its model, optimizer and random generators."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # since the last line of the log


@dataclass
class Run:
    """What a run is made of."""

    args: argparse.Namespace
    c: common.TrainConfig
    process: Process
    out: Path
    stop: common.StopSignal
    items: data.TrainSet
    val_source: data.Source
    steps: int
    per_epoch: int                   # steps
    model: torch.nn.Module
    net: torch.nn.Module             # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    info: dict                       # what its checkpoint says of it
    metric: str                      # that the best step is chosen by
    progress: Progress
    best: float = -1.0               # metric on val
    saved_at: float = 0.0            # time of the last saving

    def due(self, step: int) -> bool:
        return step > 0 and (step % (self.c.val_every or self.per_epoch) == 0 or step == self.steps)


def main(argv: list[str] | None = None) -> int:
    args, c = parse(argv)
    process = common.start(tiny=args.backbone.startswith("tiny"), device=args.device)
    stop = common.StopSignal()
    out = process.on_main(lambda: runs.find(args))
    with runs.locked(out, args.resume, process), runs.errors_in_a_sentence(args, c, process):
        run = prepare(args, c, process, out, stop)
        if args.resume:
            runs.resume(run)
        return train(run)


def prepare(args: argparse.Namespace, c: common.TrainConfig, process: Process, out: Path, stop) -> Run:
    """Data, model and optimizer, as the run begins."""
    # data
    method = load_method(args.method)
    train_source, val_source = (data.open_dataset(args.dataset, split, args.data_root, args.seed, method.Model.task)
                                for split in ("train", args.val_split))
    sentences = sum(train_source.count(i) for i in range(len(train_source)))
    n = sentences if c.every_sentence else len(train_source)
    per_epoch = n // c.batch_size
    if per_epoch == 0:
        raise UserError(f"{args.dataset} train has {n} {'sentences' if c.every_sentence else 'objects'}, fewer than "
                        f"one batch; --batch-size {n} fits.")
    if c.batch_size % (args.accumulate * process.world_size):
        raise UserError(f"--batch-size {c.batch_size} cannot be divided among {process.world_size} processes in "
                        f"{args.accumulate} parts each; a multiple of {args.accumulate * process.world_size} can.")
    # model
    device = process.device
    model = runs.build(method, c, args.weights, args.seed, process).to(device)
    info = describe(args, c, process, model, train_source)
    features = cache_features(args, model, train_source, info["frozen"], process, stop)
    process.on_main(lambda: runs.write_config(out, info, model))
    net = model
    if process.world_size > 1:
        if device.type == "cuda":
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    # optimizer
    rates = dict(backbone=c.tower_lr, adapter=c.adapter_lr, head=1.0)
    groups = [dict(params=[p for p in parameters if p.requires_grad], base=c.lr * rates[name])
              for name, parameters in common.parameters(model).items()]
    optimizer = (torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adam)(
        [g for g in groups if g["params"]], lr=c.lr, betas=(0.9, c.beta2), weight_decay=c.weight_decay, fused=True)
    amp = info["amp"]
    run = Run(args, c, process, out, stop,
              data.TrainSet(train_source, model.preprocess, args.seed, c.every_sentence, features), val_source,
              c.steps or c.epochs * per_epoch, per_epoch, model, net, optimizer,
              torch.amp.GradScaler(device.type, enabled=amp == "fp16"),
              torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16, enabled=amp != "off"),
              info, MAIN_METRIC[model.task], Progress())
    announce(run, sentences)
    torch.manual_seed(args.seed + process.rank)  # dropout
    return run


def describe(args: argparse.Namespace, c: common.TrainConfig, process: Process, model, train_source) -> dict:
    """What a checkpoint says of its run: all that is needed to build its model anew, and where it came from."""
    origin = runs.origin(args.weights, c.backbone)
    return dict(method=args.method, config=dataclasses.asdict(c), weights=args.weights, seed=args.seed,
                frozen=common.fingerprint(model), dataset=args.dataset, data_root=args.data_root,
                val_split=args.val_split, amp=choose_amp(args.amp, process.device), accumulate=args.accumulate,
                workers=args.workers, processes=process.world_size, device=str(process.device),
                cache_features=args.cache_features, origin=origin, note=train_source.note,
                leak=leak(args.method, origin, args.dataset), versions=runs.versions())


def choose_amp(amp: str, device: torch.device) -> str:
    if amp != "auto":
        return amp
    if device.type != "cuda":
        return "off"
    # below compute capability 8.0 torch emulates bf16, slowly
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def announce(run: Run, sentences: int) -> None:
    args, process, info = run.args, run.process, run.info
    process.print(f"{args.method} ({args.backbone}, {args.variant}) on {args.dataset}: "
                  f"{len(run.items.source)} objects, {sentences} sentences, {run.steps} steps of {run.c.batch_size}, "
                  f"seed {args.seed}, {process.world_size} x {process.device}, amp {info['amp']}, to {run.out}")
    for note in info["note"], info["leak"]:
        if note:
            process.print(note)
    process.print(f"trained: {common.count(run.model, True):,} of {common.count(run.model):,} parameters "
                  f"(--tune {run.c.tune})")


# The loop


def train(run: Run) -> int:
    """Trains to the last step, or until a signal. -> exit status"""
    args, c, process, progress = run.args, run.c, run.process, run.progress
    batches = load_batches(run)
    bar = tqdm(total=run.steps, initial=progress.step, disable=not process.is_main or not sys.stderr.isatty())
    begin = run.saved_at = since = time.perf_counter()
    begin, done = begin - progress.seconds, progress.step
    if run.due(progress.step) and not validated(run) and not validate(run):  # it was cut off
        return leave(run)
    run.net.train()
    for step in range(progress.step + 1, run.steps + 1):
        rate = c.lr * learning_rate(step - 1, run.steps, run.per_epoch, c)
        for group in run.optimizer.param_groups:
            group["lr"] = group["base"] * rate / c.lr
        loss, ids = forward_backward(run, batches)
        late = process.is_main and time.perf_counter() - run.saved_at > SAVE_MINUTES * 60
        loss, stopped, late = sum_over_processes(process, loss, float(run.stop.number), float(late))
        norm = gradient_norm(run)
        check_finite(run, step, loss, norm, ids)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)

        now = time.perf_counter()
        progress.step, progress.seconds = step, now - begin
        progress.losses.append(loss)
        bar.update()
        if step % args.log_every == 0 or step == run.steps:
            log_step(run, rate, (step - done) * c.batch_size / (now - since), bar)
            since, done = now, step
        due = run.due(step)
        if due or late or stopped:
            runs.save_resume(run)
        if stopped or due and not validate(run):
            return leave(run)
        if due or late:
            since, done = time.perf_counter(), step
    bar.close()
    minutes = (time.perf_counter() - begin) / 60
    process.print(f"best {args.val_split} {run.metric} {run.best} in {minutes:.1f} min. Next:\n"
                  f"  python evaluate.py --ckpt {run.out} --split all")
    return 0


def learning_rate(step: int, steps: int, per_epoch: int, c: common.TrainConfig) -> float:
    """Factor of the base rate at a step, counted from 0."""
    warm = min(1.0, (step + 1) / c.warmup) if c.warmup else 1.0
    if c.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm * 0.1 ** sum(step >= m * per_epoch for m in c.milestones)


def forward_backward(run: Run, batches: Iterator[dict]) -> tuple[Tensor, list[str]]:
    """Forward and backward of a step, in parts. -> this process's share of the mean loss, and its objects"""
    process, parts = run.process, run.args.accumulate
    total, ids = torch.zeros((), device=process.device), []
    for part in range(parts):
        batch = next(batches)
        ids += batch["id"]
        images = batch["image"].to(process.device, non_blocking=True)
        if run.items.features is None:
            images = data.normalise(images, run.model.preprocess)
        target = batch[run.model.task].to(process.device, non_blocking=True)
        tokens = run.model.tokenize(batch["sentence"]).to(process.device)
        last = part == parts - 1 or process.world_size == 1
        with nullcontext() if last else run.net.no_sync():  # gradients are exchanged once a step
            with run.autocast:
                loss = run.model.loss(run.net(images, tokens), target) / parts
            run.scaler.scale(loss).backward()
        total += loss.detach()
    return total / process.world_size, ids


def gradient_norm(run: Run) -> Tensor:
    """The norm of the whole gradient, before it is clipped to c.clip_norm."""
    run.scaler.unscale_(run.optimizer)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    if run.c.clip_norm:
        return torch.nn.utils.clip_grad_norm_(trained, run.c.clip_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])


def check_finite(run: Run, step: int, loss: float, norm: Tensor, ids: list[str]) -> None:
    # fp16's scaler looks for itself, and skips a step whose gradients are not finite
    if math.isfinite(loss) and (run.scaler.is_enabled() or norm.isfinite()):
        return
    what = f"the gradient's norm is {norm.item()}" if math.isfinite(loss) else f"the loss is {loss}"
    ids = [i for part in run.process.gather(ids) for i in part]
    raise UserError(f"{what} at step {step}, so the run stops before it spoils the weights; its batch: "
                    f"{', '.join(ids)}. A lower --lr or --amp off may help; what was saved in {run.out} is untouched.")


def sum_over_processes(process: Process, *values) -> list[float]:
    total = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=process.device) for v in values])
    if process.world_size > 1:
        dist.all_reduce(total)
    return total.tolist()


def validate(run: Run) -> bool:
    """Measures the model on val, keeps it where it is the best so far; False where a signal came before the end."""
    process = run.process
    if process.world_size > 1:  # without SyncBatchNorm (gloo) each process has statistics of its own
        for buffer in run.model.buffers():
            dist.broadcast(buffer, 0)
    # a trial of a few steps is not worth a long validation: no more sentences than the run learns from
    most, share = run.steps * run.c.batch_size, run.c.batch_size // run.args.accumulate // process.world_size
    workers = 0 if run.args.dataset in data.SHAPE_SETS else run.args.workers  # drawing is faster than starting one
    with run.autocast:
        val = evaluate_split(run.model, run.val_source, process, share, workers, most=most, stop=run.stop)
    if not val:
        return False
    process.print(f"step {run.progress.step}  {run.args.val_split}  " + "  ".join(f"{k} {v}" for k, v in val.items()))
    if val[run.metric] > run.best:
        run.best = val[run.metric]
        process.on_main(lambda: runs.save_best(run, val))
    # last, as --resume takes a validation that is in the log for done
    runs.write_log(run, epoch=round(run.progress.step / run.per_epoch, 3), val=val)
    process.on_main(lambda: draw_pictures(run, most))
    return True


def draw_pictures(run: Run, most: int) -> None:
    """What a glance at the run folder tells: its curves, and the same few expressions of val every time."""
    was_training = run.model.training
    run.model.eval()
    try:
        with run.autocast:
            draw_examples(run.out / "samples.png", run.model, run.val_source, 12, most=most)
        draw.draw_curves(run.out / "log.jsonl", run.metric, run.out / "curves.png")
    except (UserError, OSError, ImportError) as e:  # no reason to stop a run
        run.process.print(f"no pictures of this validation: {e}")
    run.model.train(was_training)


def leave(run: Run) -> int:
    """After a signal, with resume.pt saved. -> exit status"""
    if run.best < 0:
        run.process.on_main(lambda: runs.save_best(run, {}))
    run.process.print(f"stopped at step {run.progress.step} and saved; the same command with --resume continues.")
    return 128 + (run.stop.number or signal.SIGTERM)


def validated(run: Run) -> bool:
    step = run.progress.step
    return any("val" in e and e["step"] == step for e in runs.read_log(run.out / "log.jsonl", step))


def log_step(run: Run, rate: float, images_per_s: float, bar: tqdm) -> None:
    p = run.progress
    loss, peak = round(sum(p.losses) / len(p.losses), 6), round(runs.peak_memory(run.process.device), 2)
    p.losses = []
    runs.write_log(run, loss=loss, lr=rate, images_per_s=round(images_per_s, 1), peak_gib=peak,
                   seconds=round(p.seconds, 1))
    minutes = (run.steps - p.step) * run.c.batch_size / images_per_s / 60
    if bar.disable:
        run.process.print(f"step {p.step}/{run.steps}  loss {loss:.4f}  lr {rate:.2e}  {images_per_s:.0f} images/s  "
                          f"ETA {minutes:.1f} min  peak {peak:.2f} GiB")
    else:
        bar.set_postfix_str(f"loss {loss:.4f} peak {peak:.2f} GiB")


# Batches


def load_batches(run: Run) -> Iterator[dict]:
    """The batches of this process from the next step on, a batch for each part of a step."""
    cuda, features = run.process.device.type == "cuda", run.items.features
    return iter(DataLoader(
        run.items, num_workers=0 if features else run.args.workers, collate_fn=data.collate,
        batch_sampler=micro_batches(len(run.items), run.c, run.args.seed, range(run.progress.step, run.steps),
                                    run.process, run.args.accumulate),
        worker_init_fn=runs.ignore_signals, pin_memory=cuda,
        generator=torch.Generator()))  # so that it draws nothing from the one that dropout draws from


def micro_batches(n: int, c: common.TrainConfig, seed: int, steps: range, process: Process,
                  accumulate: int) -> Iterator[list]:
    """Indices (epoch, object) of this process, one list for each part of each step.

    An epoch's order depends on (seed, epoch) alone, and the processes share the same global batch, so neither their
    number nor an interruption changes what a step learns from. The last, smaller batch is dropped.
    """
    per_epoch, size = n // c.batch_size, c.batch_size // (accumulate * process.world_size)
    epoch = -1
    for step in steps:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng([seed, epoch]).permutation(n)
        first = step % per_epoch * c.batch_size
        for part in range(accumulate):
            begin = first + (part * process.world_size + process.rank) * size
            yield [(epoch, int(i)) for i in order[begin:begin + size]]


if __name__ == "__main__":
    common.run_command(main)
