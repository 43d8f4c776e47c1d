"""The section of the run file on the optimizer, and on the schedules of its learning rate and weight decay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megacore.training.config.section import Section

_ADAMW_KEYS = {"beta1", "beta2", "eps"}
_SGD_KEYS = {"sgd_momentum"}
_WARMUP_KEYS = ("warmup_iters", "warmup_fraction", "warmup_samples")
_DECAY_KEYS = ("lr_decay_iters", "lr_decay_samples")


class OptimizerSection(Section):
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101) or SGD, and the schedules of learning rate and weight
    decay."""

    kind: Literal["adamw", "sgd"] = Field(
        "adamw", description='`"adamw"`: Adam with decoupled weight decay, or `"sgd"`: SGD with momentum.'
    )
    lr: float = Field(gt=0, description="Peak learning rate.")
    min_lr: float = Field(
        0.0,
        ge=0,
        description="Learning rate that the decay approaches, and lower bound after the warmup.",
    )
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = Field(
        "cosine",
        description='Schedule after the warmup: `"constant"`, `"linear"`, `"cosine"`, `"inverse-square-root"`, or '
        '`"WSD"`: constant until a linear decay at the end.',
    )
    warmup_iters: int = Field(
        0, ge=0, description="Iterations of linear warmup; the iteration after them has the peak learning rate."
    )
    warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="Instead of warmup_iters: fraction of the decay, or of the run."
    )
    warmup_samples: int | None = Field(None, ge=0, description="Instead of warmup_iters: number of samples.")
    lr_decay_iters: int | None = Field(
        None, gt=0, description="Iteration after which the learning rate is `min_lr`. Default: the last one."
    )
    lr_decay_samples: int | None = Field(None, gt=0, description="Instead of lr_decay_iters: number of samples.")
    lr_wsd_decay_iters: int | None = Field(
        None, gt=0, description="`WSD` only: iterations of the linear decay at the end."
    )
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of matrices. Norms and biases have none.")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description='`"constant"`: `weight_decay` throughout; `"linear"` or `"cosine"`: from `start_weight_decay` to '
        "`end_weight_decay` over the run.",
    )
    start_weight_decay: float | None = Field(
        None, ge=0, description="Weight decay of the first step. Default: `weight_decay`."
    )
    end_weight_decay: float | None = Field(
        None, ge=0, description="Weight decay that the end of the run approaches. Default: `weight_decay`."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="`adamw` only: decay rate of the mean of the gradients.")
    beta2: float = Field(0.95, ge=0, lt=1, description="`adamw` only: decay rate of the mean of their squares.")
    eps: float = Field(1e-8, gt=0, description="`adamw` only: term added to the denominator.")
    sgd_momentum: float = Field(0.9, ge=0, lt=1, description="`sgd` only: decay rate of the sum of the gradients.")
    clip_grad: float = Field(
        1.0, ge=0, description="Maximum norm of the gradient over all parameters; 0 disables clipping."
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> OptimizerSection:
        given = self.model_fields_set
        if stray := given & (_SGD_KEYS if self.kind == "adamw" else _ADAMW_KEYS):
            other = "sgd" if self.kind == "adamw" else "adamw"
            raise ValueError(f'{_belong(stray)} to kind = "{other}", and that is "{self.kind}"')
        for alternatives in (_WARMUP_KEYS, _DECAY_KEYS):
            if len(named := [key for key in alternatives if getattr(self, key)]) > 1:
                raise ValueError(f"{' and '.join(named)} say the same: give one of them")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above lr ({self.lr})")
        has_no_end = self.lr_decay_style in ("constant", "inverse-square-root")
        if has_no_end and (stray := {key for key in _DECAY_KEYS if getattr(self, key) is not None}):
            raise ValueError(
                f"{_belong(stray)} to a learning rate that falls to its end, and lr_decay_style is "
                f'"{self.lr_decay_style}"'
            )
        if (self.lr_decay_style == "WSD") != (self.lr_wsd_decay_iters is not None):
            raise ValueError('lr_wsd_decay_iters belongs to lr_decay_style = "WSD", which needs it')
        if self.weight_decay_incr_style == "constant":
            if stray := {key for key in ("start_weight_decay", "end_weight_decay") if getattr(self, key) is not None}:
                raise ValueError(f'{_belong(stray)} to weight_decay_incr_style "linear" or "cosine"')
        elif self.start_weight_decay is None and self.end_weight_decay is None:
            raise ValueError(
                f'weight_decay_incr_style is "{self.weight_decay_incr_style}": give start_weight_decay, '
                "end_weight_decay or both"
            )
        return self


def _belong(keys: set[str]) -> str:
    return f"{' and '.join(sorted(keys))} belong{'s' if len(keys) == 1 else ''}"
