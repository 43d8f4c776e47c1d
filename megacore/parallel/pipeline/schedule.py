"""Pipeline schedules: the order in which stages process micro-batches, and the stages of each process.

The schedules are torch's. That of the learning rate is ``megacore.training.schedule``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from megacore.errors import LayoutError
from megacore.parallel.context import ParallelContext
from megacore.parallel.pipeline.stages import Stage

# It logs the whole schedule with every exception, which reaches the user anyway.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Schedule:
    """The requirements of a pipeline schedule.

    Attributes:
        name: Name in ``torch.distributed.pipelining``.
        is_v_shaped: True if a process has the stages ``rank`` and ``2 * pp - 1 - rank`` instead of every ``pp``-th one.
        stages_per_rank: Number of stages of a process; ``None`` for any number.
        splits_backward: True if the gradients of parameters are computed later than those of activations (Qi et al.,
            2023, arXiv:2401.10241).
        uses_equal_rounds: True if micro-batches are processed in ``num_micro_batches // pp`` rounds of equal size.
        min_micro_batches_per: ``"rank"`` or ``"stage"``, of which there must be at most as many as micro-batches.
    """

    name: str
    is_v_shaped: bool = False
    stages_per_rank: int | None = None
    splits_backward: bool = False
    uses_equal_rounds: bool = False
    min_micro_batches_per: str | None = None


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("1F1B", stages_per_rank=1, min_micro_batches_per="rank"),
        Schedule("Interleaved1F1B", uses_equal_rounds=True),
        Schedule("InterleavedZeroBubble", splits_backward=True, uses_equal_rounds=True),
        Schedule("ZBVZeroBubble", is_v_shaped=True, stages_per_rank=2, splits_backward=True),
        Schedule("DualPipeV", is_v_shaped=True, stages_per_rank=2, splits_backward=True, min_micro_batches_per="stage"),
    )
}
"""The available schedules, by name. 1F1B: Narayanan et al., 2021, arXiv:2104.04473, also interleaved; zero bubble:
Qi et al., 2023, arXiv:2401.10241; DualPipeV: DeepSeek-AI, 2025."""


def check_schedule(name: str, *, pp: int, stages_per_rank: int, num_micro_batches: int) -> None:
    """Refuse a schedule whose requirements are not met.

    Raises:
        LayoutError: When they are not, with what the schedule needs.
    """
    schedule = SCHEDULES[name]
    if schedule.stages_per_rank not in (None, stages_per_rank):
        raise LayoutError(
            f"the pipeline schedule {name} takes stages_per_rank {schedule.stages_per_rank}, not {stages_per_rank}: "
            f"set parallel.stages_per_rank to {schedule.stages_per_rank}, or choose another of {', '.join(SCHEDULES)}"
        )
    needed = {"rank": pp, "stage": pp * stages_per_rank, None: 1}[schedule.min_micro_batches_per]
    if num_micro_batches < needed:
        raise LayoutError(
            f"the pipeline schedule {name} at pp {pp} needs at least {needed} micro-batches, and a global batch gives "
            f"each replica {num_micro_batches}: raise training.global_batch_size, or lower training.micro_batch_size"
        )
    num_rounds = max(1, num_micro_batches // pp)
    if schedule.uses_equal_rounds and num_micro_batches % num_rounds:
        raise LayoutError(
            f"the pipeline schedule {name} at pp {pp} takes micro-batches in {num_rounds} equal rounds, and a global "
            f"batch gives each replica {num_micro_batches}: choose training.global_batch_size so that it is a multiple "
            f"of {pp}"
        )


def local_stages(name: str, stages: Sequence[Stage], parallel: ParallelContext) -> list[Stage]:
    """Return those of ``stages`` that this process has."""
    owners = stage_owners(name, len(stages), parallel.pp_size)
    return [stage for stage, owner in zip(stages, owners, strict=True) if owner == parallel.pp_rank]


def stage_owners(name: str, num_stages: int, pp: int) -> list[int]:
    """Return the process along ``pp`` of each stage."""
    if SCHEDULES[name].is_v_shaped:
        return [*range(pp), *reversed(range(pp))]
    return [stage % pp for stage in range(num_stages)]


def _output_as_loss(output: Tensor, targets: Tensor) -> Tensor:
    return output


class Pipeline:
    """Stages of a model, run on micro-batches by one of torch's schedules.

    Args:
        name: Name of the schedule.
        stages: Stages of this process with their modules: each is called with token ids or hidden states, the targets
            and the further inputs of ``run``; the last one returns a loss of shape ``[1]``.
        num_micro_batches: Number of micro-batches of each run.
        hidden_shape: Shape of the hidden states between stages.
        hidden_dtype: Their dtype.
        parallel: The mesh with the axis ``pp``.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[tuple[Stage, nn.Module]],
        *,
        num_micro_batches: int,
        hidden_shape: tuple[int, ...],
        hidden_dtype: torch.dtype,
        parallel: ParallelContext,
    ) -> None:
        # Given in advance, since torch would otherwise run the stages on the meta device to find out.
        hidden = torch.empty(hidden_shape, dtype=hidden_dtype, device="meta", requires_grad=True)
        ids = torch.empty(hidden_shape[:1], dtype=torch.int64, device="meta")
        loss = torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True)
        built = [
            PipelineStage(
                module,
                stage.index,
                stage.num_stages,
                parallel.device,
                input_args=ids if stage.is_first else hidden,
                output_args=loss if stage.is_last else hidden,
                group=parallel.group("pp"),
            )
            for stage, module in stages
        ]
        kind = get_schedule_class(name)
        single = issubclass(kind, PipelineScheduleSingle)
        self._schedule = kind(
            built[0] if single else built, num_micro_batches, loss_fn=_output_as_loss, scale_grads=False
        )
        self._is_first = any(stage.is_first for stage, _ in stages)
        self._is_last = any(stage.is_last for stage, _ in stages)

    def run(self, input_ids: Tensor, targets: Tensor, **inputs: Tensor) -> list[Tensor]:
        """Run forward and backward of all micro-batches, and add to the gradients of the modules' parameters.

        The tensors hold all micro-batches, joined along axis 0.

        Returns:
            The loss of each micro-batch, on the process with the last stage; an empty list elsewhere.
        """
        losses: list[Tensor] = []
        arguments: dict[str, Any] = {"targets": targets, **inputs}
        self._schedule.step(
            *([input_ids] if self._is_first else []),
            target=targets if self._is_last else None,
            losses=losses,
            return_outputs=False,
            **arguments,
        )
        return [loss.detach() for loss in losses]
