"""``verify``: compares our model with an independent implementation, on the same token ids and targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
    """The allowed difference of logits: the maximum and the mean absolute error."""

    max_error: float
    mean_error: float

    @classmethod
    def for_dtype(cls, dtype: torch.dtype, override: float | None = None) -> Tolerance:
        """Return the tolerance of a comparison in ``dtype``.

        In 32 and 64 bit the maximum error may be at most 1e-3 (or ``override``), and the mean a tenth of that. In 16
        bit single logits are coarse, so only the mean counts, which may be at most 0.1 (or ``override``).
        """
        if dtype.itemsize < 4:
            return cls(max_error=math.inf, mean_error=0.1 if override is None else override)
        max_error = 1e-3 if override is None else override
        return cls(max_error=max_error, mean_error=max_error / 10)


@dataclass(frozen=True)
class Iteration:
    """The comparison of one sequence of tokens. Errors are absolute differences of logits; losses, nats per token."""

    index: int
    max_error: float
    mean_error: float
    our_loss: float
    their_loss: float
    agreement: float
    """Share of positions at which both have the same most likely token."""

    @property
    def loss_error(self) -> float:
        return abs(self.our_loss - self.their_loss)

    def within(self, tolerance: Tolerance) -> bool:
        """Return whether the errors are within ``tolerance``; NaN never is."""
        return self.max_error <= tolerance.max_error and self.mean_error <= tolerance.mean_error


@dataclass(frozen=True)
class VerificationReport:
    """All iterations of a comparison, and its tolerance."""

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
        """The result in one line."""
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
        """Return the figures as plain JSON values; infinities and NaN, which JSON lacks, become ``None``."""

        def finite(figures: dict[str, float]) -> dict[str, float | None]:
            return {name: value if math.isfinite(value) else None for name, value in figures.items()}

        return {
            "passed": self.passed,
            "dtype": self.dtype,
            "tp": self.tp,
            "tolerance": finite(asdict(self.tolerance)),
            "iterations": [finite({**asdict(each), "loss_error": each.loss_error}) for each in self.iterations],
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
        checkpoint: Native checkpoint of any layout.
        reference: Published checkpoint to compare with.
        samples: Token ids, ``[iterations, sequence + 1]``; the last of each row is only a target.
        dtype: Dtype that our model computes in; the reference computes in float32, or in float64 if ``dtype`` is that.
        tp: Tensor-parallel size to compare at, by default the checkpoint's own; processes are started for it.
        tolerance: Tolerance that replaces that of the dtype; see :meth:`Tolerance.for_dtype`.
        on_iteration: Called after each iteration. A function of a module, since another process calls it.

    Raises:
        MegacoreError: when the comparison cannot be made. A failed comparison is reported, not raised.
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
    dtype_name = str(dtype).removeprefix("torch.")
    return VerificationReport(tuple(iterations), Tolerance.for_dtype(dtype, tolerance), dtype_name, tp)


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
    """Gather the ranks' parts of the vocabulary into ``[batch, sequence, vocab_size]``, on every rank."""
    if parallel.tp_mesh is None:
        return logits
    shape = torch.Size((*logits.shape[:-1], vocab_size))
    stride = torch.empty(shape, device="meta").stride()
    distributed = DTensor.from_local(
        logits, parallel.tp_mesh, [Shard(logits.dim() - 1)], run_check=False, shape=shape, stride=stride
    )
    return distributed.full_tensor()


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


def _worst(errors: Iterable[float]) -> float:
    """Return the largest error; NaN counts as infinite."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)
