"""Overlays of synthetic users of the organism: the gain of each over the shared policy, by number of examples.

    python benchmarks/personal.py --out benchmarks/results/organism/personal.json

A user likes one register and nothing else, whatever the prompt; the shared policy knows of no user. An example is the
best and the worst, for the user, of eight responses to a training prompt. Users stand side by side in one batch, each
row under its own policy. Held-out prompts; the same sampling noise for the shared policy and for the overlays.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import dspa
from dspa.methods.personal import Overlay, PersonalPolicy, personalise
from dspa.methods.policy import Policy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.preferences import PreferenceTriples, load_preferences
from dspa.organism.demo import CANDIDATES as SETTINGS
from dspa.organism.demo import DemoOptions, Organism, load_organism
from dspa.organism.evaluation import Estimate, prompt_batch
from dspa.organism.language import (
    CANDIDATES,
    MAX_RESPONSE_TOKENS,
    REGISTERS,
    Prompt,
    Response,
    Split,
    draw_prompt,
    draw_prompts,
    draw_response,
    parse,
)
from dspa.util.files import write_atomically
from dspa.util.provenance import Provenance

USERS = tuple(REGISTERS)
PROMPTS_AT_ONCE = 30  # each of them for all users


def utility(user: str, moves: Sequence[str]) -> int:
    """Moves of the user's register minus all other moves."""
    return sum(1 if move in REGISTERS[user] else -1 for move in moves)


def draw_examples(user: str, count: int, rng: np.random.Generator, tokenizer: Any) -> PreferenceTriples:
    """The best and the worst of some responses of one length, for one user."""
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompt = draw_prompt(rng, "train")
        wordings = draw_response(rng).wordings
        drawn = [draw_response(rng, wordings) for _ in range(CANDIDATES)]
        ranked: list[Response] = sorted(drawn, key=lambda response: utility(user, response.moves))
        if utility(user, ranked[-1].moves) > utility(user, ranked[0].moves):
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt.text}],
                    "chosen": [{"role": "assistant", "content": ranked[-1].text}],
                    "rejected": [{"role": "assistant", "content": ranked[0].text}],
                }
            )
    return load_preferences(rows, tokenizer)


def respond(
    organism: Organism, prompts: Sequence[Prompt], policies: dict[str, Policy] | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`[users, prompts]`: each user's utility of the response to each prompt, and whether it is malformed."""
    utilities = np.zeros((len(USERS), len(prompts)), dtype=np.int64)
    malformed = np.zeros(utilities.shape, dtype=bool)
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        part = prompts[start : start + PROMPTS_AT_ONCE]
        batch = prompt_batch(organism.tokenizer, [prompt for _ in USERS for prompt in part])
        rows = [user for user in USERS for _ in part]

        def generate(batch: dict[str, torch.Tensor] = batch, noise: int = seed + start) -> torch.Tensor:
            torch.manual_seed(noise)
            model: Any = organism.model
            return model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MAX_RESPONSE_TOKENS)

        if policies is None:
            output = generate()
        else:
            with dspa.steer(organism.model, policies, select=rows):
                output = generate()
        texts = organism.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, (user, text) in enumerate(zip(rows, texts, strict=True)):
            parsed, place = parse(text), (USERS.index(user), start + row % len(part))
            utilities[place] = utility(user, parsed.moves)
            malformed[place] = parsed.malformed > 0 or not parsed.moves
    return utilities, malformed


def overlays(shared: SteeringPolicy, organism: Organism, count: int, seed: int, **options: Any) -> dict[str, Overlay]:
    return {
        user: personalise(
            shared,
            organism.model,
            draw_examples(user, count, np.random.default_rng([seed, index]), organism.tokenizer),
            **options,
        )
        for index, user in enumerate(USERS)
    }


def folder_bytes(overlay: Overlay) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return sum(file.stat().st_size for file in overlay.save_pretrained(folder).iterdir())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--examples", default="2,5,10,20", help="numbers of examples of a user")
    parser.add_argument("--prompts", type=int, default=240, help="prompts, each for every user")
    parser.add_argument("--split", default="heldout", help="of the prompts; validation while settings are chosen")
    parser.add_argument("--entries-per-side", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=None, help="of the overlay; default: the shared policy's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    split: Split = options.split
    with tempfile.TemporaryDirectory() as folder:
        organism = load_organism(DemoOptions(), Path(folder), progress=False)
        shared = organism.policy(90, SETTINGS[1])
    prompts = draw_prompts(np.random.default_rng([options.seed, 1]), split, options.prompts)
    unsteered, _ = respond(organism, prompts, None, options.seed)
    base, base_malformed = respond(organism, prompts, dict.fromkeys(USERS, shared), options.seed)
    rows: list[dict[str, Any]] = []
    made: dict[str, Overlay] = {}

    def estimate(values: NDArray[Any]) -> dict[str, float]:
        return asdict(Estimate.from_samples(values.astype(float).mean(axis=0)))  # a prompt's users are one sample

    for count in map(int, options.examples.split(",")):
        made = overlays(
            shared, organism, count, options.seed, entries_per_side=options.entries_per_side, alpha=options.alpha
        )
        found, malformed = respond(
            organism, prompts, {user: PersonalPolicy(shared, overlay) for user, overlay in made.items()}, options.seed
        )
        row = {
            "examples": count,
            "utility": estimate(found),
            "gain": estimate(found - base),
            "gain_by_user": {
                user: asdict(Estimate.from_samples((found - base)[index])) for index, user in enumerate(USERS)
            },
            "malformed": float(malformed.mean()),
            "numbers": max(len(overlay.latents) for overlay in made.values()),
            "bytes": max(folder_bytes(overlay) for overlay in made.values()),
        }
        rows.append(row)
        gains = ", ".join(
            f"{user} {gain['mean']:+.2f}±{gain['half_width']:.2f}" for user, gain in row["gain_by_user"].items()
        )
        print(
            f"{count} examples: gain {row['gain']['mean']:+.2f} ± {row['gain']['half_width']:.2f} ({gains}), "
            f"malformed {row['malformed']:.1%}, {row['numbers']} latents, {row['bytes']} bytes",
            flush=True,
        )
    # The control: everyone under the overlay of the next user, of the last number of examples
    others = dict(zip(USERS, [*list(made.values())[1:], next(iter(made.values()))], strict=True))
    found, _ = respond(
        organism, prompts, {user: PersonalPolicy(shared, overlay) for user, overlay in others.items()}, options.seed
    )
    control = estimate(found - base)
    print(f"control, overlays of another user: {control}")
    record = {
        "control": control,
        "provenance": asdict(Provenance.here()),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "unsteered": estimate(unsteered),
        "shared": estimate(base),
        "shared_malformed": float(base_malformed.mean()),
        "rows": rows,
    }
    print(f"unsteered {record['unsteered']}, shared {record['shared']}, malformed {base_malformed.mean():.1%}")
    write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
