"""Whether the token ids of a dataset stand for what the model has learned that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megacore.checkpoint import Checkpoint
from megacore.data import DatasetDescription, InstructionDescription, load_tokenizer
from megacore.data.tokenizers.tokenizer import digest_of_tokens
from megacore.errors import DataError

Description = DatasetDescription | InstructionDescription


def require_rows(prefix: Path, description: Description | None, checkpoint: Checkpoint) -> None:
    """Refuse a dataset of more ids than the model has rows, where the dataset says how many there are.

    Raises:
        DataError: says what to do.
    """
    vocab_size = checkpoint.manifest.config["vocab_size"]
    if description is not None and description.vocab_size > vocab_size:
        raise DataError(
            f"the dataset {prefix} was made with a tokenizer of {description.vocab_size} ids, and the checkpoint's "
            f"vocabulary has {vocab_size}: tokenize with the checkpoint's own tokenizer, and with --no-new-tokens or, "
            "where new tokens are wanted, give the model rows for them: "
            f"`megacore split {checkpoint.path} --out … --add-tokens {prefix}`"
        )


def check_vocabulary(
    prefix: Path, description: Description, checkpoint: Checkpoint, *, may_differ: bool
) -> Iterator[str]:
    """Refuse a dataset whose ids stand for other tokens than the checkpoint's tokenizer says; what is not known.

    The new tokens of the dataset are not looked at: the checkpoint may carry the tokenizer that lacks them.

    Args:
        prefix: of the dataset.
        description: of the dataset.
        checkpoint: of the model; one that carries no tokenizer has nothing to compare with.
        may_differ: do not refuse it, but tell.

    Raises:
        DataError: says what to do.
    """
    if description.tokenizer_sha256 in checkpoint.manifest.tokenizer.values():
        return
    files = checkpoint.tokenizer_files()
    file = files.get("tokenizer.json") or files.get("tokenizer.model")
    if file is None:
        return
    if description.known_tokens_sha256 is None:
        yield (
            f"the dataset {prefix} was made with another tokenizer than the checkpoint carries, and does not say "
            f"whether its ids stand for the same tokens; tokenize with {file.parent} to be sure"
        )
        return
    num_known = min(description.new_tokens.values(), default=description.vocab_size)
    if digest_of_tokens(load_tokenizer(file).vocabulary(), num_known) == description.known_tokens_sha256:
        return
    told = f"the ids of the dataset {prefix} stand for other tokens than those of {file}"
    if not may_differ:
        raise DataError(
            f"{told}, which the checkpoint carries: tokenize with that one. If the model is to learn the other "
            "vocabulary, set data.other_vocabulary = true"
        )
    yield told
