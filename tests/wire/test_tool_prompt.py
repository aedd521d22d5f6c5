"""Tools in the prompt, calls out of the text: nothing of the markers can be faked, nothing unfit is taken for a call."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.model.errors import InvalidRequest
from fallow.wire import json_schema
from fallow.wire.generation import Tool, ToolCall, Turn
from fallow.wire.tool_prompt import TOOLS_MAX, CallWatch, call_schema, check_tools, either_schema, read_calls, with_tools

PROMISE = settings(max_examples=150)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
LIST: dict[str, Any] = {
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["next"]}
    },
    "type": "object",
    "properties": {"list": {"$ref": "#/$defs/node"}},
    "required": ["list"],
}
WEATHER = Tool(name="weather", description="The weather.", parameters=CITY)
TIME = Tool(name="time")
CHAIN = Tool(name="chain", parameters=LIST)
USER = Turn(role="user", text="Hello")


def test_tools_are_told_before_everything_else() -> None:
    turns = with_tools([Turn(role="system", text="Be brief."), USER], [WEATHER, TIME], "auto", None)
    assert [turn.role for turn in turns] == ["system", "user"]
    assert turns[0].text.startswith("Be brief.\n\n")
    lines = turns[0].text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"]["name"] for line in lines] == ["weather", "time"]
    assert json.loads(lines[0])["function"]["parameters"] == CITY
    alone = with_tools([USER], [WEATHER], "required", None)
    assert [turn.role for turn in alone] == ["system", "user"]


def test_only_the_tool_that_must_be_called_is_told() -> None:
    text = with_tools([USER], [WEATHER, TIME], "required", "time")[0].text
    assert '"time"' in text
    assert '"weather"' not in text


def test_with_none_no_tool_is_told_but_the_history_stays() -> None:
    history = [
        USER,
        Turn(role="assistant", text="Let me see.", calls=(ToolCall(id="1", name="weather", arguments='{"city":"Ulm"}'),)),
        Turn(role="tool", text="rain", call_id="1"),
        Turn(role="tool", text="wind", call_id="2"),
        Turn(role="user", text="Thanks"),
    ]
    turns = with_tools(history, [WEATHER], "none", None)
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "user"]
    assert turns[1].text == 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city":"Ulm"}}\n</tool_call>'
    assert turns[2].text == "<tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response>"


@pytest.mark.parametrize("marker", ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"])
def test_nobody_can_fake_a_marker(marker: str) -> None:
    told = Tool(name="t", description=marker, parameters={})
    history = [
        Turn(role="user", text=f"a {marker} b"),
        Turn(role="assistant", text=marker, calls=(ToolCall(id="1", name="t", arguments=json.dumps({"x": marker})),)),
        Turn(role="tool", text=marker, call_id="1"),
    ]
    clean = with_tools(
        [Turn(role="user", text="a b"), Turn(role="assistant", calls=history[1].calls), Turn(role="tool", call_id="1")],
        [told],
        "auto",
        None,
    )
    turns = with_tools(history, [told], "auto", None)
    ours = {"<tool_call>": 3, "</tool_call>": 3, "<tool_response>": 1, "</tool_response>": 1, "<tools>": 2, "</tools>": 2}
    assert sum(turn.text.count(marker) for turn in turns) == sum(turn.text.count(marker) for turn in clean) == ours[marker]


def test_what_callers_say_of_tools_is_neutralised() -> None:
    told = Tool(name="t", description="<|im_end|>")
    text = with_tools([USER], [told], "auto", None, lambda text: text.replace("<|", "<\u200b|"))[0].text
    assert "<|im_end|>" not in text
    assert "<tool_call>" in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"name": "weather", "arguments": {"city": "Ulm"}}', (("weather", {"city": "Ulm"}),)),
        (
            '[{"name": "time", "arguments": {}}, {"name": "weather", "arguments": {"city": "Ulm"}}]',
            (("time", {}), ("weather", {"city": "Ulm"})),
        ),
        ('[{"name": "time", "arguments": {}}, {"name": "time", "arguments": {}}]', (("time", {}),)),
        ('{"name": "weather", "arguments": {"city": 5}}', None),
        ('{"name": "weather", "arguments": {}}', None),
        ('{"name": "weather", "arguments": {"city": "Ulm", "more": 1}}', None),
        ('{"name": "time", "arguments": {"x": 1}}', None),
        ('{"name": "nobody", "arguments": {}}', None),
        ('{"name": "weather", "arguments": {"city": "Ul', None),
        ('{"name": "time", "arguments": {}, "more": 1}', None),
        ("[]", None),
        ("", None),
        ("[" * 5000, None),
        ('"time"', None),
    ],
)
def test_calls_are_read_and_checked(text: str, found: Any) -> None:
    assert read_calls(text, [WEATHER, TIME]) == found


def test_only_the_named_tool_counts() -> None:
    assert read_calls('{"name": "time", "arguments": {}}', [WEATHER, TIME], "weather") is None


def test_the_schema_of_calls_holds_every_tool_s_own() -> None:
    constraint = call_schema([WEATHER, CHAIN], None, parallel=False)
    good = {"name": "chain", "arguments": {"list": {"next": {"next": None}}}}
    assert json_schema.fits(constraint.engine, good)
    assert not json_schema.fits(constraint.engine, good | {"arguments": {"list": {"next": {"next": 1}}}})
    assert not json_schema.fits(constraint.engine, {"name": "weather", "arguments": good["arguments"]})
    several = call_schema([WEATHER, CHAIN], None, parallel=True).engine
    assert json_schema.fits(several, [good, good])
    assert not json_schema.fits(several, [])
    assert not json_schema.fits(several, [good] * 9)
    named = call_schema([WEATHER, CHAIN], "weather", parallel=False).engine
    assert not json_schema.fits(named, good)
    check_tools([WEATHER, CHAIN], "tools[{index}]")


def test_a_call_or_a_text() -> None:
    either = either_schema(call_schema([CHAIN], None, parallel=False), json_schema.constrain(LIST)).engine
    assert json_schema.fits(either, {"name": "chain", "arguments": {"list": {"next": None}}})
    assert json_schema.fits(either, {"list": {"next": {"next": None}}})
    assert not json_schema.fits(either, {"list": {"next": 3}})


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([WEATHER, Tool(name="x", parameters={"type": "nonsense"})], "tools[1].p"),
        ([Tool(name="x", parameters={"type": "string"})], "tools[0].p"),
        ([Tool(name=f"t{n}") for n in range(TOOLS_MAX + 1)], "tools"),
        ([Tool(name=f"t{n}", parameters={"type": "object", "description": "x" * 60_000}) for n in range(2)], "tools"),
    ],
)
def test_tools_that_cannot_be_used(tools: list[Tool], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_tools(tools, "tools[{index}].p")
    assert caught.value.param == param


def watched(pieces: list[str]) -> tuple[str, bool]:
    watch = CallWatch([WEATHER])
    shown = "".join(watch.feed(piece) for piece in pieces)
    return shown + watch.rest(), watch.found


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@PROMISE
@given(st.text(alphabet='<tol_cal>{"name: w`\n', max_size=40) | st.text(max_size=30), st.lists(st.integers(0, 100), max_size=6))
def test_text_that_is_no_call_comes_out_whole(text: str, places: list[int]) -> None:
    if "<tool_call>" not in text:
        assert watched(cut(text, places)) == (text, False)


@PROMISE
@given(st.text(alphabet="<tol_cal> {\n", max_size=20), st.lists(st.integers(0, 100), max_size=6))
def test_a_call_is_found_however_it_is_cut(before: str, places: list[int]) -> None:
    if "<tool_call>" not in before + "<tool_call":
        assert watched(cut(before + "<tool_call>{", places)) == (before.rstrip(), True)


@pytest.mark.parametrize(
    "text", ['{"name": "weather", ', ' \n{ "name" : "weather"', '```json\n{"name":"weather"', '```\n{"name":"weather"}']
)
def test_a_bare_call_is_one_too(text: str) -> None:
    for at in range(len(text)):
        assert watched([text[:at], text[at:]]) == ("", True)


@pytest.mark.parametrize("text", ['{"name": "nobody"}', '{"names": "weather"', 'So: {"name": "weather"}', "```python\nx = 1", "{}", "`x`"])
def test_what_only_looks_like_one(text: str) -> None:
    for at in range(len(text)):
        assert watched([text[:at], text[at:]]) == (text, False)
