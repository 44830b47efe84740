"""Forward and backward of this checkout beside another commit, in CPU-seconds of one thread, in interleaved pairs.

    python docs/compare_speed.py COMMIT [--pairs 5] [--batch 2] [--only ETRIS,...]

For each row two processes build the same model with random weights and take turns; what is printed is the median of the
ratios of the pairs, ours / COMMIT's, with the least and the greatest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROWS = {
    "ETRIS RN101": dict(method="etris", backbone="RN101"),
    "ETRIS RN101 released": dict(method="etris", backbone="RN101", variant="released"),
    "ETRIS ViT-B-16": dict(method="etris", backbone="ViT-B-16"),
    "ETRIS ViT-B-16 released": dict(method="etris", backbone="ViT-B-16", variant="released"),
    "DCRIS-B": dict(method="dcris", backbone="dinov2-base"),
    "DCRIS-B detris": dict(method="dcris", backbone="dinov2-base", variant="detris"),
    "M2IST side": dict(method="m2ist", backbone="detr-resnet-50"),
    "M2IST frozen": dict(method="m2ist", backbone="detr-resnet-50", tune="frozen"),
    "M2IST full": dict(method="m2ist", backbone="detr-resnet-50", tune="full"),
    "Shared-RIS B": dict(method="shared_ris", backbone="beit3-base"),
    "Shared-RIS B frozen": dict(method="shared_ris", backbone="beit3-base", tune="frozen"),
}


def serve(batch: int, method: str, backbone: str, variant: str = "", **flags) -> None:
    """Builds a model of the checkout in the working directory, and takes a step for each line of standard input."""
    sys.path.insert(0, os.getcwd())
    import torch

    import common
    from toolbox import costs, runs

    torch.set_num_threads(1)
    module = common.load_method(method)
    c = module.config(backbone, variant or module.VARIANTS[0], "refcoco", **flags)
    model = runs.build(module, c, "random", 0)
    images, tokens, target = costs.blank(model, batch)
    for _ in sys.stdin:
        begin = time.process_time()
        with torch.no_grad():
            model.eval()(images, tokens)
        middle = time.process_time()
        model.train()
        torch.manual_seed(0)  # the same dropout at each step
        loss = model.loss(model(images, tokens), target)
        loss.backward()
        model.zero_grad()
        print(json.dumps([middle - begin, time.process_time() - middle, loss.item()]), flush=True)


def ask(process: subprocess.Popen) -> list[float]:
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def compare(trees: list[Path], row: dict, batch: int, pairs: int) -> None:
    command = [sys.executable, __file__, "--serve", json.dumps(dict(batch=batch) | row)]
    ours, theirs = (subprocess.Popen(command, cwd=tree, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                    for tree in trees)
    try:
        rounds = [(ask(ours), ask(theirs)) for _ in range(pairs + 1)][1:]  # the first of each warms up
    finally:
        for process in ours, theirs:
            process.stdin.close()
            process.wait()
    for n, what in enumerate(("forward", "forward + backward")):
        ratios = [a[n] / b[n] for a, b in rounds]
        seconds = [median(r[side][n] for r in rounds) / batch for side in (0, 1)]
        print(f"  {what}: {median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}], "
              f"{seconds[0]:.2f} and {seconds[1]:.2f} CPU-seconds per image", flush=True)
    print(f"  losses: {rounds[-1][0][2]:.6f} and {rounds[-1][1][2]:.6f}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("commit", nargs="?", help="what git knows: a branch, a tag, a commit")
    p.add_argument("--pairs", type=int, default=5)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--only", default="", help="rows whose names start with one of these")
    p.add_argument("--serve", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve:
        return serve(**json.loads(args.serve))
    here = Path(__file__).resolve().parents[1]
    os.environ |= dict(OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as there:
        git = ["git", "-C", str(here), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", there, args.commit], check=True)
        try:
            for name, row in ROWS.items():
                if name.startswith(tuple(args.only.split(","))):
                    print(name, flush=True)
                    compare([here, Path(there)], row, args.batch, args.pairs)
        finally:
            subprocess.run([*git, "remove", "--force", there], check=True)


if __name__ == "__main__":
    main()
