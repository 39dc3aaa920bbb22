"""The commands `dspa tune` and `dspa compare`; what they do is loaded when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspa.util.options import DeviceOption, DtypeOption, JsonOption, ModelOption, SaeHelp
from dspa.util.terminal import console


def tune(
    model: ModelOption,
    policy: Annotated[str, typer.Option(help="Policy folder or hub id.")],
    preferences: Annotated[str, typer.Option(help="Held-out preferences, as dspa collect reads them.")],
    out: Annotated[Path, typer.Option(help="Folder of the chosen policy and the report; an interrupted run goes on.")],
    alpha: Annotated[str, typer.Option(help="Values to try, by commas.", show_default="0.1,0.2,0.3,0.5")] = "",
    edit: Annotated[str, typer.Option(help="Likewise.", show_default="ablate,both")] = "",
    k_prompt: Annotated[str, typer.Option(help="Likewise.", show_default="the policy's")] = "",
    k_diff: Annotated[str, typer.Option(help="Likewise.", show_default="8,16")] = "",
    gate_percentile: Annotated[str, typer.Option(help="Likewise; needs --densities.", show_default="the map's")] = "",
    gate_rule: Annotated[str, typer.Option(help="Likewise; needs --densities.", show_default="the map's")] = "",
    estimator: Annotated[
        str, typer.Option(help="Likewise; ranked, no more tries.", show_default="both, with --densities")
    ] = "",
    features: Annotated[
        str, typer.Option(help="Likewise, with ridge; ranked, no more tries.", show_default="the map's")
    ] = "",
    penalty: Annotated[
        str, typer.Option(help="Likewise, with ridge; ranked, no more tries.", show_default="the map's")
    ] = "",
    entries_per_side: Annotated[
        str, typer.Option(help="Likewise; ranked, no more tries.", show_default="the map's")
    ] = "",
    densities: Annotated[
        Path | None, typer.Option(help="What the policy was fitted from, to rank lists and for other maps.")
    ] = None,
    rank: Annotated[
        bool, typer.Option(help="With --densities, try the lists that agree most with held-out triples.")
    ] = True,
    folds: Annotated[int, typer.Option(help="Parts of the triples for that.")] = 5,
    tries: Annotated[
        int | None, typer.Option(help="Settings tried at most.", show_default="as many as the grid has")
    ] = None,
    output_sae: Annotated[str | None, typer.Option(help=f"The whole output SAE, {SaeHelp}.")] = None,
    reward: Annotated[
        str | None, typer.Option(help="FILE.py:NAME or MODULE:NAME, a function of prompt and response.")
    ] = None,
    margin: Annotated[bool, typer.Option(help="Maximise the preference margin (too).")] = True,
    neutral: Annotated[Path | None, typer.Option(help="Texts on which nothing should change, a line each.")] = None,
    max_kl: Annotated[float, typer.Option(help="Guard: KL to unsteered there, nats per token.")] = 0.1,
    max_perplexity: Annotated[float, typer.Option(help="Guard: perplexity there, as a multiple.")] = 1.05,
    report_share: Annotated[float, typer.Option(help="Part that the choice does not see.")] = 0.5,
    first: Annotated[int, typer.Option(help="Examples on which every setting is evaluated.")] = 8,
    keep: Annotated[float, typer.Option(help="Part of the settings that goes on to the next rung.")] = 0.25,
    full_grid: Annotated[bool, typer.Option(help="Evaluate every setting on all examples.")] = False,
    limit: Annotated[int | None, typer.Option(help="Use at most so many preferences.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="As in dspa collect.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of responses, for a reward.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Rows run at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the split and the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Choose a policy's settings on held-out preferences, and measure the choice on others."""
    options = dict(locals())
    from dspa.tuning.command import TuneCommand, run_tune

    as_json = options.pop("as_json")
    report = run_tune(TuneCommand(**options), progress=not as_json)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        report.print(console(quiet=False))


def compare(
    policies: Annotated[list[str], typer.Argument(help="Policy folders or hub ids.")],
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="Prompts, a line each, or the column prompt of a .jsonl file.")],
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many of them.")] = None,
    unsteered: Annotated[bool, typer.Option(help="Show what the model as it is answers as well.")] = True,
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template, if it has one.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling, the same for every answer.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Show what policies answer to the same prompts, side by side, with the edited tokens marked."""
    from dspa.methods.saved_policy import load_policy
    from dspa.transformers_model import load_language_model
    from dspa.tuning.comparison import compare as compare_policies
    from dspa.util.files import write_atomically
    from dspa.util.texts import read_texts

    texts = read_texts(prompts, "prompt")[:limit]
    names = [Path(policy).name for policy in policies]
    named = {
        name if names.count(name) == 1 else policy: load_policy(policy)
        for name, policy in zip(names, policies, strict=True)
    }
    language_model, tokenizer = load_language_model(model, dtype, device)
    comparison = compare_policies(
        language_model,
        tokenizer,
        named,
        texts,
        unsteered=unsteered,
        chat=chat,
        max_new_tokens=max_new_tokens,
        sample=sample,
        seed=seed,
        progress=not as_json,
    )
    if html is not None:
        write_atomically(html, comparison.to_html().encode())
    if as_json:
        typer.echo(comparison.to_json(), nl=False)
    else:
        comparison.print(console(quiet=False))
