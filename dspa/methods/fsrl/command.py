"""`dspa fsrl train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dspa.errors import InvalidInputError
from dspa.methods.fsrl.training import TrainingOptions, train
from dspa.offline.distributed import is_first_process
from dspa.offline.preferences import PreferenceTriples, load_preferences
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import text_config

TRAINING = (
    "activation",
    "clip",
    "l1",
    "l1_over",
    "epochs",
    "learning_rate",
    "pairs_per_step",
    "pairs_at_once",
    "edit_positions",
    "evaluate_every",
    "patience",
    "checkpoint_every",
    "seed",
)


def run_training(
    model: nn.Module, tokenizer: Any, sae: SparseAutoencoder, options: dict[str, Any], *, progress: bool
) -> dict[str, object]:
    """Trains, and writes the policy to `options["out"]`; checkpoints are in its subfolder `training`.

    Args:
        model, tokenizer: of the language model.
        sae: the SAE.
        options: of the command, by name.
        progress: whether to draw progress bars.

    Returns:
        What the command prints.

    Raises:
        DspaError: as `train` and `load_preferences`.
    """
    layer = sae.metadata.layer if options["layer"] is None else options["layer"]
    if layer is None:
        raise InvalidInputError("the SAE does not say which layer it belongs to; pass --layer")
    for name, known in (
        ("activation", ("soft_threshold", "relu", "jump_relu")),
        ("l1_over", ("tokens", "padded")),
        ("edit_positions", ("all", "from_last_prompt", "generated")),
    ):
        if options[name] not in known:
            raise InvalidInputError(f"{name} is {options[name]!r}; expected one of {', '.join(known)}")
    context = getattr(text_config(model), "max_position_embeddings", None)

    def read(source: str, limit: int | None) -> PreferenceTriples:
        return load_preferences(
            source,
            tokenizer,
            skip_bad=options["skip_bad"],
            max_length=options["max_length"] or context,
            limit=limit,
            progress=progress,
        )

    triples = read(options["preferences"], options["limit"])
    validation = () if options["validation"] is None else read(options["validation"], None)
    bos = tokenizer.bos_token_id
    training = TrainingOptions(
        **{name: options[name] for name in TRAINING},
        uncounted_token_ids=() if options["edit_bos"] or bos is None else (int(bos),),
    )
    out = Path(options["out"])
    result = train(model, triples, sae, layer, training, validation=validation, out=out / "training", progress=progress)
    if is_first_process():
        result.policy.save_pretrained(out)
    last = result.steps[-1]
    return {
        "policy": str(out),
        "triples": len(triples),
        "steps": len(result.steps),
        "best_step": result.best_step,
        "simpo": last.simpo,
        "margin": last.margin,
        "l0": last.l0,
    }
