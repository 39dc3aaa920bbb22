"""Training an FSRL adapter by SimPO on preference pairs (docs/method.md, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import AdapterWeights
from dspa.kernels.adapter_step.differentiable import differentiable_adapter_step
from dspa.kernels.adapter_weights import AdapterActivation
from dspa.methods.fsrl.checkpoints import TrainingState, load_newest, save
from dspa.methods.fsrl.objective import response_log_probabilities, simpo_losses
from dspa.methods.fsrl.pairs import EditedTokens, PairBatch, PairSource
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.methods.fsrl.processes import TrainingProcesses
from dspa.methods.fsrl.records import EvaluationRecord, StepRecord
from dspa.methods.policy import EditPositions
from dspa.methods.split_model import SplitModel
from dspa.offline.preferences import PreferenceTriple, PreferenceTriples
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import ModelFingerprint, device_of
from dspa.util.progress import track

MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
"""An optimiser of some parameters with a learning rate."""

Reward = Callable[[FsrlPolicy], float]


@dataclass(frozen=True)
class TrainingOptions:
    """How an adapter is trained; the defaults are those of version 3, but for the optimiser.

    Attributes:
        activation, clip: see `AdapterWeights`; clip False is versions 1 and 2.
        beta, gamma: of SimPO.
        l1: weight of the mean of `sum_j |v_j|` over positions.
        l1_over: "tokens" averages over the positions that are edited; "padded" edits padding too and averages over the
            whole padded batch, as the original code does.
        pairs_per_step: pairs in an optimiser step, of all processes together.
        pairs_at_once: most pairs that run together.
        epochs: passes over the triples.
        learning_rate: after the warm-up, constant.
        warmup: share of the steps in which it rises from 0.
        initial_threshold: of every latent; the weights begin uniform between plus and minus it.
        train_weight: False trains one constant sparse vector: `W_a = 0`, and only the bias is trained, without a
            threshold (the form of YaPO).
        edit_positions, uncounted_token_ids, masked_latents: as in `FsrlPolicy`; the same in training.
        bandwidth: of the gradient of jump_relu thresholds.
        seed: of the initial weights and of the order of the pairs.
        evaluate_every: steps between evaluations; 0 for none before the end.
        patience: evaluations without a new best after which training stops; 0 for never.
        checkpoint_every: steps between checkpoints; 0 for none.
        cache_states: whether hidden states at the layer are kept in memory, or computed in every epoch.
    """

    activation: AdapterActivation = "soft_threshold"
    clip: bool = True
    beta: float = 10.0
    gamma: float = 5.0
    l1: float = 0.1
    l1_over: Literal["tokens", "padded"] = "tokens"
    pairs_per_step: int = 32
    pairs_at_once: int = 8
    epochs: int = 10
    learning_rate: float = 5e-4
    warmup: float = 0.01
    initial_threshold: float = 1e-6
    train_weight: bool = True
    edit_positions: EditPositions = "all"
    uncounted_token_ids: tuple[int, ...] = ()
    masked_latents: tuple[int, ...] = ()
    bandwidth: float = 1e-3
    seed: int = 0
    evaluate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 100
    cache_states: bool = True

    def __post_init__(self) -> None:
        for name in ("pairs_per_step", "pairs_at_once", "epochs"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.learning_rate < math.inf or self.initial_threshold <= 0 or self.l1 < 0:
            raise InvalidInputError(
                f"learning_rate is {self.learning_rate}, initial_threshold {self.initial_threshold}, l1 {self.l1}; "
                "expected positive numbers, l1 may be 0"
            )


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """A trained policy and how it came about.

    Attributes:
        policy: of the best evaluation, or of the last step if nothing was evaluated.
        best_step: which step that is.
        steps, evaluations: the history, that of resumed runs included.
    """

    policy: FsrlPolicy
    best_step: int
    steps: tuple[StepRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]


def adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)


def train(
    model: nn.Module,
    triples: PreferenceTriples | Sequence[PreferenceTriple],
    sae: SparseAutoencoder,
    layer: int,
    options: TrainingOptions | None = None,
    *,
    initial: AdapterWeights | None = None,
    validation: PreferenceTriples | Sequence[PreferenceTriple] = (),
    reward: Reward | None = None,
    optimizer: MakeOptimizer = adamw,
    out: str | Path | None = None,
    on_step: Callable[[StepRecord], object] | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Trains an adapter beside a frozen SAE in a frozen model.

    The processes of `torchrun` or `accelerate launch` share the pairs of every step and sum their gradients, so that
    the result is that of one process up to rounding. A run whose folder has checkpoints goes on from the newest one, to
    the same bits as a run that was not interrupted.

    Args:
        model: a transformers model; its parameters get no gradient.
        triples: what it is trained on.
        sae: the SAE of the layer, with its decoder.
        layer: the decoder layer, from 0.
        options: how.
        initial: the adapter that training begins with; None for small random weights by `initial_threshold`.
        validation: other triples, for the margin.
        reward: scores a policy by what it generates, higher is better; training then keeps the policy with the best
            reward instead of the best margin, since the loss can fall while text breaks. Called in every process.
        optimizer: makes the optimiser from parameters and a learning rate.
        out: folder for checkpoints; None for none.
        on_step: called after every step.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInputError: if there are no triples, the SAE lacks decoder rows, or the first adapter is of another
            activation or clip than the options.
        MismatchError: if the SAE, the layer or the first adapter does not fit the model, or the folder holds another
            run.
    """
    options = options or TrainingOptions()
    if not len(triples):
        raise InvalidInputError("there are no triples to train on")
    fingerprint = ModelFingerprint.from_model(model)
    trainer = _Trainer(
        model, list(triples), list(validation), sae, layer, options, initial, reward, optimizer, fingerprint
    )
    trainer.policy().intervention.check(fingerprint)
    with TrainingProcesses.joined() as processes:
        return trainer.run(processes, None if out is None else Path(out), on_step, progress)


@dataclass(eq=False)
class _Trainer:
    """A training run: what it trains, and the loop."""

    model: nn.Module
    triples: list[PreferenceTriple]
    validation: list[PreferenceTriple]
    sae: SparseAutoencoder
    layer: int
    options: TrainingOptions
    initial: AdapterWeights | None
    reward: Reward | None
    make_optimizer: MakeOptimizer
    fingerprint: ModelFingerprint
    parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        split = SplitModel(self.model, self.layer)
        self.device = device_of(self.model)
        self.sae = self.sae.to(self.device)
        self._split = split
        trained = ["bias"]
        if self.options.train_weight:
            trained += ["weight"] if self.options.activation == "relu" else ["weight", "threshold"]
        self.parameters = {
            name: nn.Parameter(tensor.to(self.device), requires_grad=name in trained)
            for name, tensor in _start(self.initial, self.sae, self.options).items()
        }
        edited = EditedTokens(self.options.edit_positions, self.options.uncounted_token_ids)
        config: Any = self.model.config
        sources = [
            PairSource(
                split,
                triples,
                edited,
                device=self.device,
                pad_token_id=int(getattr(config, "pad_token_id", None) or 0),
                cached=self.options.cache_states,
                padding_too=self.options.l1_over == "padded",
            )
            for triples in (self.triples, self.validation)
        ]
        self.source, self.validation_source = sources

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters.values() if parameter.requires_grad]

    def adapter(self, tensors: dict[str, Tensor] | None = None) -> AdapterWeights:
        values: dict[str, Tensor] = {**self.parameters} if tensors is None else tensors
        threshold = values["threshold"]
        if self.options.masked_latents:
            masked = torch.zeros_like(threshold, dtype=torch.bool)
            masked[list(self.options.masked_latents)] = True
            threshold = torch.where(masked, math.inf, threshold)
        return AdapterWeights(
            weight=values["weight"],
            bias=values["bias"],
            threshold=threshold,
            activation=self.options.activation,
            clip=self.options.clip,
        )

    def policy(self, tensors: dict[str, Tensor] | None = None) -> FsrlPolicy:
        adapter = self.adapter(tensors)
        copied = {name: getattr(adapter, name).detach().clone() for name in self.parameters}
        return FsrlPolicy(
            replace(adapter, **copied),
            self.sae,
            self.layer,
            model=self.fingerprint,
            edit_positions=self.options.edit_positions,
            uncounted_token_ids=self.options.uncounted_token_ids,
        )

    def run(
        self,
        processes: TrainingProcesses,
        out: Path | None,
        on_step: Callable[[StepRecord], object] | None,
        progress: bool,
    ) -> TrainingResult:
        optimizer = self.make_optimizer(self.trained, self.options.learning_rate)
        run = self._description()
        state = load_newest(out, run) if out is not None else None
        best = self._copy()
        if state is None:
            state = TrainingState()
            if self._evaluates:
                self._note(state, self._evaluate(0, processes), best)
        else:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(state.tensors[name])
            best = {name: state.tensors[f"best.{name}"] for name in self.parameters}
            state.restore_optimizer(optimizer)
        with self._frozen_model():
            total = self.options.epochs * self._steps_per_epoch
            for step in track(range(state.step + 1, total + 1), "Training", enabled=progress, unit="steps"):
                if state.stopped:
                    break
                record = self._step(step, total, optimizer, processes)
                state.step = step
                state.steps.append(record)
                if on_step is not None:
                    on_step(record)
                if self._evaluates and (step == total or self._due(step, self.options.evaluate_every)):
                    self._note(state, self._evaluate(step, processes), best)
                    waited = sum(1 for each in state.evaluations if each.step > state.best_step)
                    state.stopped = bool(self.options.patience) and waited >= self.options.patience
                if out is not None and (
                    step == total or state.stopped or self._due(step, self.options.checkpoint_every)
                ):
                    tensors = {**self._copy(), **{f"best.{name}": tensor for name, tensor in best.items()}}
                    processes.first_does(lambda: save(out, run, state, tensors, optimizer))  # noqa: B023
        if not state.evaluations:
            best, state.best_step = self._copy(), state.step
        return TrainingResult(self.policy(best), state.best_step, tuple(state.steps), tuple(state.evaluations))

    @contextmanager
    def _frozen_model(self) -> Iterator[None]:
        """Without gradients of the model's own parameters, and without dropout, with which the states of an example
        would differ between epochs."""
        was_training = self.model.training
        required = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.eval().requires_grad_(False)
        try:
            yield
        finally:
            self.model.train(was_training)
            for parameter in required:
                parameter.requires_grad_()

    @property
    def _evaluates(self) -> bool:
        return self.reward is not None or bool(self.validation)

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.triples) // self.options.pairs_per_step)

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return bool(every) and step % every == 0

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _note(self, state: TrainingState, record: EvaluationRecord, best: dict[str, Tensor]) -> None:
        """Adds an evaluation; the best one so far replaces `best`."""
        scores = [each.score for each in state.evaluations]
        state.evaluations.append(record)
        if not scores or record.score > max(scores):
            state.best_step = record.step
            best.update(self._copy())

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.triples), generator=generator).tolist()

    def _step(
        self, step: int, total: int, optimizer: torch.optim.Optimizer, processes: TrainingProcesses
    ) -> StepRecord:
        epoch, within = divmod(step - 1, self._steps_per_epoch)
        first = within * self.options.pairs_per_step
        indices = self._order(epoch)[first : first + self.options.pairs_per_step]
        rise = self.options.warmup * total
        for group in optimizer.param_groups:
            group["lr"] = self.options.learning_rate * min(1.0, step / rise if rise > 1 else 1.0)
        optimizer.zero_grad(set_to_none=True)
        sums = self._accumulate(self.source, indices, processes, backward=True)
        processes.sum_gradients(self.trained)
        optimizer.step()
        with torch.no_grad():
            if self.options.train_weight:
                self.parameters["threshold"].clamp_(min=0)  # a negative one would count as 0 and never rise again
        return StepRecord(step, *sums)

    def _evaluate(self, step: int, processes: TrainingProcesses) -> EvaluationRecord:
        simpo = margin = accuracy = math.nan
        if self.validation:
            with torch.no_grad():
                simpo, _, _, margin, accuracy = self._accumulate(
                    self.validation_source, range(len(self.validation)), processes, backward=False
                )
        reward = math.nan if self.reward is None else float(self.reward(self.policy()))
        return EvaluationRecord(step, simpo, margin, accuracy, reward)

    def _accumulate(
        self, source: PairSource, indices: Sequence[int], processes: TrainingProcesses, *, backward: bool
    ) -> tuple[float, float, float, float, float]:
        """Means over pairs of SimPO loss, over tokens of l1 and l0, over pairs of margin and accuracy; adds gradients.

        Every pair and every token weighs the same, however they are divided into batches and among processes."""
        pairs, tokens = len(indices), source.edited_tokens(indices)
        width = source.widest(indices) if self.options.l1_over == "padded" else None
        sums = torch.zeros(5, dtype=torch.float64)
        for part in _parts(indices[processes.rank :: processes.count], self.options.pairs_at_once):
            margins, l1, l0 = self._forward(source.batch(part, width))
            simpo = simpo_losses(margins, self.options.beta, self.options.gamma)
            if backward:
                (simpo.sum() / pairs + self.options.l1 * l1 / tokens).backward()
            values = (simpo.sum(), l1, l0, margins.sum(), (margins > 0).sum())
            sums += torch.stack([value.detach().double().cpu() for value in values])
        sums = processes.sum(sums)
        sums /= torch.tensor([pairs, tokens, tokens, pairs, pairs], dtype=torch.float64)
        return tuple(sums.tolist())  # type: ignore[return-value]

    def _forward(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Margins `[P]`, and the sums of l1 and l0 over edited tokens."""
        step = differentiable_adapter_step(
            batch.hidden.flatten(0, 1),
            self.sae,
            self.adapter(),
            batch.edited.flatten(),
            bandwidth=self.options.bandwidth,
        )
        logits = self._split.logits(step.hidden.view_as(batch.hidden), batch.ids, batch.mask)
        scores = response_log_probabilities(logits, batch.ids, batch.response)
        chosen, rejected = scores.chunk(2)
        return chosen - rejected, step.l1.sum(), step.l0.sum()

    def _description(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on from it."""
        from hashlib import sha256

        ids = sha256(repr([(t.prompt, t.chosen, t.rejected) for t in self.triples]).encode()).hexdigest()
        options = {name: getattr(self.options, name) for name in TrainingOptions.__dataclass_fields__}
        ignored = ("evaluate_every", "patience", "checkpoint_every", "cache_states")
        kept: dict[str, Any] = {name: value for name, value in options.items() if name not in ignored}
        begun = None
        if self.initial is not None:
            tensors = (getattr(self.initial, name) for name in ("weight", "bias", "threshold"))
            begun = sha256(b"".join(each.double().cpu().numpy().tobytes() for each in tensors)).hexdigest()
        return {"triples": ids, "sae": self.sae.fingerprint(), "layer": self.layer, "initial": begun, "options": kept}


def _start(adapter: AdapterWeights | None, sae: SparseAutoencoder, options: TrainingOptions) -> dict[str, Tensor]:
    """What training begins with."""
    return _small_tensors(sae, options) if adapter is None else _tensors_of(adapter, sae, options)


def _small_tensors(sae: SparseAutoencoder, options: TrainingOptions) -> dict[str, Tensor]:
    """Small random weights, or one small random vector."""
    dtype = torch.float64 if sae.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(options.seed)
    least = options.initial_threshold
    small = (torch.rand(sae.d_sae, sae.d_model, generator=generator, dtype=dtype) * 2 - 1) * least
    if not options.train_weight:
        zeros = torch.zeros(sae.d_sae, dtype=dtype)
        return {"weight": torch.zeros_like(small), "bias": small[:, 0].clone(), "threshold": zeros}
    threshold = 0.0 if options.activation == "relu" else least
    return {
        "weight": small,
        "bias": torch.zeros(sae.d_sae, dtype=dtype),
        "threshold": torch.full((sae.d_sae,), threshold, dtype=dtype),
    }


def _tensors_of(adapter: AdapterWeights, sae: SparseAutoencoder, options: TrainingOptions) -> dict[str, Tensor]:
    """Those of an adapter that training goes on from."""
    if adapter.weight.shape != sae.W_enc.shape:
        raise MismatchError(
            f"the initial adapter is {tuple(adapter.weight.shape)}; expected [d_sae, d_model] of the SAE, "
            f"{tuple(sae.W_enc.shape)}"
        )
    if (adapter.activation, adapter.clip) != (options.activation, options.clip):
        raise InvalidInputError(
            f"the initial adapter has activation {adapter.activation!r} and clip {adapter.clip}; expected those of the "
            f"options, {options.activation!r} and {options.clip}"
        )
    dtype = torch.float64 if sae.dtype == torch.float64 else torch.float32
    return {name: getattr(adapter, name).detach().to(dtype).clone() for name in ("weight", "bias", "threshold")}


def _parts(indices: Iterable[int], size: int) -> list[list[int]]:
    listed = list(indices)
    return [listed[first : first + size] for first in range(0, len(listed), size)]
