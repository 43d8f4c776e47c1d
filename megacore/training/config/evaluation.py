"""The section of the run file on evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megacore.training.config.section import Section


class EvaluationSection(Section):
    """On what is there to validate and to test on."""

    interval: int = Field(
        1000, gt=0, description="Iterations from one validation to the next; there is one after the last in any case."
    )
    iters: Annotated[int, Field(gt=0)] | Literal["all"] = Field(
        100, description='Global batches of each evaluation, always the same ones; `"all"`, and at most, one epoch.'
    )
    metrics: tuple[str, ...] = Field(
        ("perplexity",),
        description="What is told beside the loss; `package.module:function` for a metric of your own, "
        '`"all"` for all that there are.',
    )
