"""The name of a GPU's architecture, the key of the tables of measurements and block sizes."""

from __future__ import annotations

from functools import cache

import torch


@cache
def architecture(device: torch.device) -> str:
    """The name of a GPU's architecture: "sm_90", "gfx942", ..."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
