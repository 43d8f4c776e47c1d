"""``megacore generate``: text after a prompt, or a conversation on the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megacore.cli.notes import print_note, printing_result
from megacore.cli.options import DtypeType, checkpoint_argument, model_tp_option

if TYPE_CHECKING:
    import torch

    from megacore.generation import Generated

_TURN_TIMEOUT = timedelta(days=7)  # the other ranks wait for rank 0, which waits for a person


@click.command()
@checkpoint_argument
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue. Repeatable.")
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="File with a text to continue, whose final line break is removed; - is standard input. Repeatable.  [default: "
    "standard input, if there is no prompt]",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Answer the prompt as a message in the tokenizer's chat template. Without a prompt, chat on the terminal.",
)
@click.option("--system", metavar="TEXT", help="System message, with --chat.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Jinja chat template, with --chat.  [default: the tokenizer's]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Maximum number of tokens to generate for each prompt.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 is greedy decoding.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K most likely tokens only.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the smallest set of most likely tokens whose probabilities add up to P (nucleus sampling).",
)
@click.option("--seed", type=int, help="Random seed for sampling.  [default: a new one each time]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the text before this string. Repeatable.")
@click.option(
    "--bos/--no-bos",
    "add_bos",
    default=None,
    help="Prepend the BOS token to a text, or not.  [default: as the tokenizer's files say]",
)
@click.option("--dtype", type=DtypeType(), help="Dtype that the model computes in.  [default: the checkpoint's]")
@model_tp_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Number of texts to generate at once.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per prompt, once all are done.")
def generate(
    checkpoint: Path,
    prompts: tuple[str, ...],
    files: tuple[Path, ...],
    chat: bool,
    system: str | None,
    chat_template: Path | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    add_bos: bool | None,
    dtype: torch.dtype | None,
    tp: int | None,
    batch_size: int,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with the model of CKPT.

    The text is printed as it is generated.

    \b
    megacore generate ckpt/ --prompt "The capital of France is"
    megacore generate ckpt/ --chat --temperature 0.7 --top-p 0.9
    """
    if not chat and (system is not None or chat_template is not None):
        raise click.UsageError("--system and --chat-template require --chat.")
    from megacore.generation import Limits, Sampling, converse, generate, run_with_generator
    from megacore.parallel import is_first_process

    settings: dict[str, Any] = {"tp": tp, "dtype": dtype, "add_bos": add_bos, "chat_template": chat_template}
    is_interactive = not prompts and not files and sys.stdin.isatty()
    if is_interactive and (as_json or not chat):
        raise click.UsageError("Give --prompt, --prompt-file, or a prompt on standard input.")
    if is_interactive:
        if sampling["seed"] is None:
            del sampling["seed"]
        run_with_generator(
            checkpoint,
            converse,
            Limits(max_new_tokens=max_new_tokens, stop=stop),
            Sampling(**sampling),
            system,
            partial(read_turn, os.ttyname(sys.stdin.fileno())),
            print_answer_text,
            print_turn_error,
            timeout=_TURN_TIMEOUT,
            **settings,
        )
        return
    texts = [*prompts, *map(read_prompt, files or (() if prompts else (Path("-"),)))] if is_first_process() else [""]
    results = generate(
        checkpoint,
        [as_messages(text, system) for text in texts] if chat else texts,
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_size=batch_size,
        on_text=None if as_json else TextPrinter(texts),
        **sampling,
        **settings,
    )
    if not is_first_process():
        return
    for number, (text, result) in enumerate(zip(texts, results, strict=True), start=1):
        if as_json:
            print_text(json.dumps({"prompt": text, **result.to_json()}, ensure_ascii=False) + "\n")
        elif reason := truncation_reason(result, max_new_tokens):
            print_note(f"the text {reason}" if len(texts) == 1 else f"text {number} {reason}")


def as_messages(text: str, system: str | None) -> list[dict[str, str]]:
    """Return the messages of a conversation in which the user asks ``text``."""
    system_messages = [] if system is None else [{"role": "system", "content": system}]
    return [*system_messages, {"role": "user", "content": text}]


def read_prompt(file: Path) -> str:
    """Return the text of a file, or of standard input for ``-``, without a final line break."""
    from megacore.errors import DataError

    try:
        content = sys.stdin.buffer.read() if file == Path("-") else file.read_bytes()
        return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error


def truncation_reason(result: Generated, max_new_tokens: int) -> str | None:
    """Return why a text was cut off, ``None`` if it was not."""
    if result.ended_by == "max_new_tokens":
        return f"was cut off after {max_new_tokens} tokens; increase --max-new-tokens for more"
    if result.ended_by == "context":
        return "was cut off at the context length of the model"
    return None


def print_text(text: str) -> None:
    """Print generated text without a line break; see :func:`~megacore.cli.notes.printing_result`."""
    with printing_result():
        click.echo(text, nl=False)


class TextPrinter:
    """Prints several texts in order while they are generated together, the current one as it grows."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts
        self.current = 0
        self.pending = [""] * len(prompts)
        self.ended: set[int] = set()
        self.has_title = len(prompts) == 1

    def __call__(self, index: int, text: str) -> None:
        self.pending[index] += text
        if not text:
            self.ended.add(index)
        while self.current < len(self.prompts):
            if not self.has_title:
                print_text(f"==> {self.prompts[self.current]}\n")
                self.has_title = True
            print_text(self.pending[self.current])
            self.pending[self.current] = ""
            if self.current not in self.ended:
                return
            print_text("\n")
            self.current += 1
            self.has_title = False


def read_turn(terminal: str) -> str | None:
    """Return the user's next line that is not empty, ``None`` at the end of the input (Ctrl-D).

    A rank process, whose standard input is closed, reads from the ``terminal`` of this path.
    """
    if not sys.stdin.isatty():
        os.dup2(os.open(terminal, os.O_RDWR), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing)
    try:
        while not (line := input("> ")).strip():
            pass
        return line
    except EOFError:
        click.echo()
        return None


def print_answer_text(turn: int, text: str) -> None:
    """Print the next text of an answer, and an empty line at its end."""
    print_text(text or "\n\n")


def print_turn_error(reason: str) -> None:
    """Print why a turn could not be answered."""
    click.echo(f"Error: {reason}", err=True)
