"""What overlays are for, on the organism: they gain on prompts they have not seen."""

from __future__ import annotations

import numpy as np
import pytest
from personal import USERS, overlays, respond

from dspa.methods.personal import PersonalPolicy
from dspa.organism.demo import CANDIDATES, DemoOptions, Organism, load_organism
from dspa.organism.language import draw_prompts
from dspa.util.estimate import Estimate

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Organism:
    return load_organism(DemoOptions(triples=120), tmp_path_factory.mktemp("organism"), progress=False)


def test_an_overlay_of_ten_examples_gains_over_the_shared_policy(organism: Organism) -> None:
    shared = organism.policy(90, CANDIDATES[1])
    prompts = draw_prompts(np.random.default_rng(5), "heldout", 30)
    made = overlays(shared, organism, 10, seed=3)
    before, _ = respond(organism, prompts, dict.fromkeys(USERS, shared), seed=0)
    after, _ = respond(organism, prompts, {user: PersonalPolicy(shared, made[user]) for user in USERS}, seed=0)
    gain = Estimate.from_samples((after - before).mean(axis=0))
    assert gain.mean - gain.half_width > 0
