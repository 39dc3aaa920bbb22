"""Training an adapter: the loss is that of the equations, resumed and shared runs are the same run, options do what
they say."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import BOS, D_SAE_OUT, EOS, FAMILIES, OUTPUT_LAYER, VOCAB, Family, layer_of, tiny_model, tiny_sae
from torch import Tensor, nn

import dspa
from dspa import FsrlPolicy
from dspa.errors import InvalidInputError, MismatchError
from dspa.methods.fsrl import training
from dspa.methods.fsrl.objective import simpo_losses
from dspa.methods.fsrl.training import TrainingOptions, TrainingResult, train
from dspa.methods.split_model import SplitModel
from dspa.offline.preferences import PreferenceTriple

NAMES = ("weight", "bias", "threshold")


def triples(count: int, seed: int = 0) -> list[PreferenceTriple]:
    """Responses of different lengths; the chosen ones prefer low tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int, longest: int) -> tuple[int, ...]:
        length = int(torch.randint(2, longest, (1,), generator=generator))
        return tuple(torch.randint(low, high, (length,), generator=generator).tolist())

    rows = []
    for index in range(count):
        prompt, chosen, rejected = (BOS, *tokens(5, VOCAB, 7)), (*tokens(5, 30, 6), EOS), (*tokens(30, VOCAB, 9), EOS)
        rows.append(PreferenceTriple(prompt, chosen, rejected, len(chosen), len(rejected), f"row {index}"))
    return rows


MODEL = tiny_model("llama")
SAE = tiny_sae()
QUICK = TrainingOptions(pairs_per_step=4, pairs_at_once=3, epochs=2, learning_rate=0.02, initial_threshold=1e-3)


def run(options: TrainingOptions = QUICK, count: int = 10, **more: Any) -> TrainingResult:
    return train(MODEL, triples(count), SAE, OUTPUT_LAYER, options, **more)


def written_out(
    policy: FsrlPolicy, pairs: Sequence[PreferenceTriple], options: TrainingOptions, model: Any = MODEL
) -> tuple[float, float]:
    """Mean SimPO loss of some pairs, and mean l1 over their tokens: a forward pass per sequence, by the paper."""
    weights, l1s = policy.adapter, list[Tensor]()

    def log_probability(triple: PreferenceTriple, response: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([[*triple.prompt, *response]])

        def edit(module: nn.Module, args: Any, output: Any) -> Any:
            h = output if isinstance(output, Tensor) else output[0]
            y = h[0] @ weights.weight.T + weights.bias
            v = y.sign() * (y.abs() - weights.threshold).relu()
            f = policy.sae.encode(h[0])
            assert policy.sae.W_dec is not None
            first = 0 if options.edit_positions == "all" else len(triple.prompt) - 1
            on = torch.arange(len(v)) >= first
            for position, token in enumerate(triple.prompt):
                if options.edit_positions == "all" and token in options.uncounted_token_ids:
                    on[position] = False
            l1s.append(v[on].abs().sum(dim=1))
            edited = h[0] + torch.where(on[:, None], ((f + v).relu() - f) @ policy.sae.W_dec, 0)
            return edited[None] if isinstance(output, Tensor) else (edited[None], *output[1:])

        hook = layer_of(model, OUTPUT_LAYER).register_forward_hook(edit)
        logits = model(ids, use_cache=False).logits[0]
        hook.remove()
        log_probabilities = logits.log_softmax(dim=-1)[:-1].gather(1, ids[0, 1:, None])
        return log_probabilities[len(triple.prompt) - 1 :].mean()

    with torch.no_grad():
        margins = [log_probability(t, t.chosen) - log_probability(t, t.rejected) for t in pairs]
        losses = [-F.logsigmoid(options.beta * margin - options.gamma) for margin in margins]
    return float(torch.stack(losses).mean()), float(torch.cat(l1s).mean())


@pytest.mark.parametrize("uncounted", [(), (BOS,)], ids=["with BOS", "without BOS"])
@pytest.mark.parametrize("positions", ["all", "from_last_prompt"])
@pytest.mark.parametrize("cached", [True, False])
def test_the_loss_of_a_step_is_that_of_the_equations(positions: Any, uncounted: tuple[int, ...], cached: bool) -> None:
    options = replace(
        QUICK, pairs_per_step=10, epochs=3, edit_positions=positions, uncounted_token_ids=uncounted, cache_states=cached
    )
    result = run(options)
    shorter = run(replace(options, epochs=2))  # the adapter that the third step begins with
    simpo, l1 = written_out(shorter.policy, triples(10), options)
    assert result.steps[2].simpo == pytest.approx(simpo, rel=1e-9)
    assert result.steps[2].l1 == pytest.approx(l1, rel=1e-9)
    assert result.policy.edit_positions == positions


def test_training_goes_on_from_an_adapter() -> None:
    first = run().policy
    goes_on = run(replace(QUICK, pairs_per_step=10, epochs=1), initial=first.adapter)
    simpo, l1 = written_out(first, triples(10), QUICK)
    assert goes_on.steps[0].simpo == pytest.approx(simpo, rel=1e-9)
    assert goes_on.steps[0].l1 == pytest.approx(l1, rel=1e-9)
    assert not torch.equal(goes_on.policy.adapter.weight, first.adapter.weight)
    assert torch.equal(first.adapter.weight, run().policy.adapter.weight)  # it was not trained in place


@pytest.mark.parametrize("family", FAMILIES)
def test_the_upper_part_of_a_model_is_the_model(family: Family) -> None:
    model: Any = tiny_model(family)
    ids = torch.tensor([[BOS, 9, 10, 11, 12, 13, 14, 15], [BOS, 20, 21, 0, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    split = SplitModel(model, 2)
    with torch.no_grad():
        states = split.states(ids, mask)
        logits = split.logits(states, ids, mask)
        expected = model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    assert torch.equal(states, expected.hidden_states[3])
    assert torch.equal(logits, expected.logits)
    assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, expected.logits)  # and is whole again


def test_training_prefers_what_was_chosen_and_leaves_the_model_alone() -> None:
    model: Any = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = replace(QUICK, epochs=15, l1=1e-3)
    result = train(model, triples(24), SAE, OUTPUT_LAYER, options, validation=triples(12, seed=1))
    untrained, trained = result.evaluations[0], result.evaluations[-1]
    assert trained.margin > untrained.margin + 0.1
    assert trained.accuracy > untrained.accuracy
    assert result.steps[-1].simpo < result.steps[0].simpo
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with dspa.steer(model, result.policy):
        assert model.generate(torch.tensor([[BOS, 9]]), max_new_tokens=3).shape == (1, 5)


@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jump_relu"])
@pytest.mark.parametrize("clip", [True, False])
def test_every_activation_trains(activation: Any, clip: bool) -> None:
    result = run(replace(QUICK, activation=activation, clip=clip, epochs=6, l1=1e-3, bandwidth=0.5))
    assert result.steps[-1].simpo < result.steps[0].simpo
    assert (result.policy.adapter.activation, result.policy.adapter.clip) == (activation, clip)
    assert (result.policy.adapter.threshold >= 0).all()


def test_a_penalty_makes_it_sparse() -> None:
    dense, sparse = (run(replace(QUICK, epochs=12, l1=l1)).steps[-1].l0 for l1 in (0.0, 1.0))
    assert sparse < 0.5 * dense


def test_a_constant_vector_is_one_vector_for_all_tokens() -> None:
    """YaPO's form: W_a = 0."""
    result = run(replace(QUICK, pairs_per_step=10, epochs=20, learning_rate=5e-3, train_weight=False, l1=1e-3))
    adapter = result.policy.adapter
    assert not adapter.weight.any()
    assert not adapter.threshold.any()
    assert adapter.bias.abs().max() > 0.05
    assert result.steps[-1].simpo < result.steps[0].simpo


def test_masked_latents_are_never_used() -> None:
    masked = tuple(range(0, D_SAE_OUT, 2))
    adapter = run(replace(QUICK, masked_latents=masked)).policy.adapter
    assert adapter.threshold[list(masked)].tolist() == [math.inf] * len(masked)
    plain = run().policy.adapter
    assert plain.threshold.isfinite().all()


def test_padding_counts_where_the_original_code_counts_it() -> None:
    """A batch without padding has the same l1 either way; one with padding has not."""
    equal = [replace(t, chosen=t.chosen[:1] * 4, rejected=t.rejected[:1] * 4, prompt=t.prompt[:3]) for t in triples(4)]
    for rows, same in ((equal, True), (triples(4), False)):
        l1 = [
            train(MODEL, rows, SAE, OUTPUT_LAYER, replace(QUICK, l1_over=over, epochs=1, pairs_at_once=1)).steps[0].l1
            for over in ("tokens", "padded")
        ]
        assert (l1[0] == pytest.approx(l1[1], rel=1e-9)) == same


def test_batches_do_not_matter() -> None:
    """One pair at a time is the same step, up to rounding, as all at once."""
    one, all_of_them = (run(replace(QUICK, pairs_at_once=size)) for size in (1, 4))
    for name in NAMES:
        torch.testing.assert_close(
            getattr(one.policy.adapter, name), getattr(all_of_them.policy.adapter, name), rtol=1e-7, atol=1e-9
        )


# -------------------------------------------------------------------------------------------------- choosing, stopping


def test_the_best_reward_is_kept_and_training_stops_without_a_better_one() -> None:
    rewards = iter([0.0, 1.0, 3.0, 2.0, 1.0, 9.0])
    options = replace(QUICK, epochs=20, evaluate_every=2, patience=2)
    seen: list[FsrlPolicy] = []

    def reward(policy: FsrlPolicy) -> float:
        seen.append(policy)
        return next(rewards)

    result = run(options, reward=reward)
    assert [(each.step, each.reward) for each in result.evaluations] == [
        (0, 0.0),
        (2, 1.0),
        (4, 3.0),
        (6, 2.0),
        (8, 1.0),
    ]
    assert result.best_step == 4
    assert len(result.steps) == 8
    assert torch.equal(result.policy.adapter.weight, seen[2].adapter.weight)
    assert not torch.equal(result.policy.adapter.weight, seen[3].adapter.weight)


def test_without_an_evaluation_the_last_step_counts() -> None:
    result = run()
    assert (result.best_step, len(result.steps), result.evaluations) == (6, 6, ())


def test_the_optimiser_is_an_argument() -> None:
    made: list[Any] = []

    def sgd(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9))
        return made[-1]

    result = run(replace(QUICK, warmup=0.5), optimizer=sgd)
    assert len(made) == 1
    assert made[0].param_groups[0]["lr"] == QUICK.learning_rate
    assert not torch.equal(result.policy.adapter.weight, run().policy.adapter.weight)


# --------------------------------------------------------------------------------------------------------- checkpoints


class KilledError(Exception):
    """Stands for a killed run."""


@pytest.mark.long
@pytest.mark.parametrize("killed_after", [1, 3, 4, 7])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_resumed_run_is_the_same_run_to_the_bits(killed_after: int, evaluated: bool, tmp_path: Path) -> None:
    options = replace(QUICK, epochs=3, checkpoint_every=2, evaluate_every=3)
    more: dict[str, Any] = {"validation": triples(4, seed=1)} if evaluated else {}
    whole = run(options, **more)

    def kill(record: Any) -> None:
        if record.step == killed_after + 1:
            raise KilledError

    with pytest.raises(KilledError):
        run(options, out=tmp_path, on_step=kill, **more)
    steps: list[int] = []
    resumed = run(options, out=tmp_path, on_step=lambda record: steps.append(record.step), **more)
    assert steps[0] == killed_after // 2 * 2 + 1
    assert (resumed.steps, resumed.best_step) == (whole.steps, whole.best_step)
    assert repr(resumed.evaluations) == repr(whole.evaluations)
    for name in NAMES:
        assert torch.equal(getattr(resumed.policy.adapter, name), getattr(whole.policy.adapter, name)), name
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-9"]
    again: list[int] = []
    run(options, out=tmp_path, on_step=lambda record: again.append(record.step), **more)
    assert again == []


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    options = replace(QUICK, checkpoint_every=2)
    whole = run(options, out=tmp_path)
    cut = tmp_path / "checkpoint-100"
    cut.mkdir()
    (cut / "fsrl_checkpoint.safetensors").write_bytes(b"half")
    assert torch.equal(run(options, out=tmp_path).policy.adapter.weight, whole.policy.adapter.weight)


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    run(out=tmp_path)
    with pytest.raises(MismatchError, match="other learning_rate, seed; use another folder"):
        run(replace(QUICK, learning_rate=0.01, seed=3), out=tmp_path)
    with pytest.raises(MismatchError, match="other initial"):
        run(initial=run().policy.adapter, out=tmp_path)
    with pytest.raises(MismatchError, match="other triples"):
        run(count=9, out=tmp_path)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epochs": 0}, "epochs is 0"), ({"learning_rate": 0.0}, "learning_rate is 0.0"), ({"l1": -1.0}, "l1 -1.0")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        TrainingOptions(**options)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no triples"):
        train(MODEL, [], SAE, OUTPUT_LAYER)
    with pytest.raises(MismatchError, match="layer is 9"):
        train(MODEL, triples(2), SAE, 9)
    with pytest.raises(InvalidInputError, match="every decoder row"):
        train(MODEL, triples(2), SAE.encoder_only(), OUTPUT_LAYER)
    adapter = run().policy.adapter
    with pytest.raises(InvalidInputError, match="initial adapter has activation 'soft_threshold' and clip True"):
        run(replace(QUICK, clip=False), initial=adapter)
    with pytest.raises(MismatchError, match="initial adapter is"):
        run(initial=replace(adapter, weight=adapter.weight[:, :-1].contiguous()))


# ----------------------------------------------------------------------------------------------------- processes, trl


def train_and_save(folder: str) -> None:
    """What each process of the test below runs."""
    torch.set_num_threads(1)
    result = run(replace(QUICK, pairs_per_step=5, epochs=3), validation=triples(3, seed=1), out=folder)
    if os.environ.get("RANK", "0") == "0":
        result.policy.save_pretrained(Path(folder) / "policy")
        (Path(folder) / "steps.json").write_text(json.dumps([record.simpo for record in result.steps]))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.long
def test_two_processes_are_one_up_to_rounding(tmp_path: Path) -> None:
    """Steps of 5 pairs, so that one process has one more than the other."""
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--main_process_port", str(free_port()), __file__, str(tmp_path / "two")]
    path = os.pathsep.join([str(Path(dspa.__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "one").mkdir()
    train_and_save(str(tmp_path / "one"))
    one, two = (FsrlPolicy.from_pretrained(tmp_path / name / "policy").adapter for name in ("one", "two"))
    for name in NAMES:
        torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-9, atol=1e-11)
    steps = [json.loads((tmp_path / name / "steps.json").read_text()) for name in ("one", "two")]
    assert steps[1] == pytest.approx(steps[0], rel=1e-9)
    assert steps[0][0] != steps[0][-1]


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="pip install 'dspa[baselines]' for trl")
def test_the_objective_is_that_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, margins and log-probabilities of CPOTrainer with loss_type simpo, on the model unsteered."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    pairs = triples(5)
    recorded: list[Tensor] = []

    def recording(margins: Tensor, beta: float, gamma: float) -> Tensor:
        recorded.append(margins)
        return simpo_losses(margins, beta, gamma)

    monkeypatch.setattr(training, "simpo_losses", recording)
    result = run(replace(QUICK, pairs_per_step=5, pairs_at_once=5, epochs=1, initial_threshold=1e-30), count=5)
    log_probabilities = []
    for side in ("chosen", "rejected"):
        rows = [(*t.prompt, *getattr(t, side)) for t in pairs]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        labels = torch.full_like(ids, -100)
        for row, t in enumerate(pairs):
            labels[row, len(t.prompt) : len(rows[row])] = ids[row, len(t.prompt) : len(rows[row])]
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            logits = MODEL(input_ids=ids, attention_mask=mask, use_cache=False).logits  # type: ignore[operator]
        log_probabilities.append(CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True))  # type: ignore[arg-type]

    class Settings:
        """What `cpo_loss` reads of its trainer."""

        loss_type, beta, simpo_gamma, label_smoothing, alpha = "simpo", QUICK.beta, QUICK.gamma, 0.0, 0.0
        accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()

    losses, chosen, rejected = CPOTrainer.cpo_loss(Settings(), *log_probabilities)  # type: ignore[arg-type]
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        recorded[0].detach(), (log_probabilities[0] - log_probabilities[1])[order], rtol=1e-9, atol=1e-9
    )
    assert result.steps[0].simpo == pytest.approx(float(losses.mean()), rel=1e-9)
    assert result.steps[0].accuracy == pytest.approx(float((chosen > rejected).double().mean()))


if __name__ == "__main__":
    train_and_save(sys.argv[1])
