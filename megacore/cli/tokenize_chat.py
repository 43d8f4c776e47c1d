"""``megacore tokenize-chat``: conversations to instruction data, token ids with the role of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from megacore.cli.notes import counted, print_note
from megacore.cli.progress import bytes_progress
from megacore.cli.tokenizing_options import (
    MultiInputCommand,
    inputs_option,
    note_new_tokens,
    on_error_option,
    prefix_option,
    tokenizer_option,
    vocab_extra_ids_list_option,
)

_MAX_SKIP_NOTES = 10
"""Number of skipped records with a note of their own."""


@click.command(name="tokenize-chat", cls=MultiInputCommand)
@inputs_option("Conversations: one JSON object per line of a .jsonl or .json file, or one row of a .parquet file.")
@tokenizer_option(
    "A tokenizer.json, or the directory with it, its tokenizer_config.json and its chat template. With --markup "
    "megatron-llm also a tokenizer.model."
)
@prefix_option(
    "Prefix of the output: PREFIX-text and PREFIX-role, each a .bin and an .idx, and PREFIX.json. None may exist."
)
@click.option(
    "--messages-key",
    metavar="KEY",
    help="Key of the list of messages, each with role and content.  [default: messages]",
)
@click.option("--tools-key", metavar="KEY", help="Key of the tools for the chat template, if any.  [default: tools]")
@click.option(
    "--question-key", metavar="KEY", help="Key of the question, for records without messages.  [default: input]"
)
@click.option("--answer-key", metavar="KEY", help="Key of the answer.  [default: output]")
@click.option("--system-key", metavar="KEY", help="Key of the system message.  [default: no system message]")
@click.option(
    "--markup",
    type=click.Choice(["template", "megatron-llm"]),
    help="Markup of the turns: the chat template, or Megatron-LLM's <|im_start|>question and so on.  [default: "
    "megatron-llm for questions and answers, template for messages]",
)
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Jinja chat template.  [default: the tokenizer's own]",
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
    **settings: Any,
) -> None:
    """Tokenize conversations into instruction data.

    The output has token ids and the role of each. With data.kind = "instruction", the training loss covers the
    assistant's tokens, including the end of its turns.

    \b
    megacore tokenize-chat --input chats.jsonl --tokenizer published/ --out data/chats
    megacore tokenize-chat --input qa.jsonl --question-key q --answer-key a --tokenizer published/ --out data/qa
    """
    import megacore.data
    from megacore.data.preprocess.readers import expand, total_size
    from megacore.errors import DataError

    has_message_keys, has_question_keys = messages_key or tools_key, question_key or answer_key or system_key
    if has_message_keys and has_question_keys:
        raise click.UsageError(
            "records have either messages (--messages-key, --tools-key) or a question and an answer (--question-key, "
            "--answer-key, --system-key)"
        )
    keys = (
        megacore.data.QuestionKeys(question=question_key or "input", answer=answer_key or "output", system=system_key)
        if has_question_keys
        else megacore.data.MessageKeys(messages=messages_key or "messages", tools=tools_key or "tools")
    )
    num_skipped = 0

    def note_skipped(error: DataError) -> None:
        nonlocal num_skipped
        num_skipped += 1
        if num_skipped <= _MAX_SKIP_NOTES:
            print_note(f"skipped {error}")

    with bytes_progress("tokenizing", total_size(expand(inputs))) as advance:
        summary = megacore.data.tokenize_chat(
            inputs,
            tokenizer=tokenizer,
            out=out,
            keys=keys,
            on_skip=note_skipped,
            advance=advance,
            **settings,
        )
    if num_skipped > _MAX_SKIP_NOTES:
        print_note(f"skipped {num_skipped - _MAX_SKIP_NOTES:,} more")
    note_new_tokens(summary.new_tokens, summary.tokenizer_directory)
    if summary.num_with_special_tokens:
        print_note(
            f"{counted(summary.num_with_special_tokens, 'conversation')} with text that spells special tokens and was "
            "tokenized as such; remove it from the records if that is not intended"
        )
    click.echo(
        f"{out}: {counted(summary.num_conversations, 'conversation')}, {counted(summary.num_tokens, 'token')}, "
        f"{summary.num_assistant_tokens / summary.num_tokens:.1%} of them the assistant's"
        + (f"; skipped {counted(summary.num_skipped, 'record')}" if summary.num_skipped else "")
    )
