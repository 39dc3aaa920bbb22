"""One policy from several."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import CsrMap
from dspa.methods.conditional_map import ConditionalDifferenceMap
from dspa.methods.latent_lists import with_all_decoder_rows
from dspa.methods.policy_edits import MERGED, written
from dspa.methods.steering_policy import SteeringPolicy
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.util.scalars import LARGEST_FLOAT32, check_number


def merge(weights: Mapping[SteeringPolicy, float]) -> SteeringPolicy:
    """One policy from several of the same model, layers and SAEs: their maps, and their strengths, averaged.

    The lists of the merged policy are those that the weighted sum of the maps selects,
    `A = sum_n w_n A_n / sum_n w_n`, and alpha is averaged in the same way. A latent that one of the policies does not
    edit (`SteeringPolicy.without`) is not edited by the merged one. A policy of weight 0 takes no part. One lookup and
    one step serve it, as every policy; its map has the entries of all.

    Args:
        weights: a weight, at least 0, for each policy.

    Raises:
        InvalidInputError: if there are fewer than two, one is no `SteeringPolicy`, a weight is negative, or all are 0;
            if the options differ, or a map has rows of triples.
        MismatchError: if models, layers, SAEs, factors of latents or counting rules differ.
    """
    if not isinstance(weights, Mapping):
        raise InvalidInputError(
            f"weights are a {type(weights).__name__}; expected a dictionary of policies and weights"
        )
    policies = list(weights)
    for policy in policies:
        if not isinstance(policy, SteeringPolicy):
            raise InvalidInputError(f"a {type(policy).__name__} cannot be merged; expected instances of SteeringPolicy")
    if len(policies) < 2:
        raise InvalidInputError(f"{len(policies)} policies were passed; expected at least two to merge")
    for weight in weights.values():
        check_number("a weight", weight, 0, LARGEST_FLOAT32)
    total = sum(float(weight) for weight in weights.values())
    if not total > 0:
        raise InvalidInputError("all weights are 0; expected a positive one")
    for other in policies[1:]:
        _check_mergeable(policies[0], other)
    shared = {policy: float(weight) / total for policy, weight in weights.items()}
    shared = {policy: share for policy, share in shared.items() if share > 0}
    policies, shares = list(shared), list(shared.values())
    first = policies[0]
    try:
        sae = with_all_decoder_rows([policy.output_sae for policy in policies])
    except MismatchError as error:
        raise MismatchError(
            "the policies decode a latent differently, as after scaled(); merge the policies before they are scaled, "
            "and scale the merged one"
        ) from error
    assert isinstance(sae, SparseAutoencoder)
    masks = [policy.editable for policy in policies if policy.editable is not None]
    parts = ", ".join(
        f"{written(share)} x (alpha {written(policy.alpha)}, {_fit_of(policy.conditional_map)}"
        f"{''.join(f', {change}' for change in policy.changes)})"
        for share, policy in zip(shares, policies, strict=True)
    )
    return replace(
        first,
        conditional_map=_merged_maps([policy.conditional_map for policy in policies], shares),
        output_sae=sae,
        alpha=sum(share * float(policy.alpha) for share, policy in zip(shares, policies, strict=True)),
        editable=torch.stack(masks).all(dim=0) if masks else None,
        factors=_merged_factors(policies),
        changes=(f"{MERGED}{parts}",),
    )


def _fit_of(fitted: ConditionalDifferenceMap) -> str:
    """How a map was fitted, in words."""
    fit, run = fitted.options, fitted.run
    return (
        f"{run.triple_count} triples {run.triples[:8]}, gates {fit.gate_rule} percentile "
        f"{written(fit.gate_percentile)}, sparsify {fit.sparsify} {fit.entries_per_side}"
    )


def _merged_factors(policies: list[SteeringPolicy]) -> Tensor | None:
    """Of each decoder row that of the first policy that holds it, as in `with_all_decoder_rows`."""
    if all(policy.factors is None for policy in policies):
        return None
    merged = torch.ones(policies[0].output_sae.d_sae)
    for policy in reversed(policies):
        rows, factors = policy.output_sae.decoder_rows, policy.factors
        held = torch.ones(len(merged), dtype=torch.bool) if rows is None else rows.cpu() >= 0
        merged[held] = 1.0 if factors is None else factors[held]
    return merged


def _check_mergeable(one: SteeringPolicy, other: SteeringPolicy) -> None:
    maps = one.conditional_map, other.conditional_map
    if any(each.features is not None for each in maps):
        raise InvalidInputError(
            "a map fitted by ridge is looked up by features of its own triples; only maps by mean_difference are added"
        )
    for name in ("k_prompt", "k_diff", "edit", "sign_guard", "edit_positions"):
        if getattr(one, name) != getattr(other, name):
            raise InvalidInputError(
                f"the policies' {name} are {getattr(one, name)!r} and {getattr(other, name)!r}; make them equal by "
                "with_options first"
            )
    for name in (
        *("model", "input_layer", "output_layer", "input_sae", "output_sae"),
        *("count_bos", "count_template", "count_eos", "uncounted_token_ids"),
    ):
        if getattr(maps[0].run, name) != getattr(maps[1].run, name):
            raise MismatchError(f"the policies' maps were collected with another {name}; collect them alike")


def _merged_maps(maps: list[ConditionalDifferenceMap], shares: list[float]) -> ConditionalDifferenceMap:
    first, runs = maps[0], [each.run for each in maps]
    width = first.matrix.d_sae_out
    places = torch.cat([_places(each.matrix) for each in maps])
    values = torch.cat([share * each.matrix.values.double() for share, each in zip(shares, maps, strict=True)])
    entries, of_entry = places.unique(sorted=True, return_inverse=True)
    sums = torch.zeros(len(entries), dtype=torch.float64).index_add_(0, of_entry, values)
    kept = sums != 0
    entries, sums = entries[kept], sums[kept]
    offsets = torch.zeros(first.matrix.d_sae_in + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(entries // width, minlength=first.matrix.d_sae_in).cumsum(dim=0)
    if all(run == runs[0] for run in runs):
        run, counts = runs[0], first.gate_counts
        if any(not torch.equal(each.gate_counts, counts) for each in maps):
            counts = torch.stack([each.gate_counts for each in maps]).double().mean(dim=0).round().long()
    else:
        digest = hashlib.sha256("".join(run.triples for run in runs).encode()).hexdigest()
        run = replace(runs[0], triples=digest, triple_count=sum(run.triple_count for run in runs))
        counts = torch.stack([each.gate_counts for each in maps]).sum(dim=0)

    def mean(name: str) -> Tensor:
        tensors = [getattr(each, name) for each in maps]
        total = sum(share * tensor.double() for share, tensor in zip(shares, tensors, strict=True))
        assert isinstance(total, Tensor)
        return total.to(tensors[0].dtype)

    return replace(
        first,
        matrix=CsrMap(offsets, (entries % width).int(), sums.to(first.matrix.values.dtype), width),
        gate_counts=counts,
        gate_thresholds=mean("gate_thresholds").clamp(0, 1),
        mean_difference=mean("mean_difference").clamp(-1, 1),
        run=run,
    )


def _places(matrix: CsrMap) -> Tensor:
    """`[nonzeros]` int64, the place of each entry in the dense matrix, row by row."""
    rows = torch.arange(matrix.d_sae_in).repeat_interleave(matrix.row_offsets.diff())
    return rows * matrix.d_sae_out + matrix.columns.long()
