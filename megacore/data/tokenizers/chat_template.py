"""A tokenizer's chat template: a conversation to text, and which of that text is the assistant's.

Templates are Jinja programs that come with a tokenizer, so they run in Jinja's sandbox, with what transformers gives
them and nothing else: the messages, the tools, the names of special tokens, ``raise_exception``, ``strftime_now``, and
the tag ``{% generation %}`` around what the assistant says.
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
        text: of the whole.
        assistant: where the assistant speaks: ``[start, stop)`` in characters, ascending, end of turn included.
        system_stop: the text before it is the system message; 0 where the template does not write it first and apart.
    """

    text: str
    assistant: list[tuple[int, int]]
    system_stop: int


class ChatTemplate:
    """Renders conversations as ``apply_chat_template`` of transformers does.

    Args:
        source: the template.
        where: what messages call it, its file as a rule.
        special_tokens: what the template knows by the names ``bos_token``, ``eos_token`` and so on.
        added_tokens: texts that the tokenizer takes for one token wherever they stand; ends of turns are among them.

    Raises:
        DataError: it is not a template.
    """

    def __init__(
        self, source: str, *, where: str, special_tokens: Mapping[str, str], added_tokens: Sequence[str] = ()
    ) -> None:
        self.source = source
        self.where = where
        self._special_tokens = dict(special_tokens)
        # The longest first: one may begin as another one does.
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
        """The text of a conversation, or of its beginning; with the prompt for the assistant's next turn on request.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        return self._split_off_marks(self._run(messages, tools, add_generation_prompt=add_generation_prompt))[0]

    def render_marked(self, messages: Sequence[Message], *, tools: list[Any] | None = None) -> RenderedChat:
        """The text of a conversation, with where the assistant speaks.

        What a template marks with ``{% generation %}`` is the assistant's; and if it marks its answers without the
        end-of-turn token that follows, that token too, since a model must learn to stop. Where it marks nothing, a turn
        is what the template adds to the conversation before it with the prompt for an answer. White space after an
        end-of-turn token is nobody's turn: no model is asked to go on there.

        Raises:
            DataError: the template fails, or what it writes for a conversation does not begin with what it writes for
                the conversation's beginning, so that turns cannot be told apart.
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
        """The token that ends what the assistant says; ``None`` where the tokenizer has none for it."""
        try:
            text = self.render([_PROBE[0], {"role": "assistant", "content": self._mark}])
        except DataError:
            return None
        rest = text.partition(self._mark)[2].lstrip()
        return next((token for token in self._added_tokens if rest.startswith(token)), None)

    def _run(self, messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False) -> str:
        # transformers leaves out keys without a value too: templates ask whether there is such a key.
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
        except Exception as error:  # a program of somebody else, which may raise anything
            raise DataError(f"the chat template {self.where} does not take the conversation: {error}") from error

    def _split_off_marks(self, output: str) -> tuple[str, list[tuple[int, int]]]:
        """The text without the marks of the tag, and the spans that they enclosed."""
        pieces = re.split(f"(</?{self._mark}>)", output)
        text, position, begun = "", 0, []
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
        text = "".join(pieces[::2])
        return text, spans

    def _turn(self, text: str, messages: Sequence[Message], number: int, tools: list[Any] | None) -> tuple[int, int]:
        """Where turn ``number`` lies in the ``text`` of all messages."""
        before = self.render(messages[:number], tools=tools, add_generation_prompt=True)
        until = self.render(messages[: number + 1], tools=tools)
        if not (until.startswith(before) and text.startswith(until)):
            raise DataError(
                f"the chat template {self.where} writes the beginning of this conversation otherwise when message "
                f"{number + 1} follows, so that the assistant's text cannot be told apart: put {{% generation %}} and "
                "{% endgeneration %} around it in a copy of the template, and give that with --chat-template"
            )
        turn = until[len(before) :]
        bare = turn.rstrip()
        return len(before), len(before) + len(bare if bare.endswith(self._added_tokens) else turn)

    def _system_stop(self, text: str, messages: Sequence[Message], tools: list[Any] | None) -> int:
        if messages[0]["role"] != "system":
            return 0
        try:
            system = self.render(messages[:1], tools=tools)
        except DataError:  # many refuse a conversation that nobody has begun
            return 0
        return len(system) if text.startswith(system) else 0

    def _unmarked_end_of_turn(self) -> str:
        """What follows a marked answer up to its end-of-turn token, if the template leaves that outside of the mark."""
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
    """The chat template in ``file``, or the one that came with the tokenizer.

    Raises:
        DataError: there is none, it is not a template, or the tokenizer does not know the tokens that it writes.
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
    """The text of a chat template, and where it stands."""
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
    """The chat template of the tokenizer in ``directory``, and where it stands; ``None`` where it has none.

    ``chat_template.jinja`` comes before the one in ``tokenizer_config.json``. Of several by name, it is ``default``, or
    with tools ``tool_use`` where there is such a one.

    Raises:
        DataError: the files are damaged, or name several templates, none of them ``default``.
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
    """What templates are written for: the settings and names that transformers has, with marks around generation."""

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  Jinja's own way

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
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = _new_dict
    return environment


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, but without the names by which Python's insides are reached."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace of a chat template cannot have an attribute {name!r}")
        super().__setitem__(name, value)


def _new_dict(*items: Any, **named: Any) -> dict[Any, Any]:
    """``dict`` as templates call it; the class itself would have more to offer."""
    return dict(*items, **named)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message, with its reasoning under the names that templates read it by, whatever name it came with."""
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


def _now(form: str) -> str:
    return datetime.now().strftime(form)
