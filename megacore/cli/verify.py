"""``megacore verify``: a comparison with the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megacore.cli.options import DtypeType, checkpoint_argument, model_tp_option
from megacore.cli.published_options import cache_dir_option, revision_option

if TYPE_CHECKING:
    from megacore.verification import Iteration


@click.command()
@checkpoint_argument
@click.option(
    "--reference",
    metavar="DIR_OR_HUB_ID",
    required=True,
    help="Published checkpoint to compare with: a directory, or OWNER/NAME on the Hugging Face hub.",
)
@cache_dir_option
@revision_option
@click.option("--data", type=click.Path(path_type=Path), metavar="PREFIX", help="Compare on token ids of this dataset.")
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="Compare on this text, tokenized.")
@click.option("--random-ids", is_flag=True, help="Compare on random token ids.")
@click.option("--iters", type=click.IntRange(min=1), default=10, show_default=True, help="Number of comparisons.")
@click.option(
    "--seq-length",
    type=click.IntRange(min=1),
    help="Tokens of each comparison.  [default: 512, or the model's context length if that is shorter]",
)
@click.option("--dtype", type=DtypeType(), default="fp32", show_default=True, help="Dtype that our model computes in.")
@model_tp_option
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest allowed logit error; the mean error may be a tenth of it. In 16 bit, the largest allowed mean error."
    "  [default: 0.001; in 16 bit 0.1]",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the results to this JSON file.",
)
def verify(
    checkpoint: Path,
    reference: str,
    cache_dir: Path | None,
    revision: str | None,
    data: Path | None,
    text: Path | None,
    random_ids: bool,
    iters: int,
    seq_length: int | None,
    json_file: Path | None,
    **settings: Any,
) -> None:
    """Compare the logits of CKPT with a reference.

    The reference is an independent implementation on the published weights. The exit code is 1 if the logits differ.

    \b
    megacore verify ckpt/ --reference published/ --data data/text
    """
    if (data is not None) + (text is not None) + random_ids != 1:
        raise click.UsageError("Give one of --data, --text and --random-ids.")
    if json_file is not None and not json_file.absolute().parent.is_dir():  # checked before the work, not after it
        raise click.UsageError(f"{json_file.absolute().parent}, for --json, is not a directory: create it first.")
    from megacore.checkpoint import Checkpoint
    from megacore.parallel import is_first_process
    from megacore.verification import dataset_samples, random_samples, text_samples, verify
    from megacore.weights.hub import locate

    opened = Checkpoint(checkpoint)
    seq_length = seq_length or min(512, opened.manifest.config["max_position_embeddings"])
    if data is not None:
        samples = dataset_samples(data, opened, iterations=iters, seq_length=seq_length)
    elif text is not None:
        samples = text_samples(text, opened, iterations=iters, seq_length=seq_length)
    else:
        samples = random_samples(opened, iterations=iters, seq_length=seq_length)
    report = verify(
        checkpoint,
        locate(reference, cache_dir=cache_dir, revision=revision),
        samples,
        on_iteration=print_iteration,
        **settings,
    )
    if is_first_process():
        click.echo(report.verdict)
        if json_file is not None:
            json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    click.get_current_context().exit(0 if report.passed else 1)


def print_iteration(iteration: Iteration) -> None:
    """Print the result of one comparison."""
    click.echo(
        f"Iteration {iteration.index}...\n"
        f"Max absolute error in the logits: {iteration.max_error:.6f}\n"
        f"Abs loss error: {iteration.loss_error:.6f} "
        f"Our loss: {iteration.our_loss:.3f}, theirs: {iteration.their_loss:.3f}"
    )
