"""What a frozen encoder gives for each picture, computed once and kept in memory or in a file."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import common
from common import Preprocess, Process, UserError, writing
from data import Source, normalise, to_canvas

BATCH = 8  # pictures encoded together


class FeatureCache:
    """What a frozen encoder gives for each picture of a source, made once: cache[picture].

    In memory, or in a file of `folder` that the next run with the same encoder (`towers`), pictures by name and sizes
    finds; it is made anew where the first picture gives something else. Raises UserError where it would not fit.
    """

    def __init__(self, source: Source, pre: Preprocess, encode: Callable[[Tensor], NamedTuple],
                 folder: str | None, towers: str, say: Callable[[str], None] = print):
        first = {}  # of each picture, an object that is in it
        for i in range(len(source)):
            first.setdefault(source.picture(i), i)
        self.rows = {picture: row for row, picture in enumerate(first)}
        objects = list(first.values())
        make = (encode(normalise(torch.stack([to_canvas(source.read(i).image, pre) for i in some]), pre))
                for some in (objects[n:n + BATCH] for n in range(0, len(objects), BATCH)))
        one = next(make)
        self.kind = type(one)
        row = np.dtype([(name, v.cpu().numpy().dtype, v.shape[1:]) for name, v in one._asdict().items()])
        need = len(first) * row.itemsize
        key = hashlib.sha256(f"{towers} {source.identity()} {pre} {row}".encode()).hexdigest()[:16]
        file = Path(folder or ".") / f"{source.name}-{source.split}-{key}.features"
        size = f"features of {len(first):,} pictures, {need / 2**30:.2f} GiB"
        if folder and file.is_file() and file.stat().st_size == need and all(
                np.allclose(a, b[0].cpu().numpy(), atol=1e-2) for a, b in zip(np.memmap(file, row, "r")[0], one)):
            say(f"{size}, are in {file}")
        else:
            say(f"{size}, go to {file if folder else 'memory'} ...")
            free = free_space(file.parent) if folder else free_memory()
            if need > free:
                raise UserError(f"--cache-features {folder or 'memory'}: {size}, but {free / 2**30:.2f} GiB are free"
                                + ("." if folder else "; a folder in the place of memory may hold them."))
            rows = (np.array(list(zip(*(v.cpu().numpy() for v in e))), row) for e in itertools.chain([one], make))
            if folder:
                with writing(file) as temporary, open(temporary, "wb") as f:
                    f.writelines(r.tobytes() for r in rows)
            else:
                self.data = np.empty(len(first), row)
                for n, r in enumerate(rows):
                    self.data[n * BATCH:n * BATCH + len(r)] = r
        if folder:
            self.data = np.memmap(file, row, "r")

    def __getitem__(self, picture) -> NamedTuple:
        row = self.data[self.rows[picture]]
        return self.kind(*(torch.from_numpy(np.array(row[n])) for n in self.data.dtype.names))


def free_memory() -> float:
    """In bytes; without a limit on a system that does not say."""
    with suppress(OSError, StopIteration):  # Linux counts what caches would give back
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS no such name
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def free_space(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cache_features(args: argparse.Namespace, model, source, frozen: str, process: Process,
                   stop: common.StopSignal) -> FeatureCache | None:
    """What --cache-features asks for. Raises UserError where features are not frozen, or pictures change."""
    if not args.cache_features:
        return None
    wrong = "that method reads pictures together with the sentence" if not hasattr(model, "image_features") else \
        "features change while their encoder is trained or has adapters inside" if not model.features_key else \
        "pictures change from epoch to epoch; --no-augment leaves them as they are" if model.preprocess.augment else \
        "it is for one process" if process.world_size > 1 else ""
    if wrong:
        raise UserError(f"--cache-features: {wrong}.")

    @torch.no_grad()
    def encode(image: torch.Tensor):
        if stop.number:  # nothing is trained yet that could be lost
            raise KeyboardInterrupt
        return model.eval().image_features(image.to(process.device))

    folder = None if args.cache_features == "memory" else args.cache_features
    towers = f"{frozen} {model.features_key}"
    return FeatureCache(source, model.preprocess, encode, folder, towers, process.print)
