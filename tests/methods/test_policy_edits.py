"""Policies made from policies: what they edit, against lists and sums written out here, and what their folder keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from naive_generation import generate
from tiny_models import prompts, tiny_model, tiny_policy
from torch import Tensor

import dspa
from dspa.errors import CorruptFileError, InvalidInputError, MismatchError
from dspa.kernels import EditKind, EditList, token_step
from dspa.methods.policy_edits import shortened
from dspa.methods.policy_merge import merge
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.steering import steer

MODEL: Any = tiny_model("llama")
EDITS: tuple[EditKind, ...] = get_args(EditKind)


def random_density(policy: SteeringPolicy, rows: int = 30, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = rows, policy.input_sae.d_sae
    return torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3)


def lists_of(edits: EditList) -> list[tuple[list[int], list[int]]]:
    return [(edits.augmented(row), edits.ablated(row)) for row in range(edits.batch)]


def most_selected(policy: SteeringPolicy) -> list[int]:
    """The latents that random prompts select, the most often selected first."""
    edits = policy.select(random_density(policy))
    counts = torch.bincount(edits.latents[edits.valid()].long(), minlength=policy.output_sae.d_sae)
    return [latent for latent in counts.argsort(descending=True).tolist() if counts[latent]]


# --- switching off ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("change", ["without", "only"])
def test_lists_lose_exactly_what_is_switched_off(edit: EditKind, change: str) -> None:
    policy = tiny_policy(MODEL).with_options(edit=edit)
    named, density = set(most_selected(policy)[::2]), random_density(policy, seed=1)
    changed = getattr(policy, change)(named)
    keeps = [lambda latent: latent not in named, lambda latent: latent in named][change == "only"]
    expected = [
        tuple([latent for latent in side if keeps(latent)] for side in row) for row in lists_of(policy.select(density))
    ]
    assert lists_of(changed.select(density)) == expected
    assert any(up or down for up, down in expected)
    found = changed.select(density)
    assert not found.latents[~found.valid()].any()
    assert not found.signs[~found.valid()].any()


def test_lists_are_no_longer_than_what_may_be_edited() -> None:
    """Buffers and kernels get the narrower lists."""
    policy = tiny_policy(MODEL)
    named = most_selected(policy)[:2]
    changed = policy.only(named)
    assert policy.intervention.longest_list > changed.intervention.longest_list == 2
    assert changed.select(random_density(policy)).k == 2


def test_changes_follow_one_another() -> None:
    policy = tiny_policy(MODEL)
    a, b, c, *_ = most_selected(policy)
    density = random_density(policy)
    one = policy.only([a, b, c]).without([b])
    assert lists_of(one.select(density)) == lists_of(policy.only([a, c]).select(density))
    assert one.changes == (f"only latents {', '.join(map(str, sorted((a, b, c))))}", f"without latent {b}")
    assert policy.changes == ()


def test_the_static_counterpart_leaves_out_what_is_switched_off() -> None:
    policy = tiny_policy(MODEL)
    static = StaticPolicy.from_mean_difference(policy)
    latent, other = static.edits.augmented(0)[1], static.edits.ablated(0)[0]
    found = StaticPolicy.from_mean_difference(policy.without([latent, other])).edits
    assert found.augmented(0) == [j for j in static.edits.augmented(0) if j != latent]
    assert found.ablated(0) == [j for j in static.edits.ablated(0) if j != other]


def test_a_latent_switched_off_stays_as_it_is_while_generating() -> None:
    policy = tiny_policy(MODEL)
    latent = most_selected(policy)[0]
    rows = prompts((6, 4, 5))
    with steer(MODEL, policy) as steering:
        generate(MODEL, rows, 6)
    with steer(MODEL, policy.without([latent])) as changed:
        generate(MODEL, rows, 6)
    assert latent in [edit.latent for edit in steering.summary().latents]
    assert latent not in [edit.latent for edit in changed.summary().latents]
    assert changed.summary().latents


# --- scaling ----------------------------------------------------------------------------------------------------------


def naive_step(hidden: Tensor, policy: SteeringPolicy, edits: EditList, factors: dict[int, float]) -> Tensor:
    """Method.md, section 4, with a factor for what each latent adds, in float64."""
    sae, result = policy.output_sae, []
    assert sae.W_dec is not None
    assert sae.decoder_rows is None
    for row, h in enumerate(hidden.double()):
        z = sae.W_enc.double() @ h + sae.b_enc.double()
        f = torch.where(z > sae.threshold.double(), z.clamp(min=0), 0)
        for latent, sign in [(j, 1) for j in edits.augmented(row)] + [(j, -1) for j in edits.ablated(row)]:
            if f[latent] > 0:
                after = max(float(f[latent] + sign * policy.alpha * f.max()), 0.0)
                h = h + factors.get(latent, 1.0) * (after - float(f[latent])) * sae.W_dec[latent].double()
        result.append(h)
    return torch.stack(result)


@pytest.mark.parametrize("edit", EDITS)
def test_the_change_of_a_latent_is_multiplied(edit: EditKind) -> None:
    policy = tiny_policy(MODEL, "jumprelu").with_options(edit=edit)
    a, b, c, *_ = most_selected(policy)
    factors = {a: 0.5, b: 0.0, c: 3.0}
    scaled = policy.scaled(factors)
    edits = policy.select(random_density(policy, 20, seed=2))
    assert lists_of(scaled.select(random_density(policy, 20, seed=2))) == lists_of(edits)
    hidden = torch.randn(20, policy.output_sae.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    changed, plain = hidden.clone(), hidden.clone()
    token_step(changed, scaled.output_sae, edits, scaled.alpha)
    token_step(plain, policy.output_sae, edits, policy.alpha)
    assert torch.allclose(changed, naive_step(hidden, policy, edits, factors), rtol=1e-12, atol=1e-12)
    assert not torch.equal(changed, plain)


def test_a_factor_of_0_is_without() -> None:
    policy = tiny_policy(MODEL)
    latent, rows = most_selected(policy)[0], prompts((6, 4, 5))
    with steer(MODEL, policy.scaled({latent: 0})):
        scaled = generate(MODEL, rows, 6)
    with steer(MODEL, policy.without([latent])):
        assert generate(MODEL, rows, 6) == scaled


def test_scaled_and_unscaled_rows_stand_in_one_batch() -> None:
    """Their decoders differ, so that they are served by two launches."""
    policy = tiny_policy(MODEL)
    scaled, rows = policy.scaled(dict.fromkeys(most_selected(policy), 4.0)), prompts((6, 4, 5))
    alone = []
    for each in (policy, scaled, policy):
        with steer(MODEL, each):
            alone.append(generate(MODEL, [rows[len(alone)]], 8)[0])
    with steer(MODEL, {"plain": policy, "scaled": scaled}, select=["plain", "scaled", "plain"]):
        assert generate(MODEL, rows, 8) == alone


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_are_replaced_and_noted() -> None:
    policy = tiny_policy(MODEL)
    changed = policy.with_options(alpha=0.125, k_diff=2, edit=policy.edit)
    assert (changed.alpha, changed.k_diff) == (0.125, 2)
    assert changed.changes == (f"alpha {policy.alpha} -> 0.125", f"k_diff {policy.k_diff} -> 2")
    density = random_density(policy)
    assert lists_of(changed.select(density)) == lists_of(replace(policy, k_diff=2).select(density))


# --- mixtures ---------------------------------------------------------------------------------------------------------


def other_policy(policy: SteeringPolicy, seed: int) -> SteeringPolicy:
    """The same with other values in its map, some of which cancel those of the first."""
    matrix = policy.conditional_map.matrix
    values = torch.randn(matrix.nonzeros, generator=torch.Generator().manual_seed(seed)).to(matrix.values.dtype)
    values[::5] = -matrix.values[::5]
    return replace(policy, conditional_map=replace(policy.conditional_map, matrix=replace(matrix, values=values)))


@pytest.mark.parametrize("edit", EDITS)
def test_a_mixture_selects_by_the_weighted_sum_of_the_maps(edit: EditKind) -> None:
    a = tiny_policy(MODEL).with_options(edit=edit)
    b = other_policy(a, 4).with_options(alpha=0.1)
    merged = merge({a: 1.4, b: 0.6})
    A = 0.7 * a.conditional_map.to_dense().double().numpy() + 0.3 * b.conditional_map.to_dense().double().numpy()
    assert merged.alpha == pytest.approx(0.7 * a.alpha + 0.3 * 0.1)
    assert np.allclose(merged.conditional_map.to_dense().numpy(), A, atol=1e-7)
    density = random_density(a, seed=5)
    found = merged.select(density)
    for row in range(len(density)):
        prompt = sorted(range(len(A)), key=lambda i, row=row: (-density[row, i].item(), i))[: a.k_prompt]
        s = A[prompt].sum(axis=0)
        chosen = {*found.augmented(row), *found.ablated(row)}
        assert chosen
        for side, sign in ((found.augmented(row), -1), (found.ablated(row), 1)):
            left_out = [sign * s[j] for j in range(A.shape[1]) if j not in chosen]
            assert all(sign * s[j] <= min(left_out) + 1e-6 for j in side)


def test_equal_parts_are_the_policy() -> None:
    policy, density = tiny_policy(MODEL), random_density(tiny_policy(MODEL))
    merged = merge({policy: 1, replace(policy): 1})
    assert lists_of(merged.select(density)) == lists_of(policy.select(density))


def test_what_one_part_does_not_edit_the_mixture_does_not() -> None:
    policy = tiny_policy(MODEL)
    a, b, *_ = most_selected(policy)
    merged = merge({policy.without([a]): 1, other_policy(policy, 6).without([b]): 1})
    edits = merged.select(random_density(policy))
    assert not {a, b} & set(edits.latents[edits.valid()].tolist())
    assert f"without latent {a}" in merged.changes[0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k_diff": 1}, InvalidInputError, "make them equal by with_options first"),
        ({"edit": "augment"}, InvalidInputError, "edit are 'both' and 'augment'"),
        ("other layers", MismatchError, "another input_layer"),
        ("scaled", MismatchError, "merge the policies before they are scaled"),
        ("negative", InvalidInputError, "a weight is -1"),
        ("zero", InvalidInputError, "all weights are 0"),
        ("alone", InvalidInputError, "at least two"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused(change: Any, error: type[Exception], words: str) -> None:
    policy = tiny_policy(MODEL).with_options(edit="both")
    other, weight = replace(policy), 1.0
    if isinstance(change, dict):
        other = policy.with_options(**change)
    elif change == "other layers":
        run = replace(policy.conditional_map.run, input_layer=0)
        other = replace(policy, conditional_map=replace(policy.conditional_map, run=run))
    elif change == "scaled":
        other = policy.scaled({most_selected(policy)[0]: 2.0})
    elif change == "negative":
        weight = -1.0
    with pytest.raises(error, match=words):
        merge(
            {
                policy: 0 if change == "zero" else 1,
                **({} if change == "alone" else {other: 0 if change == "zero" else weight}),
            }
        )


# --- the folder and the card ------------------------------------------------------------------------------------------


def test_the_folder_keeps_the_change_and_the_card_says_it(tmp_path: Path) -> None:
    policy = tiny_policy(MODEL)
    a, b, *_ = most_selected(policy)
    changed = policy.without([a]).scaled({b: 0.5}).with_options(alpha=0.25)
    loaded = SteeringPolicy.from_pretrained(changed.save_pretrained(tmp_path / "policy"))
    density, rows = random_density(policy), prompts((6, 4))
    assert lists_of(loaded.select(density)) == lists_of(changed.select(density))
    assert loaded.changes == changed.changes
    said = f"without latent {a}; scaled the edits of latent {b} by 0.5; alpha {policy.alpha} -> 0.25"
    assert said in (tmp_path / "policy" / "README.md").read_text()
    with steer(MODEL, changed):
        expected = generate(MODEL, rows, 6)
    with steer(MODEL, loaded):
        assert generate(MODEL, rows, 6) == expected


def test_a_policy_without_changes_is_saved_as_before(tmp_path: Path) -> None:
    folder = tiny_policy(MODEL).save_pretrained(tmp_path)
    assert "changes" not in (folder / "config.json").read_text()
    assert "changed since" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "stored", [torch.full((56,), 2, dtype=torch.uint8), torch.ones(55, dtype=torch.uint8), torch.ones(56)]
)
def test_a_damaged_switch_is_refused(stored: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(MODEL).without([0])
    original = dspa.SteeringPolicy.__module__
    folder = __import__(original, fromlist=["FOLDER"]).FOLDER
    write = type(folder).write
    monkeypatch.setattr(
        type(folder),
        "write",
        lambda self, path, config, tensors: write(self, path, config, {**tensors, "editable": stored}),
    )
    policy.save_pretrained(tmp_path)
    with pytest.raises(CorruptFileError, match="editable is"):
        SteeringPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda policy: policy.without([]), "no latent was named"),
        (lambda policy: policy.without([56]), "a latent is 56; expected 0 to d_sae - 1 = 55"),
        (lambda policy: policy.only([-1]), "a latent is -1"),
        (lambda policy: policy.only(["1"]), "a latent is '1'; expected an integer"),
        (lambda policy: policy.scaled({1: -0.5}), "the factor of latent 1 is -0.5"),
        (lambda policy: policy.with_options(alfa=1), "option 'alfa' is not known"),
        (lambda policy: replace(policy, editable=torch.ones(3)), "editable is"),
    ],
)
def test_what_cannot_be_changed_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        make(tiny_policy(MODEL))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda policy: policy.without(5), "latents are 5; expected a list of integers"),
        (lambda policy: policy.only("12"), "latents are '12'"),
        (lambda policy: policy.scaled([5]), "factors are a list; expected a dictionary"),
        (lambda policy: merge(cast(Any, [policy, policy])), "weights are a list; expected a dictionary"),
        (lambda policy: merge(cast(Any, {policy: 1, "other": 1})), "a str cannot be merged"),
        (lambda policy: replace(policy, factors=torch.full((56,), torch.nan)), "factors are"),
    ],
)
def test_arguments_of_other_kinds_are_refused_in_a_line(make: Any, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words) as caught:
        make(tiny_policy(MODEL))
    assert "\n" not in str(caught.value)


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_changes_are_recorded_whole_and_shown_short(tmp_path: Path) -> None:
    policy = tiny_policy(MODEL)
    factors = {latent: 1 + latent / 3 for latent in range(30)}
    changed = policy.only(range(40)).scaled(factors)
    loaded = SteeringPolicy.from_pretrained(changed.save_pretrained(tmp_path))
    assert loaded.changes[0] == f"only latents {', '.join(map(str, range(40)))}"
    said = dict(
        part.split(" by ") for part in loaded.changes[1].removeprefix("scaled the edits of latents ").split(", ")
    )
    assert {int(latent): float(factor) for latent, factor in said.items()} == factors
    assert loaded.factors is not None
    assert torch.equal(loaded.factors[:30], torch.tensor(list(factors.values())))
    card = (tmp_path / "README.md").read_text()
    assert (
        f"only latents {', '.join(map(str, range(20)))} and 20 more; scaled the edits of latents 0 by 1, 1 by" in card
    )
    assert f"19 by {factors[19]!r} and 10 more |" in card
    merged = merge({changed: 1, replace(changed): 1})
    assert merged.changes[0].count(changed.changes[0]) == 2  # what two mixtures differ in is in their lines
    assert "and 20 more, scaled" in shortened(merged.changes)


def test_options_of_a_loaded_policy_are_a_change(tmp_path: Path) -> None:
    policy = tiny_policy(MODEL)
    folder = policy.save_pretrained(tmp_path)
    loaded = SteeringPolicy.from_pretrained(folder, alpha=0.9, k_diff=policy.k_diff)
    assert (loaded.alpha, loaded.changes) == (0.9, (f"alpha {policy.alpha} -> 0.9",))


def test_damaged_factors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tiny_policy(MODEL).scaled({0: 2})
    object.__setattr__(changed, "factors", torch.full((56,), -1.0))
    monkeypatch.setattr(SteeringPolicy, "model_card", lambda *_: "")
    changed.save_pretrained(tmp_path)
    with pytest.raises(CorruptFileError, match="factors are not 56 finite factors"):
        SteeringPolicy.from_pretrained(tmp_path)


def test_the_table_of_the_card_is_that_of_the_policy() -> None:
    """No latent that is switched off, and the factor of one that is scaled."""
    policy = tiny_policy(MODEL)
    columns = policy.conditional_map.matrix.columns.unique().tolist()
    a, b = columns[:2]
    card = policy.only([a, b]).scaled({b: 5}).scaled({b: 0.5}).model_card("me/policy")
    rows = [line for line in card.splitlines() if line.startswith("| ") and ", mean " in line]
    assert sorted(int(line.split("|")[1]) for line in rows) == [a, b]
    assert ["its edits times 2.5" in line for line in rows] == [int(line.split("|")[1]) == b for line in rows]
    assert f"Left out are {len(columns) - 2} latents" in card
    plain = policy.model_card("me/policy")
    assert "Left out" not in plain
    assert "its edits" not in plain


def test_a_part_of_weight_0_takes_no_part() -> None:
    policy = tiny_policy(MODEL)
    off, latent = policy.without(most_selected(policy)), most_selected(policy)[0]
    merged = merge({policy: 2, off.scaled({latent: 3}): 0})
    density = random_density(policy)
    assert lists_of(merged.select(density)) == lists_of(policy.select(density))
    assert torch.equal(merged.conditional_map.matrix.values, policy.conditional_map.matrix.values)
    assert merged.factors is None


def test_a_mixture_of_scaled_policies_keeps_their_factors_and_the_card_names_the_parts() -> None:
    policy = tiny_policy(MODEL)
    latent = most_selected(policy)[0]
    other = replace(
        policy.conditional_map, options=replace(policy.conditional_map.options, gate_percentile=50.0, gate_rule="ge")
    )
    scaled = policy.scaled({latent: 3})
    merged = merge({scaled: 1, replace(scaled, conditional_map=other): 1})
    assert merged.factors is not None
    assert float(merged.factors[latent]) == 3
    card = merged.model_card("me/policy")
    assert "| gate_percentile, gate_rule | of each part |" in card
    assert "gates ge percentile 50, " in card
