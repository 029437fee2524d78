"""Training of the further models beside scvi-tools: cells a second and memory; a line each and a JSON file.

::

    python benchmarks/models.py --model PEAKVI --data snare_mouse_cortex.h5mu --peer PEER_ENV/bin/python

Each measurement is a process of its own; the two sides take turns, and medians count. DATA is a file that has what the
model reads: ``kang_ctrl_8donors.h5ad`` (SCANVI, LinearSCVI, CondSCVI, DestVI), ``pbmc10k_cite.h5ad`` (TOTALVI) or
``snare_mouse_cortex.h5mu`` (PEAKVI, MULTIVI). Models are added to the results that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from compare_scvi_tools import machine
from model_worker import SETUPS

WORKER = Path(__file__).with_name("model_worker.py")
RESULTS = Path(__file__).parent / "results" / "models.json"
FIGURES = ("cells_per_second", "peak_mib", "beyond_imports_mib")


def measure(python: str, package: str, model: str, data: Path) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [python, str(WORKER), package, model, str(data)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(model: str, data: Path, peer: str | None, repeats: int) -> dict[str, object]:
    """Both sides in turn: medians, the ratio of their speeds with its range, and every figure."""
    sides = {"scvi_lite": sys.executable} | ({"scvi": peer} if peer else {})
    runs: dict[str, list[dict[str, float]]] = {package: [] for package in sides}
    for _ in range(repeats):
        for package, python in sides.items():
            runs[package].append(measure(python, package, model, data))
    medians = {
        package: {figure: statistics.median(run[figure] for run in side) for figure in FIGURES}
        for package, side in runs.items()
    }
    row: dict[str, object] = {"model": model, "data": data.name, "cells": SETUPS[model].n_cells, "median": medians}
    if peer:
        pairs = zip(runs["scvi_lite"], runs["scvi"], strict=True)
        ratios = [ours["cells_per_second"] / theirs["cells_per_second"] for ours, theirs in pairs]
        row["ratio"] = medians["scvi_lite"]["cells_per_second"] / medians["scvi"]["cells_per_second"]
        row |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    return row | {"runs": runs}


def report(row: dict[str, object]) -> str:
    """A line for each side."""
    lines = [
        f"{row['model']:<12} {package:<10} {figure['cells_per_second']:8.0f} cells/s, "
        f"peak {figure['peak_mib']:5.0f} MiB, {figure['beyond_imports_mib']:5.0f} beyond imports"
        for package, figure in row["median"].items()
    ]
    if "ratio" in row:
        lines.append(f"{row['model']:<12} {row['ratio']:.2f} times ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and add to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=SETUPS)
    parser.add_argument("--data", type=Path, required=True, help="file that the model is trained on")
    parser.add_argument("--peer", help="interpreter of the environment that has scvi-tools; without, ours alone")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    row = compare(args.model, args.data, args.peer, args.repeats)
    print(report(row))
    before = json.loads(args.out.read_text())["models"] if args.out.exists() else []
    rows = [other for other in before if other["model"] != args.model] + [row]
    args.out.write_text(json.dumps({"machine": machine(), "models": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
