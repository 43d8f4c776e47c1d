"""One optimizer step on however many processes: the model's stages, their gradients, the sums over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megacore.checkpoint import Checkpoint
from megacore.config import ModelConfig
from megacore.model import DecoderModel, apply_options, load_stages, read_config
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
from megacore.plugins import get_family
from megacore.training.batches import Batch
from megacore.training.config.run_config import RunConfig
from megacore.training.freezing import frozen_names
from megacore.training.loss_scale import LossScale
from megacore.training.optimizer import build_optimizer, set_rates
from megacore.training.plan import compute_options, model_specs_of, pipeline_stages, splits_backward

COMPUTED_IN = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
HELD_IN = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32, "fp16": torch.float32}
"""What weights, gradients and the optimizer's state are in, by ``model.dtype`` of the run file."""


@dataclass(frozen=True)
class StepResult:
    """What came of one step.

    Attributes:
        loss: mean over the tokens of the global batch, in nats, before the step.
        grad_norm: before clipping.
        is_taken: whether the weights changed; not when it was skipped or refused, or was not finite.
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
        trains: whether the model is to be trained; else it takes no memory for gradients, and there are no steps.

    Attributes:
        stages: the pipeline stages that this process has; the whole model without pipeline parallelism.
        all_stages: which layers each stage has, of all processes.
        parameters: of the stages, by name.
        specs: how each is cut.
    """

    def __init__(
        self, run: RunConfig, checkpoint: Checkpoint, parallel: ParallelContext, *, trains: bool = True
    ) -> None:
        self.run = run
        self.parallel = parallel
        self.held_dtype, self.compute_dtype = HELD_IN[run.model.dtype], COMPUTED_IN[run.model.dtype]
        narrower = self.compute_dtype if self.compute_dtype != self.held_dtype else None
        config = read_config(get_family(checkpoint.manifest.family), checkpoint)
        whole_specs = model_specs_of(checkpoint)
        frozen = frozen_names(run.training.freeze, whole_specs) if trains else set(whole_specs)
        self.all_stages = pipeline_stages(run, config, whole_specs)
        own_stages = (
            local_stages(run.parallel.pipeline_schedule, self.all_stages, parallel)
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
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in frozen)
            apply_options(model, compute_options(run, narrower))
            if parallel.sizes.dp_shard > 1:
                # What lies around the layers is gathered as it is held: the gradients of embedding and head are sums
                # over many tokens, for which 16 bit are too few.
                shard_one(model, compute_dtype=None)
        self.parameters = {name: p for model in self.stages for name, p in model.own_parameters().items()}
        self._buckets: GradientBuckets | None = None
        if parallel.sizes.dp_shard == 1 and parallel.sizes.dp_replicate > 1:
            trained = [parameter for parameter in self._all_parameters() if parameter.requires_grad]
            self._buckets = GradientBuckets(trained, parallel.group("dp_replicate"))
        self._pipeline: tuple[tuple[int, int], Pipeline] | None = None
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
        weight_decay: float | None = None,
        is_skipped: bool = False,
        accepts: Callable[[float, float], bool] = lambda loss, grad_norm: True,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Take one optimizer step on ``batch``, which is this process's part of the global one.

        A step whose gradients are not finite is not taken, nor one whose loss and gradient norm are not accepted;
        ``accepts`` is asked on every rank, and must answer alike. Nor is one that ``is_skipped``, of which only the
        loss and the gradients' norm are computed. ``wants_stop`` is asked when the gradients are there, and what it
        says on any rank is the result's ``is_to_stop`` on all of them. Without ``weight_decay`` it is that of the run
        file.
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
            clear_cast_cache(model)
        if self._buckets is not None:
            self._buckets.finish()
        self._sum_tied_gradients()
        loss = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        for micro_batch_loss in losses:
            loss += micro_batch_loss.double().sum()
        if self.parallel.tp_rank > 0:
            loss.zero_()  # the first of them counts
        square_norm = local_square_norm(self.parameters, self.specs, self.parallel)
        sums = torch.stack([loss, square_norm, loss.new_tensor(float(wants_stop()))])
        if self.parallel.mesh is not None:
            dist.all_reduce(sums)
        total, square, num_wanting_stop = sums.tolist()
        return total / self._loss_factor, math.sqrt(square) / self._loss_factor, num_wanting_stop > 0

    def score(self, batch: Batch) -> Tensor | None:
        """How probable the model finds each target of ``batch``; see :func:`megacore.parallel.token_scores`.

        Nothing is dropped, and nothing of it is left behind. For all processes, whatever they have of the model.

        Returns:
            ``[samples, sequence, 2]`` on those that have its last stage, 0 where a micro-batch is shorter.
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
                    # Some stay gathered until a backward pass, which does not come.
                    module.reshard()
        return scores

    def _forward(self, batch: Batch) -> Tensor | None:
        size = self.run.training.micro_batch_size
        micro_batches = self._micro_batches(batch, {"sample_ids": batch.sample_ids})
        length = batch.loss_mask.shape[1]

        def through(model: DecoderModel) -> Callable[[Tensor | None, int], Tensor]:
            def stage(hidden: Tensor | None, number: int) -> Tensor:
                input_ids, inputs = micro_batches[number]
                return model(input_ids if hidden is None else hidden, **inputs)

            return stage

        owners = stage_owners(self.run.parallel.pipeline_schedule, len(self.all_stages), self.parallel.pp_size)
        stages = {model.stage.index: through(model) for model in self.stages}
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
        """The input ids of each micro-batch, and what else the model is called with: targets, segments, ``inputs``."""
        size = self.run.training.micro_batch_size
        tokens = batch.tokens.to(self.parallel.device)
        inputs = {"targets": tokens[:, 1:], **inputs}
        if batch.segments is not None:
            inputs["segments"] = batch.segments
        micro_batches = []
        for number in range(len(tokens) // size):
            samples = slice(number * size, (number + 1) * size)
            length = batch.micro_batch_lengths[number] if batch.micro_batch_lengths else batch.loss_mask.shape[1]
            own = {
                name: tensor[samples, :length] if tensor.dim() == 2 else tensor[samples]
                for name, tensor in inputs.items()
            }
            micro_batches.append((tokens[samples, :length], own))
        return micro_batches

    @property
    def _loss_factor(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.factor

    def _forward_and_backward(self, batch: Batch) -> list[Tensor]:
        device = self.parallel.device
        loss_mask = batch.loss_mask.to(device, self.held_dtype)
        total = self._over_data_parallelism(loss_mask.sum())
        # Of a global batch with nothing to learn the loss is 0.
        token_weights = loss_mask * (self._loss_factor / torch.where(total > 0, total, 1.0))
        inputs = {"token_weights": token_weights, "sample_ids": batch.sample_ids}
        num_micro_batches = len(batch.tokens) // self.run.training.micro_batch_size
        if self._buckets is not None:
            self._buckets.expect(None if splits_backward(self.run) else num_micro_batches)
        if self.parallel.pp_size > 1:
            tokens = batch.tokens.to(device)
            input_ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            if batch.segments is not None:
                inputs["segments"] = batch.segments
            return self._pipeline_for(input_ids.shape[1], num_micro_batches).run(input_ids, targets, **inputs)
        [model] = self.stages
        losses = []
        for number, (input_ids, of_micro_batch) in enumerate(self._micro_batches(batch, inputs)):
            if isinstance(model, FSDPModule):
                is_last = number == num_micro_batches - 1
                model.set_is_last_backward(is_last)
                model.set_requires_gradient_sync(is_last)
            loss = model(input_ids, **of_micro_batch)
            loss.backward()
            losses.append(loss.detach())
        return losses

    def _over_data_parallelism(self, number: Tensor) -> Tensor:
        """The sum over the processes that see different samples."""
        for axis in ("dp_replicate", "dp_shard"):
            if getattr(self.parallel.sizes, axis) > 1:
                dist.all_reduce(number, group=self.parallel.group(axis))
        return number

    def _pipeline_for(self, length: int, num_micro_batches: int) -> Pipeline:
        """The pipeline for so many micro-batches of ``length`` inputs, which is kept until others come."""
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
        """Of what goes from stage to stage of a micro-batch of ``length`` inputs."""
        tp = self.parallel.tp_size if self.parallel.sequence_parallel else 1
        return (self.run.training.micro_batch_size, length // tp, self.stages[0].config.hidden_size)

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
        """Those that are trained, among them the last stage's copy of an embedding that is the head too."""
        return [(name, parameter) for name, parameter in self._all_named_parameters() if parameter.requires_grad]

    def _all_named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [item for model in self.stages for item in model.named_parameters()]
