"""A run folder while its run trains: one command at a time, what the run is, its log, and where to continue from."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch

import common
from common import ALONE, Process, UserError
from toolbox import pretrain

TOWERS = "towers.safetensors"
FILES = ("config.json", TOWERS, "log.jsonl", "model.safetensors", "resume.pt", "metrics.json", "curves.png",
         "samples.png")
RESUMED = {"model", "optimizer", "scaler", "rng", "progress", "identity"}


def find(args: argparse.Namespace) -> Path:
    """The run folder to make or to resume: without --out the next one of its kind, or the last."""
    out, n = Path(args.out or f"runs/{args.method}-{args.dataset}"), 2
    while args.out is None and (out / "config.json").exists():
        following = Path(f"runs/{args.method}-{args.dataset}-{n}")
        if args.resume and not (following / "config.json").exists():
            break  # the last one
        out, n = following, n + 1
    return out


@contextmanager
def locked(out: Path, resume: bool, process: Process) -> Iterator[None]:
    """Keeps the run folder for this command alone. A command that is refused leaves no folder behind."""
    files = []
    try:
        process.on_main(lambda: files.append(lock(out, resume)))
        yield
    finally:
        for file in files:
            with suppress(OSError):
                if os.listdir(out) == [".lock"]:
                    os.remove(out / ".lock")
                    out.rmdir()
            file.close()


def lock(out: Path, resume: bool):
    """-> a file that must stay open. Raises UserError where another command has the folder, or, without `resume`, where
    it holds a run. Temporary files of a command that was killed are removed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")
    except OSError as e:
        raise UserError(f"--out {str(out)[:200]} cannot be written: {e.strerror}.") from None
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not kept by data workers that outlive us
    except (BlockingIOError, PermissionError):
        raise UserError(f"{out} is in use by another process that trains; wait for it, or give another --out."
                        ) from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        print(f"{out} cannot be locked, so nothing keeps a second command out of it", file=sys.stderr)
    if (out / "config.json").exists() and not resume:
        raise UserError(f"{out} holds a run already: --resume continues it, another --out keeps both.")
    for name in FILES:
        for leftover in out.glob(f".{name}.*"):
            leftover.unlink(missing_ok=True)
    return file


def write_config(out: Path, info: dict, model: torch.nn.Module) -> None:
    """Writes what the run is, with frozen towers that nobody else has. Raises UserError where the run to resume was
    started with something else."""
    path, names = out / "config.json", ("dataset", "weights", "seed", "val_split")
    if not path.exists():
        if info["origin"] == "toolbox.pretrain" and info["frozen"]:
            common.write_tensors(out / TOWERS, pretrain.towers_of(model),
                                 pretrain.describe(info["method"], model.c, info["seed"]))
        common.write_json(path, info)
        return
    try:
        before = json.loads(path.read_bytes())
        was = before["config"] | {k: before[k] for k in names}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--resume: {path} cannot be read ({e!r}).") from None
    now = json.loads(json.dumps(info["config"] | {k: info[k] for k in names}))
    changed = [k for k in now if k in was and now[k] != was[k]]
    if changed:
        raise UserError(f"--resume: {out} was started with {changed[0]} = {was[changed[0]]}, not {now[changed[0]]}; "
                        "give the same flags, or start another run with another --out.")


# The log


def write_log(run, **entry) -> None:
    if run.process.is_main:
        try:
            with open(run.out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(dict(step=run.progress.step) | entry) + "\n")
        except OSError as e:
            raise UserError(f"{run.out / 'log.jsonl'} cannot be written: {e.strerror}.") from None


def read_log(path: Path, last: int) -> list[dict]:
    """The entries up to a step. The last line of the file may be half a line, or the file not there yet."""
    entries = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            if entry["step"] <= last:
                entries.append(entry)
        except (ValueError, KeyError, TypeError):
            break
    return entries


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU, or resident of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# Saving and resuming


def save_best(run, val: dict) -> None:
    step = run.progress.step
    common.write_tensors(run.out / "model.safetensors", common.trained_state(run.model),
                         run.info | dict(step=step, val=val))
    if val:
        about = dict(step=step, dataset=run.args.dataset, split=run.args.val_split)
        about |= dict(leak=run.info["leak"]) if run.info["leak"] else {}
        common.write_json(run.out / "metrics.json", about | val)


def identity(run) -> str:
    """What must be the same for a run to be continued."""
    return json.dumps([run.info[k] for k in ("config", "dataset", "weights", "seed", "frozen")])


def save_resume(run) -> None:
    """Before a validation, which --resume then repeats unless it is in the log."""
    device = run.process.device
    rng = run.process.gather([torch.get_rng_state()] + (
        [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))

    def write() -> None:
        with common.writing(run.out / "resume.pt") as temporary, open(temporary, "wb") as f:
            torch.save(dict(model=common.trained_state(run.model), optimizer=run.optimizer.state_dict(),
                            scaler=run.scaler.state_dict(), rng=rng, progress=dataclasses.asdict(run.progress),
                            identity=identity(run)), f)

    run.process.on_main(write)
    run.saved_at = time.perf_counter()


def resume(run) -> None:
    """Puts the run back to where it was saved."""
    path, process = run.out / "resume.pt", run.process
    if process.on_main(lambda: nothing_saved(run.out)):
        process.print(f"--resume: nothing is saved in {run.out} yet, so the run begins at its first step")
    else:
        saved = load_resume(path, identity(run))
        common.load_trained(run.model, saved["model"], str(path))
        try:
            run.optimizer.load_state_dict(saved["optimizer"])
            run.scaler.load_state_dict(saved["scaler"])
            run.progress = type(run.progress)(**saved["progress"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise UserError(f"{path} does not fit this run: {common.first_line(e)}.") from None
        if process.rank < len(saved["rng"]):
            torch.set_rng_state(saved["rng"][process.rank][0])
            if process.device.type == "cuda":
                torch.cuda.set_rng_state(saved["rng"][process.rank][1], process.device)
        process.print(f"resumed at step {run.progress.step}")
    entries = process.on_main(lambda: read_log(run.out / "log.jsonl", run.progress.step))
    run.best = max((e["val"][run.metric] for e in entries if "val" in e), default=-1.0)

    def keep_entries() -> None:  # those after the saved step will come again
        with common.writing(run.out / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(e) + "\n" for e in entries), "utf-8")

    process.on_main(keep_entries)


def nothing_saved(out: Path) -> bool:
    """Whether a run was stopped before it saved anything. Raises UserError where its resume.pt is lost."""
    if not (out / "resume.pt").exists() and (out / "model.safetensors").exists():
        raise UserError(f"--resume: {out} holds a model but no resume.pt to continue from; another run may take its "
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


# What stops a run


def ignore_signals(_: int) -> None:
    """For data workers: Ctrl-C and SIGTERM reach them too, but the process that trains decides."""
    for s in signal.SIGINT, signal.SIGTERM:
        signal.signal(s, signal.SIG_IGN)


@contextmanager
def errors_in_a_sentence(args: argparse.Namespace, c: common.TrainConfig, process: Process) -> Iterator[None]:
    """Raises UserError for too little memory for a batch, and for the death of a process that reads data."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        why = common.first_line(e)
        if why.startswith("DataLoader worker"):
            raise UserError(f"{why} --workers 0 reads in the process that trains, and shows what is wrong.") from None
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(
                text in str(e) for text in ("can't allocate memory", "out of memory", "ALLOC_FAILED")):
            n, parts = c.batch_size // args.accumulate // process.world_size, args.accumulate + 1
            while parts < c.batch_size and c.batch_size % (parts * process.world_size):
                parts += 1
            less = (f"--accumulate {parts} computes the same batch in smaller parts" if n > 1 else
                    "a smaller --image-size or backbone may do")
            raise UserError(f"memory is not enough for {n} pictures at a time in each process: {less} ({why})."
                            ) from None
        raise


# Building a model, from released weights or from the towers of another run


def is_run(weights: str) -> bool:
    """Whether --weights names a run folder or its checkpoint: not a keyword, nor files that others released."""
    return weights not in ("random", "pretrained") and (
        os.path.isdir(weights) or os.path.basename(weights) == "model.safetensors" and "," not in weights)


def build(method, config: common.TrainConfig, weights: str, seed: int, process: Process = ALONE) -> torch.nn.Module:
    """The method's model with random weights, released ones (tiny: those of toolbox/pretrain.py), or the towers that
    another run trained. What is random depends on `seed` alone."""
    torch.manual_seed(seed)
    tiny = config.backbone.startswith("tiny") and weights != "random"
    model = method.Model(config, "random" if tiny or is_run(weights) else weights)
    if is_run(weights):
        load_towers(model, weights, method.__name__)
    elif tiny:
        pretrain.load(model, pretrain.pretrained(method.__name__, config, seed, process) if weights == "pretrained" else
                      pretrain.read(weights, method=method.__name__, backbone=config.backbone), weights)
    return model


def weights_of(ckpt: str, info: dict) -> str:
    """The --weights that the frozen towers of a checkpoint came from: a copy of tiny ones is in its run folder."""
    copy = (Path(ckpt) if os.path.isdir(ckpt) else Path(ckpt).parent) / TOWERS
    return str(copy) if info["weights"] == "pretrained" and copy.is_file() else info["weights"]


def load_towers(model: torch.nn.Module, run: str, method: str) -> None:
    """Loads the towers that another run trained. Raises UserError where it trained none, or others."""
    info, state = common.read_checkpoint(run)
    if info["method"] != method or info["config"]["backbone"] != model.c.backbone:
        raise UserError(f"--weights {run}: a run of {info['method']} with {info['config']['backbone']}, "
                        f"not of {method} with {model.c.backbone}.")
    if info["frozen"]:
        raise UserError(f"--weights {run}: that run trained no towers (it was --tune {info['config']['tune']}); "
                        "give its own --weights, or a run with --tune full.")
    own, names = model.state_dict(), pretrain.tower_names(model)
    state = {names[k]: v for k, v in state.items() if k in names}
    odd = [k for k, v in state.items() if not common.same_shape(k, own[k], v)]
    if odd:
        raise UserError(f"--weights {run}: its towers do not fit these settings: {min(odd)} is "
                        f"{tuple(state[min(odd)].shape)} there.")
    model.load_state_dict(state, strict=False)


def origin(weights: str, backbone: str = "") -> str:
    """What the towers came from in the first place: of a run, what its own came from."""
    if not is_run(weights):
        return "toolbox.pretrain" if weights == "pretrained" and backbone.startswith("tiny") else weights
    info, _ = common.read_checkpoint(weights, tensors=False)
    return info.get("origin", info["weights"])


def versions() -> dict[str, str]:
    """Of Python and the libraries that a run depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in "torchvision", "transformers", "open_clip_torch", "sentencepiece", "numpy", "pillow":
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
