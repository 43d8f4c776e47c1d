"""One optimizer step on any number of processes: the model's stages, their gradients, the sums over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megacore.config import ModelConfig
from megacore.model import ComputeOptions, DecoderModel, apply_options, load_stages
from megacore.parallel import (
    GradientBuckets,
    ParallelContext,
    Pipeline,
    clear_cast_cache,
    local_gradients,
    local_square_norm,
    local_stages,
    parameter_specs,
    run_forward,
    scale_gradients,
    shard,
    stage_owners,
)
from megacore.training.batches import Batch
from megacore.training.config import RunConfig
from megacore.training.loss_scale import LossScale
from megacore.training.optimizer import build_optimizer, set_rates
from megacore.training.resolved import ResolvedRun


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one step.

    Attributes:
        loss: Mean over the predicted tokens of the global batch, in nats, before the step.
        grad_norm: Norm of the gradient over all parameters, before clipping.
        is_taken: True if the weights changed; False if the step was skipped, refused or not finite.
        is_finite: True if loss and gradients were finite.
        is_to_stop: True if some rank wants to stop.
    """

    loss: float
    grad_norm: float
    is_taken: bool
    is_finite: bool = True
    is_to_stop: bool = False


class Engine:
    """The part of the training of a model that one process computes.

    Args:
        resolved: The run.
        parallel: The place of this process.
        trains: False for a model that is only scored, which needs no memory for gradients.

    Attributes:
        run: The run file.
        parallel: The place of this process.
        param_dtype: The dtype of weights, gradients and optimizer state.
        compute_dtype: The dtype of the forward and backward pass.
        all_stages: The pipeline stages of the whole model.
        stages: The pipeline stages that this process holds; the whole model without pipeline parallelism.
        specs: The shape and the cut of each parameter of these stages, by name.
        parameters: The parameters of these stages, by name.
        optimizer: The optimizer over them.
        loss_scale: The loss scale; ``None`` unless the run computes in fp16.
    """

    def __init__(self, resolved: ResolvedRun, parallel: ParallelContext, *, trains: bool = True) -> None:
        self.run = run = resolved.run
        self.parallel = parallel
        self.param_dtype, self.compute_dtype = run.model.param_dtype, run.model.compute_dtype
        narrower = self.compute_dtype if self.compute_dtype != self.param_dtype else None
        frozen = resolved.frozen if trains else resolved.specs.keys()
        self.all_stages = resolved.stages
        own_stages = (
            local_stages(run.parallel.pipeline_schedule, self.all_stages, parallel)
            if parallel.pp_size > 1
            else self.all_stages
        )
        shard_one = partial(
            shard, parallel=parallel, compute_dtype=narrower, reshard_after_forward=parallel.pp_size == 1
        )
        on_layer = shard_one if parallel.sizes.dp_shard > 1 else lambda layer: None
        self.stages = load_stages(
            resolved.checkpoint, parallel, own_stages, dtype=self.param_dtype, on_layer=on_layer, specs=resolved.specs
        )
        self.specs = {name: spec for model in self.stages for name, spec in parameter_specs(model).items()}
        for model in self.stages:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in frozen)
            apply_options(model, _compute_options(run, narrower))
            if parallel.sizes.dp_shard > 1:
                # The embedding and the head are gathered in their own dtype: their gradients are sums over many
                # tokens, for which 16 bit are too few.
                shard_one(model, compute_dtype=None)
        self.parameters = {name: p for model in self.stages for name, p in model.own_parameters().items()}
        self._buckets: GradientBuckets | None = None
        if parallel.sizes.dp_shard == 1 and parallel.sizes.dp_replicate > 1:
            trained = [parameter for parameter in self._all_parameters() if parameter.requires_grad]
            self._buckets = GradientBuckets(trained, parallel.group("dp_replicate"))
        self._pipeline: tuple[tuple[int, int], Pipeline] | None = None
        self._ends_group = self._group_of_both_ends(resolved.config)
        self.optimizer = build_optimizer(
            self._all_named_parameters(), self.specs, run.optimizer, kernel=run.kernels.optimizer
        )
        self.loss_scale = LossScale(run.loss_scale) if run.model.dtype == "fp16" else None

    def step(
        self,
        batch: Batch,
        *,
        lr: float,
        weight_decay: float | None = None,
        is_skipped: bool = False,
        accepts: Callable[[float, float], bool] = lambda loss, grad_norm: True,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Take one optimizer step on ``batch``, which is this process's part of the global one.

        The step is not taken if its gradients are not finite, if ``accepts`` refuses its loss and gradient norm, or if
        it ``is_skipped``; then only the loss and the norm are computed. ``accepts`` is called on every rank and must
        return the same on each. ``wants_stop`` is called once the gradients are computed; if it is true on any rank,
        ``is_to_stop`` is true on all. ``weight_decay`` is by default that of the run file.
        """
        self.zero_gradients()
        loss, norm, is_to_stop = self._accumulate(batch, wants_stop)
        is_finite = math.isfinite(norm) and math.isfinite(loss)
        is_taken = is_finite and not is_skipped and accepts(loss, norm)
        if is_taken:
            clip = self.run.optimizer.clip_grad
            factor = 1.0 if clip == 0 else min(1.0, clip / (norm + 1e-6))
            self._scale(factor / self._loss_factor)
            if weight_decay is None:
                weight_decay = self.run.optimizer.weight_decay
            set_rates(self.optimizer, lr=lr, weight_decay=weight_decay)
            self.optimizer.step()
        if self.loss_scale is not None and not is_skipped:
            self.loss_scale.stepped() if is_finite else self.loss_scale.overflowed()
        return StepResult(loss, norm, is_taken, is_finite, is_to_stop)

    def zero_gradients(self) -> None:
        """Drop the gradients."""
        if self._buckets is not None:
            self._buckets.zero()
        else:
            self.optimizer.zero_grad()

    def accumulate(self, batch: Batch) -> tuple[float, float]:
        """Add the gradients of the mean loss over the global batch; return that loss and their norm.

        In fp16 the gradients are scaled by the loss scale; the returned loss and norm are not.
        """
        loss, norm, _ = self._accumulate(batch, lambda: False)
        return loss, norm

    def _accumulate(self, batch: Batch, wants_stop: Callable[[], bool]) -> tuple[float, float, bool]:
        losses = self._forward_and_backward(batch)
        for model in self.stages:
            clear_cast_cache(model)
        if self._buckets is not None:
            self._buckets.finish()
        self._sum_tied_gradients()
        loss = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        for micro_batch_loss in losses:
            loss += micro_batch_loss.double().sum()
        if self.parallel.tp_rank > 0:
            loss.zero_()  # tensor-parallel ranks have the same loss; the first one counts
        square_norm = local_square_norm(self.parameters, self.specs, self.parallel)
        sums = torch.stack([loss, square_norm, loss.new_tensor(float(wants_stop()))])
        if self.parallel.mesh is not None:
            dist.all_reduce(sums)
        total, square, num_wanting_stop = sums.tolist()
        return total / self._loss_factor, math.sqrt(square) / self._loss_factor, num_wanting_stop > 0

    def score(self, batch: Batch) -> Tensor | None:
        """Score each target of ``batch``; see :func:`megacore.parallel.token_scores`. For all ranks.

        Dropout is off, and no activation or gradient is kept.

        Returns:
            ``[samples, sequence, 2]`` on ranks with the last stage, 0 where a micro-batch is shorter; ``None`` on
            others.
        """
        for model in self.stages:
            model.eval()
        with torch.no_grad():
            scores = self._forward(batch)
        for model in self.stages:
            model.train()
            clear_cast_cache(model)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    # Some modules stay gathered until a backward pass, and there is none.
                    module.reshard()
        return scores

    def _forward(self, batch: Batch) -> Tensor | None:
        size = self.run.training.micro_batch_size
        micro_batches = self._micro_batches(batch, {"sample_ids": batch.sample_ids})
        length = batch.loss_mask.shape[1]

        def forward_of(model: DecoderModel) -> Callable[[Tensor | None, int], Tensor]:
            def stage(hidden: Tensor | None, number: int) -> Tensor:
                input_ids, inputs = micro_batches[number]
                output: Tensor = model(input_ids if hidden is None else hidden, **inputs)
                return output

            return stage

        owners = stage_owners(self.run.parallel.pipeline_schedule, len(self.all_stages), self.parallel.pp_size)
        stages = {model.stage.index: forward_of(model) for model in self.stages}
        if self.parallel.pp_size == 1:
            outputs = [stages[0](None, number) for number in range(len(micro_batches))]
        else:
            outputs = run_forward(
                stages,
                owners,
                len(micro_batches),
                hidden_shape=self._hidden_shape(length),
                hidden_dtype=self.compute_dtype,
                parallel=self.parallel,
            )
        if not outputs:
            return None
        scores = outputs[0].new_zeros(len(micro_batches) * size, length, 2)
        for number, output in enumerate(outputs):
            scores[number * size : (number + 1) * size, : output.shape[1]] = output
        return scores

    def _micro_batches(self, batch: Batch, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Return the input ids of each micro-batch, and its keyword arguments: targets, segments and ``inputs``."""
        size = self.run.training.micro_batch_size
        tokens = batch.tokens.to(self.parallel.device)
        inputs = {"targets": tokens[:, 1:], **inputs}
        if batch.segments is not None:
            inputs["segments"] = batch.segments
        micro_batches = []
        for number in range(len(tokens) // size):
            samples = slice(number * size, (number + 1) * size)
            length = batch.micro_batch_lengths[number] if batch.micro_batch_lengths else batch.loss_mask.shape[1]
            keywords = {
                name: tensor[samples, :length] if tensor.dim() == 2 else tensor[samples]
                for name, tensor in inputs.items()
            }
            micro_batches.append((tokens[samples, :length], keywords))
        return micro_batches

    @property
    def _loss_factor(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.factor

    def _forward_and_backward(self, batch: Batch) -> list[Tensor]:
        device = self.parallel.device
        loss_mask = batch.loss_mask.to(device, self.param_dtype)
        total = self._sum_over_data_parallelism(loss_mask.sum())
        # The loss of a global batch with nothing to learn is 0.
        token_weights = loss_mask * (self._loss_factor / torch.where(total > 0, total, 1.0))
        inputs = {"token_weights": token_weights, "sample_ids": batch.sample_ids}
        num_micro_batches = len(batch.tokens) // self.run.training.micro_batch_size
        if self._buckets is not None:
            self._buckets.expect(None if self.run.parallel.splits_backward else num_micro_batches)
        if self.parallel.pp_size > 1:
            tokens = batch.tokens.to(device)
            input_ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            if batch.segments is not None:
                inputs["segments"] = batch.segments
            return self._pipeline_for(input_ids.shape[1], num_micro_batches).run(input_ids, targets, **inputs)
        [model] = self.stages
        losses = []
        for number, (input_ids, keywords) in enumerate(self._micro_batches(batch, inputs)):
            if isinstance(model, FSDPModule):
                is_last = number == num_micro_batches - 1
                model.set_is_last_backward(is_last)
                model.set_requires_gradient_sync(is_last)
            loss = model(input_ids, **keywords)
            loss.backward()
            losses.append(loss.detach())
        return losses

    def _sum_over_data_parallelism(self, number: Tensor) -> Tensor:
        """Sum ``number`` in place over the processes that see different samples."""
        for axis in ("dp_replicate", "dp_shard"):
            if getattr(self.parallel.sizes, axis) > 1:
                dist.all_reduce(number, group=self.parallel.group(axis))
        return number

    def _pipeline_for(self, length: int, num_micro_batches: int) -> Pipeline:
        """Return the pipeline for ``num_micro_batches`` of ``length`` inputs, which is kept until these change."""
        if self._pipeline is None or self._pipeline[0] != (length, num_micro_batches):
            pipeline = Pipeline(
                self.run.parallel.pipeline_schedule,
                [(model.stage, model) for model in self.stages],
                num_micro_batches=num_micro_batches,
                hidden_shape=self._hidden_shape(length),
                hidden_dtype=self.compute_dtype,
                parallel=self.parallel,
            )
            self._pipeline = ((length, num_micro_batches), pipeline)
        return self._pipeline[1]

    def _hidden_shape(self, length: int) -> tuple[int, int, int]:
        """Return the shape that stages exchange for a micro-batch of ``length`` inputs."""
        tp = self.parallel.tp_size if self.parallel.sequence_parallel else 1
        return (self.run.training.micro_batch_size, length // tp, self.stages[0].config.hidden_size)

    def _group_of_both_ends(self, config: ModelConfig) -> dist.ProcessGroup | None:
        """Return the group of the first and the last stage, where they share a tied embedding; else ``None``."""
        ends = {stage.index for model in self.stages if (stage := model.stage).is_first or stage.is_last}
        if not config.tie_embeddings or len(self.all_stages) == 1 or len(ends) != 1:
            return None
        ranks = dist.get_process_group_ranks(self.parallel.group("pp"))
        return self.parallel.new_group([ranks[0], ranks[-1]])

    def _sum_tied_gradients(self) -> None:
        """Give both copies of a tied embedding on two stages the sum of their gradients."""
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
        """Return the trained parameters by name, including the last stage's copy of a tied embedding."""
        return [(name, parameter) for name, parameter in self._all_named_parameters() if parameter.requires_grad]

    def _all_named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [item for model in self.stages for item in model.named_parameters()]


def _compute_options(run: RunConfig, compute_dtype: torch.dtype | None) -> ComputeOptions:
    """Return how the run file lets the model compute."""
    return ComputeOptions(
        compute_dtype=compute_dtype,
        # Recomputed layers hold one cast at a time, shards are gathered in the compute dtype, and compiled code casts
        # by itself.
        caches_casts=run.recompute.granularity != "full"
        and run.parallel.data_parallel == "replicated"
        and not run.kernels.compile,
        recompute=run.recompute.granularity,
        recompute_layers=run.recompute.num_layers,
        attention_dropout=run.dropout.attention,
        hidden_dropout=run.dropout.hidden,
        lima_dropout=run.dropout.lima,
        dropout_seed=run.dropout.seed,
        attention=run.kernels.attention,
        norm=run.kernels.norm,
        compile=run.kernels.compile,
        splits_backward=run.parallel.splits_backward,
    )
