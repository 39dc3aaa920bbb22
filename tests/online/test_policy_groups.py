"""Which policies share a launch, and the decoder rows they then need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_generation import generate, naive_generate
from tiny_models import prompts, tiny_model, tiny_policy

from dspa.errors import MismatchError
from dspa.kernels import EditList
from dspa.methods.latent_lists import with_all_decoder_rows
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.policy_groups import editing_groups, reading_groups
from dspa.online.steering import steer

MODEL: Any = tiny_model("llama")


def reloaded(policy: SteeringPolicy, folder: Path) -> SteeringPolicy:
    """With tensors of its own, and of the decoder only the rows that it can select."""
    return SteeringPolicy.from_pretrained(policy.save_pretrained(folder))


@pytest.mark.parametrize(
    ("options", "reading", "editing"),
    [
        ([{}, {"alpha": 0.1}], [(1, "ab")], [(2, "ab")]),
        ([{}, {"output_layer": 3}], [(1, "ab")], [(2, "a"), (3, "b")]),
        ([{"output_layer": 3}, {}], [(1, "ab")], [(2, "b"), (3, "a")]),
        ([{}, {"input_layer": 0}], [(0, "b"), (1, "a")], [(2, "ab")]),
        ([{}, {"seed": 1}], [(1, "a"), (1, "b")], [(2, "a"), (2, "b")]),
        ([{}, {"seed": 1}, {"alpha": 0.3}], [(1, "ac"), (1, "b")], [(2, "ac"), (2, "b")]),
    ],
)
def test_policies_are_grouped_by_layer_and_encoder(options: list[Any], reading: list[Any], editing: list[Any]) -> None:
    policies = {name: tiny_policy(MODEL, **each) for name, each in zip("abc", options, strict=False)}
    assert [(group.layer, "".join(group.names)) for group in reading_groups(policies)] == reading
    assert [(group.layer, "".join(group.names)) for group in editing_groups(policies)] == editing


def test_a_rule_that_does_not_look_at_the_prompt_has_a_group_without_an_sae() -> None:
    policy = tiny_policy(MODEL)
    static = StaticPolicy.with_edits(policy, EditList.from_lists([[1]], [[2]]))
    groups = reading_groups({"a": policy, "b": static})
    assert [(group.layer, group.sae is None) for group in groups] == [(1, False), (2, True)]


def test_saved_policies_share_a_launch_with_the_decoder_rows_of_both(tmp_path: Path) -> None:
    whole = tiny_policy(MODEL)
    lists = [EditList.from_lists([[1, 5]], [[9]]), EditList.from_lists([[5]], [[7, 30]])]
    kept = [torch.tensor([1, 5, 9]), torch.tensor([5, 7, 30])]
    policies = {
        name: replace(StaticPolicy.with_edits(whole, edits), output_sae=whole.output_sae.with_decoder_rows(latents))
        for name, edits, latents in zip("ab", lists, kept, strict=True)
    }
    (group,) = editing_groups(policies)
    sae = with_all_decoder_rows([policy.output_sae for policy in policies.values()])
    assert group.names == ("a", "b")
    assert sae.decoder_rows is not None
    assert sae.W_dec is not None
    assert whole.output_sae.W_dec is not None
    for latent in range(whole.output_sae.d_sae):
        row = int(sae.decoder_rows[latent])
        assert (row >= 0) == (latent in (1, 5, 7, 9, 30))
        if row >= 0:
            assert torch.equal(sae.W_dec[row], whole.output_sae.W_dec[latent])


def test_rows_under_saved_policies(tmp_path: Path) -> None:
    rows = prompts((6, 4))
    made = {"a": tiny_policy(MODEL), "b": tiny_policy(MODEL, alpha=0.9, k_diff=3)}
    policies = {name: reloaded(policy, tmp_path / name) for name, policy in made.items()}
    expected = [naive_generate(MODEL, made[name], [row], 6)[0] for name, row in zip("ab", rows, strict=True)]
    with steer(MODEL, policies, select=("a", "b")) as steering:
        assert generate(MODEL, rows, 6) == expected
        assert steering.counters(2).seen.tolist() == [6, 6]  # one launch, one set of counters


def test_decoders_that_contradict_each_other_are_served_by_two_launches() -> None:
    """Whichever comes first, and also where the first of three contradicts neither of the others."""
    policy = tiny_policy(MODEL)
    assert policy.output_sae.W_dec is not None
    other = replace(policy, output_sae=replace(policy.output_sae, W_dec=2 * policy.output_sae.W_dec))
    static = StaticPolicy.with_edits(policy, EditList.from_lists([[]], [[]]))
    neither = replace(static, output_sae=policy.output_sae.with_decoder_rows(torch.tensor([], dtype=torch.int64)))
    groups = editing_groups({"neither": neither, "a": policy, "b": other, "c": policy})
    assert [group.names for group in groups] == [("neither", "a", "c"), ("b",)]
    with pytest.raises(MismatchError, match="same encoder and different decoders"):
        with_all_decoder_rows([policy.output_sae, other.output_sae])
