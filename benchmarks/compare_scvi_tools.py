"""scvi_lite beside scvi-tools: the same work, alternating, medians; a table and a JSON file.

::

    python benchmarks/compare_scvi_tools.py --peer-python PEER_ENV/bin/python --data DATA_FOLDER

The peer lives in an environment of its own: scvi-tools 1.5.0 and the same PyTorch. DATA_FOLDER holds
``kang_ctrl_8donors.h5ad`` (12,261 × 1,287) and ``pbmc_multitech.h5ad`` (7,944 × 8,732). Each measurement is a process
of its own; the two sides take turns, so that a machine that gets slower does so for both.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
SMALL, LARGE = "kang_ctrl_8donors.h5ad", "pbmc_multitech.h5ad"
SIMULATED = "simulated.h5ad"  # 20,000 x 16,000, written where it is asked for
# name: (task, data, epochs, the figure that counts, whether more is better)
WORK = {
    "training, 1,287 genes": ("train", SMALL, 6, "cells_per_second", True),
    "training, 8,732 genes": ("train", LARGE, 3, "cells_per_second", True),
    "training, 16,000 genes, simulated": ("train", SIMULATED, 1, "cells_per_second", True),
    "latent space, 1,287 genes": ("latent", SMALL, 1, "seconds", False),
    "latent space, 8,732 genes": ("latent", LARGE, 1, "seconds", False),
    "normalised expression, 1,287 genes": ("expression", SMALL, 1, "seconds", False),
    "normalised expression, 8,732 genes": ("expression", LARGE, 1, "seconds", False),
    "differential expression, 1,287 genes": ("differential_expression", SMALL, 1, "seconds", False),
    "differential expression, 8,732 genes": ("differential_expression", LARGE, 1, "seconds", False),
    "marginal likelihood, 200 cells": ("marginal_ll", SMALL, 1, "seconds", False),
}
IMPORTS = {
    "python": "pass",
    "import torch": "import torch",
    "import torch, anndata": "import torch, anndata",
    "import scvi_lite": "import scvi_lite",
    "from scvi_lite.model import SCVI": "from scvi_lite.model import SCVI",
}


def measure(python: str, package: str, task: str, data: Path, epochs: int) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [python, str(WORKER), package, task, str(data), str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(name: str, peer: str, folder: Path, repeats: int) -> dict[str, object]:
    """Both sides in turn; medians, their ratio (ours better above 1), and every figure."""
    task, file, epochs, figure, more_is_better = WORK[name]
    sides: dict[str, list[dict[str, float]]] = {"scvi_lite": [], "scvi": []}
    for _ in range(repeats):
        for package, python in (("scvi_lite", sys.executable), ("scvi", peer)):
            sides[package].append(measure(python, package, task, folder / file, epochs))
    ours, theirs = ([run[figure] for run in sides[package]] for package in ("scvi_lite", "scvi"))
    a, b = statistics.median(ours), statistics.median(theirs)
    pairs = [x / y if more_is_better else y / x for x, y in zip(ours, theirs, strict=True)]
    peaks = {package: statistics.median(run["peak_mib"] for run in runs) for package, runs in sides.items()}
    row = {
        "work": name,
        "peak_mib": peaks,
        "figure": figure,
        "scvi_lite": a,
        "scvi_tools": b,
        "ratio": a / b if more_is_better else b / a,
    }
    if "beyond_imports_mib" in sides["scvi"][0]:
        row["beyond_imports_mib"] = {
            package: statistics.median(run["beyond_imports_mib"] for run in runs) for package, runs in sides.items()
        }
    return row | {"ratio_min": min(pairs), "ratio_max": max(pairs), "runs": sides}


def simulate(path: Path) -> None:
    """Write counts of 20,000 cells x 16,000 genes, one in seven of them above zero."""
    from step import simulated

    adata = simulated()
    adata.obs["batch"] = ["a", "b"] * (adata.n_obs // 2)
    adata.write_h5ad(path)


def import_times(repeats: int) -> dict[str, float]:
    """Median CPU seconds of import statements, less those of a bare interpreter."""
    figures: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(repeats):
        for name, statement in IMPORTS.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            figures[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    bare = medians.pop("python")
    return {name: value - bare for name, value in medians.items()}


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    import torch

    import scvi_lite

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scvi_lite": scvi_lite.__version__,
        "scvi_tools": "1.5.0",
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment that has scvi-tools")
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="measure only work whose name contains this")
    default = Path(__file__).parent / "results" / "compare_scvi_tools.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    result: dict[str, object] = {"machine": machine(), "repeats": args.repeats}
    if not args.only:
        result["import_seconds"] = import_times(args.repeats)
        for name, seconds in result["import_seconds"].items():
            print(f"{name:40} {seconds:8.2f} s of CPU")
    rows = []
    print(f"{'work':40} {'scvi_lite':>10} {'scvi-tools':>10} {'ratio':>7}  (range)")
    for name in WORK:
        if args.only and args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            if WORK[name][1] == SIMULATED:  # elsewhere: a process begins with the peak memory of the one that starts it
                writer = multiprocessing.get_context("spawn").Process(target=simulate, args=(Path(folder) / SIMULATED,))
                writer.start()
                writer.join()
            data = Path(folder) if WORK[name][1] == SIMULATED else args.data
            row = compare(name, args.peer_python, data, args.repeats)
        rows.append(row)
        spread = f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        peaks = "{scvi_lite:.0f} and {scvi:.0f} MiB".format(**row["peak_mib"])
        ratio = f"{row['scvi_lite']:10.4g} {row['scvi_tools']:10.4g} {row['ratio']:7.2f}"
        print(f"{name:40} {ratio}  {spread}, peak {peaks}", flush=True)
    result["work"] = rows
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
