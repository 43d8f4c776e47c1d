"""``megacore tokenize-chat``: conversations to a dataset of token ids and of who speaks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from megacore.cli.notes import counted, print_note
from megacore.cli.progress import bytes_progress
from megacore.cli.tokenizing_options import (
    ManyInputs,
    inputs_option,
    note_new_tokens,
    on_error_option,
    prefix_option,
    tokenizer_option,
    vocab_extra_ids_list_option,
)

_SHOWN = 10
"""Skipped records that are told of one by one."""


@click.command(name="tokenize-chat", cls=ManyInputs)
@inputs_option("Conversations, each a JSON object in a line of a .jsonl or .json file, or a row of a .parquet file.")
@tokenizer_option(
    "tokenizer.json, or the directory that has it, its tokenizer_config.json and its chat template; a tokenizer.model "
    "too, with the markup of megatron-llm."
)
@prefix_option("Writes PREFIX-text and PREFIX-role, each a .bin and an .idx, and PREFIX.json. None of them may exist.")
@click.option(
    "--messages-key", metavar="KEY", help="Where a record has its list of role and content.  [default: messages]"
)
@click.option("--tools-key", metavar="KEY", help="Where it has the tools, if any, for the template.  [default: tools]")
@click.option(
    "--question-key", metavar="KEY", help="Where a record has its question, instead of messages.  [default: input]"
)
@click.option("--answer-key", metavar="KEY", help="Where a record has its answer.  [default: output]")
@click.option("--system-key", metavar="KEY", help="Where a record has its system message.  [default: there is none]")
@click.option(
    "--markup",
    type=click.Choice(["template", "megatron-llm"]),
    help="What turns are written as: with a chat template, or with <|im_start|>question and so on, as Megatron-LLM "
    "does.  [default: megatron-llm for questions and answers, template for messages]",
)
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A Jinja template.  [default: the tokenizer's own]",
)
@vocab_extra_ids_list_option
@on_error_option
def tokenize_chat(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    out: Path,
    messages_key: str | None,
    tools_key: str | None,
    question_key: str | None,
    answer_key: str | None,
    system_key: str | None,
    markup: Literal["template", "megatron-llm"] | None,
    chat_template: Path | None,
    vocab_extra_ids_list: str,
    on_error: Literal["stop", "skip"],
) -> None:
    """Turn conversations into instruction data: token ids, and who speaks at each of them.

    Training on it (data.kind = "instruction") has a loss on the assistant's tokens, the end of its turns included.

    \b
    megacore tokenize-chat --input chats.jsonl --tokenizer published/ --out data/chats
    megacore tokenize-chat --input qa.jsonl --question-key q --answer-key a --tokenizer published/ --out data/qa
    """
    import megacore.data
    from megacore.data.preprocess.readers import expand, total_size
    from megacore.errors import DataError

    asks_messages, asks_questions = messages_key or tools_key, question_key or answer_key or system_key
    if asks_messages and asks_questions:
        raise click.UsageError(
            "records have either messages (--messages-key, --tools-key) or a question and an answer (--question-key, "
            "--answer-key, --system-key)"
        )
    keys = (
        megacore.data.QuestionKeys(question=question_key or "input", answer=answer_key or "output", system=system_key)
        if asks_questions
        else megacore.data.MessageKeys(messages=messages_key or "messages", tools=tools_key or "tools")
    )
    num_told = 0

    def tell(error: DataError) -> None:
        nonlocal num_told
        num_told += 1
        if num_told <= _SHOWN:
            print_note(f"skipped {error}")

    total = total_size(expand(inputs))
    with bytes_progress("tokenizing", total) as advance:
        summary = megacore.data.tokenize_chat(
            inputs,
            tokenizer=tokenizer,
            out=out,
            keys=keys,
            markup=markup,
            chat_template=chat_template,
            vocab_extra_ids_list=vocab_extra_ids_list.split(",") if vocab_extra_ids_list else (),
            on_error=on_error,
            on_skip=tell,
            advance=advance,
        )
    if num_told > _SHOWN:
        print_note(f"skipped {num_told - _SHOWN:,} more")
    note_new_tokens(summary.new_tokens, summary.tokenizer_directory)
    if summary.num_with_special_tokens:
        print_note(
            f"{counted(summary.num_with_special_tokens, 'conversation')} with text that spells special tokens, which "
            "it has become; remove it from the records where it must not have that power"
        )
    click.echo(
        f"{out}: {counted(summary.num_conversations, 'conversation')}, {counted(summary.num_tokens, 'token')}, "
        f"{summary.num_assistant_tokens / summary.num_tokens:.1%} of them the assistant's"
        + (f"; skipped {counted(summary.num_skipped, 'record')}" if summary.num_skipped else "")
    )
