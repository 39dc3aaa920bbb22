"""The types that the operations exchange beside hidden states and SAE weights: the sparse map, edit lists, counters."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.kernels.operands import Versions, can_be_read, check_is_tensor, check_same_device, versions_of
from dspa.sae.weights import SaeWeights

EditKind = Literal["ablate", "augment", "both"]


def offsets_rise(offsets: Tensor, entries: int) -> bool:
    """Whether offsets `[n + 1]` int64 of compressed rows rise from 0 to the number of entries. The bound is looked at
    before the differences, which could wrap around."""
    bounded = bool(((offsets >= 0) & (offsets <= entries)).all())
    return bounded and int(offsets[0]) == 0 and int(offsets[-1]) == entries and bool((offsets.diff() >= 0).all())


@dataclass(frozen=True, eq=False)
class CsrMap:
    """The conditional-difference map `A`, `[d_sae_in, d_sae_out]`, by compressed rows (docs/method.md, section 2).

    The operations check a map when they first see it, and again when one of its tensors was written in place since.

    Attributes:
        row_offsets: `[d_sae_in + 1]` int64; row i holds entries `row_offsets[i]` to `row_offsets[i + 1]`.
        columns: `[nonzeros]` int32, ascending within a row.
        values: `[nonzeros]` float32 or float64.
        d_sae_out: number of columns.
    """

    row_offsets: Tensor
    columns: Tensor
    values: Tensor
    d_sae_out: int
    _checked: list[Versions] = field(
        default_factory=list, init=False, repr=False, compare=False
    )  # those that passed, one at most

    @property
    def d_sae_in(self) -> int:
        return self.row_offsets.shape[0] - 1

    @property
    def nonzeros(self) -> int:
        return self.columns.shape[0]

    def to(self, device: torch.device | str) -> CsrMap:
        if self.values.device == torch.device(device):
            return self
        moved = CsrMap(self.row_offsets.to(device), self.columns.to(device), self.values.to(device), self.d_sae_out)
        if self._is_checked():
            moved._remember_check()
        return moved

    def to_dense(self) -> Tensor:
        """`[d_sae_in, d_sae_out]`, dtype of the values."""
        dense = torch.zeros(self.d_sae_in, self.d_sae_out, dtype=self.values.dtype, device=self.values.device)
        dense[self._row_of_entry(), self.columns.long()] = self.values
        return dense

    def check(self) -> CsrMap:
        """Itself, if every offset and column is in bounds and every value finite; kernels rely on it.

        Raises:
            CorruptFileError: naming the first violation.
        """
        if self._is_checked():
            return self
        offsets, columns, values = self.row_offsets, self.columns, self.values
        for name, tensor in (("row_offsets", offsets), ("columns", columns), ("values", values)):
            check_is_tensor(name, tensor)
            if tensor.device != values.device or not tensor.is_contiguous():
                raise CorruptFileError(f"map tensor {name} is not contiguous, or not on {values.device} as the values")
        value_types = (torch.float32, torch.float64)
        if (offsets.dtype, columns.dtype) != (torch.int64, torch.int32) or values.dtype not in value_types:
            raise CorruptFileError(
                f"map tensors are {offsets.dtype}, {columns.dtype}, {values.dtype}; expected int64, int32, float32"
            )
        if type(self.d_sae_out) is not int or not 1 <= self.d_sae_out < 2**31:
            raise CorruptFileError(f"the map has {self.d_sae_out} columns; expected at least 1, below 2**31")
        if offsets.ndim != 1 or columns.ndim != 1 or columns.shape != values.shape or self.d_sae_in < 1:
            raise CorruptFileError(
                f"map tensors have shapes {tuple(offsets.shape)}, {tuple(columns.shape)}, {tuple(values.shape)}; "
                "expected [d_sae_in + 1], [nonzeros], [nonzeros]"
            )
        if not offsets_rise(offsets, self.nonzeros):
            raise CorruptFileError(f"map row offsets do not rise from 0 to the {self.nonzeros} entries; fit it again")
        if self.nonzeros and not (int(columns.min()) >= 0 and int(columns.max()) < self.d_sae_out):
            raise CorruptFileError(
                f"map columns run from {int(columns.min())} to {int(columns.max())}; expected 0 to {self.d_sae_out - 1}"
            )
        row = self._row_of_entry()
        if bool(((columns.diff() <= 0) & (row.diff() == 0)).any()):
            raise CorruptFileError("map columns are not strictly ascending within a row; fit it again")
        if not bool(values.isfinite().all()):
            raise CorruptFileError("map values contain NaN or Inf; fit it again")
        self._remember_check()
        return self

    def _is_checked(self) -> bool:
        versions = versions_of(self.row_offsets, self.columns, self.values) if self._checked else None
        return versions is not None and versions in self._checked

    def _remember_check(self) -> None:
        versions = versions_of(self.row_offsets, self.columns, self.values)
        self._checked[:] = [] if versions is None else [versions]

    def _row_of_entry(self) -> Tensor:
        rows = torch.arange(self.d_sae_in, device=self.row_offsets.device)
        return rows.repeat_interleave(self.row_offsets.diff())


@dataclass(frozen=True, eq=False)
class EditList:
    """For each row of a batch, which output latents to edit and in which direction (docs/method.md, section 3).

    Row b edits `latents[b, :counts[b]]`; the rest is padding (latent 0, sign 0).
    The tensors are allocated once per batch and updated in place, so that captured graphs see fixed addresses.

    Attributes:
        latents: `[B, k]` int32; augmented ones by falling score, then ablated ones by rising score.
        signs: `[B, k]` int8; +1 augment, -1 ablate.
        counts: `[B]` int32.
    """

    latents: Tensor
    signs: Tensor
    counts: Tensor
    _checked: list[object] = field(
        default_factory=list, init=False, repr=False, compare=False
    )  # what passed `check`, one at most

    def __post_init__(self) -> None:
        latents, signs, counts = self.latents, self.signs, self.counts
        for name in ("latents", "signs", "counts"):
            check_is_tensor(name, getattr(self, name))
        check_same_device(latents.device, signs=signs, counts=counts)
        if (latents.dtype, signs.dtype, counts.dtype) != (torch.int32, torch.int8, torch.int32):
            raise InvalidInputError(
                f"edit lists are {latents.dtype}, {signs.dtype}, {counts.dtype}; expected int32, int8, int32"
            )
        if latents.ndim != 2 or signs.shape != latents.shape or counts.shape != latents.shape[:1]:
            raise InvalidInputError(
                f"edit lists have shapes {tuple(latents.shape)}, {tuple(signs.shape)}, {tuple(counts.shape)}; "
                "expected [B, k], [B, k], [B]"
            )

    @classmethod
    def empty(cls, batch: int, k: int, device: torch.device | str = "cpu") -> EditList:
        """Lists without an edit, with room for k a row."""
        return cls(
            torch.zeros(batch, k, dtype=torch.int32, device=device),
            torch.zeros(batch, k, dtype=torch.int8, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
        )

    @classmethod
    def from_lists(
        cls, augment: list[list[int]], ablate: list[list[int]], device: torch.device | str = "cpu"
    ) -> EditList:
        """Lists written out by hand: `augment[b]` and `ablate[b]` are the latents of row b.

        Raises:
            InvalidInputError: if the two have different lengths.
        """
        if len(augment) != len(ablate):
            raise InvalidInputError(f"{len(augment)} augment rows and {len(ablate)} ablate rows; expected as many")
        edits = cls.empty(len(augment), max((len(a) + len(b) for a, b in zip(augment, ablate, strict=True)), default=0))
        for row, (up, down) in enumerate(zip(augment, ablate, strict=True)):
            count = len(up) + len(down)
            edits.latents[row, :count] = torch.tensor(up + down, dtype=torch.int32)
            edits.signs[row, : len(up)] = 1
            edits.signs[row, len(up) : count] = -1
            edits.counts[row] = count
        return edits.to(device)

    def check(self, sae: SaeWeights) -> None:
        """Refuses lists that name what an SAE does not have. On the CPU, once, and again when they were written to;
        a GPU would have to be waited for.

        Raises:
            InvalidInputError: for a length beyond the list, a sign other than +1 and -1, a latent out of range, or one
                without a decoder row.
        """
        if not can_be_read(self.latents):
            return
        versions = versions_of(self.latents, self.signs, self.counts)
        rows = sae.d_sae if sae.W_dec is None else sae.W_dec.shape[0]
        known = (versions, sae.d_sae, rows, id(sae.decoder_rows))
        if versions is not None and known in self._checked:
            return
        if self.batch and not 0 <= int(self.counts.min()) <= int(self.counts.max()) <= self.k:
            raise InvalidInputError(f"edit lists have {self.counts.tolist()[:8]} entries; expected 0 to {self.k}")
        valid = self.valid()
        listed, signs = self.latents[valid].long(), self.signs[valid]
        if listed.numel() and not 0 <= int(listed.min()) <= int(listed.max()) < sae.d_sae:
            raise InvalidInputError(
                f"edit lists name latents {int(listed.min())} to {int(listed.max())}; expected 0 to {sae.d_sae - 1}"
            )
        if listed.numel() and sae.decoder_rows is not None:
            found = sae.decoder_rows[listed]
            if not 0 <= int(found.min()) <= int(found.max()) < rows:
                raise InvalidInputError("edit lists name latents without a decoder row in this SAE; pass the whole SAE")
        odd = signs[signs.abs() != 1]
        if odd.numel():
            raise InvalidInputError(f"edit lists have the sign {int(odd[0])}; expected +1 (augment) or -1 (ablate)")
        self._checked[:] = [known]

    @property
    def batch(self) -> int:
        return self.latents.shape[0]

    @property
    def k(self) -> int:
        """Entries a row has room for."""
        return self.latents.shape[1]

    def to(self, device: torch.device | str) -> EditList:
        return EditList(self.latents.to(device), self.signs.to(device), self.counts.to(device))

    def rows(self, index: Tensor) -> EditList:
        """The lists of the rows in `index` (int64), as new tensors."""
        return EditList(self.latents[index], self.signs[index], self.counts[index])

    def where(self, keep: Tensor, longest: int | None = None) -> EditList:
        """The lists without the entries for which `keep [B, k]` is False, in the same order, as new tensors.

        Nothing waits for a device.

        Args:
            keep: bool.
            longest: how many entries a row keeps at most, if that is known; the lists become so narrow.
        """
        kept = keep & self.valid()
        order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, : self.k if longest is None else longest]
        present = kept.gather(1, order)
        return EditList(
            torch.where(present, self.latents.gather(1, order), 0),
            torch.where(present, self.signs.gather(1, order), 0),
            kept.sum(dim=1, dtype=torch.int32),
        )

    def copy_(self, other: EditList) -> None:
        """Takes over the lists of another of the same shape, in place.

        Raises:
            InvalidInputError: if the shapes differ.
        """
        if other.latents.shape != self.latents.shape:
            raise InvalidInputError(
                f"edit lists of shape {tuple(other.latents.shape)} do not fit into {tuple(self.latents.shape)}"
            )
        self.latents.copy_(other.latents)
        self.signs.copy_(other.signs)
        self.counts.copy_(other.counts)

    def valid(self) -> Tensor:
        """`[B, k]` bool: which entries are edits and not padding."""
        return torch.arange(self.k, device=self.counts.device) < self.counts[:, None]

    def augmented(self, row: int) -> list[int]:
        """The latents that row augments."""
        return self._signed(row, 1)

    def ablated(self, row: int) -> list[int]:
        """The latents that row ablates."""
        return self._signed(row, -1)

    def _signed(self, row: int, sign: int) -> list[int]:
        count = int(self.counts[row])
        return self.latents[row, :count][self.signs[row, :count] == sign].tolist()


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Counters that `token_step` adds to where the edit happens. Rows that are not enabled are not touched.

    Attributes:
        seen: `[B]` int64, tokens processed.
        edited: `[B]` int64, tokens whose hidden state was changed.
        nonfinite: `[B]` int64, tokens left alone because of NaN or Inf; see `token_step`.
        maximum: `[B]` float64, M_t of the last token; NaN where it did not have to be computed.
        maximum_sum: `[B]` float64, sum of M_t over the tokens for which it was computed.
        maximum_known: `[B]` int64, number of those tokens.
        latent_edits: `[d_sae]` int64, edits of each latent that changed it.
    """

    seen: Tensor
    edited: Tensor
    nonfinite: Tensor
    maximum: Tensor
    maximum_sum: Tensor
    maximum_known: Tensor
    latent_edits: Tensor

    def __post_init__(self) -> None:
        for counter in fields(self):
            tensor = getattr(self, counter.name)
            check_is_tensor(counter.name, tensor)
            dtype = torch.float64 if counter.name in ("maximum", "maximum_sum") else torch.int64
            alike = counter.name == "latent_edits" or tensor.shape == self.seen.shape
            if tensor.ndim != 1 or tensor.dtype != dtype or not tensor.is_contiguous() or not alike:
                raise InvalidInputError(
                    f"counter {counter.name} is {tuple(tensor.shape)} {tensor.dtype}; expected {dtype}, contiguous, "
                    "[d_sae] for latent_edits and [B] for the others"
                )
            check_same_device(self.seen.device, **{counter.name: tensor})

    @classmethod
    def zeros(cls, batch: int, d_sae: int, device: torch.device | str = "cpu") -> TokenStats:
        def counter(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            seen=counter(batch),
            edited=counter(batch),
            nonfinite=counter(batch),
            maximum=torch.full((batch,), torch.nan, dtype=torch.float64, device=device),
            maximum_sum=counter(batch, torch.float64),
            maximum_known=counter(batch),
            latent_edits=counter(d_sae),
        )
