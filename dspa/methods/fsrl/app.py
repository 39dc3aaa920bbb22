"""The words of `dspa fsrl`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dspa.util.options import DeviceOption, DtypeOption, JsonOption, ModelOption, SaeHelp
from dspa.util.terminal import print_record

fsrl_app = typer.Typer(help="FSRL: a trained adapter.", no_args_is_help=True)


@fsrl_app.command("train")
def fsrl_train(
    model: ModelOption,
    preferences: Annotated[str, typer.Option(help="JSON Lines or parquet file, dataset folder, or hub name.")],
    sae: Annotated[str, typer.Option(help=f"SAE of the edited layer, {SaeHelp}.")],
    out: Annotated[Path, typer.Option(help="Folder of the policy; an interrupted run goes on there.")],
    layer: Annotated[int | None, typer.Option(help="Layer of the SAE; by default, as it says.")] = None,
    validation: Annotated[str | None, typer.Option(help="Other preferences, on which the best margin is kept.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many triples.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens; default: the context.")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave out bad rows, and count them, instead of stopping.")] = False,
    activation: Annotated[str, typer.Option(help="soft_threshold, relu or jump_relu.")] = "soft_threshold",
    clip: Annotated[bool, typer.Option(help="Keep activations from falling below 0, as version 3 does.")] = True,
    l1: Annotated[float, typer.Option(help="Weight of the l1 penalty.")] = 0.1,
    l1_over: Annotated[str, typer.Option(help="tokens, or padded as in the original code.")] = "tokens",
    epochs: Annotated[int, typer.Option(help="Passes over the triples.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 5e-4,
    pairs_per_step: Annotated[int, typer.Option(help="Pairs in a step, of all processes together.")] = 32,
    pairs_at_once: Annotated[int, typer.Option(help="Pairs run at once, at most.")] = 8,
    edit_positions: Annotated[str, typer.Option(help="all, from_last_prompt or generated.")] = "all",
    edit_bos: Annotated[bool, typer.Option(help="Edit the beginning-of-sequence token too.")] = True,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: only at the end.")] = 0,
    patience: Annotated[int, typer.Option(help="Evaluations without a new best before stopping; 0: never.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of initial weights and order.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Train an FSRL adapter on preferences. Processes of torchrun or accelerate launch share the pairs of a step."""
    options: dict[str, Any] = dict(locals())
    from dspa.methods.fsrl.command import run_training
    from dspa.offline.distributed import device_of_process, is_first_process
    from dspa.sae.named import load_sae
    from dspa.transformers_model import load_language_model

    language_model, tokenizer = load_language_model(model, dtype, device_of_process(device))
    progress = not as_json and is_first_process()
    record = run_training(language_model, tokenizer, load_sae(sae), options, progress=progress)
    if is_first_process():
        print_record(record, as_json)
