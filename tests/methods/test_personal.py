"""Overlays: which latents a few examples choose, against densities counted here; many users in one launch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from altered_records import change_record
from naive_generation import generate, naive_generate
from tiny_models import BOS, D_SAE_OUT, OUTPUT_LAYER, layer_of, prompts, tiny_model, tiny_policy
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError, MismatchError
from dspa.kernels import EditList
from dspa.methods.personal import Overlay, PersonalPolicy, personalise
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.triples import PreferenceTriple, PreferenceTriples
from dspa.online.policy_groups import editing_groups
from dspa.online.steering import steer

MODEL: Any = tiny_model("llama")
POLICY = tiny_policy(MODEL)
PROMPT = [BOS, 7, 8, 9]


def overlay_of(latents: list[int], signs: list[int], alpha: float | None = None) -> Overlay:
    run = POLICY.conditional_map.run
    return Overlay(
        torch.tensor(latents, dtype=torch.int32),
        torch.tensor(signs, dtype=torch.int8),
        torch.zeros(len(latents)),
        alpha,
        run.output_layer,
        run.output_sae,
        3,
    )


def examples_of(*pairs: tuple[list[int], list[int]]) -> PreferenceTriples:
    """The last token of a liked response is not counted."""
    rows = [
        PreferenceTriple(tuple(PROMPT), tuple(liked), tuple(disliked), len(liked) - 1, len(disliked), f"row {index}")
        for index, (liked, disliked) in enumerate(pairs)
    ]
    return PreferenceTriples(tuple(rows), (BOS,))


EXAMPLES = examples_of(([11, 12, 13, 14], [21, 22]), ([31, 32, 33], [41, 42, 43, 44, 45]), ([50, 51], [52]))


def naive_density(response: tuple[int, ...], counted: int) -> Tensor:
    """`[d_sae]`: the share of the counted response tokens on which each latent is active, by a forward hook."""
    seen: list[Tensor] = []
    hook = layer_of(MODEL, OUTPUT_LAYER).register_forward_hook(
        lambda module, inputs, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        MODEL(torch.tensor([[*PROMPT, *response]]), use_cache=False)
    hook.remove()
    sae = POLICY.output_sae
    states = seen[0][0, len(PROMPT) : len(PROMPT) + counted]
    z = states.double() @ sae.W_enc.double().T + sae.b_enc.double()
    return ((z > sae.threshold) & (z > 0)).double().mean(dim=0)


@pytest.mark.parametrize("side", [1, 4, D_SAE_OUT])
def test_the_latents_that_differ_most_are_chosen(side: int) -> None:
    score = torch.stack(
        [naive_density(t.chosen, t.chosen_counted) - naive_density(t.rejected, t.rejected_counted) for t in EXAMPLES]
    ).mean(dim=0)
    found = personalise(POLICY, MODEL, EXAMPLES, entries_per_side=side, alpha=0.7)
    up = sorted((j for j in range(D_SAE_OUT) if score[j] > 0), key=lambda j: (-score[j], j))[:side]
    down = sorted((j for j in range(D_SAE_OUT) if score[j] < 0), key=lambda j: (score[j], j))[:side]
    assert found.latents.tolist() == up + down
    assert found.signs.tolist() == [1] * len(up) + [-1] * len(down)
    assert torch.allclose(found.scores.double(), score[up + down], atol=1e-6)
    assert (found.alpha, found.examples) == (0.7, 3)
    assert up
    assert down


def test_what_a_policy_cannot_select_is_no_candidate() -> None:
    all_chosen = personalise(POLICY, MODEL, EXAMPLES).latents.tolist()
    found = personalise(POLICY.without(all_chosen[:3]), MODEL, EXAMPLES)
    assert not set(all_chosen[:3]) & set(found.latents.tolist())
    PersonalPolicy(POLICY.without(all_chosen[:3]), found)


def test_an_overlay_takes_precedence_over_the_shared_list() -> None:
    density = torch.rand(9, POLICY.input_sae.d_sae, generator=torch.Generator().manual_seed(1))
    shared = POLICY.select(density)
    up, down = shared.augmented(0)[0], shared.ablated(0)[0]
    other = next(j for j in range(D_SAE_OUT) if j not in shared.augmented(0) + shared.ablated(0))
    silent = shared.augmented(0)[1]
    found = PersonalPolicy(POLICY, overlay_of([up, down, other, silent], [-1, 1, -1, 0])).select(density)
    for row in range(9):
        named = {up, down, other, silent}
        assert found.augmented(row) == [down, *(j for j in shared.augmented(row) if j not in named)]
        assert found.ablated(row) == [up, other, *(j for j in shared.ablated(row) if j not in named)]
    assert (
        found.k
        == POLICY.intervention.longest_list + 3
        == PersonalPolicy(POLICY, overlay_of([up, down, other, silent], [-1, 1, -1, 0])).intervention.longest_list
    )


def test_rows_of_many_users_are_served_by_one_launch() -> None:
    users = {
        "a": PersonalPolicy(POLICY, overlay_of([3, 4], [1, -1], alpha=0.9)),
        "b": PersonalPolicy(POLICY, overlay_of([], [])),
        "c": PersonalPolicy(POLICY, overlay_of([5, 9, 30], [-1, -1, 1])),
        "shared": POLICY,
    }
    rows, names = prompts((6, 4, 5, 3, 5)), ["a", "b", "c", "shared", None]
    expected = []
    for row, name in zip(rows, names, strict=True):
        if name is None:
            expected.append(generate(MODEL, [row], 6)[0])
            continue
        with steer(MODEL, users[name]):
            expected.append(generate(MODEL, [row], 6)[0])
    assert len(editing_groups(users)) == 1
    with steer(MODEL, users, select=names) as steering:
        assert generate(MODEL, rows, 6) == expected
        assert steering.counters(5).seen.tolist() == [6, 6, 6, 6, 0]
    assert expected[1] == naive_generate(MODEL, POLICY, [rows[1]], 6)[0]


def test_a_users_file_has_a_few_kilobytes_and_fits_the_saved_policy(tmp_path: Path) -> None:
    compact = POLICY.with_options(edit="ablate", k_diff=2)
    policy = SteeringPolicy.from_pretrained(compact.save_pretrained(tmp_path / "policy"))
    overlay = personalise(policy, MODEL, EXAMPLES, entries_per_side=16)
    folder = overlay.save_pretrained(tmp_path / "user")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3000
    loaded = Overlay.from_pretrained(folder)
    for name in ("latents", "signs", "scores"):
        assert torch.equal(getattr(loaded, name), getattr(overlay, name))
    assert repr(loaded) == repr(overlay)
    density = torch.rand(3, policy.input_sae.d_sae, generator=torch.Generator().manual_seed(2))
    one, other = (PersonalPolicy(policy, each).select(density) for each in (overlay, loaded))
    assert one.latents.tolist() == other.latents.tolist()


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    folder = overlay_of([1, 2], [1, -1]).save_pretrained(tmp_path)
    change_record(folder / "config.json", lambda record: record.update(alpha=-1.0))
    with pytest.raises(CorruptFileError, match=r"alpha is -1\.0"):
        Overlay.from_pretrained(folder)


@pytest.mark.parametrize(
    ("overlay", "policy", "words"),
    [
        (replace(overlay_of([1], [1]), output_layer=3), POLICY, "another output SAE or layer"),
        (replace(overlay_of([1], [1]), output_sae="other"), POLICY, "another output SAE or layer"),
        (overlay_of([D_SAE_OUT], [1]), POLICY, f"names latent {D_SAE_OUT}"),
        (overlay_of([7], [1]), POLICY.without([7]), "switched off"),
        (
            overlay_of([7], [-1]),
            replace(POLICY.only([1]), output_sae=POLICY.output_sae.with_decoder_rows(torch.tensor([1]))),
            "decoder rows",
        ),
    ],
)
def test_an_overlay_that_does_not_fit_is_refused(overlay: Overlay, policy: SteeringPolicy, words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        PersonalPolicy(policy, overlay)


@pytest.mark.parametrize(
    ("latents", "signs", "words"),
    [([1, 1], [1, 1], "twice"), ([-1], [1], "negative"), ([1], [2], "signs are not all"), ([1], [], "expected")],
)
def test_an_overlay_is_checked(latents: list[int], signs: list[int], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        overlay_of(latents, signs)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PersonalPolicy(POLICY, {}), "the overlay is a dict"),  # type: ignore[arg-type]
        (lambda: PersonalPolicy("p", overlay_of([1], [1])), "the shared policy is a str"),  # type: ignore[arg-type]
        (
            lambda: personalise(PersonalPolicy(POLICY, overlay_of([], [])), MODEL, EXAMPLES),  # type: ignore[arg-type]
            "the shared policy is a PersonalPolicy",
        ),
        (lambda: personalise(POLICY, MODEL, 5), "the triples are a int"),  # type: ignore[arg-type]
        (lambda: PersonalPolicy(POLICY, overlay_of([10**6], [0])), "the overlay names latent 1000000 of"),
    ],
)
def test_arguments_of_other_kinds_are_refused(make: Any, words: str) -> None:
    with pytest.raises((InvalidInputError, MismatchError), match=words):
        make()


def test_a_steered_model_is_refused() -> None:
    with steer(MODEL, POLICY), pytest.raises(InvalidInputError, match="the model is steered"):
        personalise(POLICY, MODEL, EXAMPLES)


def test_lists_keep_their_order_where_entries_are_dropped() -> None:
    edits = EditList.from_lists([[4, 2], [1]], [[3], [9, 8]])
    keep = torch.tensor([[True, False, True], [False, True, True]])
    found = edits.where(keep)
    assert (found.augmented(0), found.ablated(0), found.augmented(1), found.ablated(1)) == ([4], [3], [], [9, 8])
    assert found.k == 3
    assert edits.where(keep, 2).latents.tolist() == [[4, 3], [9, 8]]
