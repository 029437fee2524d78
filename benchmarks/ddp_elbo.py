"""Does a model trained on two devices end as good as on one? Final validation ELBO over seeds; prints and writes JSON.

::

    python benchmarks/ddp_elbo.py kang_ctrl_8donors.h5ad --epochs 20 --seeds 0 1 2

Trains SCVI on one device, on two with half the minibatch each (so that steps are as many and as large), and on two
whose cells are dealt out anew in each epoch. The seed of a training decides its split, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
BATCH = 128
CASES = {
    "1 device": {"devices": 1},
    "2 devices, shuffled within": {"devices": 2, "shuffle_over": "shard"},
    "2 devices, dealt out anew": {"devices": 2, "shuffle_over": "all"},
}


def train(
    data: str, seed: int, epochs: int, accelerator: str, devices: int, out: str, shuffle_over: str = "shard"
) -> None:
    """One training; every rank of it runs this, and the first writes the ELBO."""
    import anndata

    import scvi_lite
    from scvi_lite.model import SCVI

    scvi_lite.settings.seed = seed
    adata = anndata.read_h5ad(data)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata)
    model.train(
        max_epochs=epochs,
        batch_size=BATCH // devices,
        accelerator=accelerator,
        devices=devices,
        enable_progress_bar=False,
        datasplitter_kwargs={"shuffle_over": shuffle_over},
        plan_kwargs={"n_epochs_kl_warmup": max(1, epochs // 2)},
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(out).write_text(json.dumps(float(model.history["elbo_validation"].iloc[-1, 0])))


def measure(options: dict[str, object]) -> dict[str, float]:
    """Run one training in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "elbo.json"
        threads = {"OMP_NUM_THREADS": "1"} if options["accelerator"] == "cpu" else {}
        start = time.perf_counter()
        command = [sys.executable, __file__, "--one", json.dumps(options | {"out": str(out)}), str(options["data"])]
        subprocess.run(command, check=True, env=os.environ | threads)
        return {"elbo_validation": json.loads(out.read_text()), "seconds": time.perf_counter() - start}


def main() -> None:
    """Measure all cases over the seeds and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an .h5ad file with counts in X and obs['batch']")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "ddp_elbo.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        train(**json.loads(args.one))
        return
    rows = []
    for seed in args.seeds:
        for name, case in CASES.items():
            options = {"data": args.data, "seed": seed, "epochs": args.epochs, "accelerator": args.accelerator}
            rows.append({"case": name, "seed": seed, **measure({**options, **case})})
            found = rows[-1]
            print(f"seed {seed}, {name}: {found['elbo_validation']:.2f} in {found['seconds']:.0f} s", flush=True)
    args.out.write_text(
        json.dumps({"epochs": args.epochs, "data": Path(args.data).name, "rows": rows}, indent=1) + "\n"
    )
    compare(rows)


def compare(rows: list[dict[str, object]]) -> None:
    """Differences from one device at the same seed, beside the spread over seeds."""
    by_case = {name: np.array([row["elbo_validation"] for row in rows if row["case"] == name]) for name in CASES}
    one = by_case.pop("1 device")
    print(f"1 device: {one.mean():.2f}, spread over seeds {np.ptp(one):.2f}")
    for name, values in by_case.items():
        differences = ", ".join(f"{value:+.2f}" for value in values - one)
        verdict = "within" if abs(values - one).max() <= np.ptp(one) else "beyond"
        print(f"{name}: {values.mean():.2f}; from one device at the same seed {differences}: {verdict} the spread")


if __name__ == "__main__":
    main()
