"""The processes of a training run, through accelerate where there are several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from dspa.errors import InvalidInputError


@dataclass(frozen=True)
class TrainingProcesses:
    """The processes that share the pairs of every step.

    Attributes:
        rank: this one, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[TrainingProcesses]:
        """The processes that `torchrun` or `accelerate launch` started, or of the process group that is there.

        Raises:
            InvalidInputError: if there are several and accelerate is not installed.
        """
        there = distributed.is_available() and distributed.is_initialized()
        if there:
            yield cls(distributed.get_rank(), distributed.get_world_size())
            return
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise InvalidInputError(
                "training by several processes needs accelerate; install it with: pip install 'dspa[train]'"
            ) from error
        state = PartialState(cpu=not torch.cuda.is_available())
        try:
            yield cls(state.process_index, state.num_processes)
        finally:
            state.wait_for_everyone()
            state.destroy_process_group()
            PartialState._reset_state()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every process gets the sum of all gradients: each counted its pairs' share of the step's mean."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # a process without a pair in this step
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor of each process."""
        if self.count == 1:
            return values
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        summed = values.to(device)
        distributed.all_reduce(summed)
        return summed.cpu()

    def first_does(self, action: Callable[[], object]) -> None:
        """Runs an action in the first process, while the others wait."""
        if self.rank == 0:
            action()
        if self.count > 1:
            distributed.barrier()
