"""Trains one of the methods.

    python train.py --method dcris                                       # built-in shapes, tiny towers, two CPU cores
    python train.py --method dcris --dataset refcoco --data-root DATA    # one GPU
    torchrun --nproc_per_node 8 train.py --method dcris --dataset refcoco --data-root DATA
    python train.py ... --resume                                         # the same command, where it stopped

The run folder gets config.json (everything, resolved), log.jsonl, model.safetensors (what was trained, best on val),
resume.pt (all that --resume needs), metrics.json, curves.png and samples.png (a few answers on val). Every setting of
the method is a flag; --help with --method X lists them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
import data
import draw
from common import METHODS, Process, UserError, load_method
from evaluate import MAIN_METRIC, draw_examples, evaluate_split


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, object]:
    """(arguments, the method's Config)"""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--method", required=True, choices=METHODS)
    p.add_argument("--dataset", default="shapes", help=", ".join(data.DATASETS))
    p.add_argument("--data-root", help="folder of the data set (see the README for its layout)")
    p.add_argument("--val-split", default="val", choices=("val", "train"),
                   help="train: the best step is the one that knows its training set best (learning by heart)")
    p.add_argument("--backbone", help="default: tiny for shapes, otherwise the paper's")
    p.add_argument("--variant", help="default: the paper's")
    p.add_argument("--tune", help="method (as the paper: adapters and head, or all), frozen (head alone), full (all), "
                   f"{', '.join(common.BASELINES)}, or one of these with the method's adapters, as in method+lora")
    p.add_argument("--weights", help="pretrained (default), random (default for tiny), file[,file], or a run folder")
    p.add_argument("--out", help="run folder; default: runs/METHOD-DATASET")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="auto: off on a CPU")
    p.add_argument("--accumulate", type=int, default=1, help="parts of a batch, one after another, to save memory")
    p.add_argument("--workers", type=int, help="processes that read data, for each process that trains")
    p.add_argument("--cache-features", metavar="memory|FOLDER",
                   help="keep what the frozen encoder gives for each picture, where it reads them without the sentence")
    p.add_argument("--log-every", type=int, default=50, help="steps")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    words = sys.argv[1:] if argv is None else argv
    if "--method" not in " ".join(words):
        p.parse_args(words)  # --help, or the error that there is no method
    known, _ = p.parse_known_args([a for a in words if a not in ("-h", "--help")])
    method = load_method(known.method)
    common.add_config_flags(p, method.Config)
    args = p.parse_args(argv)
    args.backbone = args.backbone or ("tiny" if args.dataset.startswith("shapes") else next(iter(method.BACKBONES)))
    args.variant = args.variant or method.VARIANTS[0]
    args.weights = args.weights or ("random" if args.backbone.startswith("tiny") else "pretrained")
    random_tiny = args.backbone.startswith("tiny") and args.weights == "random"
    args.tune_said = args.tune is None and random_tiny
    args.tune = args.tune or ("full" if random_tiny else method.TUNES[0])
    for name, names in ("backbone", method.BACKBONES), ("variant", method.VARIANTS), ("tune", method.TUNES):
        if getattr(args, name) not in names:
            p.error(f"--{name} {getattr(args, name)}: {args.method} has {', '.join(names)}")
    if args.workers is None:
        args.workers = max(1, min(4, (os.cpu_count() or 1) - 1))
    if args.accumulate < 1 or args.log_every < 1 or args.workers < 0 or not 0 <= args.seed < 2**31:
        p.error("--accumulate and --log-every must be positive, --workers not negative, --seed 0 to 2147483647")
    c = method.config(args.backbone, args.variant, args.dataset, tune=args.tune,
                      **common.config_flags(args, method.Config))
    return args, c


def learning_rate(step: int, steps: int, per_epoch: int, c) -> float:
    """Factor of the base rate at a step, counted from 0."""
    warm = min(1.0, (step + 1) / c.warmup) if c.warmup else 1.0
    if c.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm * 0.1 ** sum(step >= m * per_epoch for m in c.milestones)


def micro_batches(n: int, c, seed: int, steps: range, process: Process, accumulate: int) -> Iterator[list]:
    """Indices (epoch, object) of this process, one list for each part of each step.

    An epoch's order depends on (seed, epoch) alone, and the processes share out the same global batch, so neither
    their number nor an interruption changes what a step learns from. The last, smaller batch is dropped.
    """
    per_epoch, size = n // c.batch_size, c.batch_size // (accumulate * process.world)
    epoch = -1
    for step in steps:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng([seed, epoch]).permutation(n)
        first = step % per_epoch * c.batch_size
        for part in range(accumulate):
            begin = first + (part * process.world + process.rank) * size
            yield [(epoch, int(i)) for i in order[begin:begin + size]]


def quiet_worker(_: int) -> None:
    for s in signal.SIGINT, signal.SIGTERM:  # they reach the workers too, but the process that trains decides
        signal.signal(s, signal.SIG_IGN)


def find_run(args: argparse.Namespace) -> Path:
    """The run folder to make or to resume: without --out the next one of its kind, or the last."""
    out, base = Path(args.out or f"runs/{args.method}-{args.dataset}"), 2
    while args.out is None and (out / "config.json").exists():
        following = Path(f"runs/{args.method}-{args.dataset}-{base}")
        if args.resume and not (following / "config.json").exists():
            break  # the last one
        out, base = following, base + 1
    return out


def lock(out: Path, resume: bool = False):
    """The run folder for this command alone, as long as it runs; what an earlier one was killed over is removed. Raises
    UserError where another has it, or, without `resume`, where it holds a run. -> a file that must stay open"""
    import fcntl

    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")
    except OSError as e:
        raise UserError(f"--out {str(out)[:200]} cannot be written: {e.strerror}.") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not kept by data workers that outlive us
    except (BlockingIOError, PermissionError):
        raise UserError(f"{out} is in use by another process that trains; wait for it, or give another --out."
                        ) from None
    except OSError:  # a file system without locks
        print(f"{out} cannot be locked, so nothing keeps a second command out of it", file=sys.stderr)
    if (out / "config.json").exists() and not resume:
        raise UserError(f"{out} holds a run already: --resume continues it, another --out keeps both.")
    for name in ("config.json", "log.jsonl", "model.safetensors", "resume.pt", "metrics.json", "curves.png",
                 "samples.png"):
        for leftover in out.glob(f".{name}.*"):
            leftover.unlink(missing_ok=True)
    return file


def open_run(args: argparse.Namespace, out: Path, settings: dict) -> None:
    """Writes what the run is, or compares it with what the run to resume was."""
    config = out / "config.json"
    if not config.exists():
        common.write_json(config, settings)
    else:
        names = "dataset", "weights", "seed", "val_split"
        try:
            before = json.loads(config.read_text())
            was = before["config"] | {k: before[k] for k in names}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"--resume: {config} cannot be read ({e!r}).") from None
        same = json.loads(json.dumps(settings))
        fixed = same["config"] | {k: same[k] for k in names}
        changed = [k for k in fixed if k in was and fixed[k] != was[k]]
        if changed:
            raise UserError(f"--resume: {out} was started with {changed[0]} = {was[changed[0]]}, not "
                            f"{fixed[changed[0]]}; give the same flags, or start another run with another --out.")


def keep_log(path: Path, last: int, validated: bool) -> None:
    """Leaves the lines up to a step, its validation only if that is done with. The last line may be half a line, or the
    file not begun."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            if entry["step"] < last or entry["step"] == last and (validated or "val" not in entry):
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    with common.writing(path) as temporary:
        temporary.write_text("".join(lines))


def cache_features(args: argparse.Namespace, model, source, frozen: str, process: Process,
                   stop: common.StopSignal) -> data.FeatureCache | None:
    """What --cache-features asks for. Raises UserError where features are not frozen, or pictures change."""
    if not args.cache_features:
        return None
    wrong = "that method reads pictures together with the sentence" if not hasattr(model, "image_features") else \
        "features change while their encoder is trained or has adapters inside" if not model.features_key else \
        "pictures change from epoch to epoch; --no-augment leaves them as they are" if model.preprocess.augment else \
        "it is for one process" if process.world > 1 else ""
    if wrong:
        raise UserError(f"--cache-features: {wrong}.")

    @torch.no_grad()
    def encode(image: torch.Tensor):
        if stop.number:  # nothing is trained yet that could be lost
            raise KeyboardInterrupt
        return model.eval().image_features(image.to(process.device))

    folder = None if args.cache_features == "memory" else args.cache_features
    towers = f"{frozen} {model.features_key}"
    return data.FeatureCache(source, model.preprocess, encode, folder, towers, process.say)


def nothing_saved(out: Path) -> bool:
    """Whether a run was stopped before it saved anything. Raises UserError where its resume.pt is lost."""
    if not (out / "resume.pt").exists() and (out / "model.safetensors").exists():
        raise UserError(f"--resume: {out} holds a model but no resume.pt to go on from; another run may take its "
                        f"towers by --weights {out}.")
    return not (out / "resume.pt").exists()


def load_resume(path: Path, identity: str | None = None) -> dict:
    """What a run saved. Raises UserError for a file that is missing, damaged or of a run with another `identity`."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.keys() != RESUMED:
            raise ValueError("it holds something else than a run, or one of an older version")
    except Exception as e:  # a broken file fails in many ways
        raise UserError(f"{path} cannot be read ({common.first_line(e)}); the run cannot be resumed, its "
                        "model.safetensors is untouched.") from None
    if identity is not None and saved["identity"] != identity:
        raise UserError(f"--resume: {path} is of a run with other settings or towers than {path.parent} was "
                        "started with.")
    return saved


SAVE_MINUTES = 10  # between two savings, where validations are further apart
RESUMED = {"model", "optimizer", "scaler", "step", "best", "rng", "interval", "seconds", "validate", "identity"}


@contextmanager
def explained(args: argparse.Namespace, batch_size: int, process: Process, reading: list[str]):
    """Says in a sentence what stops a run: too little memory for a batch, or a death among the processes that read.
    `reading`: the objects of the last batch that was wanted."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        why = common.first_line(e)
        if why.startswith("DataLoader worker"):  # the signal of its death comes wherever this process is
            raise UserError(f"{why} It was reading this batch or one soon after it, or for a validation: "
                            f"{', '.join(reading)}. --workers 0 reads in the process that trains, and shows what is "
                            "wrong.") from None
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(
                said in str(e) for said in ("can't allocate memory", "out of memory", "ALLOC_FAILED")):
            n, parts = batch_size // args.accumulate // process.world, args.accumulate + 1
            while parts < batch_size and batch_size % (parts * process.world):
                parts += 1
            less = (f"--accumulate {parts} computes the same batch in smaller parts" if n > 1 else
                    "a smaller --image-size or backbone may do")
            more = f" ({n * process.world} in validation)" if process.world > 1 else ""
            raise UserError(f"memory is not enough for {n} pictures at a time in each process{more}: {less} ({why})."
                            ) from None
        raise


def rng_state(device: torch.device) -> list:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: list[str] | None = None) -> int:
    args, c = parse(argv)
    process = common.start(tiny=args.backbone.startswith("tiny"), device=args.device)
    stop = common.StopSignal()
    out, locks = process.first_alone(lambda: find_run(args)), []
    try:
        process.first_alone(lambda: locks.append(lock(out, args.resume)))
        reading: list[str] = []
        with explained(args, c.batch_size, process, reading):
            return learn(args, c, process, out, stop, reading)
    finally:
        for file in locks:
            with suppress(OSError):  # a command that was refused leaves no folder behind
                if os.listdir(out) == [".lock"]:
                    os.remove(out / ".lock")
                    out.rmdir()
            file.close()


def learn(args: argparse.Namespace, c, process: Process, out: Path, stop: common.StopSignal, reading: list[str]) -> int:
    """The run, from its data to its last step; `reading` says where it is (see explained). -> exit status"""
    device, method = process.device, load_method(args.method)

    # data
    train_source = data.open_dataset(args.dataset, "train", args.data_root, args.seed)
    val_source = data.open_dataset(args.dataset, args.val_split, args.data_root, args.seed)
    sentences = sum(train_source.count(i) for i in range(len(train_source)))
    n = sentences if c.every_sentence else len(train_source)
    per_epoch = n // c.batch_size
    if per_epoch == 0:
        raise UserError(f"{args.dataset} train has {n} {'sentences' if c.every_sentence else 'objects'}, fewer than "
                        f"one batch; --batch-size {n} fits.")
    if c.batch_size % (args.accumulate * process.world):
        raise UserError(f"--batch-size {c.batch_size} cannot be shared out to {process.world} processes in "
                        f"{args.accumulate} parts each; a multiple of {args.accumulate * process.world} can.")
    steps = c.steps or c.epochs * per_epoch
    val_every = c.val_every or per_epoch
    val_workers = 0 if args.dataset in data.SHAPE_SETS else args.workers  # drawing shapes is faster than starting one

    # model
    amp = args.amp if args.amp != "auto" else "off" if device.type == "cpu" else (
        "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    model = common.build(method, c, args.weights, args.seed).to(device)
    frozen = common.fingerprint(model)
    info = dict(method=args.method, config=dataclasses.asdict(c), weights=args.weights, frozen=frozen, seed=args.seed,
                dataset=args.dataset, data_root=args.data_root, val_split=args.val_split, amp=amp,
                accumulate=args.accumulate, workers=args.workers, processes=process.world, device=str(device),
                cache_features=args.cache_features, origin=common.origin(args.weights),
                note=getattr(train_source, "note", ""),
                leak=common.leak(method, common.origin(args.weights), args.dataset),
                versions=common.versions())
    features = cache_features(args, model, train_source, frozen, process, stop)
    process.first_alone(lambda: open_run(args, out, info))
    trained = [p for p in model.parameters() if p.requires_grad]
    rates = dict(backbone=c.tower_lr, adapter=getattr(c, "adapter_lr", 1.0), head=1.0)
    groups = [dict(params=[p for p in parameters if p.requires_grad], base=c.lr * rates[name])
              for name, parameters in common.parameters(model).items()]
    adam = torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adam
    optimizer = adam([g for g in groups if g["params"]], lr=c.lr, betas=(0.9, c.beta2), weight_decay=c.weight_decay,
                     fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    autocast = torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16, enabled=amp != "off")

    process.say(f"{args.method} ({args.backbone}, {args.variant}) on {args.dataset}: {len(train_source)} objects, "
                f"{sentences} sentences, {steps} steps of {c.batch_size}, seed {args.seed}, "
                f"{process.world} x {device}, amp {amp}, to {out}")
    if args.tune_said:
        process.say("the tiny towers are random, so nothing is worth freezing yet: --tune full, everything is trained")
    for said in info["note"], info["leak"]:
        if said:
            process.say(said)
    process.say(f"trained: {common.count(model, True):,} of {common.count(model):,} parameters (--tune {c.tune})")

    # resume
    first, best, seconds, interval, saved = 0, -1.0, 0.0, [], None
    identity = json.dumps([info[k] for k in ("config", "dataset", "weights", "seed", "frozen")])
    if args.resume and process.first_alone(lambda: nothing_saved(out)):
        process.say(f"--resume: nothing is saved in {out} yet, so the run begins at its first step")
        process.first_alone(lambda: keep_log(out / "log.jsonl", 0, True))
    elif args.resume:
        saved = process.everywhere(lambda: load_resume(out / "resume.pt", identity))
        common.load_trained(model, saved["model"], str(out / "resume.pt"))
        try:
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise UserError(f"{out / 'resume.pt'} does not fit this run: {common.first_line(e)}.") from None
        first, best, seconds, interval = (saved[k] for k in ("step", "best", "seconds", "interval"))
        process.say(f"resumed at step {first}")
        # lines after the saved step will come again
        process.first_alone(lambda: keep_log(out / "log.jsonl", first, not saved["validate"]))

    net = model
    if process.world > 1:
        if device.type == "cuda":
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    items = data.TrainSet(train_source, model.preprocess, args.seed, c.every_sentence, features)
    coming, ahead = (micro_batches(n, c, args.seed, range(first, steps), process, args.accumulate) for _ in range(2))
    loader = iter(DataLoader(
        items, num_workers=0 if features else args.workers, collate_fn=data.collate, batch_sampler=ahead,
        worker_init_fn=quiet_worker, pin_memory=device.type == "cuda"))
    torch.manual_seed(args.seed + process.rank)  # dropout
    if saved and process.rank < len(saved["rng"]):
        torch.set_rng_state(saved["rng"][process.rank][0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng"][process.rank][1], device)

    def log(**entry) -> None:
        if process.rank == 0:
            try:
                with open(out / "log.jsonl", "a") as f:
                    f.write(json.dumps(entry) + "\n")
            except OSError as e:
                raise UserError(f"{out / 'log.jsonl'} cannot be written: {e.strerror}.") from None

    def save_best() -> None:
        common.save_model(out / "model.safetensors", model, info | dict(step=step, val=val))
        if val:
            about = dict(step=step, dataset=args.dataset, split=args.val_split)
            about |= dict(leak=info["leak"]) if info["leak"] else {}
            common.write_json(out / "metrics.json", about | val)

    def save_resume(validate: bool = False) -> None:
        """`validate`: whether the validation of this step is still to come."""
        nonlocal saved_at
        rng = process.gather(rng_state(device))

        def write() -> None:
            state = dict(model=common.trained_state(model), optimizer=optimizer.state_dict(), identity=identity,
                         scaler=scaler.state_dict(), step=step, best=best, rng=rng, validate=validate,
                         interval=interval, seconds=seconds + time.perf_counter() - begin)
            with common.writing(out / "resume.pt") as temporary, open(temporary, "wb") as f:
                torch.save(state, f)

        process.first_alone(write)
        saved_at = time.perf_counter()

    def validate() -> bool:
        """Measures the model and keeps it where it is the best so far; False where a signal came before the end."""
        nonlocal best, val
        if process.world > 1:  # without SyncBatchNorm (gloo) each process has statistics of its own
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        # a trial of a few steps is not worth a long validation: no more sentences than the run learns from
        val = evaluate_split(model, val_source, process, c.batch_size // args.accumulate, val_workers,
                             most=steps * c.batch_size, stop=stop)
        if not val:
            return False
        log(step=step, epoch=round(step / per_epoch, 3), val=val)
        if not bar.disable:
            bar.clear()
        process.say(f"step {step}  {args.val_split}  " + "  ".join(f"{k} {v}" for k, v in val.items()))
        if val[MAIN_METRIC[model.task]] > best:
            best = val[MAIN_METRIC[model.task]]
            process.first_alone(save_best)
        process.first_alone(draw_pictures)
        return True

    def draw_pictures() -> None:
        """What a glance at the run folder tells: its curves, and the same few expressions of val every time."""
        was_training = model.training
        model.eval()
        try:
            draw_examples(out / "samples.png", model, val_source, 12, most=steps * c.batch_size)
            draw.draw_curves(out / "log.jsonl", MAIN_METRIC[model.task], out / "curves.png")
        except (UserError, OSError, ImportError) as e:  # no reason to stop a run
            process.say(f"no pictures of this validation: {e}")
        model.train(was_training)

    def leave(pending: bool) -> int:
        save_resume(pending)
        if best < 0:
            process.first_alone(save_best)
        process.say(f"stopped at step {step} and saved; the same command with --resume goes on from there.")
        return 128 + (stop.number or signal.SIGTERM)

    # train
    bar = tqdm(total=steps, initial=first, disable=process.rank > 0 or not sys.stderr.isatty())
    begin = since = saved_at = time.perf_counter()
    step, val, done = first, {}, first
    if saved and saved["validate"]:
        if not validate():
            return leave(pending=True)
        save_resume()
    net.train()
    for step in range(first + 1, steps + 1):
        factor = learning_rate(step - 1, steps, per_epoch, c)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        total, ids = torch.zeros((), device=device), []
        for part in range(args.accumulate):
            reading[:] = [train_source.describe(items.pairs[k][0]) for _, k in next(coming)]
            batch = next(loader)
            ids += batch["id"]
            images = batch["image"].to(device, non_blocking=True)
            target = batch[model.task].to(device, non_blocking=True)
            tokens = model.tokenize(batch["sentence"]).to(device)
            sync = part == args.accumulate - 1 or process.world == 1
            with nullcontext() if sync else net.no_sync():
                with autocast:
                    loss = model.loss(net(images, tokens), target) / args.accumulate
                scaler.scale(loss).backward()
            total += loss.detach()
        late = process.rank == 0 and time.perf_counter() - saved_at > SAVE_MINUTES * 60
        status = torch.stack([total / process.world, total.new_tensor(float(stop.number)), total.new_tensor(late)])
        if process.world > 1:
            dist.all_reduce(status)
        loss_value, stopped, late = status.tolist()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, c.clip_norm) if c.clip_norm else \
            torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        # fp16's scaler looks for itself, and leaves out a step whose gradients are none
        if not math.isfinite(loss_value) or not scaler.is_enabled() and not norm.isfinite():
            ids = [i for part in process.gather(ids) for i in part]
            what = f"the loss is {loss_value}" if not math.isfinite(loss_value) else \
                f"the gradient's norm is {norm.item()}"
            raise UserError(
                f"{what} at step {step}, so the run stops before it spoils the weights; its batch: {', '.join(ids)}. A "
                f"lower --lr or --amp off may help; what was saved in {out} is untouched.")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        interval.append(loss_value)

        bar.update()
        if step % args.log_every == 0 or step == steps:
            now = time.perf_counter()
            rate = (step - done) * c.batch_size / (now - since)
            entry = dict(step=step, loss=round(sum(interval) / len(interval), 6), lr=c.lr * factor,
                         images_per_s=round(rate, 1), peak_gib=round(peak_memory(device), 2),
                         seconds=round(seconds + now - begin, 1))
            log(**entry)
            eta = (steps - step) * c.batch_size / rate
            line = (f"step {step}/{steps}  loss {entry['loss']:.4f}  lr {entry['lr']:.2e}  {rate:.0f} images/s  "
                    f"ETA {eta / 60:.1f} min  peak {entry['peak_gib']:.2f} GiB")
            bar.set_postfix_str(f"loss {entry['loss']:.4f} peak {entry['peak_gib']:.2f} GiB") if not bar.disable \
                else process.say(line)
            interval, since, done = [], now, step
        due = step % val_every == 0 or step == steps
        if stopped:
            return leave(pending=due)
        if due:
            save_resume(validate=True)
            if not validate():
                return leave(pending=True)
        if due or late:
            save_resume()
            since, done = saved_at, step
    bar.close()
    minutes = (seconds + time.perf_counter() - begin) / 60
    process.say(f"best {args.val_split} {MAIN_METRIC[model.task]} {best} in {minutes:.1f} min. Next:\n"
                f"  python evaluate.py --ckpt {out} --split all")
    return 0


if __name__ == "__main__":
    common.run_command(main)
