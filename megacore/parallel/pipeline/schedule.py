"""Pipeline parallelism: which stages a process has, and torch's schedules, by name."""

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
    """What a pipeline schedule asks for.

    Attributes:
        name: in ``torch.distributed.pipelining``.
        is_v_shaped: a process has the stages ``rank`` and ``2 * pp - 1 - rank``; else every ``pp``-th one.
        stages_per_rank: how many stages a process has; ``None`` for any number.
        splits_backward: the gradients of parameters are computed apart from those of activations, later (Qi et al.,
            2023, arXiv:2401.10241).
        in_rounds: micro-batches come in rounds of equal size, as many as ``pp`` goes into their number.
        needs_a_micro_batch_per: ``"rank"`` or ``"stage"``: there are at least as many micro-batches.
    """

    name: str
    is_v_shaped: bool = False
    stages_per_rank: int | None = None
    splits_backward: bool = False
    in_rounds: bool = False
    needs_a_micro_batch_per: str | None = None


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("1F1B", stages_per_rank=1, needs_a_micro_batch_per="rank"),
        Schedule("Interleaved1F1B", in_rounds=True),
        Schedule("InterleavedZeroBubble", splits_backward=True, in_rounds=True),
        Schedule("ZBVZeroBubble", is_v_shaped=True, stages_per_rank=2, splits_backward=True),
        Schedule(
            "DualPipeV", is_v_shaped=True, stages_per_rank=2, splits_backward=True, needs_a_micro_batch_per="stage"
        ),
    )
}
"""The schedules that there are, by name. 1F1B: Narayanan et al., 2021, arXiv:2104.04473, also interleaved; zero bubble:
Qi et al., 2023, arXiv:2401.10241; DualPipeV: DeepSeek-AI, 2025."""


def check_schedule(name: str, *, pp: int, stages_per_rank: int, num_micro_batches: int) -> None:
    """Refuse a schedule whose demands are not met.

    Raises:
        LayoutError: says what it needs.
    """
    schedule = SCHEDULES[name]
    if schedule.stages_per_rank not in (None, stages_per_rank):
        raise LayoutError(
            f"the pipeline schedule {name} takes stages_per_rank {schedule.stages_per_rank}, not {stages_per_rank}: "
            f"set parallel.stages_per_rank to {schedule.stages_per_rank}, or choose another of {', '.join(SCHEDULES)}"
        )
    needed = {"rank": pp, "stage": pp * stages_per_rank, None: 1}[schedule.needs_a_micro_batch_per]
    if num_micro_batches < needed:
        raise LayoutError(
            f"the pipeline schedule {name} at pp {pp} needs at least {needed} micro-batches, and a global batch gives "
            f"each replica {num_micro_batches}: raise training.global_batch_size, or lower training.micro_batch_size"
        )
    num_rounds = max(1, num_micro_batches // pp)
    if schedule.in_rounds and num_micro_batches % num_rounds:
        raise LayoutError(
            f"the pipeline schedule {name} at pp {pp} takes micro-batches in {num_rounds} equal rounds, and a global "
            f"batch gives each replica {num_micro_batches}: choose training.global_batch_size so that it is a multiple "
            f"of {pp}"
        )


def local_stages(name: str, stages: Sequence[Stage], parallel: ParallelContext) -> list[Stage]:
    """The stages that this process has, of all ``stages``."""
    owners = stage_owners(name, len(stages), parallel.pp_size)
    return [stage for stage, owner in zip(stages, owners, strict=True) if owner == parallel.pp_rank]


def stage_owners(name: str, num_stages: int, pp: int) -> list[int]:
    """Of each stage, the process along ``pp`` that has it."""
    if SCHEDULES[name].is_v_shaped:
        return [*range(pp), *reversed(range(pp))]
    return [stage % pp for stage in range(num_stages)]


def _is_the_loss(output: Tensor, targets: Tensor) -> Tensor:
    return output


class Pipeline:
    """Stages of a model, run on micro-batches by one of torch's schedules.

    Args:
        name: of the schedule.
        stages: of this process, with their modules: called with token ids or hidden states, the targets and what else
            ``run`` is given by name; the last one returns a loss of shape ``[1]``.
        num_micro_batches: of each run.
        hidden_shape: of what goes from stage to stage.
        hidden_dtype: likewise.
        parallel: whose axis ``pp`` the stages are on.
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
        # Said in advance, since torch would otherwise find out by running the stages on the meta device.
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
        self._schedule = kind(built[0] if single else built, num_micro_batches, loss_fn=_is_the_loss, scale_grads=False)
        self._is_first = any(stage.is_first for stage, _ in stages)
        self._is_last = any(stage.is_last for stage, _ in stages)

    def run(self, input_ids: Tensor, targets: Tensor, **inputs: Tensor) -> list[Tensor]:
        """Forward and backward of all micro-batches; gradients are added to those of the modules' parameters.

        All tensors are of all micro-batches, joined along axis 0.

        Returns:
            The loss of each micro-batch, on the process with the last stage; elsewhere nothing.
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
