"""Where a loaded model goes."""

from __future__ import annotations

import torch

from scvi_lite.errors import check_choice


def choose_device(accelerator: str, device: int | str | torch.device) -> torch.device:
    """The device that ``accelerator`` and ``device`` name.

    Raises
    ------
    ValueError
        If there is no such accelerator, or none in this machine.

    >>> choose_device("cpu", "auto")
    device(type='cpu')
    """
    if isinstance(device, torch.device) or (isinstance(device, str) and device != "auto"):
        return torch.device(device)
    number = "" if device == "auto" else f":{device}"
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    check_choice(["auto", "gpu", *kinds], accelerator=accelerator)
    meant = {"auto": ["cuda", "mps", "cpu"], "gpu": ["cuda", "mps"]}.get(accelerator, [accelerator])
    found = [kind for kind in meant if kinds[kind]]
    if not found:
        raise ValueError(f"accelerator={accelerator!r}: PyTorch finds none in this machine. Leave accelerator out.")
    return torch.device(found[0] + (number if found[0] == "cuda" else ""))
