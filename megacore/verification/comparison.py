"""Comparing our model with an independent implementation, on the same token ids and the same targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F  # noqa: N812

from megacore.checkpoint import Checkpoint
from megacore.errors import CheckpointError, VerificationError
from megacore.model import load_model
from megacore.parallel import ParallelContext, ParallelSizes, check_tensor_parallel, run_on_ranks
from megacore.plugins import get_family


@dataclass(frozen=True)
class Tolerance:
    """How far logits may be apart: the largest absolute error of any, and the mean absolute error of all."""

    max_error: float
    mean_error: float

    @classmethod
    def for_dtype(cls, dtype: torch.dtype, override: float | None = None) -> Tolerance:
        """The tolerance of a comparison in ``dtype``.

        In 32 and 64 bit the largest error decides, at most 1e-3 (``override`` replaces it), and the mean must be ten
        times smaller. In 16 bit single logits are coarse: only the mean decides, at most 0.1 (or ``override``).
        """
        if dtype.itemsize < 4:
            return cls(max_error=math.inf, mean_error=0.1 if override is None else override)
        max_error = 1e-3 if override is None else override
        return cls(max_error=max_error, mean_error=max_error / 10)


@dataclass(frozen=True)
class Iteration:
    """One comparison, of one sequence of tokens.

    Attributes:
        index: from 0.
        max_error: the largest absolute difference of two logits.
        mean_error: the mean absolute difference.
        our_loss: the mean negative log-likelihood of the targets, in nats a token.
        their_loss: the reference's, of the same targets.
        agreement: the share of positions at which both hold the same token for the most likely.
    """

    index: int
    max_error: float
    mean_error: float
    our_loss: float
    their_loss: float
    agreement: float

    @property
    def loss_error(self) -> float:
        return abs(self.our_loss - self.their_loss)

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the errors are within ``tolerance``; not-a-number never is."""
        return self.max_error <= tolerance.max_error and self.mean_error <= tolerance.mean_error


@dataclass(frozen=True)
class VerificationReport:
    """All iterations of a comparison, and what was allowed."""

    iterations: tuple[Iteration, ...]
    tolerance: Tolerance
    dtype: str
    tp: int

    @property
    def passed(self) -> bool:
        return all(iteration.within(self.tolerance) for iteration in self.iterations)

    @property
    def max_error(self) -> float:
        return _worst(iteration.max_error for iteration in self.iterations)

    @property
    def mean_error(self) -> float:
        return _worst(iteration.mean_error for iteration in self.iterations)

    @property
    def verdict(self) -> str:
        """One line for a person."""
        agreement = sum(iteration.agreement for iteration in self.iterations) / len(self.iterations)
        loss_error = _worst(iteration.loss_error for iteration in self.iterations)
        counted = "1 iteration" if len(self.iterations) == 1 else f"{len(self.iterations)} iterations"
        allowed_max = "" if math.isinf(self.tolerance.max_error) else f" (allowed {self.tolerance.max_error:g})"
        return (
            f"{'Verified' if self.passed else 'NOT VERIFIED'} in {self.dtype}, tp {self.tp}: over "
            f"{counted}, logit error at most {self.max_error:.3g}{allowed_max}, "
            f"on average at most {self.mean_error:.3g} (allowed {self.tolerance.mean_error:g}), "
            f"loss error at most {loss_error:.3g}, same most likely token at {agreement:.2%} of positions"
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; what is not a number, which JSON cannot say, is ``None``."""
        figures = [asdict(iteration) | {"loss_error": iteration.loss_error} for iteration in self.iterations]
        return {
            "passed": self.passed,
            "dtype": self.dtype,
            "tp": self.tp,
            "tolerance": {
                "max_error": None if math.isinf(self.tolerance.max_error) else self.tolerance.max_error,
                "mean_error": self.tolerance.mean_error,
            },
            "iterations": [
                {name: value if math.isfinite(value) else None for name, value in iteration.items()}
                for iteration in figures
            ],
        }


def verify(
    checkpoint: Path | str,
    reference: Path | str,
    samples: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    tp: int | None = None,
    tolerance: float | None = None,
    on_iteration: Callable[[Iteration], None] | None = None,
) -> VerificationReport:
    """Compare the model of ``checkpoint`` with the independent implementation that its family names.

    Args:
        checkpoint: a native checkpoint, cut in any way.
        reference: the published checkpoint to compare with.
        samples: token ids, ``[iterations, sequence + 1]``; the last of each row is only a target.
        dtype: our model computes in; the reference computes in float32, or in float64 when ``dtype`` is that.
        tp: tensor-parallel size to compare at, by default the checkpoint's own; processes are started for it.
        tolerance: instead of that of the dtype; see :meth:`Tolerance.for_dtype`.
        on_iteration: is told of each iteration as it is done; a function of a module, since another process calls it.

    Raises:
        MegacoreError: when the comparison cannot be made. A comparison that fails is reported, not raised.
    """
    opened = Checkpoint(checkpoint)
    reference = Path(reference)
    if not reference.is_dir():
        raise CheckpointError(f"the reference {reference} is not a directory")
    get_family(opened.manifest.family)  # a missing plugin is better reported before processes are started
    tp = tp or opened.manifest.layout.tp
    check_tensor_parallel(opened.manifest.specs, tp)
    iterations = run_on_ranks(
        _compare_on_rank, opened.path, reference, samples, dtype, on_iteration, sizes=ParallelSizes(tp=tp)
    )
    name = str(dtype).removeprefix("torch.")
    return VerificationReport(tuple(iterations), Tolerance.for_dtype(dtype, tolerance), name, tp)


@torch.no_grad()
def _compare_on_rank(
    parallel: ParallelContext,
    checkpoint_path: Path,
    reference_path: Path,
    samples: Tensor,
    dtype: torch.dtype,
    on_iteration: Callable[[Iteration], None] | None,
) -> list[Iteration]:
    checkpoint = Checkpoint(checkpoint_path)
    model = load_model(checkpoint, parallel, dtype=dtype).eval()
    is_first = parallel.tp_rank == 0
    if is_first:
        family = get_family(checkpoint.manifest.family)
        reference_dtype = dtype if dtype.itemsize > 4 else torch.float32
        reference = family.load_reference(model.config, reference_path, reference_dtype, parallel.device)
    iterations = []
    for index, sample in enumerate(samples.to(parallel.device)):
        inputs, targets = sample[:-1].unsqueeze(0), sample[1:]
        ours = gather_logits(model(inputs), model.config.vocab_size, parallel)[0]
        if not is_first:
            continue
        theirs = reference(inputs)[0]
        if theirs.shape != ours.shape:
            raise VerificationError(
                f"our logits are {list(ours.shape)} and the reference's {list(theirs.shape)}: "
                f"{reference_path} is not the model that {checkpoint_path} was made from"
            )
        iterations.append(_compare(index, ours, theirs, targets))
        if on_iteration is not None:
            on_iteration(iterations[-1])
    return iterations


def gather_logits(logits: Tensor, vocab_size: int, parallel: ParallelContext) -> Tensor:
    """Join the ranks' parts of the vocabulary into ``[batch, sequence, vocab_size]``."""
    if parallel.tp_mesh is None:
        return logits
    shape = torch.Size((*logits.shape[:-1], vocab_size))
    stride = torch.empty(shape, device="meta").stride()
    cut = DTensor.from_local(
        logits, parallel.tp_mesh, [Shard(logits.dim() - 1)], run_check=False, shape=shape, stride=stride
    )
    return cut.full_tensor()


def _compare(index: int, ours: Tensor, theirs: Tensor, targets: Tensor) -> Iteration:
    """Compare logits ``[sequence, vocabulary]``; losses in float64, so that the comparison adds no error of its own."""
    difference = (ours.double() - theirs.double()).abs()
    return Iteration(
        index=index,
        max_error=difference.max().item(),
        mean_error=difference.mean().item(),
        our_loss=F.cross_entropy(ours.double(), targets).item(),
        their_loss=F.cross_entropy(theirs.double(), targets).item(),
        agreement=(ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
    )


def _worst(errors: Any) -> float:
    """The largest; not-a-number counts as larger than any."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)
