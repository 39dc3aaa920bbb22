"""lm-eval on the steered organism: local task files of three kinds. Scores do not depend on the batch size and equal a
loop over one request at a time, written out; in float64, in which no rounding reaches a threshold."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from naive_generation import naive_generate, naive_lists, naive_logits

import dspa
from dspa import cli, organism
from dspa.errors import InvalidInputError

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("evaluating needs dspa[eval]", allow_module_level=True)

pytestmark = pytest.mark.long  # lm-eval takes many seconds to import, so that it is imported in the tests alone

MMLU, HELLASWAG, GENERATION = TASKS = ("local_mmlu", "local_hellaswag", "local_generation")
EXAMPLES = 6
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dspa.SteeringPolicy:
    """Of 32 triples, strong enough to change what is said."""
    folder = tmp_path_factory.mktemp("evaluation")
    model, tokenizer = organism.load_model()
    triples = dspa.load_preferences(organism.triples_file(), tokenizer, limit=32)
    saes = [dspa.SparseAutoencoder.from_sae_lens(organism.sae_folder(which)) for which in ("input", "output")]
    store = dspa.collect(model, tokenizer, triples, input_sae=saes[0], output_sae=saes[1], out=folder / "densities")
    fitted = dspa.ConditionalDifferenceMap.fit(store)
    return dspa.SteeringPolicy(fitted, saes[0], saes[1], edit="both", alpha=0.5)


@pytest.fixture(scope="module")
def policy(chosen: dspa.SteeringPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chosen.save_pretrained(tmp_path_factory.mktemp("saved") / "policy")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files and their data, made of the organism's triples."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.loads(line) for line in organism.triples_file().read_text().splitlines()[:EXAMPLES]]
    records = []
    for index, row in enumerate(rows):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        records.append(
            {
                "question": row["prompt"][0]["content"],
                # endings of different lengths, so that batches have padding
                "endings": [" ".join(text.split()[: 3 + 2 * index + k]) for k, text in enumerate((chosen, rejected))],
                "letters": ["Haha", "Wrong", "Hello", "May"],  # each begins with a token of its own
                "answer": index % 4,
            }
        )
    (folder / "data.json").write_text("\n".join(map(json.dumps, records)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "data.json")},
        "test_split": "train",
        "doc_to_text": "{{question}}",
        "target_delimiter": " ",
    }
    configs: dict[str, dict[str, Any]] = {
        MMLU: {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{letters}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        },
        HELLASWAG: {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        GENERATION: {
            "output_type": "generate_until",
            "doc_to_target": "{{endings[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "min_new_tokens": NEW_TOKENS},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **config}))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


@pytest.fixture(scope="module")
def model() -> Any:
    return organism.load_model()[0].double()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return organism.load_model()[1]


def evaluate(scorer: Any, tasks: Path, names: Sequence[str], **options: Any) -> Any:
    """What lm-eval's own function returns."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import dspa.evaluation  # noqa: F401, registers the model

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    run: Any = lm_eval.simple_evaluate
    return run(scorer, tasks=list(names), task_manager=manager, **options)


def steered_model(*arguments: Any, **options: Any) -> Any:
    from dspa.evaluation import SteeredLM

    return SteeredLM(*arguments, **options)


def samples(scorer: Any, tasks: Path, names: tuple[str, ...] = TASKS) -> dict[str, list[Any]]:
    """By task, what lm-eval got for each request of each example, in order."""
    run = evaluate(scorer, tasks, names, bootstrap_iters=0, log_samples=True)
    return {
        name: [sample["resps"] for sample in sorted(found, key=lambda sample: sample["doc_id"])]
        for name, found in run["samples"].items()
    }


def naive_scores(model: Any, policy: Any, context: list[int], continuation: list[int]) -> list[float]:
    """The log-probability of each token of the continuation, by the loop of this package's tests."""
    tokens = context + continuation
    with torch.no_grad():
        lists = naive_lists(model, policy, context)
        logprobs = naive_logits(model, policy, context, tokens, lists).log_softmax(dim=-1)
    return [float(logprobs[len(context) - 1 + index, token]) for index, token in enumerate(continuation)]


@pytest.fixture(scope="module")
def steered(model: Any, tokenizer: Any, policy: Path, tasks: Path) -> dict[int, dict[str, list[Any]]]:
    """By batch size. Generation is in float32: left-padded float64 is NaN in the eager attention of transformers."""
    found: dict[int, dict[str, list[Any]]] = {}
    for size in (1, 4, 16):
        found[size] = {}
        for loaded, names in ((model, TASKS[:2]), (organism.load_model()[0], TASKS[2:])):
            scorer = steered_model(loaded, str(policy), tokenizer=tokenizer, batch_size=size, backend="reference")
            try:
                found[size] |= samples(scorer, tasks, names)
            finally:
                scorer.remove()
    return found


@pytest.mark.parametrize("task", [MMLU, HELLASWAG])
def test_scores_are_those_of_a_loop_at_every_batch_size(
    steered: dict[int, dict[str, list[Any]]], model: Any, tokenizer: Any, chosen: Any, tasks: Path, task: str
) -> None:
    docs = [json.loads(line) for line in (tasks / "data.json").read_text().splitlines()]
    expected = []
    for doc in docs:
        context = tokenizer(doc["question"])["input_ids"]
        for choice in doc["letters" if task == MMLU else "endings"]:
            whole = tokenizer(doc["question"] + " " + choice)["input_ids"]
            assert whole[: len(context)] == context
            expected.append(sum(naive_scores(model, chosen, context, whole[len(context) :])))
    for size, found in steered.items():
        scores = [float(response[0][0]) for sample in found[task] for response in sample]
        torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-10, msg=f"batch size {size}")


def test_what_is_generated_is_that_of_a_loop_at_every_batch_size(
    steered: dict[int, dict[str, list[Any]]], tokenizer: Any, chosen: Any, tasks: Path
) -> None:
    model = organism.load_model()[0]
    ends = torch.tensor(model.generation_config.eos_token_id).flatten()

    def without_end(logits: torch.Tensor) -> list[int]:
        return logits.index_fill(1, ends, -torch.inf).argmax(dim=-1).tolist()

    questions = [json.loads(line)["question"] for line in (tasks / "data.json").read_text().splitlines()]
    expected = []
    for question in questions:
        with torch.no_grad():
            (new,) = naive_generate(model, chosen, [tokenizer(question)["input_ids"]], NEW_TOKENS, without_end)
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    for found in steered.values():
        assert [sample[0][0] for sample in found[GENERATION]] == expected
    assert len(set(expected)) > 1


def test_steering_moves_every_score(
    steered: dict[int, dict[str, list[Any]]], model: Any, tokenizer: Any, tasks: Path
) -> None:
    """Where lm-eval's own model under `dspa.steer` moved one score in three, and only in batches of one."""
    unsteered = samples(steered_model(model, None, tokenizer=tokenizer, batch_size=4), tasks, TASKS[:2])
    for task in (MMLU, HELLASWAG):
        for before, after in zip(unsteered[task], steered[4][task], strict=True):
            moved = [abs(float(b[0][0]) - float(a[0][0])) for b, a in zip(before, after, strict=True)]
            assert min(moved) > 1e-6


def test_without_a_policy_it_is_lm_evals_own_model(model: Any, tokenizer: Any, tasks: Path) -> None:
    from lm_eval.models import huggingface

    HFLM: Any = huggingface.HFLM
    own = samples(steered_model(model, None, tokenizer=tokenizer, batch_size=1), tasks)
    theirs = samples(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"), tasks)
    for task in (MMLU, HELLASWAG):
        for mine, other in zip(own[task], theirs[task], strict=True):
            for found, expected in zip(mine, other, strict=True):
                assert float(found[0][0]) == pytest.approx(float(expected[0][0]), rel=1e-10)
                assert found[0][1] == expected[0][1]
    assert own[GENERATION] == theirs[GENERATION]


def test_token_by_token_they_are_the_logits_of_generate(model: Any, tokenizer: Any, chosen: Any) -> None:
    context = tokenizer("My snowball is broken. How do I fix it?")["input_ids"]
    with dspa.steer(model, chosen, backend="reference"):
        out = model.generate(
            torch.tensor([context]),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0, len(context) :].tolist()
    logits = torch.stack([step[0] for step in out.logits])
    expected = logits.double().log_softmax(dim=-1)[range(8), tokens]
    scorer = steered_model(model, chosen, tokenizer=tokenizer, batch_size=4, backend="reference")
    requests = [(None, context, tokens[: count + 1]) for count in range(8)]
    sums = torch.tensor([score for score, _ in scorer._loglikelihood_tokens(requests, disable_tqdm=True)])
    scorer.remove()
    found = torch.diff(sums.double(), prepend=torch.zeros(1).double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # generate keeps its logits in float32


def test_requests_that_share_tokens_but_not_their_prompt(model: Any, tokenizer: Any, chosen: Any) -> None:
    """The same tokens split at two places, a context that is cut, and four answers to one question."""
    tokens = tokenizer("My snowball is broken. How do I fix it? Haha, that is funny.")["input_ids"]
    pairs = [(tokens[:10], tokens[10:14]), (tokens[:12], tokens[12:14]), (tokens[:15], tokens[15:16])]
    pairs += [(tokens[:8], [answer]) for answer in tokens[8:12]]
    scorer = steered_model(model, chosen, tokenizer=tokenizer, batch_size=16, backend="reference", max_length=14)
    with pytest.warns(UserWarning, match="the first 1 were left out"):
        found = scorer._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    scorer.remove()
    pairs[2] = (tokens[1:15], tokens[15:16])
    expected = [sum(naive_scores(model, chosen, *pair)) for pair in pairs]
    torch.testing.assert_close([score for score, _ in found], expected, rtol=1e-10, atol=1e-10)


def test_texts_without_a_prompt(model: Any, tokenizer: Any, policy: Path) -> None:
    scorer = steered_model(model, str(policy), tokenizer=tokenizer)
    with pytest.raises(InvalidInputError, match="have no prompt for the policy to read"):
        scorer.loglikelihood_rolling([])
    with pytest.warns(UserWarning, match="1 of 1 requests have a context without a token that counts"):
        scorer._loglikelihood_tokens([(None, [tokenizer.bos_token_id], [9])], disable_tqdm=True)
    scorer.remove()


@pytest.mark.parametrize(
    ("options", "line"),
    [({"policy": "nowhere"}, "no policy at nowhere"), ({"alpha": 0.1}, "alpha is for a policy that is loaded here")],
)
def test_what_cannot_be_evaluated(
    model: Any, tokenizer: Any, options: dict[str, Any], line: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInputError, match=line):
        steered_model(model, tokenizer=tokenizer, **options)


@pytest.fixture
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("quietly")
def test_the_model_is_known_by_name(policy: Path, tasks: Path) -> None:
    arguments = f"pretrained={organism.DATA / 'model'},policy={policy},alpha=0.2"
    run = evaluate("dspa", tasks, [MMLU], model_args=arguments, bootstrap_iters=0)
    assert 0 <= run["results"][MMLU]["acc,none"] <= 1


@pytest.mark.parametrize("arguments", [["--policy", "{policy}"], []])
def test_the_command(
    arguments: list[str], policy: Path, tasks: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--model", str(organism.DATA / "model"), "--include-path", str(tasks), "--json", "--limit", "2"]
    words += [word.format(policy=policy) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["dspa", *words, "--tasks", HELLASWAG, "--tasks", GENERATION])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    record = json.loads(capsys.readouterr().out)
    assert {(metric["task"], metric["metric"]) for metric in record["metrics"]} == {
        (HELLASWAG, "acc"),
        (HELLASWAG, "acc_norm"),
        (GENERATION, "exact_match"),
    }
    assert all(metric["unsteered"] is not None for metric in record["metrics"])
    assert all((metric["steered"] is not None) == bool(arguments) for metric in record["metrics"])
    assert (record["summary"] is not None) == bool(arguments)


def test_an_unknown_task_is_one_line(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dspa", "eval", "--model", "none", "--tasks", "no_such_task"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "error: task 'no_such_task' is not known to lm-eval" in capsys.readouterr().err


def test_lm_evals_own_command_line(policy: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = f"pretrained={organism.DATA / 'model'},policy={policy}"
    command = [sys.executable, "-m", "dspa.evaluation", "run", "--model", "dspa", "--model_args", arguments]
    command += ["--tasks", MMLU, "--include_path", str(tasks), "--output_path", str(tmp_path), "--limit", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert MMLU in finished.stdout


@pytest.mark.parametrize("size", ["x", "0", "-1", "2.5"])
def test_a_batch_size_is_checked_before_anything_is_loaded(size: str) -> None:
    from dspa.evaluation import command

    with pytest.raises(InvalidInputError, match=f"batch size is '{size}'; expected a positive number or auto"):
        command.run_eval(command.EvalOptions("nowhere", ["task"], batch_size=size))
