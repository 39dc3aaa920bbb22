"""The words of `dspa audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspa.util.options import DeviceOption, DtypeOption, JsonOption
from dspa.util.terminal import console


def audit_command(
    policy: Annotated[str, typer.Argument(help="Policy folder or hub id.")],
    model: Annotated[str | None, typer.Option(help="Model folder or hub id: adds the logit lens.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to steer on: JSON Lines with a prompt, or text with one a line.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="What output latents are: a file that neuronpedia.org exported.")
    ] = None,
    densities: Annotated[
        Path | None, typer.Option(help="Folder that dspa collect wrote: names triples that support an edit.")
    ] = None,
    preferences: Annotated[
        str | None, typer.Option(help="The preferences it was collected from, for their texts.")
    ] = None,
    preference_limit: Annotated[int | None, typer.Option(help="The --limit of that collection.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response in tokens.")] = 64,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts run at once.")] = 8,
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template, if it has one.")] = True,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Say what a policy edits, how far that moves the model, and what the edited latents mean."""
    from dspa.auditing.command import AuditRequest, run_audit
    from dspa.auditing.forward import Decoding
    from dspa.auditing.tables import print_audit

    request = AuditRequest(
        policy=policy,
        model=model,
        prompts=prompts,
        labels=labels,
        densities=densities,
        preferences=preferences,
        preference_limit=preference_limit,
        limit=limit,
        chat=chat,
        decoding=Decoding(max_new_tokens, sample, seed, batch_size),
        dtype=dtype,
        device=device,
    )
    found = run_audit(request, html=html, markdown=markdown, progress=not as_json)
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        print_audit(console(quiet=False), found)
