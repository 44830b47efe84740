"""train.py with BatchNorm in eval mode, since gloo has no SyncBatchNorm; the first step's gradients go to a file.

    torchrun --nproc_per_node 2 tests/still_batchnorm.py GRADIENTS.pt --method dcris ...
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

_BatchNorm.train = lambda self, mode=True: torch.nn.Module.train(self, False)


def keep_gradients(optimizer, args, kwargs):
    if not os.path.exists(sys.argv[1]) and os.environ.get("RANK", "0") == "0":
        torch.save([p.grad for g in optimizer.param_groups for p in g["params"]], sys.argv[1])


register_optimizer_step_pre_hook(keep_gradients)
common.run_command(lambda: train.main(sys.argv[2:]))
