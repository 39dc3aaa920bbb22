"""Scoring with lm-eval: how often a model prefers the chosen response of a triple, unsteered and steered.

`first_policy.py` writes the policy. Needs lm-eval: pip install 'dspa[eval]'.
"""

import argparse

from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import dspa
from dspa import organism
from dspa.evaluation import SteeredLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(organism.DATA / "model"), help="model folder or hub id")
    parser.add_argument("--policy", default="runs/policy", help="policy folder or hub id")
    parser.add_argument("--limit", type=int, default=100, help="how many triples")
    options = parser.parse_args()

    task = {"task": "preferences", "dataset_path": "json", "test_split": "train", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": str(organism.triples_file())}, "doc_to_text": "{{prompt[0].content}}"}
    task |= {"doc_to_choice": "{{[chosen[0].content, rejected[0].content]}}", "doc_to_target": 0}
    run = {"limit": options.limit, "apply_chat_template": True, "task_manager": TaskManager(include_defaults=False)}
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for name, policy in (("unsteered", None), ("steered", dspa.SteeringPolicy.from_pretrained(options.policy))):
        scored = SteeredLM(model, policy, tokenizer=tokenizer, batch_size=16)
        results = simple_evaluate(scored, tasks=[ConfigurableTask(config=task)], bootstrap_iters=0, **run)
        print(f"{name}: chosen preferred {results['results']['preferences']['acc,none']:.3f}")
        scored.remove()


if __name__ == "__main__":
    main()
