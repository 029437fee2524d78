"""Training on several devices: seconds an epoch over sizes of data and numbers of devices; a JSON file and a figure.

::

    python benchmarks/scaling.py --accelerator cpu --devices 1 2 --cells 2000 8000 32000

Each measurement is a process of its own, which trains SCVI on simulated counts by the same call at every number of
devices. On CPUs every process gets its share of the cores, so that more devices means more processes, not more cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parents[1] / "docs" / "scaling.png"


def measure(n_cells: int, n_genes: int, devices: int, accelerator: str, batch_size: int, epochs: int) -> None:
    """Train in this process (and, under DDP, its copies); the first rank prints seconds an epoch."""
    import torch

    import scvi_lite
    from scvi_lite.model import SCVI

    if accelerator == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // devices))
    adata = scvi_lite.data.simulate(n_cells=n_cells, n_genes=n_genes, seed=0)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata)
    options = dict(accelerator=accelerator, devices=devices, batch_size=batch_size, train_size=1.0)
    times: list[float] = []
    model.train(max_epochs=epochs + 1, callbacks=epoch_clock(times), enable_progress_bar=False, **options)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(json.dumps({"seconds_per_epoch": (times[-1] - times[0]) / epochs}))


def epoch_clock(times: list[float]):
    """A callback that notes when each epoch ends; the first one pays for starting up."""
    from lightning.pytorch import Callback

    class EpochClock(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            times.append(time.perf_counter())

    return EpochClock()


def main() -> None:
    """Measure all combinations and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[2_000, 8_000, 32_000])
    parser.add_argument("--genes", type=int, default=1_000)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(*json.loads(args.one))
        return
    rows = []
    for n_cells in args.cells:
        for devices in args.devices:
            one = json.dumps([n_cells, args.genes, devices, args.accelerator, args.batch_size, args.epochs])
            done = subprocess.run([sys.executable, __file__, "--one", one], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
            rows.append({"cells": n_cells, "devices": devices, **json.loads(line)})
            print(
                f"{n_cells:>9,} cells, {devices} device(s): {rows[-1]['seconds_per_epoch']:.3f} s an epoch", flush=True
            )
    about = {"cpu": platform.processor(), "cores": os.cpu_count(), "accelerator": args.accelerator, "genes": args.genes}
    out = RESULTS / f"scaling_{args.accelerator}.json"
    out.write_text(json.dumps({"machine": about, "batch_size": args.batch_size, "rows": rows}, indent=1) + "\n")
    draw(rows, args.accelerator)
    print(f"Written to {out} and {FIGURE}")


def draw(rows: list[dict[str, float]], accelerator: str) -> None:
    """Speed-up over one device against the size of the data."""
    import matplotlib.pyplot as plt

    one = {row["cells"]: row["seconds_per_epoch"] for row in rows if row["devices"] == 1}
    figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for devices in sorted({row["devices"] for row in rows} - {1}):
        several = [row for row in rows if row["devices"] == devices]
        speedup = [one[row["cells"]] / row["seconds_per_epoch"] for row in several]
        ax.plot([row["cells"] for row in several], speedup, marker="o", label=f"{devices} devices")
    ax.axhline(1, color="0.6", lw=1)
    ax.set(xscale="log", xlabel="cells", ylabel="speed-up over one device", title=f"SCVI, accelerator={accelerator!r}")
    ax.legend(frameon=False)
    figure.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    main()
