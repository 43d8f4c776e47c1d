"""``megacore report``: a page with the curves of one or several runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="File to write.  [default: report.html in the directory of a single run]",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write an HTML page with the curves of runs.

    RUN is the output.directory of a run file, which may still be running. The page is self-contained: it
    needs no network and no other file.

    \b
    megacore report runs/first
    megacore report runs/first runs/second --out comparison.html
    """
    from megacore.runs import report

    click.echo(f"Wrote {report(runs, out)}.")
