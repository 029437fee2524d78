"""Where a loaded model goes."""

from __future__ import annotations

import torch

from scvi_lite.errors import unknown


def choose_device(accelerator: str, device: int | str | torch.device) -> torch.device:
    """The device that ``accelerator`` and ``device`` name.

    >>> choose_device("cpu", "auto")
    device(type='cpu')
    """
    if isinstance(device, torch.device) or (isinstance(device, str) and device != "auto"):
        return torch.device(device)
    number = "" if device == "auto" else f":{device}"
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator in ("auto", "gpu"):
        accelerator = next(kind for kind, there in kinds.items() if there)
    if accelerator not in kinds:
        raise ValueError(unknown("accelerator", accelerator, ["auto", "gpu", *kinds]))
    return torch.device(accelerator + (number if accelerator == "cuda" else ""))
