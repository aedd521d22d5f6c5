"""Tools as small models understand them: described in the prompt, called as marked JSON, and the calls read back and checked.

The form is that of the Hermes and Qwen models: `<tools>`, `<tool_call>`, `<tool_response>`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from fallow.model.errors import InvalidRequest
from fallow.wire import json_schema
from fallow.wire.generation import Tool, ToolCall, ToolChoice, Turn

TOOLS_MAX = 128
TOOLS_BYTES_MAX = 64 * 1024
PARALLEL_MAX = 4
"""How many calls a forced answer may hold."""
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
CALL, CALL_END = "<tool_call>", "</tool_call>"
_MARKER = re.compile(r"<(?=/?(?:tool_call|tool_response|tools)>)")
_BARE = re.compile(r'\s*(?:```(?:json)?\s*)?\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]{1,128})"')
_BARE_BEGUN = re.compile(
    r'\s*(?:`{1,2}|```(?:j|js|jso|json)?\s*|(?:```(?:json)?\s*)?\{\s*(?:"(?:n|na|nam|name(?:"\s*(?::\s*(?:"[a-zA-Z0-9_-]{0,128})?)?)?)?)?)?'
)
_INTRODUCTION = """\
You may call functions to help with the request. Their signatures stand between <tools> and </tools>:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and its arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": NAME, "arguments": ARGUMENTS}}
</tool_call>"""
_MUST = {"auto": "", "none": "", "required": "\nAnswer with a function call."}


def check_tools(tools: Sequence[Tool], param: str) -> None:
    """Refuse tools that can't be used; raises InvalidRequest naming the schema. `param` may hold `{index}`."""
    if len(tools) > TOOLS_MAX:
        raise InvalidRequest(f"at most {TOOLS_MAX} tools can be given, not {len(tools)}", param=param.partition("[")[0])
    if sum(len(msgspec.json.encode(tool.parameters)) for tool in tools) > TOOLS_BYTES_MAX:
        raise InvalidRequest(f"the tools' schemas are over {TOOLS_BYTES_MAX} bytes together", param=param.partition("[")[0])
    for index, tool in enumerate(tools):
        named = param.format(index=index)
        json_schema.check_schema(parameters(tool), param=named)
        if parameters(tool).get("type", "object") != "object":
            raise InvalidRequest(f"{named}: a tool's arguments are an object", param=named)


def parameters(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments."""
    return tool.parameters or NO_PARAMETERS


def plain(text: str) -> str:
    """A caller's text, in which nothing is one of our markers."""
    return _MARKER.sub("<\u200b", text) if "<" in text else text


def with_tools(
    turns: Sequence[Turn], tools: Sequence[Tool], choice: ToolChoice, tool_name: str | None, neutral: Callable[[str], str] = str
) -> tuple[Turn, ...]:
    """The conversation with its tools, calls and results as text: the roles left are system, user and assistant.

    `neutral` breaks the model's control tokens in what callers wrote of the tools; the turns' own texts have been through it.
    """
    out: list[Turn] = []
    for turn in turns:
        match turn.role:
            case "assistant":
                out.append(Turn(role="assistant", text="\n".join([*filter(None, [plain(turn.text)]), *map(_said, turn.calls)])))
            case "tool":
                text = f"<tool_response>\n{plain(turn.text)}\n</tool_response>"
                if out and out[-1].role == "user" and out[-1].call_id:
                    out[-1] = msgspec.structs.replace(out[-1], text=f"{out[-1].text}\n{text}")
                else:
                    out.append(Turn(role="user", text=text, call_id=turn.call_id or "?"))
            case "system" | "user":
                out.append(Turn(role=turn.role, text=plain(turn.text)))
    if not tools or choice == "none":
        return tuple(out)
    told = [tool for tool in tools if tool_name in (None, tool.name)]
    lines = "\n".join(neutral(plain(msgspec.json.encode(_signature(tool)).decode())) for tool in told)
    introduction = _INTRODUCTION.format(tools=lines) + _MUST[choice]
    if out and out[0].role == "system":
        return (Turn(role="system", text=f"{out[0].text}\n\n{introduction}"), *out[1:])
    return (Turn(role="system", text=introduction), *out)


def _signature(tool: Tool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": parameters(tool)}}


def _said(call: ToolCall) -> str:
    """A call of the history, as the model would have written it."""
    return f'{CALL}\n{{"name": {msgspec.json.encode(call.name).decode()}, "arguments": {plain(call.arguments)}}}\n{CALL_END}'


def call_schema(tools: Sequence[Tool], tool_name: str | None, *, parallel: bool) -> json_schema.Constraint:
    """What the engine must write when a tool has to be called: one object with name and arguments, or a short list of them."""
    wanted = [tool for tool in tools if tool_name in (None, tool.name)]
    defs: dict[str, Any] = {}
    exact = True
    ways: list[dict[str, Any]] = []
    for number, tool in enumerate(wanted):
        constraint = json_schema.constrain(parameters(tool))
        exact &= constraint.exact
        own = dict(constraint.engine)
        prefix = f"t{number}_"
        defs |= {prefix + name: _renamed(part, prefix) for name, part in own.pop("$defs", {}).items()}
        properties = {"name": {"const": tool.name}, "arguments": _renamed(own, prefix)}
        ways.append({"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False})
    one = ways[0] if len(ways) == 1 else {"anyOf": ways}
    engine: dict[str, Any] = {"type": "array", "items": one, "minItems": 1, "maxItems": PARALLEL_MAX} if parallel else one
    return json_schema.Constraint(engine={**engine, "$defs": defs} if defs else engine, exact=exact)


def either_schema(call: json_schema.Constraint, text: json_schema.Constraint) -> json_schema.Constraint:
    """A call, or a text of the caller's form."""
    defs: dict[str, Any] = {}
    ways = []
    for prefix, constraint in (("c_", call), ("x_", text)):
        own = dict(constraint.engine)
        defs |= {prefix + name: _renamed(part, prefix) for name, part in own.pop("$defs", {}).items()}
        ways.append(_renamed(own, prefix))
    engine: dict[str, Any] = {"anyOf": ways}
    return json_schema.Constraint(engine={**engine, "$defs": defs} if defs else engine, exact=call.exact and text.exact)


def _renamed(part: Any, prefix: str) -> Any:
    """The same schema, whose references point to definitions with the prefix. What constrain() made has no other references."""
    if isinstance(part, list):
        return [_renamed(one, prefix) for one in part]
    if not isinstance(part, dict):
        return part
    if isinstance(part.get("$ref"), str):
        return {"$ref": part["$ref"].replace("#/$defs/", f"#/$defs/{prefix}", 1)}
    return {key: value if key in ("enum", "const") else _renamed(value, prefix) for key, value in part.items()}


class _Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any]


_calls = msgspec.json.Decoder(_Call | list[_Call])


def read_calls(text: str, tools: Sequence[Tool], tool_name: str | None = None) -> tuple[tuple[str, dict[str, Any]], ...] | None:
    """The calls that a constrained text holds, each once; None if one is cut off, unknown or doesn't fit its tool's schema."""
    try:
        found = _calls.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    by_name = {tool.name: tool for tool in tools if tool_name in (None, tool.name)}
    calls: list[tuple[str, dict[str, Any]]] = []
    for call in found if isinstance(found, list) else [found]:
        tool = by_name.get(call.name)
        if tool is None or not json_schema.fits(parameters(tool), call.arguments):
            return None
        if (call.name, call.arguments) not in calls:
            calls.append((call.name, call.arguments))
    return tuple(calls) or None


class CallWatch:
    """Watches free text for the beginning of a call; what may be one is held back until it is clear."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = frozenset(tool.name for tool in tools)
        self._held = ""
        self._may_be_bare = True
        self.found = False

    def feed(self, text: str) -> str:
        """What of the text so far may be shown; nothing more once a call was `found`."""
        if self.found:
            return ""
        self._held += text
        if self._may_be_bare:
            bare = _BARE.match(self._held)
            if bare is not None and bare.group(1) in self._names:
                self.found = True
                return ""
            if bare is None and _BARE_BEGUN.fullmatch(self._held):
                return ""
            if not self._held.isspace():
                self._may_be_bare = False
        at = self._held.find(CALL)
        if at >= 0:
            self.found = True
            return self._shown(at).rstrip()
        keep = max((n for n in range(1, len(CALL)) if self._held.endswith(CALL[:n])), default=0)
        spaces = len(self._held) - keep - len(self._held[: len(self._held) - keep].rstrip())
        return self._shown(len(self._held) - keep - spaces)

    def _shown(self, end: int) -> str:
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def rest(self) -> str:
        """What is still held back when the text is over."""
        return "" if self.found else self._shown(len(self._held))
