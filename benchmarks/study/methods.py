"""Every method as a list of settings to try. All begin with the same triples, and have the same number of tries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_baselines import merge_into_copy

import dspa
from dspa.kernels import EditKind
from dspa.methods.conditional_map import Estimator, GateRule
from dspa.methods.controls import lists_of_other_prompts, random_latents, response_density
from dspa.methods.mean_vectors import ResponseMeans, mean_difference_policy, principal_directions_policy
from dspa.offline.density_subset import DensitySubset
from study.fits import Chat, Material
from study.prompts import Prompt
from study.settings import Task

UNSTEERED = "unsteered"
PUBLISHED = "DSPA, published"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."  # the chat template's own
INSTRUCTIONS: dict[Task, tuple[str, ...]] = {
    "conditional": (
        "If you are asked how to do something, answer with a numbered list. If you are asked for an opinion, say 'I "
        "think' and hedge. If you are asked for a fact, answer in one short, plain sentence first. If somebody tells "
        "you a feeling, show sympathy first and talk about them. If you are asked for a story, tell it in the past "
        "tense with dialogue. If you are asked for a program, write code.",
        "How-to: numbered steps. Opinion: first person, hedged. Fact: a short, direct first sentence. Feeling: "
        "sympathy first. Story: past tense, dialogue. Programming: code.",
        "Suit the form of your answer to the message: steps, a hedged personal view, a plain fact, sympathy, a story "
        "or code.",
        "Begin as in these examples. How do I boil an egg? 1. Boil water. Is tea better than coffee? I think it may "
        "be. What is the capital of Italy? It is Rome. I feel sad. I'm sorry that you feel sad. Tell me a story. "
        'Once he said, "Come in." Print a number in Python. print(1)',
    ),
    "concise": (
        "Answer in one short sentence.",
        "Be concise. Leave out greetings, filler and closing remarks.",
        "Answer in as few words as you can.",
        "Begin as in these examples. What is the capital of Italy? It is Rome. Is tea healthy? Yes, in moderation.",
    ),
}


@dataclass(frozen=True, eq=False)
class Try:
    """A setting of a method.

    Attributes:
        setting: in words.
        fits: what it was made from, by name.
        policy: what steers; None where nothing does.
        adapters: a folder of LoRA.
        scale: of these.
        instruction: the system prompt.
    """

    setting: str
    fits: tuple[str, ...] = ()
    policy: dspa.Policy | None = None
    adapters: Path | None = None
    scale: float = 1.0
    instruction: str = ""

    def chat(self, text: str) -> Chat:
        """What a prompt is asked with."""
        system = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return [*system, {"role": "user", "content": text}]

    @contextmanager
    def applied(self, material: Material) -> Iterator[Any]:
        """The model that answers: the one of the study, or a copy with LoRA merged into it."""
        if self.adapters is None:
            yield material.model
        else:
            yield merge_into_copy(material.model, self.adapters, self.scale)


Method = Callable[[Material], list[Try]]


@dataclass(frozen=True)
class DspaSetting:
    """What may be tried of DSPA; the first of each list is the published strength."""

    gate_rule: GateRule
    edit: EditKind
    alpha: float
    estimator: Estimator = "mean_difference"
    k_diff: int = 16

    def __str__(self) -> str:
        gate = "ridge" if self.estimator == "ridge" else self.gate_rule
        return f"{gate}, {self.edit}, alpha {self.alpha}"

    def policy(self, material: Material, count: int | None = None) -> dspa.SteeringPolicy:
        """From the first `count` triples, or from all."""
        store: Any = material.densities
        if count is not None:
            store = DensitySubset.from_store(store, range(count))
        return self.of(
            material, dspa.ConditionalDifferenceMap.fit(store, gate_rule=self.gate_rule, estimator=self.estimator)
        )

    def of(self, material: Material, fitted: dspa.ConditionalDifferenceMap) -> dspa.SteeringPolicy:
        """With a map that was fitted already."""
        return dspa.SteeringPolicy(
            fitted, material.input_sae, material.output_sae, alpha=self.alpha, edit=self.edit, k_diff=self.k_diff
        )


DSPA = (
    DspaSetting("ge", "ablate", 0.2),
    DspaSetting("positive_ge", "both", 0.3),
    DspaSetting("positive_ge", "both", 0.6),
    DspaSetting("positive_ge", "both", 1.0),
)
RIDGE = tuple(replace(each, estimator="ridge") for each in DSPA)
CAA_SCALES = (1.0, 2.0, 4.0, 8.0)
REPE_SHARES = (0.01, 0.02, 0.05, 0.1)  # of the mean length of a response's mean state
REPE_DIRECTIONS = 16
FSRL_SCALES = (0.1, 0.2, 0.3, 0.5)  # of what is added to each token; from 0.5 on answers break
LORA_SCALES = (0.5, 1.0, 2.0, 4.0)  # of what training added to the weights


def unsteered_tries(material: Material) -> list[Try]:
    return [Try("-")]


def instruction_tries(material: Material) -> list[Try]:
    texts = INSTRUCTIONS[material.task]
    return [Try(f"instruction {place + 1}", instruction=f"{SYSTEM} {text}") for place, text in enumerate(texts)]


def static_list_tries(material: Material) -> list[Try]:
    return [
        Try(f"{each.edit}, alpha {each.alpha}", ("densities",), static_list(each.policy(material))) for each in DSPA
    ]


def static_list(policy: dspa.SteeringPolicy) -> dspa.StaticPolicy:
    return dspa.StaticPolicy.from_mean_difference(policy)


def caa_tries(material: Material) -> list[Try]:
    return [Try(f"scale {scale:g}", ("means",), caa(material.means, scale)) for scale in CAA_SCALES]


def caa(means: ResponseMeans, scale: float) -> dspa.VectorPolicy:
    return mean_difference_policy(means, scale=scale)


def repe_tries(material: Material) -> list[Try]:
    return [Try(f"{share:g} of the state", ("means",), repe(material.means, share)) for share in REPE_SHARES]


def repe(means: ResponseMeans, share: float) -> dspa.VectorPolicy:
    """Published: 16 directions; with fewer triples as many as there are."""
    directions = min(REPE_DIRECTIONS, len(means.chosen))
    length = share * float(means.chosen.norm(dim=1).mean())
    return principal_directions_policy(means, directions=directions, scale=length / directions**0.5)


def published_tries(material: Material) -> list[Try]:
    return [Try(str(DSPA[0]), ("densities",), DSPA[0].policy(material))]


def dspa_tries(material: Material) -> list[Try]:
    return [Try(str(each), ("densities",), each.policy(material)) for each in DSPA]


def ridge_tries(material: Material) -> list[Try]:
    return [Try(str(each), ("densities",), each.policy(material)) for each in RIDGE]


def fsrl_tries(material: Material) -> list[Try]:
    return [Try(f"scale {scale:g}", ("fsrl",), replace(material.fsrl, scale=scale)) for scale in FSRL_SCALES]


def lora_tries(objective: str) -> Method:
    def tries(material: Material) -> list[Try]:
        folder = material.lora(objective)
        return [Try(f"scale {scale:g}", (objective,), adapters=folder, scale=scale) for scale in LORA_SCALES]

    return tries


METHODS: dict[str, Method] = {
    UNSTEERED: unsteered_tries,
    "system prompt": instruction_tries,
    "static list": static_list_tries,
    "CAA": caa_tries,
    "RepE": repe_tries,
    PUBLISHED: published_tries,
    "DSPA": dspa_tries,
    "DSPA, ridge": ridge_tries,
    "FSRL": fsrl_tries,
    "DPO, LoRA": lora_tries("dpo"),
    "SimPO, LoRA": lora_tries("simpo"),
}
CONTROLS = ("control: DSPA, lists of other kinds", "control: DSPA, random latents")


def tries(material: Material, method: str) -> list[Try]:
    """As many as a method may have."""
    return METHODS[method](material)[: material.run.settings.tries]


def controls(material: Material, chosen: Try, prompts: Sequence[Prompt]) -> dict[str, Try]:
    """What the gain of DSPA has to be compared with: one list for each of these prompts, in their order."""
    policy = chosen.policy
    assert isinstance(policy, dspa.SteeringPolicy)
    lists = material.edit_lists(policy, [chosen.chat(prompt.text) for prompt in prompts])
    seed = material.run.settings.seed
    others = lists_of_other_prompts(lists, [prompt.kind for prompt in prompts], seed)
    random = random_latents(lists, response_density(material.densities), seed)
    return {
        name: replace(chosen, policy=dspa.StaticPolicy.with_edits(policy, edits))
        for name, edits in zip(CONTROLS, (others, random), strict=True)
    }


def file_name(method: str) -> str:
    """Of the file that holds a method's results."""
    return "".join(letter if letter.isalnum() else "-" for letter in method.lower()) + ".json"
