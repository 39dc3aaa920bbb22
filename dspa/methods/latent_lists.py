"""Editing the latents of a list: the intervention of DSPA and of static lists (docs/method.md, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import EditList, SaeWeights, StepMode, TokenStats
from dspa.kernels.token_step.differentiable import differentiable_token_step
from dspa.kernels.token_step.equation import edited_activations
from dspa.kernels.token_step.prepared import PreparedStep
from dspa.methods.policy import Intervention, LatentChange, TokenEdit
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.encode import encode
from dspa.sae.weights import decode_alike, encode_alike
from dspa.transformers_model import ModelFingerprint, check_sae_fits


@dataclass(frozen=True, eq=False)
class LatentLists:
    """Latents of one SAE, listed per prompt, are moved by `alpha` times the token's largest activation where they are
    active; the decoded difference is added to the residual stream.

    Attributes:
        layer: the decoder layer after which the SAE encodes and the edit is written, from 0.
        sae: the output SAE, with decoder rows for every latent that can be listed.
        strength: alpha.
        longest_list: how many latents one row's list can name. Buffers are allocated by it.
    """

    layer: int
    sae: SaeWeights
    strength: float
    longest_list: int

    def check(self, model: ModelFingerprint) -> None:
        """Raises MismatchError if the layer or the SAE does not fit the model."""
        check_sae_fits(self.sae, "output", self.layer, model)

    def shares_launch_with(self, other: Intervention) -> bool:
        if not isinstance(other, LatentLists) or type(self) is not type(other):  # a subclass may edit in another way
            return False
        return self.layer == other.layer and encode_alike(self.sae, other.sae) and decode_alike(self.sae, other.sae)

    def editor(
        self, sharing: Mapping[str, Intervention], device: torch.device, backend: str, mode: StepMode | None
    ) -> LatentListEditor:
        lists = {name: each for name, each in sharing.items() if isinstance(each, LatentLists)}
        return LatentListEditor(lists, device, backend, mode)


def with_all_decoder_rows(saes: Sequence[SaeWeights]) -> SaeWeights:
    """One SAE with the decoder rows of several that encode alike. Saved policies keep different rows.

    Raises:
        MismatchError: if two decode a latent differently.
    """
    first = saes[0]
    if all(sae is first or sae.W_dec is first.W_dec for sae in saes):
        return first
    decoder_rows = torch.full((first.d_sae,), -1, dtype=torch.int32, device=first.device)
    W_dec = first.W_enc.new_empty(0, first.d_model)
    for sae in saes:
        assert sae.W_dec is not None  # policies check it
        own = torch.arange(sae.d_sae, device=sae.device) if sae.decoder_rows is None else sae.decoder_rows.long()
        known = (own >= 0) & (decoder_rows >= 0)
        if not torch.equal(W_dec[decoder_rows[known].long()], sae.W_dec[own[known]]):
            raise MismatchError(
                "two policies have output SAEs with the same encoder and different decoders; steer with one at a time"
            )
        new = (own >= 0) & (decoder_rows < 0)
        decoder_rows[new] = len(W_dec) + torch.arange(int(new.sum()), dtype=torch.int32, device=first.device)
        W_dec = torch.cat([W_dec, sae.W_dec[own[new]]])
    return replace(first, W_dec=W_dec, decoder_rows=decoder_rows)


@dataclass(eq=False)
class ListBuffers:
    """What the token steps of batches of one size read, at fixed addresses.

    Attributes:
        edits: the lists, `[B, k]`, k that of the longest list any policy declared.
        alpha: one strength for all rows, or `[B]`.
        step: the token step that reads them.
    """

    edits: EditList
    alpha: float | Tensor
    step: PreparedStep


class LatentListEditor:
    """One `token_step` per position for all rows whose policies share an output SAE; see `PositionEditor`.

    Attributes:
        sae: the SAE, on the layer's device, with the decoder rows of all policies.
    """

    def __init__(
        self, policies: Mapping[str, LatentLists], device: torch.device, backend: str, mode: StepMode | None
    ) -> None:
        self.sae = with_all_decoder_rows([each.sae for each in policies.values()]).to(device)
        self.layer = next(iter(policies.values())).layer
        self.device = self.sae.device
        self.latents = self.sae.d_sae
        self._strengths = {name: float(each.strength) for name, each in policies.items()}
        self._longest = max(each.longest_list for each in policies.values())
        self._backend = backend
        self._mode: StepMode | None = mode
        self._dtype = self.sae.dtype  # of hidden states, until one is known
        self._by_batch: dict[int, ListBuffers] = {}
        self._current: ListBuffers | None = None

    def prepare(self, dtype: torch.dtype) -> None:
        """Compiles what the steps of every batch need, for hidden states of a dtype."""
        self._dtype = dtype
        self._by_batch[1] = self._allocate(1)

    def begin_prompt(self, row_policies: Sequence[str | None]) -> None:
        batch = len(row_policies)
        if batch not in self._by_batch:
            self._by_batch[batch] = self._allocate(batch)
        buffers = self._current = self._by_batch[batch]
        buffers.edits.counts.zero_()
        if isinstance(buffers.alpha, Tensor):
            strengths = [self._strengths.get(name or "", 0.0) for name in row_policies]
            buffers.alpha.copy_(torch.tensor(strengths, dtype=torch.float64))

    def set_selection(self, selection: EditList, rows: Tensor) -> None:
        lists, k = self._buffers.edits, selection.k
        if k > lists.k:
            raise InvalidInputError(
                f"a policy selected lists of {k} latents; its intervention declares longest_list = {lists.k} at most"
            )
        if selection.batch == lists.batch and lists.k == k:
            lists.copy_(selection)
            return
        rows = rows.to(self.device)
        lists.latents[rows] = 0
        lists.signs[rows] = 0
        lists.latents[rows, :k] = selection.latents.to(self.device)
        lists.signs[rows, :k] = selection.signs.to(self.device)
        lists.counts[rows] = selection.counts.to(self.device)

    def edit(self, hidden: Tensor, enabled: Tensor | None, counters: Sequence[TokenStats | None]) -> None:
        step = self._buffers.step
        for position, stats in enumerate(counters):
            step(hidden[:, position], None if enabled is None else enabled[:, position], stats)

    def differentiable_edit(self, hidden: Tensor, enabled: Tensor | None) -> Tensor:
        # Copies: autograd keeps them until the backward pass, and the next prompt overwrites the buffers.
        edits = self._buffers.edits.rows(torch.arange(len(hidden), device=self.device))
        alpha = self._buffers.alpha
        alpha = alpha.clone() if isinstance(alpha, Tensor) else alpha
        positions = [
            differentiable_token_step(
                hidden[:, position],
                self.sae,
                edits,
                alpha,
                None if enabled is None else enabled[:, position],
            )
            for position in range(hidden.shape[1])
        ]
        return torch.stack(positions, dim=1)

    def describe(self, hidden: Tensor, enabled: Tensor | None) -> list[TokenEdit | None]:
        """Activations are computed again, by the reference encoder; where one lies within rounding of its threshold,
        the kernel may decide otherwise."""
        edits, alpha = self._buffers.edits, self._buffers.alpha
        page = self.sae.metadata.neuronpedia_page if isinstance(self.sae, SparseAutoencoder) else lambda latent: None
        f = encode(hidden, self.sae)
        maximum = f.amax(dim=1)
        on = torch.ones(len(f), dtype=torch.bool, device=f.device) if enabled is None else enabled
        finite = maximum.isfinite() & hidden.isfinite().all(dim=1)
        before = f.gather(1, edits.latents.long())
        after = edited_activations(before, edits.signs, alpha, maximum)
        changed = edits.valid() & (after != before) & (on & finite)[:, None]
        known = torch.where(finite, maximum, torch.nan).tolist()
        described: list[TokenEdit | None] = [None] * len(f)
        for row in on.nonzero().flatten().tolist():
            listed = zip(edits.latents[row].tolist(), before[row].tolist(), after[row].tolist(), strict=True)
            changes = tuple(
                LatentChange(latent, was, becomes, page(latent))
                for (latent, was, becomes), moved in zip(listed, changed[row].tolist(), strict=True)
                if moved
            )
            described[row] = TokenEdit(known[row], changes)
        return described

    def selection(self) -> EditList | None:
        return None if self._current is None else self._current.edits

    @property
    def _buffers(self) -> ListBuffers:
        assert self._current is not None  # a prompt has begun
        return self._current

    def _allocate(self, batch: int) -> ListBuffers:
        """Buffers, and everything the backend keeps between steps: that is made by steps which edit no row, not in a
        compiled or captured graph, whose memory is not for keeping."""
        strengths = set(self._strengths.values())
        dtype = torch.float64 if self.sae.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False):  # they are written in later calls, which may not be in inference mode
            edits = EditList.empty(batch, self._longest, self.device)
            alpha = strengths.pop() if len(strengths) == 1 else torch.zeros(batch, dtype=dtype, device=self.device)
            step = PreparedStep(self.sae, edits, alpha, mode=self._mode, backend=self._backend)
            step.prepare(self._dtype)
        return ListBuffers(edits, alpha, step)
