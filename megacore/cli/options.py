"""Option types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click
from click.shell_completion import CompletionItem

from megacore.errors import PluginError

if TYPE_CHECKING:
    import torch

    from megacore.plugins import Family

Command = TypeVar("Command", bound=Callable[..., Any])


class FamilyType(click.ParamType):
    """The name of a model family, converted to its :class:`~megacore.plugins.Family`.

    Not :class:`click.Choice`, which would load every plugin while the command line is being defined.
    """

    name = "family"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Family:
        """Return the family called ``value``. Raises :class:`click.BadParameter` with the plugin error's message."""
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


class DtypeType(click.ParamType):
    """``fp64``, ``fp32``, ``bf16`` or ``fp16``, converted to a torch dtype."""

    name = "dtype"
    names: ClassVar[dict[str, str]] = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> torch.dtype:
        import torch

        if isinstance(value, torch.dtype):
            return value
        if value not in self.names:
            self.fail(f"{value!r} is none of {', '.join(self.names)}", param, ctx)
        return getattr(torch, self.names[value])

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names)}]"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names if name.startswith(incomplete)]


checkpoint_argument = click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
"""A native checkpoint that a command reads."""

out_option = click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
"""Where a command writes to."""


def parallel_size_option(name: str, help: str, default: int | None = 1) -> Callable[[Command], Command]:
    """An option for a number of ranks."""
    return click.option(name, type=click.IntRange(min=1), default=default, help=help, show_default=default is not None)


tp_option = parallel_size_option("--tp", "Tensor-parallel size to cut for.")
pp_option = parallel_size_option("--pp", "Pipeline-parallel size to cut for.")

FORMAT_NAMES = ("hf", "meta", "megatron-llm")
"""The published formats; those of :data:`megacore.weights.formats.FORMATS`, which would be slow to import."""

source_option = click.option(
    "--source", help=f"Format of the checkpoint: {', '.join(FORMAT_NAMES)}.  [default: recognised by its files]"
)
"""The format that a command reads."""

format_option = click.option(
    "--format", default="hf", show_default=True, help=f"Format to write: {', '.join(FORMAT_NAMES)}."
)
"""The format that a command writes."""

true_vocab_size_option = click.option(
    "--true-vocab-size",
    type=click.IntRange(min=1),
    help="Rows of the vocabulary that are tokens, where a checkpoint pads it and does not say so.",
)
"""What a command is told of the vocabulary."""


def from_option(verb: str, *, default: str | None = None) -> Callable[[Command], Command]:
    """An option for the published checkpoint that a command reads; required unless there is a ``default``."""
    return click.option(
        "--from",
        "origin",
        metavar="DIR_OR_HUB_ID",
        required=default is None,
        help=f"Checkpoint to {verb}: a directory, or owner/name on the Hugging Face hub."
        + (f"  [default: {default}]" if default else ""),
    )


cache_dir_option = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep what comes from the hub here.  [default: the cache of huggingface_hub]",
)
"""Where a command keeps what it fetches."""

revision_option = click.option("--revision", help="Branch, tag or commit to fetch from the hub.  [default: main]")
"""Which state of a repository a command fetches."""

add_tokens_option = click.option(
    "--add-tokens",
    type=click.Path(path_type=Path),
    metavar="PREFIX_OR_DIR",
    help="Give embedding and head rows for the new tokens of a dataset's tokenizer (or of one in a directory), each "
    "the mean of the rows before the first of them.",
)
