"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Option(help="Model folder or hub id.")]
DtypeOption = Annotated[str, typer.Option(help="Model dtype: auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
SaeHelp = "as a folder, or as RELEASE:SAE_ID of sae-lens' list, or as HUB_REPOSITORY:FOLDER"
