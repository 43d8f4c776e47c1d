"""``converse``: a conversation with a model, turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megacore.errors import DataError, GenerationError
from megacore.generation.sampling import Sampling
from megacore.generation.text_generator import Limits, OnText, TextGenerator


def converse(
    generator: TextGenerator,
    limits: Limits,
    sampling: Sampling,
    system: str | None,
    read: Callable[[], str | None],
    on_text: OnText,
    on_error: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Answer each message that ``read`` returns until it returns ``None``; return the messages of the conversation.

    The seed of ``sampling`` is increased by one for each answer. ``on_text`` receives the text of an answer as it is
    generated, with the number of the turn. A message that cannot be answered, because the conversation would be longer
    than the model's context, is removed from the conversation, and ``on_error`` receives the reason.

    Raises:
        DataError: when the tokenizer has no chat template.
        GenerationError: when there is no tokenizer.
    """
    _ = generator.prompts.template  # report a missing one before the user has typed anything
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    turn = 0

    def on_turn_text(index: int, text: str) -> None:
        on_text(turn, text)

    while (question := read()) is not None:
        conversation = [*messages, {"role": "user", "content": question}]
        turn_sampling = replace(sampling, seed=sampling.seed + turn)
        try:
            generator.prompts.encode(conversation)  # a later failure would also end the other ranks, which have begun
        except (DataError, GenerationError) as error:
            on_error(str(error))
            continue
        [answer] = generator.generate([conversation], limits, turn_sampling, on_text=on_turn_text)
        messages = [*conversation, {"role": "assistant", "content": answer.text}]
        turn += 1
    return messages
