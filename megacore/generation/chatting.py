"""``converse``: a conversation with a model, turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megacore.errors import DataError, GenerationError
from megacore.generation.generator import Limits, OnText, TextGenerator
from megacore.generation.sampling import Sampling


def converse(
    generator: TextGenerator,
    limits: Limits,
    sampling: Sampling,
    system: str | None,
    read: Callable[[], str | None],
    on_text: OnText,
    on_refusal: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Answer what ``read`` returns until that is ``None``; return the messages of the conversation.

    A turn that cannot be answered, since the conversation has become longer than the context for one, is told to
    ``on_refusal`` and taken back.

    Args:
        generator: answers.
        limits: of each answer.
        sampling: of the answers; the seed is counted up with each.
        system: a message before the first turn.
        read: the user's next turn.
        on_text: is told of an answer as it comes, with the number of the turn.
        on_refusal: is told why there is no answer.

    Raises:
        DataError: when the tokenizer has no chat template.
        GenerationError: when there is no tokenizer.
    """
    generator.prompts.require_template()  # a missing one is better said before anybody has typed anything
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    turn = 0

    def of_this_turn(index: int, text: str) -> None:
        on_text(turn, text)

    while (question := read()) is not None:
        asked = [*messages, {"role": "user", "content": question}]
        drawn = replace(sampling, seed=sampling.seed + turn)
        try:
            generator.prompts.read(asked)  # what fails later has begun on the other ranks too, and ends them all
        except (DataError, GenerationError) as error:
            on_refusal(str(error))
            continue
        [answer] = generator.generate([asked], limits, drawn, on_text=of_this_turn)
        messages = [*asked, {"role": "assistant", "content": answer.text}]
        turn += 1
    return messages
