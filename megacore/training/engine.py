"""One optimizer step on however many processes: the model's stages, their gradients, the sums over processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megacore.checkpoint import Checkpoint
from megacore.config import ModelConfig
from megacore.model import apply_options, load_stages, read_config
from megacore.parallel import (
    GradientBuckets,
    ParallelContext,
    Pipeline,
    forget_casts,
    local_gradients,
    own_square_norm,
    parameter_specs,
    scale_gradients,
    shard,
    stages_on_rank,
)
from megacore.plugins import get_family
from megacore.training.batches import Batch
from megacore.training.loss_scale import LossScale
from megacore.training.optimizer import build_optimizer
from megacore.training.plan import compute_options, model_specs_of, pipeline_stages, splits_backward
from megacore.training.run_config import RunConfig

COMPUTED_IN = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
HELD_IN = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32, "fp16": torch.float32}
"""What weights, gradients and the optimizer's state are in, by ``model.dtype`` of the run file."""


@dataclass(frozen=True)
class StepResult:
    """What came of one step.

    Attributes:
        loss: mean over the tokens of the global batch, in nats, before the step.
        grad_norm: before clipping.
        is_taken: whether the weights changed; not when loss or gradients were not finite, or refused.
        is_finite: whether loss and gradients were.
        is_to_stop: whether some rank wants to stop.
    """

    loss: float
    grad_norm: float
    is_taken: bool
    is_finite: bool = True
    is_to_stop: bool = False


class Engine:
    """What one process does of the training of a model.

    Args:
        run: says how the work is spread and how the model computes.
        checkpoint: to start from.
        parallel: the place of this process.

    Attributes:
        stages: the pipeline stages that this process has; the whole model without pipeline parallelism.
        all_stages: which layers each stage has, of all processes.
        parameters: of the stages, by name.
        specs: how each is cut.
    """

    def __init__(self, run: RunConfig, checkpoint: Checkpoint, parallel: ParallelContext) -> None:
        self.run = run
        self.parallel = parallel
        self.held_dtype, self.compute_dtype = HELD_IN[run.model.dtype], COMPUTED_IN[run.model.dtype]
        narrower = self.compute_dtype if self.compute_dtype != self.held_dtype else None
        config = read_config(get_family(checkpoint.manifest.family), checkpoint)
        self.all_stages = pipeline_stages(run, config, model_specs_of(checkpoint))
        own_stages = (
            stages_on_rank(run.parallel.pipeline_schedule, self.all_stages, parallel)
            if parallel.pp_size > 1
            else self.all_stages
        )
        shard_one = partial(
            shard, parallel=parallel, compute_dtype=narrower, reshard_after_forward=parallel.pp_size == 1
        )
        on_layer = shard_one if parallel.sizes.dp_shard > 1 else lambda layer: None
        self.stages = load_stages(checkpoint, parallel, own_stages, dtype=self.held_dtype, on_layer=on_layer)
        self.specs = {name: spec for model in self.stages for name, spec in parameter_specs(model).items()}
        for model in self.stages:
            apply_options(model, compute_options(run, narrower))
            if parallel.sizes.dp_shard > 1:
                # What lies around the layers is gathered as it is held: the gradients of embedding and head are sums
                # over many tokens, for which 16 bit are too few.
                shard_one(model, compute_dtype=None)
        self.parameters = {name: p for model in self.stages for name, p in model.own_parameters().items()}
        self.num_micro_batches = run.training.global_batch_size // parallel.dp_size // run.training.micro_batch_size
        self._buckets: GradientBuckets | None = None
        if parallel.sizes.dp_shard == 1 and parallel.sizes.dp_replicate > 1:
            self._buckets = GradientBuckets(self._all_parameters(), parallel.group("dp_replicate"))
        self._pipeline = self._build_pipeline(run.data.seq_length) if parallel.pp_size > 1 else None
        self._pipeline_length = run.data.seq_length
        self._ends_group = self._group_of_both_ends(config)
        self.optimizer = build_optimizer(
            self._all_named_parameters(), self.specs, run.optimizer, kernel=run.kernels.optimizer
        )
        self.loss_scale = LossScale(run.loss_scale) if run.model.dtype == "fp16" else None

    def step(
        self,
        batch: Batch,
        *,
        lr: float,
        accepts: Callable[[float, float], bool] = lambda loss, grad_norm: True,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Take one optimizer step on ``batch``, which is this process's part of the global one.

        A step whose gradients are not finite is not taken, nor one whose loss and gradient norm are not accepted;
        ``accepts`` is asked on every rank, and must answer alike. ``wants_stop`` is asked when the gradients are there,
        and what it says on any rank is the result's ``is_to_stop`` on all of them.
        """
        self.zero_gradients()
        loss, norm, is_to_stop = self._accumulate(batch, wants_stop)
        is_finite = math.isfinite(norm) and math.isfinite(loss)
        is_taken = is_finite and accepts(loss, norm)
        if is_taken:
            clip = self.run.optimizer.clip_grad
            factor = 1.0 if clip == 0 else min(1.0, clip / (norm + 1e-6))
            self._scale(factor / self._loss_factor)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.stepped() if is_finite else self.loss_scale.overflowed()
        return StepResult(loss, norm, is_taken, is_finite, is_to_stop)

    def zero_gradients(self) -> None:
        """Forget the gradients."""
        if self._buckets is not None:
            self._buckets.zero()
        else:
            self.optimizer.zero_grad()

    def accumulate(self, batch: Batch) -> tuple[float, float]:
        """Add to the gradients those of the mean loss over the global batch; return that loss and their norm.

        In fp16 the gradients are those of the loss times the loss scale; the loss and the norm are not.
        """
        loss, norm, _ = self._accumulate(batch, lambda: False)
        return loss, norm

    def _accumulate(self, batch: Batch, wants_stop: Callable[[], bool]) -> tuple[float, float, bool]:
        losses = self._forward_and_backward(batch)
        for model in self.stages:
            forget_casts(model)
        if self._buckets is not None:
            self._buckets.finish()
        self._sum_tied_gradients()
        loss = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        for micro_batch_loss in losses:
            loss += micro_batch_loss.double().sum()
        if self.parallel.tp_rank > 0:
            loss.zero_()  # the first of them counts
        square_norm = own_square_norm(self.parameters, self.specs, self.parallel)
        sums = torch.stack([loss, square_norm, loss.new_tensor(float(wants_stop()))])
        if self.parallel.mesh is not None:
            dist.all_reduce(sums)
        total, square, num_wanting_stop = sums.tolist()
        return total / self._loss_factor, math.sqrt(square) / self._loss_factor, num_wanting_stop > 0

    @property
    def _loss_factor(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.factor

    def _forward_and_backward(self, batch: Batch) -> list[Tensor]:
        device, micro_batch_size = self.parallel.device, self.run.training.micro_batch_size
        tokens = batch.tokens.to(device)
        input_ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss_mask = batch.loss_mask.to(device, self.held_dtype)
        token_weights = loss_mask * (self._loss_factor / self._over_data_parallelism(loss_mask.sum()).clamp(min=1.0))
        inputs = {"token_weights": token_weights, "sample_ids": batch.sample_ids}
        if batch.segments is not None:
            inputs["segments"] = batch.segments
        if self._buckets is not None:
            self._buckets.expect(None if splits_backward(self.run) else self.num_micro_batches)
        if self._pipeline is not None:
            return self._pipeline_for(input_ids.shape[1]).run(input_ids, targets, **inputs)
        [model] = self.stages
        losses = []
        for number in range(self.num_micro_batches):
            samples = slice(number * micro_batch_size, (number + 1) * micro_batch_size)
            if isinstance(model, FSDPModule):
                is_last = number == self.num_micro_batches - 1
                model.set_is_last_backward(is_last)
                model.set_requires_gradient_sync(is_last)
            length = batch.micro_batch_lengths[number] if batch.micro_batch_lengths else None
            loss = model(
                input_ids[samples, :length],
                targets=targets[samples, :length],
                **{
                    name: tensor[samples, :length] if tensor.dim() == 2 else tensor[samples]
                    for name, tensor in inputs.items()
                },
            )
            loss.backward()
            losses.append(loss.detach())
        return losses

    def _over_data_parallelism(self, number: Tensor) -> Tensor:
        """The sum over the processes that see different samples."""
        for axis in ("dp_replicate", "dp_shard"):
            if getattr(self.parallel.sizes, axis) > 1:
                dist.all_reduce(number, group=self.parallel.group(axis))
        return number

    def _pipeline_for(self, length: int) -> Pipeline:
        """The pipeline for samples of ``length`` inputs: the stages are told the shape of what they are sent."""
        if self._pipeline is None or length != self._pipeline_length:
            self._pipeline, self._pipeline_length = self._build_pipeline(length), length
        return self._pipeline

    def _build_pipeline(self, length: int) -> Pipeline:
        tp = self.parallel.tp_size if self.parallel.sequence_parallel else 1
        return Pipeline(
            self.run.parallel.pipeline_schedule,
            [(model.stage, model) for model in self.stages],
            num_micro_batches=self.num_micro_batches,
            hidden_shape=(self.run.training.micro_batch_size, length // tp, self.stages[0].config.hidden_size),
            hidden_dtype=self.compute_dtype,
            parallel=self.parallel,
        )

    def _group_of_both_ends(self, config: ModelConfig) -> dist.ProcessGroup | None:
        """Where the head is the embedding: the processes of the first and of the last stage, if they are two."""
        ends = {stage.index for model in self.stages if (stage := model.stage).is_first or stage.is_last}
        if not config.tie_embeddings or len(self.all_stages) == 1 or len(ends) != 1:
            return None
        ranks = dist.get_process_group_ranks(self.parallel.group("pp"))
        return self.parallel.new_group([ranks[0], ranks[-1]])

    def _sum_tied_gradients(self) -> None:
        """Where the head is the embedding and they are on two stages, give both copies the sum of their gradients."""
        if len(self.all_stages) == 1 or not self.stages[0].config.tie_embeddings:
            return
        copies = [
            parameter
            for model in self.stages
            for name, parameter in model.named_parameters()
            if name.startswith("embedding.")
        ]
        gradients = local_gradients(copies)
        if len(gradients) == 2:
            gradients[0] += gradients[1]
            gradients[1].copy_(gradients[0])
        elif gradients and self._ends_group is not None:
            dist.all_reduce(gradients[0], group=self._ends_group)

    def _scale(self, factor: float) -> None:
        scale_gradients(self._all_parameters(), factor)

    def _all_parameters(self) -> list[nn.Parameter]:
        return [parameter for model in self.stages for parameter in model.parameters()]

    def optimized_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All of the stages by name, among them the last stage's copy of an embedding that is the head too."""
        return self._all_named_parameters()

    def _all_named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [item for model in self.stages for item in model.named_parameters()]
