"""The code is described in plain, full sentences: docstrings, the keys of the run file, the help of the commands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click

from megacore.cli import cli
from megacore.training import RunConfig

ROOT = Path(__file__).parent.parent
SOURCES = ["megacore/**/*.py", "megacore/**/*.template", "plugins/*/megacore_*/**/*.py"]

FRAGMENT_START = re.compile(
    r"(Among|And|As|At|Because|Being|But|By|For|From|How|If|In|Its|Like|Likewise|Of|On|Or|Over|That|Those|To|"
    r"Until|What|When|Where|Whether|Which|While|Who|Whom|Whose|Why|With|Within)\b"
)
"""A text that begins with one of these needs the name above it, or a text before it, to be understood."""

ENTRY_FRAGMENT_START = re.compile(
    r"(how|likewise|of|that|those|what|where|whether|which|who|whose|why)\b", re.IGNORECASE
)
"""The same for an argument or an attribute."""

LOWER_CASE_NAMES = (
    "fastokens",
    "kitoken",
    "megacore",
    "pluggy",
    "safetensors",
    "sentencepiece",
    "torch",
    "transformers",
)
"""Names that stay lower case at the beginning of a sentence, with what may follow them: ``torchrun``, ``torch's``."""

ODD_WORDS = re.compile(
    r"\b(told|tells|telling|_tell\w*|tell_\w*|goes on|is had|in vain|becomes of|there are that|that there are)\b"
)


def sources() -> Iterator[tuple[str, str]]:
    """Yield the path from the root and the text of every module and template that is described."""
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


@cache
def docstrings() -> list[tuple[str, str]]:
    """Return where each docstring of the code is, and its text."""
    found = []
    for path, text in sources():
        if not path.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                line = 1 if isinstance(node, ast.Module) else node.lineno
                name = "the module" if isinstance(node, ast.Module) else node.name
                if docstring is not None:
                    found.append((f"{path}:{line}: {name}", docstring))
    return found


def fault(text: str) -> str | None:
    """Return why the first paragraph of ``text`` is not one or more full sentences, ``None`` if it is."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    if (match := FRAGMENT_START.match(paragraph)) is not None:
        return f"begins with {match[0]!r}, as a fragment does"
    if not re.match(r"[A-Z`\"]", paragraph) and not paragraph.startswith(LOWER_CASE_NAMES):
        return "begins neither with a capital letter nor with code"
    if not re.search(r"[.!?:]([\")`]*| \[default: .*\])$", paragraph):
        return "does not end with a full stop"
    return None


def faults(texts: Iterator[tuple[str, str]]) -> list[str]:
    """Return a line for each text that is not in full sentences, sorted by where it is."""
    return [
        f"{where}: {reason}: {' '.join(text.split())[:90]}"
        for where, text in texts
        if (reason := fault(text)) is not None
    ]


def helps(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """Yield where each help text of a command, its options and its subcommands is, and the text."""
    yield f"{name} --help", command.help or ""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield f"{name} {parameter.opts[0]}", parameter.help or ""
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            yield from helps(subcommand, f"{name} {subcommand.name}")


def test_no_odd_words():
    found = [
        f"{path}:{number}: {match[0]!r}: {line.strip()[:90]}"
        for path, text in sources()
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := ODD_WORDS.search(line)) is not None
    ]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_every_docstring_begins_with_a_full_sentence():
    found = faults(iter(docstrings()))
    assert len(docstrings()) > 1000
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_no_argument_or_attribute_is_described_by_a_fragment():
    """Entries are ``name: Phrase.`` below ``Args:`` and ``Attributes:``."""
    found = [
        f"{where}: {name}: {phrase}"
        for where, docstring in docstrings()
        for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
        for name, phrase in re.findall(r"^    (\S+): (.*)$", section, re.MULTILINE)
        if ENTRY_FRAGMENT_START.match(phrase)
    ]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_every_key_of_the_run_file_is_described_in_full_sentences():
    described = (
        (f"{section}.{key}", entry.description or "")
        for section, field in RunConfig.model_fields.items()
        for key, entry in field.annotation.model_fields.items()
    )
    found = faults(described)
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_every_help_text_is_in_full_sentences():
    found = faults((where, text) for where, text in helps(cli, "megacore") if not where.endswith(" --version"))
    assert not found, f"{len(found)}:\n" + "\n".join(found)
