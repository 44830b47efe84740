"""train.py for several methods, one after another, with BatchNorm in eval mode, since gloo has no SyncBatchNorm. The
gradients of each first step go to FOLDER/METHOD.pt, the runs to FOLDER/METHOD.

    torchrun --nproc_per_node 2 tests/still_batchnorm.py FOLDER METHOD,METHOD --steps 5 ...
"""

import os
import sys
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import train  # noqa: E402

folder, methods, *flags = sys.argv[1:]
_BatchNorm.train = lambda self, mode=True: torch.nn.Module.train(self, False)


def keep_gradients(optimizer, args, kwargs):
    if not os.path.exists(file) and os.environ.get("RANK", "0") == "0":
        torch.save([p.grad for g in optimizer.param_groups for p in g["params"]], file)


def main():
    global file
    register_optimizer_step_pre_hook(keep_gradients)
    for method in methods.split(","):
        file = f"{folder}/{method}.pt"
        train.main(["--method", method, *flags, "--out", f"{folder}/{method}"])


common.run_command(main)
