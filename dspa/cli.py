"""The `dspa` command. Bad input ends with one line on the error stream and exit code 2."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dspa import __version__
from dspa.auditing.app import audit_command
from dspa.errors import DspaError
from dspa.methods.fsrl.app import fsrl_app
from dspa.tuning.app import compare, tune
from dspa.util.options import DeviceOption, DtypeOption, JsonOption, ModelOption, SaeHelp
from dspa.util.terminal import console as _console
from dspa.util.terminal import print_record as _print_record

app = typer.Typer(
    name="dspa",
    help="Steer a language model with a sparse autoencoder while it generates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(fsrl_app, name="fsrl")
app.command(name="audit")(audit_command)
app.command()(tune)
app.command()(compare)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"dspa {__version__}")
        raise typer.Exit


@app.callback()
def options_of_dspa(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options of the command itself."""


@app.command()
def demo(
    triples: Annotated[int, typer.Option(help="Preference triples to collect.")] = 250,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to measure on.")] = 1080,
    validation_prompts: Annotated[int, typer.Option(help="Prompts to choose a setting on.")] = 240,
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = 0,
    organism: Annotated[Path | None, typer.Option(help="Folder of another organism than the one shipped.")] = None,
    png: Annotated[Path, typer.Option(help="Where the chart of gains by kind of prompt goes.")] = Path("dspa-demo.png"),
    as_json: JsonOption = False,
) -> None:
    """Run the whole method on the model that ships with the package, and measure it."""
    from dspa.organism import DATA
    from dspa.organism.demo import DemoOptions, run_demo

    options = DemoOptions(organism or DATA, triples, prompts, validation_prompts, seed)
    report = run_demo(options, _console(quiet=as_json), png=png)
    if as_json:
        typer.echo(report.to_json())


@app.command()
def collect(
    model: ModelOption,
    preferences: Annotated[str, typer.Option(help="JSON Lines or parquet file, dataset folder, or hub name.")],
    input_sae: Annotated[str, typer.Option(help=f"SAE that reads prompts, {SaeHelp}.")],
    output_sae: Annotated[str, typer.Option(help=f"SAE that edits responses, {SaeHelp}.")],
    out: Annotated[Path, typer.Option(help="Folder of the density shards; an interrupted run goes on there.")],
    input_layer: Annotated[int | None, typer.Option(help="Layer of the input SAE; by default, as it says.")] = None,
    output_layer: Annotated[int | None, typer.Option(help="Layer of the output SAE; by default, as it says.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Apply the chat template to plain strings, as dspa generate does; default: no, with a warning.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many triples.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest triple in tokens; default: the context.")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave out bad rows, and count them, instead of stopping.")] = False,
    count_bos: Annotated[bool, typer.Option(help="Count the beginning-of-sequence token of prompts.")] = False,
    count_template: Annotated[bool, typer.Option(help="Count the chat template's special tokens.")] = True,
    count_eos: Annotated[bool, typer.Option(help="Count the token that ends a response.")] = True,
    triples_per_batch: Annotated[int, typer.Option(help="Triples run at once, at most.")] = 64,
    tokens_per_batch: Annotated[int, typer.Option(help="Tokens run at once, at most.")] = 16384,
    triples_per_shard: Annotated[int, typer.Option(help="Triples per file.")] = 64,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Collect activation densities of preference triples. Processes of torchrun or accelerate launch share the work."""
    from dspa.offline.collection import collect as collect_densities
    from dspa.offline.distributed import device_of_process, is_first_process
    from dspa.offline.preferences import load_preferences
    from dspa.sae.named import load_sae
    from dspa.transformers_model import load_language_model, text_config

    language_model, tokenizer = load_language_model(model, dtype, device_of_process(device))
    progress = not as_json and is_first_process()
    context = getattr(text_config(language_model), "max_position_embeddings", None)
    triples = load_preferences(
        preferences,
        tokenizer,
        split=split,
        skip_bad=skip_bad,
        max_length=max_length or context,
        count_bos=count_bos,
        count_template=count_template,
        count_eos=count_eos,
        chat=chat,
        limit=limit,
        progress=progress,
    )
    try:
        store = collect_densities(
            language_model,
            tokenizer,
            triples,
            input_sae=load_sae(input_sae),
            output_sae=load_sae(output_sae),
            input_layer=input_layer,
            output_layer=output_layer,
            out=out,
            triples_per_batch=triples_per_batch,
            tokens_per_batch=tokens_per_batch,
            triples_per_shard=triples_per_shard,
            progress=progress,
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {out} keeps what is finished, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    record = {
        "folder": str(store.folder),
        "triples": len(triples),
        "skipped_rows": len(triples.skipped),
        "shards": len(store.shards),
        "nonfinite_tokens": store.nonfinite_tokens,
    }
    if is_first_process():
        _print_record(record, as_json)


@app.command()
def fit(
    densities: Annotated[Path, typer.Argument(help="Folder that dspa collect wrote.")],
    input_sae: Annotated[str, typer.Option(help=f"The input SAE of the collection, {SaeHelp}.")],
    output_sae: Annotated[str, typer.Option(help=f"The output SAE of the collection, {SaeHelp}.")],
    out: Annotated[Path, typer.Option(help="Folder of the policy.")],
    gate_percentile: Annotated[float, typer.Option(help="Percentile at which a gate opens.")] = 90.0,
    gate_rule: Annotated[str, typer.Option(help="ge (literal) or positive_ge.")] = "ge",
    sparsify: Annotated[str, typer.Option(help="per_row, global_tau or none.")] = "per_row",
    entries_per_side: Annotated[
        int | None, typer.Option(help="Extremes kept on each side of a row; default 16, or 32 with ridge.")
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="mean_difference (the paper's) or ridge, for few triples.")
    ] = "mean_difference",
    features: Annotated[int, typer.Option(help="With ridge, how many latents describe a prompt at most.")] = 64,
    penalty: Annotated[float, typer.Option(help="With ridge, a factor of its penalties.")] = 1.0,
    folds: Annotated[int, typer.Option(help="Parts of the triples to check the map on; 0 for no check.")] = 0,
    k_prompt: Annotated[int, typer.Option(help="Prompt latents that choose rows of the map.")] = 32,
    k_diff: Annotated[int, typer.Option(help="Latents edited in each direction.")] = 16,
    alpha: Annotated[float, typer.Option(help="Edit strength, in units of the largest activation.")] = 0.2,
    edit: Annotated[str, typer.Option(help="ablate, augment or both.")] = "ablate",
    sign_guard: Annotated[bool, typer.Option(help="Drop selected latents whose score has the other sign.")] = False,
    edit_positions: Annotated[str, typer.Option(help="from_last_prompt, generated or all.")] = "from_last_prompt",
    as_json: JsonOption = False,
) -> None:
    """Fit the conditional-difference map and write a steering policy."""
    from dspa.methods.agreement import cross_validated_agreement
    from dspa.methods.conditional_map import ConditionalDifferenceMap
    from dspa.methods.steering_policy import SteeringPolicy, check_policy_names
    from dspa.offline.density_store import DensityStore
    from dspa.sae.named import load_sae

    check_policy_names(edit, edit_positions)
    saes = load_sae(input_sae), load_sae(output_sae)
    options: dict[str, Any] = {"gate_percentile": gate_percentile, "gate_rule": gate_rule, "sparsify": sparsify}
    options |= {"entries_per_side": entries_per_side, "estimator": estimator, "features": features}
    options["penalty"] = penalty
    fitted = ConditionalDifferenceMap.fit(densities, progress=not as_json, **options)
    choices: dict[str, Any] = {"edit": edit, "edit_positions": edit_positions}
    policy = SteeringPolicy(
        fitted,
        *saes,
        k_prompt=k_prompt,
        k_diff=k_diff,
        alpha=alpha,
        sign_guard=sign_guard,
        **choices,
    )
    agreement = None
    if folds:
        looked_up: dict[str, Any] = {"k_prompt": k_prompt, "k_diff": k_diff, "edit": edit, "sign_guard": sign_guard}
        agreement = cross_validated_agreement(DensityStore.open(densities), folds=folds, **looked_up, **options)
    policy.save_pretrained(out)
    record = {
        "policy": str(out),
        "triples": fitted.run.triple_count,
        "estimator": estimator,
        "map_nonzeros": fitted.matrix.nonzeros,
    }
    if fitted.features is None:
        record |= {"gate_percentile": gate_percentile, "gates_always_on": float(fitted.always_on().double().mean())}
    else:
        record |= {"features": fitted.features.count}
    if agreement is not None:
        record |= {"agreement": agreement.mean, "agreement_half_width": agreement.half_width}
    _print_record(record, as_json)


@app.command()
def generate(
    model: ModelOption,
    policy: Annotated[str, typer.Option(help="Policy folder or hub id.")],
    prompt: Annotated[list[str], typer.Option(help="The prompt; may be repeated.")],
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template, if it has one.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response in tokens.")] = 128,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    alpha: Annotated[float | None, typer.Option(help="Edit strength instead of the policy's.")] = None,
    compare: Annotated[bool, typer.Option(help="Print the unsteered response as well.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Generate with a policy, and say what was edited."""
    import torch

    from dspa.methods.saved_policy import load_policy
    from dspa.online.steering import steer
    from dspa.transformers_model import load_language_model

    language_model, tokenizer = load_language_model(model, dtype, device)
    steering_policy = load_policy(policy, **({} if alpha is None else {"alpha": alpha}))

    def respond(text: str) -> str:
        if chat and tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            inputs = tokenizer(text, return_tensors="pt")
        torch.manual_seed(seed)
        output = language_model.generate(**inputs.to(device), do_sample=sample, max_new_tokens=max_new_tokens)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    records = []
    for text in prompt:
        record: dict[str, Any] = {"prompt": text}
        if compare:
            record["unsteered"] = respond(text)
        with steer(language_model, steering_policy) as steering:
            record["steered"] = respond(text)
            summary = steering.summary()
        records.append({**record, "summary": asdict(summary) if as_json else str(summary)})
    if as_json:
        typer.echo(json.dumps(records, indent=2))
        return
    for record in records:
        for name, value in record.items():
            typer.echo(f"{name}: {value}")
        typer.echo()


@app.command()
def explain(
    model: ModelOption,
    policy: Annotated[str, typer.Option(help="Policy folder or hub id.")],
    prompt: Annotated[list[str], typer.Option(help="The prompt; may be repeated.")],
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template, if it has one.")] = True,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Say which latents a policy will edit for a prompt, and which prompt latents decide that."""
    from dspa.methods.steering_policy import SteeringPolicy
    from dspa.transformers_model import load_language_model

    language_model, tokenizer = load_language_model(model, dtype, device)
    steering_policy = SteeringPolicy.from_pretrained(policy)
    explained = [(text, steering_policy.explain(text, language_model, tokenizer, chat=chat)) for text in prompt]
    if as_json:
        typer.echo(json.dumps([{"prompt": text, **asdict(explanation)} for text, explanation in explained], indent=2))
        return
    for text, explanation in explained:
        typer.echo(f"prompt: {text}\n{explanation}")


@app.command()
def flops(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Configuration file, model folder or hub id; may be repeated. Default: the published models."
        ),
    ] = None,
    input_layer: Annotated[int | None, typer.Option(help="Layer of the input SAE; published models have one.")] = None,
    output_layer: Annotated[int | None, typer.Option(help="Layer of the output SAE, likewise.")] = None,
    d_sae_in: Annotated[int, typer.Option(help="Width of the input SAE.")] = 16384,
    d_sae_out: Annotated[int, typer.Option(help="Width of the output SAE.")] = 16384,
    triples: Annotated[int, typer.Option(help="Preference triples, N.")] = 1000,
    parameters: Annotated[float | None, typer.Option(help="P of the published formulas; default: the model's.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, p.")] = 1000,
    chosen_tokens: Annotated[int, typer.Option(help="Tokens of a chosen response, c.")] = 1000,
    rejected_tokens: Annotated[int, typer.Option(help="Tokens of a rejected response, r.")] = 1000,
    rahf_tokens: Annotated[int, typer.Option(help="RAHF-SCIT step 1: tokens of an example, L1.")] = 768,
    rahf_examples: Annotated[float, typer.Option(help="RAHF-SCIT step 1: examples per triple.")] = 4,
    rahf_passes: Annotated[float, typer.Option(help="RAHF-SCIT step 1: gradient passes over each.")] = 2,
    rahf_batch: Annotated[int, typer.Option(help="RAHF-SCIT step 2: examples in a batch, B.")] = 64,
    rahf_step2_tokens: Annotated[int, typer.Option(help="RAHF-SCIT step 2: tokens of an example, L2.")] = 512,
    rahf_steps_per_triple: Annotated[float, typer.Option(help="RAHF-SCIT step 2: batches per triple.")] = 0.02,
    rahf_frozen_passes: Annotated[float, typer.Option(help="RAHF-SCIT step 2: passes without gradient.")] = 3,
    dpo_epochs: Annotated[float, typer.Option(help="DPO: passes over the data.")] = 1,
    dpo_cached_reference: Annotated[bool, typer.Option(help="DPO: run the reference model once only.")] = True,
    fsrl_epochs: Annotated[float, typer.Option(help="FSRL: passes over the data.")] = 1,
    fsrl_d_sae: Annotated[int, typer.Option(help="FSRL: width of its SAE and adapter.")] = 65536,
    fsrl_layer: Annotated[int | None, typer.Option(help="FSRL: its layer; default: the middle.")] = None,
    fsrl_active: Annotated[float, typer.Option(help="FSRL: latents that fire at a token.")] = 115,
    fsrl_falling: Annotated[float, typer.Option(help="FSRL: of these, those that are lowered.")] = 57,
    pairs: Annotated[str, typer.Option(help="Attention: square (as counted) or causal (unmasked pairs).")] = "square",
    chunk: Annotated[int, typer.Option(help="Collection: most tokens of a row in a call.")] = 256,
    batch: Annotated[int, typer.Option(help="Inference: rows decoded at once.")] = 1,
    context: Annotated[int, typer.Option(help="Inference: tokens of context.")] = 1024,
    response_tokens: Annotated[int, typer.Option(help="Inference: tokens of a response.")] = 500,
    weight_bytes: Annotated[float, typer.Option(help="Inference: bytes of a model weight.")] = 2,
    cache_bytes: Annotated[float, typer.Option(help="Inference: bytes of a key or value.")] = 2,
    sae_bytes: Annotated[float, typer.Option(help="Inference: bytes of an SAE weight.")] = 2,
    k_prompt: Annotated[int, typer.Option(help="Inference: rows of the map per prompt.")] = 32,
    k_diff: Annotated[int, typer.Option(help="Inference: latents in an edit list.")] = 16,
    edited_latents: Annotated[float, typer.Option(help="Inference: listed latents active on a token.")] = 1,
    pass_share: Annotated[
        float, typer.Option(help="Lazy: share of tokens that need the whole encoder.", show_default="1/3")
    ] = 1 / 3,
    screen_bytes: Annotated[float, typer.Option(help="Screened: bytes per element of the copy that is read.")] = 1,
    survivors: Annotated[float, typer.Option(help="Screened: share of the latents computed again.")] = 0.02,
    count: Annotated[bool, typer.Option(help="Count by running the models on the meta device as well.")] = True,
    measure: Annotated[
        bool, typer.Option(help="Measure this machine, and count on a model with weights: --model, or the organism.")
    ] = False,
    machine: Annotated[Path | None, typer.Option(help="JSON report whose measured machine to draw.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the charts as an image.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Add up the FLOPs of alignment and inference, by formula and by counting, against other methods."""
    options = dict(locals())
    from dspa.flops.command import run_flops

    report = run_flops(options, progress=not as_json)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        from dspa.flops.tables import print_report

        print_report(_console(quiet=False), report)


@app.command()
def bench(
    d_model: Annotated[int, typer.Option(help="Width of the model, for a random SAE.")] = 2304,
    d_sae: Annotated[int, typer.Option(help="Latents of the random SAE.")] = 16384,
    dtype: Annotated[str, typer.Option(help="Its weights: bfloat16, float16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Rows that are edited at once.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of a prompt, for encode_density.")] = 256,
    policy: Annotated[str | None, typer.Option(help="Policy folder or hub id: measure its SAEs instead.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub id: measure its generated tokens too.")] = None,
    model_dtype: DtypeOption = "auto",
    operation: Annotated[
        list[str] | None,
        typer.Option(help="token_step, encode_density or adapter_step; may be repeated. Default: all."),
    ] = None,
    backend: Annotated[str, typer.Option(help="Kernel backend, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to measure: cpu, cuda, cuda:1, ...")] = "cpu",
    seconds: Annotated[float, typer.Option(help="How long an operation is timed.")] = 12.0,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page with charts.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the speed of steering on this machine, beside plain torch. Results are checked first; exit code 1 if one
    is wrong."""
    from dspa.bench.command import BenchOptions, run_bench

    options = BenchOptions(
        d_model=d_model,
        d_sae=d_sae,
        dtype=dtype,
        batch=batch,
        tokens=tokens,
        policy=policy,
        model=model,
        model_dtype=model_dtype,
        operations=operation,
        backend=backend,
        device=device,
        seconds=seconds,
    )
    report = run_bench(options, html=html, progress=not as_json)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        from dspa.bench.page import print_report

        print_report(_console(quiet=False), report)
    if report.failed:
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    model: ModelOption,
    tasks: Annotated[list[str], typer.Option(help="Task of lm-eval, or a task file; may be repeated.")],
    policy: Annotated[str | None, typer.Option(help="Policy folder or hub id; default: the model as it is.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Edit strength instead of the policy's.")] = None,
    compare: Annotated[bool, typer.Option(help="Evaluate the unsteered model as well.")] = True,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of one's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many examples of a task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in a prompt; default: the task's.")] = None,
    batch_size: Annotated[str, typer.Option(help="Rows run at once, or auto.")] = "8",
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model under a policy on tasks of lm-eval, beside the model as it is."""
    import dspa.evaluation  # noqa: F401  says what to install if lm-eval is missing
    from dspa.evaluation.command import EvalOptions, print_evaluation, run_eval

    options = EvalOptions(
        model=model,
        tasks=tasks,
        policy=policy,
        alpha=alpha,
        compare=compare,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        apply_chat_template=chat,
        dtype=dtype,
        device=device,
    )
    evaluation = run_eval(options)
    if as_json:
        typer.echo(json.dumps(evaluation.record(), indent=2))
    else:
        print_evaluation(_console(quiet=False), evaluation)


@app.command()
def serve(
    model: ModelOption,
    policy: Annotated[list[str], typer.Option(help="Policy folder or hub id, or NAME=FOLDER; may be repeated.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for a free one.")] = 8000,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and answer; default: the model's context.")
    ] = None,
    default_max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer whose request does not say.")
    ] = 1024,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
) -> None:
    """Serve a model under policies, OpenAI-compatible: MODEL is unsteered, MODEL@NAME follows a policy."""
    from dspa.serving.serve import run_server

    run_server(
        model,
        policy,
        host=host,
        port=port,
        dtype=dtype,
        device=device,
        context_tokens=max_context,
        default_tokens=default_max_tokens,
    )


def main() -> None:
    """Entry point: errors of the package become one line and exit code 2."""
    try:
        app()
    except DspaError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
