"""The adapter step of FSRL: a random adapter beside the SAE of a case, and the same in plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dspa.bench.cases import ROUNDINGS, Case, decodable_latents, decoder_size, normal_matrix
from dspa.bench.eager import EncoderDecoder
from dspa.bench.timing import Way
from dspa.kernels import AdapterMode, AdapterWeights, SaeWeights, adapter_step
from dspa.kernels.adapter_step.cpu import work_of
from dspa.sae.encode import encoder_input

ACTIVE_SHARE = 115 / 16384  # of the latents fire, as in version 3 of the method with an SAE 65k wide
FEWEST_ACTIVE = 8  # in each row: a negative v does nothing to a latent that is not active
WEIGHT_SIZE = 8.0  # so large that what fires changes the hidden state by more than rounding
EAGER_ADAPTER = "eager FSRL"
UNTRAINED = "dense, untrained: nearly all fire"
ADAPTER_MODES: tuple[AdapterMode, ...] = ("dense", "screened")


class AdapterCase:
    """An adapter of version 3 beside the SAE of a case, or of version 2 beside a topk SAE.

    Attributes:
        case: the SAE, the hidden states and the backend.
        adapter: random weights; its thresholds lie where `ACTIVE_SHARE` of the latents fire on the hidden states, with
            none of them near its threshold.
        untrained: the same with thresholds under which nearly all latents fire.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        sae, device = case.sae, case.hidden.device
        rng = torch.Generator(device).manual_seed(2)
        weight = normal_matrix((sae.d_sae, sae.d_model), WEIGHT_SIZE / math.sqrt(sae.d_model), sae.dtype, rng)
        zeros = torch.zeros(sae.d_sae, dtype=sae.b_enc.dtype, device=device)
        masked = torch.where(decodable_latents(sae), zeros, math.inf)
        x, _ = encoder_input(case.hidden, sae)
        y = (x @ weight.to(x.dtype).T).abs().where(masked == 0, -math.inf)
        firing = max(FEWEST_ACTIVE, round(ACTIVE_SHARE * sae.d_sae)) * len(x)
        largest = y.flatten().sort(descending=True).values
        threshold = float(largest[firing - 1] + largest[firing]) / 2
        clip = sae.activation != "topk"
        self.adapter = AdapterWeights(weight=weight, bias=zeros, threshold=masked + threshold, clip=clip)
        self.untrained = replace(self.adapter, threshold=masked + threshold * 1e-3)
        norms = float(x.norm(dim=1).max()) * float(weight.float().norm(dim=1).max())
        error = ROUNDINGS * torch.finfo(torch.float32).eps * norms
        covered = case.slack == 0 and sae.dtype.itemsize == 2  # by the rounding of the states, which is far coarser
        self._slack = 0.0 if covered else case.slack + error * firing * decoder_size(sae)

    def step(self, mode: AdapterMode, adapter: AdapterWeights | None = None) -> Tensor:
        """The hidden states after one step, as a new tensor."""
        hidden = self.case.hidden.clone()
        adapter_step(hidden, self.case.sae, adapter or self.adapter, mode=mode, backend=self.case.backend)
        return hidden

    def in_place(self, mode: AdapterMode) -> tuple[Callable[[], object], Callable[[], object]]:
        """One step alone, and what restores its hidden states before the next."""
        case, hidden = self.case, self.case.hidden.clone()
        return (
            lambda: adapter_step(hidden, case.sae, self.adapter, mode=mode, backend=case.backend),
            lambda: hidden.copy_(case.hidden),
        )

    def on(self, backend: str) -> AdapterCase:
        """The same by another backend, with the same tensors."""
        other = copy.copy(self)
        other.case = self.case.on(backend)
        return other

    def check(self) -> None:
        """Every mode produces the same bits, and those of the reference on float64 copies, rounded.

        Raises:
            AssertionError: if not.
        """
        unit = torch.finfo(self.case.shape.dtype).eps
        first = self.step("dense")
        change = (first.float() - self.case.hidden.float()).abs().amax()
        assert change > 8 * unit, f"adapter_step changed by {change}"
        for mode in ADAPTER_MODES[1:]:
            assert torch.equal(self.step(mode), first), f"{mode} differs from dense"
        torch.testing.assert_close(first, self._expected(), rtol=unit, atol=unit + self._slack)

    def _expected(self) -> Tensor:
        sae, adapter = _in_float64(self.case.sae), self.adapter
        exact = replace(
            adapter,
            weight=adapter.weight.double(),
            bias=adapter.bias.double(),
            threshold=adapter.threshold.double(),
        )
        hidden = self.case.hidden.double()
        adapter_step(hidden, sae, exact, backend="reference")
        return hidden.to(self.case.shape.dtype)


def _in_float64(sae: SaeWeights) -> SaeWeights:
    return replace(sae, **{name: x.double() for name, x in sae.tensors().items() if x.is_floating_point()})


@torch.no_grad()
def eager_fsrl(
    sae: EncoderDecoder, weight: Tensor, adapter: AdapterWeights, hidden: Tensor, b_dec: Tensor | None = None
) -> Tensor:
    """FSRL as it is written on top of an SAE library: encode, adapter, two decodes, four passes over weights.

    Args:
        weight: the adapter's, as `[d_model, d_sae]`, in the dtype of the SAE.
        b_dec: the decoder bias of an SAE that subtracts it from its input.
    """
    f = sae.encode(hidden)
    x = hidden if b_dec is None else hidden - b_dec.to(hidden.dtype)
    y = x @ weight + adapter.bias.to(weight.dtype)
    v = y.sign() * torch.relu(y.abs() - adapter.threshold.to(weight.dtype))
    u = torch.relu(f + v) if adapter.clip else f + v
    return sae.decode(u) + (hidden - sae.decode(f))


def eager_way(sae: EncoderDecoder, adapters: AdapterCase, dtype: torch.dtype) -> Way:
    """The eager form in some dtype, with an SAE in this dtype that does not normalize its input."""
    case = adapters.case
    weight = adapters.adapter.weight.T.to(dtype).contiguous()
    hidden, b_dec = case.hidden.to(dtype), case.sae.b_dec if case.sae.subtract_b_dec else None
    suffix = "" if dtype == case.shape.dtype else f", {str(dtype).removeprefix('torch.')}"
    return Way(f"{EAGER_ADAPTER}{suffix}", lambda: eager_fsrl(sae, weight, adapters.adapter, hidden, b_dec))


def adapter_ways(adapters: AdapterCase) -> list[Way]:
    """Every mode, and the state in which training begins, with the bytes of the adapter's weight that they read."""

    def way(name: str, adapter: AdapterWeights, mode: AdapterMode) -> Way:
        run: Callable[[], Tensor] = lambda: adapters.step(mode, adapter)  # noqa: E731
        run()
        before = work_of(adapter)
        run()
        after = work_of(adapter)
        counted = after.weight_bytes - before.weight_bytes
        return Way(name, run, counted if after.tokens > before.tokens else adapter.weight.nbytes)

    ways = [way(mode, adapters.adapter, mode) for mode in ADAPTER_MODES]
    return [*ways, way(UNTRAINED, adapters.untrained, "dense")]
