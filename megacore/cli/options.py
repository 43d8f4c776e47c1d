"""The options and option types that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from megacore.errors import PluginError

if TYPE_CHECKING:
    import torch

    from megacore.plugins import Family

    _FamilyParam = click.ParamType[Family, Any]
    _DtypeParam = click.ParamType[torch.dtype, Any]
else:
    _FamilyParam = _DtypeParam = click.ParamType  # older versions of click cannot subscript it

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPE_NAMES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The dtypes of the command line and their names in torch."""


class FamilyType(_FamilyParam):
    """The name of a model family, converted to its :class:`~megacore.plugins.Family`.

    :class:`click.Choice` would load every plugin while the command line is being defined.
    """

    name = "family"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Family:
        """Return the family called ``value``.

        Raises:
            click.BadParameter: No usable plugin provides the family; the message is the plugin error's.
        """
        from megacore.plugins import Family, get_family

        if isinstance(value, Family):  # click converts a default that is converted already
            return value
        try:
            return get_family(value)
        except PluginError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from megacore.plugins import list_families

        return [CompletionItem(name) for name in list_families() if name.startswith(incomplete)]


class DtypeType(_DtypeParam):
    """``fp64``, ``fp32``, ``bf16`` or ``fp16``, converted to a torch dtype.

    :class:`click.Choice` would import torch while the command line is being defined.
    """

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> torch.dtype:
        import torch

        if isinstance(value, torch.dtype):
            return value
        if value not in DTYPE_NAMES:
            self.fail(f"{value!r} is none of {', '.join(DTYPE_NAMES)}", param, ctx)
        dtype: torch.dtype = getattr(torch, DTYPE_NAMES[value])
        return dtype

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(DTYPE_NAMES)}]"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in DTYPE_NAMES if name.startswith(incomplete)]


def parallel_size_option(name: str, help: str, default: int | None = 1) -> Callable[[Command], Command]:
    """Return an option for a number of processes."""
    return click.option(name, type=click.IntRange(min=1), default=default, help=help, show_default=default is not None)


checkpoint_argument = click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
out_option = click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
dtype_option = click.option(
    "--dtype", type=DtypeType(), help="Convert all tensors to this dtype.  [default: every tensor keeps its own]"
)
tp_option = parallel_size_option("--tp", "Tensor-parallel size of the output.")
pp_option = parallel_size_option("--pp", "Pipeline-parallel size of the output.")
model_tp_option = parallel_size_option(
    "--tp", "Tensor-parallel size to run the model at.  [default: the checkpoint's]", default=None
)
add_tokens_option = click.option(
    "--add-tokens",
    type=click.Path(path_type=Path),
    metavar="PREFIX_OR_DIR",
    help="Add embedding and head rows for the new tokens of a dataset's tokenizer, or of the tokenizer in a directory. "
    "Each new row is the mean of the rows before the first new one.",
)
