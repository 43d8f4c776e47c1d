"""Chat templates: from a conversation to text, with the spans of the assistant.

Templates are Jinja programs that come with a tokenizer. They run in Jinja's sandbox, with the same environment as in
transformers and nothing else: the messages, the tools, the names of special tokens, ``raise_exception``,
``strftime_now``, and the tag ``{% generation %}`` around the assistant's text. transformers itself is not used, since
the core does not depend on it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from megacore.data.tokenizers.tokenizer import Tokenizer, json_object, special_token_names
from megacore.errors import DataError

Message = Mapping[str, Any]

_PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: The whole text.
        assistant: Spans of the assistant, ``[start, stop)`` in characters, ascending, with the end of the turn.
        system_stop: End of the system message; 0 if the template does not write it first and separately.
    """

    text: str
    assistant: list[tuple[int, int]]
    system_stop: int


class ChatTemplate:
    """Renders conversations like ``apply_chat_template`` of transformers.

    Args:
        source: The template.
        where: Its name in error messages, usually its file.
        special_tokens: The template's variables ``bos_token``, ``eos_token`` and so on.
        added_tokens: Strings that the tokenizer always encodes to one token; ends of turns are among them.

    Raises:
        DataError: ``source`` is not a template.
    """

    def __init__(
        self, source: str, *, where: str, special_tokens: Mapping[str, str], added_tokens: Sequence[str] = ()
    ) -> None:
        self.source = source
        self.where = where
        self._special_tokens = dict(special_tokens)
        # The longest first: a token may be the beginning of another one.
        self._added_tokens = tuple(sorted(added_tokens, key=len, reverse=True))
        self._mark = secrets.token_hex(8)
        environment = _sandbox(begin=f"<{self._mark}>", end=f"</{self._mark}>")
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: is not a chat template: {error}") from error
        self.marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._end_of_turn = self._unmarked_end_of_turn() if self.marks_generation else ""

    def render(
        self, messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Render a conversation. Raises :class:`DataError` if the template refuses it, or fails on it."""
        return self._split_off_marks(self._run(messages, tools, add_generation_prompt=add_generation_prompt))[0]

    def render_marked(self, messages: Sequence[Message], *, tools: list[Any] | None = None) -> RenderedChat:
        """Render a conversation with the spans of the assistant.

        The assistant's text is what a template marks with ``{% generation %}``, and the end-of-turn token after it,
        since a model must learn to stop. In a template without marks, a turn is what the template adds to the
        conversation before it with the prompt for an answer. White space after an end-of-turn token belongs to no turn,
        since no model generates it.

        Raises:
            DataError: The template fails, or its text for a conversation does not begin with its text for the
                conversation's beginning, so that turns cannot be separated.
        """
        text, marked = self._split_off_marks(self._run(messages, tools))
        if self.marks_generation:
            spans = [(start, self._with_end_of_turn(text, stop)) for start, stop in marked]
        else:
            spans = [
                self._turn(text, messages, number, tools)
                for number, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        return RenderedChat(
            text, [span for span in spans if span[1] > span[0]], self._system_stop(text, messages, tools)
        )

    @property
    def end_of_turn(self) -> str | None:
        """The token that ends a turn of the assistant; ``None`` if the tokenizer has none for it."""
        try:
            text = self.render([_PROBE[0], {"role": "assistant", "content": self._mark}])
        except DataError:
            return None
        rest = text.partition(self._mark)[2].lstrip()
        return next((token for token in self._added_tokens if rest.startswith(token)), None)

    def _run(self, messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False) -> str:
        # transformers drops keys without a value too, since templates test whether a key exists.
        plain = [
            _with_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages
        ]
        try:
            return self._template.render(
                messages=plain,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a foreign program, which may raise anything
            raise DataError(f"the chat template {self.where} refuses the conversation: {error}") from error

    def _split_off_marks(self, output: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the text without the marks of the tag, and the spans that they enclosed."""
        pieces = re.split(f"(</?{self._mark}>)", output)
        position, begun = 0, []
        spans: list[tuple[int, int]] = []
        for piece in pieces:
            if piece == f"<{self._mark}>":
                begun.append(position)
            elif piece == f"</{self._mark}>":
                start = begun.pop()
                if not begun:
                    spans.append((start, position))
            else:
                position += len(piece)
        return "".join(pieces[::2]), spans

    def _turn(self, text: str, messages: Sequence[Message], number: int, tools: list[Any] | None) -> tuple[int, int]:
        """Return the span of turn ``number`` in the ``text`` of all messages."""
        before = self.render(messages[:number], tools=tools, add_generation_prompt=True)
        after = self.render(messages[: number + 1], tools=tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"the chat template {self.where} writes the beginning of this conversation differently when message "
                f"{number + 1} follows, so that the assistant's text cannot be separated: put {{% generation %}} and "
                "{% endgeneration %} around it in a copy of the template, and give that with --chat-template"
            )
        turn = after[len(before) :]
        bare = turn.rstrip()
        return len(before), len(before) + len(bare if bare.endswith(self._added_tokens) else turn)

    def _system_stop(self, text: str, messages: Sequence[Message], tools: list[Any] | None) -> int:
        if messages[0]["role"] != "system":
            return 0
        try:
            system = self.render(messages[:1], tools=tools)
        except DataError:  # many templates refuse a conversation without a user
            return 0
        return len(system) if text.startswith(system) else 0

    def _unmarked_end_of_turn(self) -> str:
        """Return the text from a marked answer to its end-of-turn token, if the template does not mark that token."""
        try:
            text, marked = self._split_off_marks(self._run(_PROBE, None))
        except DataError:
            return ""
        if not marked or text[: marked[-1][1]].rstrip().endswith(self._added_tokens):
            return ""
        rest = text[marked[-1][1] :]
        bare = rest.lstrip()
        token = next((token for token in self._added_tokens if bare.startswith(token)), "")
        return rest[: len(rest) - len(bare) + len(token)] if token else ""

    def _with_end_of_turn(self, text: str, stop: int) -> int:
        return stop + len(self._end_of_turn) if text.startswith(self._end_of_turn, stop) else stop


def open_chat_template(tokenizer: Tokenizer, file: Path | None, *, with_tools: bool = False) -> ChatTemplate:
    """Open the chat template in ``file``, or that of the tokenizer.

    Raises:
        DataError: There is none, it is not a template, or the tokenizer does not know its special tokens.
    """
    if tokenizer.file.suffix != ".json":
        raise DataError(
            f"{tokenizer.file}: a chat template needs a tokenizer.json, which knows the special tokens that it "
            "writes; give the directory of one, or questions and answers with the markup of megatron-llm"
        )
    directory = tokenizer.file.parent
    source, where = _template_source(directory, file, with_tools=with_tools)
    return ChatTemplate(
        source, where=where, special_tokens=special_token_names(directory), added_tokens=tokenizer.special_tokens()
    )


def _template_source(directory: Path, file: Path | None, *, with_tools: bool) -> tuple[str, str]:
    """Return the text of a chat template and its file."""
    if file is not None:
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: the chat template cannot be read: {error}") from error
    found = find_chat_template(directory, with_tools=with_tools)
    if found is None:
        raise DataError(
            f"{directory}: the tokenizer has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json): give a file with one as --chat-template"
        )
    return found


def find_chat_template(directory: Path, *, with_tools: bool = False) -> tuple[str, str] | None:
    """Find the chat template of the tokenizer in ``directory``; return its text and its file, or ``None``.

    ``chat_template.jinja`` has precedence over ``tokenizer_config.json``. Among several named templates, ``default`` is
    used, or with tools ``tool_use`` if it exists.

    Raises:
        DataError: The files are damaged, or name several templates, none of them ``default``.
    """
    found: dict[str, tuple[str, str]] = {}
    config = json_object(directory / "tokenizer_config.json").get("chat_template")
    where = str(directory / "tokenizer_config.json")
    if isinstance(config, str):
        found["default"] = (config, where)
    elif config is not None:
        try:
            found |= {entry["name"]: (str(entry["template"]), where) for entry in config}
        except (TypeError, KeyError) as error:
            raise DataError(f"{where}: its chat_template is neither a text nor a list of name and template") from error
    files = {"default": directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    found |= {name: (path.read_text(encoding="utf-8"), str(path)) for name, path in files.items() if path.is_file()}
    if not found:
        return None
    if with_tools and "tool_use" in found:
        return found["tool_use"]
    if "default" not in found:
        raise DataError(
            f"{directory}: has the chat templates {', '.join(sorted(found))}, and none is the default one: put the one "
            "to use into a file of its own, and name that with --chat-template"
        )
    return found["default"]


def _sandbox(*, begin: str, end: str) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return the environment of transformers' templates, with marks around the text of ``{% generation %}``."""

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  Jinja's own convention

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{begin}{caller()}{end}"

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        namespace=_Namespace,
        dict=lambda *items, **named: dict(*items, **named),  # the class itself would expose more than templates need
    )
    return environment


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without private attributes, which lead to Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace of a chat template cannot have an attribute {name!r}")
        super().__setitem__(name, value)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its reasoning under all names by which templates read it."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
