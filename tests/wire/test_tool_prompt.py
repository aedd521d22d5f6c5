"""Tools in the prompt: what the model is shown, what it must write, and what of its text is a call."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fallow.model.errors import InvalidRequest
from fallow.wire import json_schema, tool_prompt
from fallow.wire.generation import Tool, ToolCall, ToolChoice, Turn

Json = dict[str, Any]

CITY: Json = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TREE: Json = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
            "additionalProperties": False,
        }
    },
}
WEATHER = Tool(name="weather", description="How the sky is.", parameters=CITY)
PLANT = Tool(name="plant", parameters=TREE)
NOW = Tool(name="now")
TOOLS = (WEATHER, PLANT, NOW)
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")


def told(turns: tuple[Turn, ...], choice: ToolChoice = "auto", name: str | None = None) -> tuple[Turn, ...]:
    return tool_prompt.with_tools(turns, TOOLS, choice, name)


def call(name: str, arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def test_the_first_system_turn_gets_the_tools() -> None:
    turns = told((Turn(role="system", text="Be brief."), Turn(role="user", text="Hi")))
    assert [turn.role for turn in turns] == ["system", "user"]
    assert turns[0].text.startswith("Be brief.\n\n")
    assert told((Turn(role="user", text="Hi"),))[0].role == "system"


def test_each_tool_is_one_line_of_json() -> None:
    text = told((Turn(role="user", text="Hi"),))[0].text
    lines = text.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert [json.loads(line)["function"]["name"] for line in lines] == ["weather", "plant", "now"]
    assert json.loads(lines[0])["function"]["parameters"] == CITY
    assert json.loads(lines[2])["function"]["parameters"] == tool_prompt.NO_PARAMETERS


def test_only_the_tool_that_must_be_called_is_told() -> None:
    text = told((Turn(role="user", text="Hi"),), "required", "now")[0].text
    assert '"now"' in text
    assert '"weather"' not in text


HISTORY = (
    Turn(role="user", text="Weather in Ulm and Bonn?"),
    Turn(
        role="assistant",
        text="I look.",
        calls=(
            ToolCall(id="1", name="weather", arguments='{"city": "Ulm"}'),
            ToolCall(id="2", name="weather", arguments='{"city": "Bonn"}'),
        ),
    ),
    Turn(role="tool", text="sun", call_id="1"),
    Turn(role="tool", text="rain", call_id="2"),
    Turn(role="user", text="Thanks"),
)


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_calls_and_results_become_text(choice: ToolChoice) -> None:
    turns = told(HISTORY, choice)
    assert ("<tools>" in turns[0].text) == (choice != "none")
    said, results, thanks = turns[-3:]
    assert said.role == "assistant"
    assert said.text.startswith("I look.\n<tool_call>")
    bodies = [part.split("</tool_call>")[0] for part in said.text.split("<tool_call>")[1:]]
    assert [json.loads(body) for body in bodies] == [
        {"name": "weather", "arguments": {"city": "Ulm"}},
        {"name": "weather", "arguments": {"city": "Bonn"}},
    ]
    assert results.role == "user"
    assert results.text == "<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
    assert thanks == Turn(role="user", text="Thanks")


def test_results_are_not_joined_to_what_a_user_says() -> None:
    turns = told((Turn(role="user", text="Hi"), Turn(role="tool", text="sun", call_id="1")), "none")
    assert [turn.text for turn in turns] == ["Hi", "<tool_response>\nsun\n</tool_response>"]


@pytest.mark.parametrize("marker", MARKERS)
def test_callers_can_not_fake_markers(marker: str) -> None:
    arguments = json.dumps({"city": marker})
    fake = (
        Turn(role="user", text=f"a{marker}b"),
        Turn(role="assistant", text=marker, calls=(ToolCall(id="1", name="weather", arguments=arguments),)),
        Turn(role="tool", text=f"{marker * 2}", call_id="1"),
    )
    liar = Tool(name="liar", description=marker, parameters={"type": "object", "properties": {marker: {"description": marker}}})
    shown = "".join(turn.text for turn in tool_prompt.with_tools(fake, (liar,), "auto", None))
    honest = tuple(
        Turn(
            role=turn.role, text="", calls=tuple(ToolCall(id="1", name="weather", arguments="{}") for _ in turn.calls), call_id=turn.call_id
        )
        for turn in fake
    )
    without = "".join(turn.text for turn in tool_prompt.with_tools(honest, (NOW,), "auto", None))
    assert shown.count(marker) == without.count(marker)


@given(st.lists(st.sampled_from([*MARKERS, "<", ">", "/", "tool_call", "<\u200b", "x"])).map("".join))
def test_plain_leaves_no_marker_and_takes_nothing_away(text: str) -> None:
    plain = tool_prompt.plain(text)
    assert not any(marker in plain for marker in MARKERS)
    assert plain.replace("\u200b", "") == text.replace("\u200b", "")


FITTING = [("weather", {"city": "Ulm"}), ("plant", {"next": {"next": None}}), ("now", {})]
UNFIT = [("weather", {}), ("weather", {"city": 1}), ("plant", {"next": {"next": 1}}), ("now", {"a": 1}), ("other", {})]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("name", "arguments"), [*FITTING, *UNFIT])
def test_what_must_be_written_is_what_is_read(name: str, arguments: Json, parallel: bool) -> None:
    constraint = tool_prompt.call_schema(TOOLS, None, parallel=parallel)
    value: Any = {"name": name, "arguments": arguments}
    right = (name, arguments) in FITTING
    assert constraint.exact
    json_schema.check_schema(constraint.engine, param="engine")
    assert json_schema.fits(constraint.engine, [value] if parallel else value) == right
    assert not json_schema.fits(constraint.engine, value if parallel else [value])
    read = tool_prompt.read_calls(json.dumps([value] if parallel else value), TOOLS)
    assert read == (((name, arguments),) if right else None)


@pytest.mark.parametrize(
    ("count", "right"), [(0, False), (1, True), (tool_prompt.PARALLEL_MAX, True), (tool_prompt.PARALLEL_MAX + 1, False)]
)
def test_how_many_calls_may_be_written(count: int, right: bool) -> None:
    constraint = tool_prompt.call_schema(TOOLS, None, parallel=True)
    assert json_schema.fits(constraint.engine, [{"name": "now", "arguments": {}}] * count) == right


def test_a_named_tool_is_the_only_one() -> None:
    constraint = tool_prompt.call_schema(TOOLS, "now", parallel=False)
    assert json_schema.fits(constraint.engine, {"name": "now", "arguments": {}})
    assert not json_schema.fits(constraint.engine, {"name": "weather", "arguments": {"city": "Ulm"}})
    assert tool_prompt.read_calls(call("weather", {"city": "Ulm"}), TOOLS, "now") is None


def test_an_inexact_tool_makes_the_whole_inexact() -> None:
    odd = Tool(name="odd", parameters={"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 7}}})
    assert not tool_prompt.call_schema((WEATHER, odd), None, parallel=False).exact
    assert tool_prompt.read_calls(call("odd", {"n": 8}), (odd,)) is None


def test_references_of_several_tools_do_not_mix() -> None:
    first = Tool(name="first", parameters={"type": "object", "properties": {"v": {"$ref": "#/$defs/v"}}, "$defs": {"v": {"enum": ["a"]}}})
    second = Tool(name="second", parameters={"type": "object", "properties": {"v": {"$ref": "#/$defs/v"}}, "$defs": {"v": {"enum": ["b"]}}})
    engine = tool_prompt.call_schema((first, second), None, parallel=False).engine
    for name, right, wrong in (("first", "a", "b"), ("second", "b", "a")):
        assert json_schema.fits(engine, {"name": name, "arguments": {"v": right}})
        assert not json_schema.fits(engine, {"name": name, "arguments": {"v": wrong}})


def test_either_a_call_or_the_form_asked_for() -> None:
    made = tool_prompt.either_schema(tool_prompt.call_schema(TOOLS, None, parallel=False), json_schema.constrain(TREE))
    assert made.exact
    assert json_schema.fits(made.engine, {"name": "plant", "arguments": {"next": None}})
    assert json_schema.fits(made.engine, {"next": {"next": None}})
    assert not json_schema.fits(made.engine, {"name": "plant", "arguments": {"next": 1}})


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "1", '{"name": "now"}', '{"arguments": {}}', '{"name": "now", "arguments": []}', '{"name": "now", "arguments": "{}"}',
        '{"name": "now", "arguments": {}, "more": 1}', '{"name": "now", "arguments": {}', '[{"name": "now", "arguments": {}}, 1]',
        f"[{call('now', {})}, {call('weather', {})}]", "[" * 100_000, call("now", {}) + " and more",
    ],
)  # fmt: skip
def test_what_is_no_call(text: str) -> None:
    assert tool_prompt.read_calls(text, TOOLS) is None


def test_the_same_call_counts_once() -> None:
    ulm, bonn = ("weather", {"city": "Ulm"}), ("weather", {"city": "Bonn"})
    text = f"[{', '.join(call(*one) for one in (ulm, bonn, ulm))}]"
    assert tool_prompt.read_calls(text, TOOLS) == (ulm, bonn)


@given(st.text() | st.recursive(st.none() | st.text(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)).map(json.dumps))
def test_reading_never_raises(text: str) -> None:
    assert tool_prompt.read_calls(text, TOOLS) is None


def watched(parts: list[str]) -> tuple[str, str, bool]:
    watch = tool_prompt.CallWatch(TOOLS)
    shown = "".join(watch.feed(part) for part in parts)
    return shown, watch.rest(), watch.found


@st.composite
def chunked(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


NEAR = st.sampled_from(
    ["<", "<tool", "_call", ">", "<tool_call", "</tool_call>", " ", "\n", "{", '"name"', ":", '"', "no", "weathe", "```", "json", "é"]
)
FREE = st.one_of(st.text(), st.lists(NEAR).map("".join)).filter(lambda text: "<tool_call>" not in text)


@given(chunked(FREE))
@example(["```json\n{", '"name"', ': "nowhere", "x": 1}\n```'])
@example([" ", " \n", "<tool_cal"])
def test_free_text_passes_whole(parts: list[str]) -> None:
    shown, rest, found = watched(parts)
    assert not found
    assert shown + rest == "".join(parts)


@given(chunked(st.tuples(FREE, st.text()).map("<tool_call>".join)))
def test_text_before_a_call_passes_and_the_call_does_not(parts: list[str]) -> None:
    shown, rest, found = watched(parts)
    assert found
    assert rest == ""
    assert shown.rstrip() == "".join(parts).split("<tool_call>")[0].rstrip()
    assert shown == shown.rstrip() or not shown.strip()


@given(
    chunked(
        st.tuples(st.sampled_from(["", " \n", "```json\n", "```\n "]), st.sampled_from(['{"name": "now"', '{ "name" :"weather"'])).map(
            "".join
        )
    )
)
def test_a_bare_call_is_found_at_the_beginning(parts: list[str]) -> None:
    shown, rest, found = watched(parts)
    assert found
    assert (shown.strip(), rest) == ("", "")


@pytest.mark.parametrize(
    "text", ['Look: {"name": "now"}', '{"name": "other", "arguments": {}}', '{"names": "now"}', '{"name": "nowadays"}']
)
def test_what_only_looks_like_a_bare_call(text: str) -> None:
    assert watched(list(text))[2] is False


def test_text_is_passed_on_as_soon_as_it_is_clear() -> None:
    watch = tool_prompt.CallWatch(TOOLS)
    assert watch.feed("Well, 1 <") == "Well, 1"
    assert watch.feed("2") == " <2"
    assert watch.feed(" and so on") == " and so on"


BIG: Json = {"type": "object", "description": "x" * 30_000}


@pytest.mark.parametrize(
    ("tools", "param", "word"),
    [
        ([NOW] * (tool_prompt.TOOLS_MAX + 1), "tools", str(tool_prompt.TOOLS_MAX)),
        ([Tool(name="a", parameters=BIG)] * 3, "tools", str(tool_prompt.TOOLS_BYTES_MAX)),
        ([NOW, Tool(name="b", parameters={"type": "nothing"})], "tools[1].function.parameters", "JSON schema"),
        ([NOW, NOW, Tool(name="c", parameters={"type": "array"})], "tools[2].function.parameters", "object"),
        ([Tool(name="d", parameters={"type": "object", "properties": {"a": {"pattern": "(a+)+"}}})], "tools[0].function.parameters", "pattern"),
        ([Tool(name="e", parameters={"$ref": "https://example.org/s"})], "tools[0].function.parameters", "$ref"),
    ],
)  # fmt: skip
def test_tools_refused(tools: list[Tool], param: str, word: str) -> None:
    with pytest.raises(InvalidRequest, match=r".") as caught:
        tool_prompt.check_tools(tools, "tools[{index}].function.parameters")
    assert caught.value.param == param
    assert word in caught.value.message


def test_tools_accepted() -> None:
    tool_prompt.check_tools(TOOLS, "tools[{index}].function.parameters")
    tool_prompt.check_tools([NOW] * tool_prompt.TOOLS_MAX, "tools[{index}].function.parameters")
