"""``megacore generate``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megacore.cli.notes import print_note, printing_for_a_reader
from megacore.cli.options import DtypeType, checkpoint_argument, parallel_size_option

if TYPE_CHECKING:
    import torch

    from megacore.generation import Generated

_WAIT_FOR_A_TURN = timedelta(days=7)


@click.command()
@checkpoint_argument
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Go on from this; may be given several times.")
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Go on from what this file holds, less a line end at its end; - is standard input. Without any prompt it is "
    "read, too.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Answer the prompt as the tokenizer's chat template has it; without a prompt, talk on the terminal.",
)
@click.option("--system", metavar="TEXT", help="With --chat: the system message.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --chat: take this template.  [default: the tokenizer's]",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of each text.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Draw tokens, the less likely ones the more often the higher it is; 0 takes the most likely.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from so many tokens, the most likely ones.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the most likely tokens that together have this probability.",
)
@click.option("--seed", type=int, help="Of what is drawn.  [default: another one each time]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this; may be given several times.")
@click.option(
    "--bos/--no-bos",
    "add_bos",
    default=None,
    help="Begin a text with the token for that, or not.  [default: as the tokenizer's files say]",
)
@click.option("--dtype", type=DtypeType(), help="What the model computes in.  [default: the checkpoint's]")
@parallel_size_option("--tp", "Tensor-parallel size to run at.  [default: the checkpoint's]", default=None)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Texts that grow at a time."
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each prompt, once all are done.")
def generate(
    checkpoint: Path,
    prompts: tuple[str, ...],
    files: tuple[Path, ...],
    chat: bool,
    system: str | None,
    chat_template: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    add_bos: bool | None,
    dtype: torch.dtype | None,
    tp: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Print what the model of CKPT says after a prompt, as it comes.

    \b
    megacore generate ckpt/ --prompt "The capital of France is"
    megacore generate ckpt/ --chat --temperature 0.7 --top-p 0.9
    """
    if not chat and (system is not None or chat_template is not None):
        raise click.UsageError("--system and --chat-template are for --chat.")
    from megacore.generation import Limits, Sampling, converse, generate, run_with_generator
    from megacore.parallel import is_first_process

    settings: dict[str, Any] = {"dtype": dtype, "add_bos": add_bos, "chat_template": chat_template}
    is_interactive = not prompts and not files and sys.stdin.isatty()
    if is_interactive and (as_json or not chat):
        raise click.UsageError("Give --prompt, --prompt-file, or a prompt on standard input.")
    if is_interactive:
        drawn = {} if seed is None else {"seed": seed}
        run_with_generator(
            checkpoint,
            converse,
            Limits(max_new_tokens=max_new_tokens, stop=stop),
            Sampling(temperature=temperature, top_k=top_k, top_p=top_p, **drawn),
            system,
            Terminal(os.ttyname(sys.stdin.fileno())),
            print_answer,
            print_refusal,
            tp=tp,
            timeout=_WAIT_FOR_A_TURN,
            **settings,
        )
        return
    texts = [*prompts, *map(read_prompt, files or (() if prompts else (Path("-"),)))] if is_first_process() else [""]
    asked: list[Any] = list(texts)
    if chat:
        said_before = [] if system is None else [{"role": "system", "content": system}]
        asked = [[*said_before, {"role": "user", "content": text}] for text in texts]
    results = generate(
        checkpoint,
        asked,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        tp=tp,
        batch_size=batch_size,
        on_text=None if as_json else TextPrinter(texts),
        **settings,
    )
    if not is_first_process():
        return
    for number, (text, result) in enumerate(zip(texts, results, strict=True), start=1):
        if as_json:
            print_text(json.dumps({"prompt": text, **result.to_json()}, ensure_ascii=False) + "\n")
        elif note := note_on(result, max_new_tokens):
            print_note(f"the text {note}" if len(texts) == 1 else f"text {number} {note}")


def read_prompt(file: Path) -> str:
    """The text of a file, less a line end at its end; ``-`` is standard input."""
    from megacore.errors import DataError

    try:
        content = sys.stdin.buffer.read() if file == Path("-") else file.read_bytes()
        return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error


def note_on(result: Generated, max_new_tokens: int) -> str | None:
    """What a person should know of how a text ended."""
    if result.ended_by == "max_new_tokens":
        return f"was cut off after {max_new_tokens} tokens: --max-new-tokens lets it go on"
    if result.ended_by == "context":
        return "was cut off where the context of the model is full"
    return None


def print_text(text: str) -> None:
    """Print what was asked for, as it is; see :func:`~megacore.cli.notes.printing_for_a_reader`."""
    with printing_for_a_reader():
        click.echo(text, nl=False)


class TextPrinter:
    """Prints the texts one after the other, each as it comes; what comes of a later one waits."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts
        self.current = 0
        self.waiting = [""] * len(prompts)
        self.ended: set[int] = set()
        self.has_title = len(prompts) == 1

    def __call__(self, index: int, text: str) -> None:
        self.waiting[index] += text
        if not text:
            self.ended.add(index)
        while self.current < len(self.prompts):
            if not self.has_title:
                print_text(f"==> {self.prompts[self.current]}\n")
                self.has_title = True
            print_text(self.waiting[self.current])
            self.waiting[self.current] = ""
            if self.current not in self.ended:
                return
            print_text("\n")
            self.current += 1
            self.has_title = False


class Terminal:
    """Asks for turns on the terminal at ``path``, also from a process that was started without one."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> str | None:
        """A line that is not empty; ``None`` at the end of the input (Ctrl-D)."""
        if not sys.stdin.isatty():
            os.dup2(os.open(self.path, os.O_RDWR), 0)
            sys.stdin = open(0, closefd=False)  # noqa: SIM115
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lets input() edit the line)
        while True:
            try:
                line = input("> ")
            except EOFError:
                click.echo()
                return None
            if line.strip():
                return line


def print_answer(turn: int, text: str) -> None:
    """Print some of an answer, and two line ends after it."""
    print_text(text or "\n\n")


def print_refusal(reason: str) -> None:
    """Say why a turn has no answer."""
    click.echo(f"Error: {reason}", err=True)
