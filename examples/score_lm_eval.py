"""Scoring with lm-eval: how often a model prefers the chosen response of a triple, unsteered and steered.

`first_policy.py` writes the policy. Needs lm-eval: pip install 'dspa[examples]'.
"""

import argparse

from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import dspa
from dspa import organism


class SteeredModel(HFLM):
    """A steered model for lm-eval. The context of a request is the prompt, its continuation the response."""

    def __init__(self, steering: dspa.Steering, **options: object) -> None:
        super().__init__(steering.model, **options)
        self._steering = steering

    def _loglikelihood_tokens(self, requests: list, *args: object, **options: object) -> list[tuple[float, bool]]:
        # lm-eval pads on the right and passes no mask: one call scores requests with equally long contexts only.
        groups: dict[int, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            prompt_tokens = min(len(context), self.max_length - len(continuation) + 1)  # lm-eval cuts on the left
            groups.setdefault(prompt_tokens, []).append(index)
        scores = {}
        for prompt_tokens, indices in groups.items():
            with self._steering.scoring(prompt_tokens=prompt_tokens):
                scored = super()._loglikelihood_tokens([requests[i] for i in indices], *args, **options)
            scores.update(zip(indices, scored, strict=True))
        return [scores[index] for index in range(len(requests))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(organism.DATA / "model"), help="model folder or hub id")
    parser.add_argument("--policy", default="runs/policy", help="policy folder or hub id")
    parser.add_argument("--limit", type=int, default=100, help="how many triples")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model)
    task = {"task": "preferences", "dataset_path": "json", "test_split": "train", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": str(organism.triples_file())}, "doc_to_text": "{{prompt[0].content}}"}
    task |= {"doc_to_choice": "{{[chosen[0].content, rejected[0].content]}}", "doc_to_target": 0}
    run = {"limit": options.limit, "apply_chat_template": True, "task_manager": TaskManager(include_defaults=False)}
    with dspa.steer(model, {"steered": dspa.SteeringPolicy.from_pretrained(options.policy)}, select=None) as steering:
        scored = SteeredModel(steering, tokenizer=AutoTokenizer.from_pretrained(options.model), batch_size=16)
        for name in (None, "steered"):
            steering.select(name)
            results = simple_evaluate(scored, tasks=[ConfigurableTask(config=task)], bootstrap_iters=0, **run)
            print(f"{name or 'unsteered'}: chosen preferred {results['results']['preferences']['acc,none']:.3f}")


if __name__ == "__main__":
    main()
