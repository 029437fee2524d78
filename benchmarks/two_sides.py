"""One recipe, run by scvi_lite and by scvi-tools in turn, each run in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(what: str, data: str, sizes: dict[str, int], one_side: Callable[..., dict[str, float]], out: Path) -> None:
    """Read the command line, run both sides on each seed, print the rows and add them to those in a file.

    Parameters
    ----------
    what
        What the command does.
    data
        Name of the file that it reads.
    sizes
        Options that are numbers, with their defaults: cells, epochs, ...
    one_side
        Called with the package, the file, the seed and the sizes: figures by name.
    out
        Where results are; those of another recipe are dropped.
    """
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help=data)
    parser.add_argument("--peer", help="a Python interpreter that has scvi-tools; without it, only ours is run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    recipe = {name: getattr(args, name) for name in sizes}
    if args.side:
        print(json.dumps(one_side(args.side, args.data, args.seeds[0], **recipe)))
        return
    before = json.loads(out.read_text()) if out.exists() else {}
    rows: list[dict[str, Any]] = before["rows"] if before.get("recipe") == recipe else []
    chosen = [word for name, value in recipe.items() for word in (f"--{name}", str(value))]
    for seed in args.seeds:
        for package, python in ({"scvi_lite": sys.executable} | ({"scvi": args.peer} if args.peer else {})).items():
            command = [python, sys.argv[0], str(args.data), "--side", package, "--seeds", str(seed), *chosen]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise SystemExit(done.stderr)
            rows = [row for row in rows if (row["package"], row["seed"]) != (package, seed)]
            rows.append({"package": package, "seed": seed} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            out.write_text(json.dumps({"recipe": recipe, "rows": rows}, indent=1) + "\n")
