"""Tools and schemas with a real, small model: a forced call always fits, whatever the schema."""

import json
from typing import Any

import anthropic
import jsonschema
import openai
import pydantic
import pytest
from running import MODEL, Service
from vendor import check, events

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
NODE: dict[str, Any] = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["value", "next"],
    "additionalProperties": False,
}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "no parameters": {},
    "deep": deep(8),
    "a large enum": {"type": "object", "properties": {"x": {"enum": [f"value-{n}" for n in range(100)]}}, "required": ["x"]},
    "recursive": {"$defs": {"node": NODE}, "type": "object", "properties": {"list": {"$ref": "#/$defs/node"}}, "required": ["list"]},
    "what grammars can't say": {
        "type": "object",
        "properties": {
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "two": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
        },
        "required": ["share", "two"],
        "additionalProperties": False,
    },
    "names that need escaping": {
        "type": "object",
        "properties": {'a "quoted" <name>\n': {"type": "null"}},
        "required": ['a "quoted" <name>\n'],
    },
}


def tool(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


TOOLS = [
    tool("get_weather", WEATHER),
    tool("get_time", {"type": "object", "properties": {"zone": {"type": "string", "maxLength": 20}}, "required": ["zone"]}),
]
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "What's the weather in Paris?"}], "max_tokens": 400, "temperature": 0}


def calls_of(message: dict[str, Any], schemas: dict[str, dict[str, Any]]) -> list[str]:
    """The names that were called; the arguments are held against the schemas."""
    for call in message["tool_calls"]:
        jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
    return [call["function"]["name"] for call in message["tool_calls"]]


SCHEMAS = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
def test_a_forced_call_fits(service: Service, choice: Any, parallel: bool) -> None:
    body = ASK | {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel}
    answer = service.post(body)
    assert answer.status_code == 200, answer.text
    check("openai", "CreateChatCompletionResponse", answer.json())
    chosen = answer.json()["choices"][0]
    names = calls_of(chosen["message"], SCHEMAS)
    assert chosen["finish_reason"] == "tool_calls"
    assert len(names) >= 1 if parallel else len(names) == 1
    assert isinstance(choice, str) or set(names) == {"get_time"}
    streamed = events(service.post(body | {"stream": True}).content)
    for _, event in streamed[:-1]:
        check("openai", "CreateChatCompletionStreamResponse", event)
    assert streamed[-2][1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_forced_call_fits_a_hostile_schema(service: Service, schema: dict[str, Any]) -> None:
    body = ASK | {"tools": [tool("do", schema)], "tool_choice": "required", "parallel_tool_calls": False, "seed": 3, "max_tokens": 120}
    answer = service.post(body)
    if answer.status_code == 200:
        assert calls_of(answer.json()["choices"][0]["message"], {"do": schema}) == ["do"]
    else:  # a small model may not find the end of a list: that is said, and nothing unfit is given
        assert answer.json()["error"]["code"] in ("answer_incomplete", "schema_not_met"), answer.text


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        (deep(40), "deep"),
        ({"type": "object", "properties": {"x": {"enum": list(range(5000))}}}, "enum"),
        ({"$ref": "https://example.org/schema.json"}, "$ref"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "itself"),
        ({"type": "object", "properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}}, "pattern"),
        ({"type": "object", "properties": {"x": {"minItems": 10**9, "type": "array"}}}, ""),
        ({"type": "string"}, "object"),
        ({"type": "nonsense"}, ""),
    ],
)
def test_a_schema_that_would_harm_is_refused(service: Service, schema: dict[str, Any], word: str) -> None:
    answer = service.post(ASK | {"tools": [tool("do", {}), tool("harm", schema)]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tools[1].function.parameters"), answer.text
    assert word in error["message"]


def test_free_choice_is_an_answer_of_either_kind(service: Service) -> None:
    for choice in ("auto", "none"):
        answer = service.post(ASK | {"tools": TOOLS, "tool_choice": choice, "max_tokens": 60}).json()
        check("openai", "CreateChatCompletionResponse", answer)
        message = answer["choices"][0]["message"]
        assert "<tool_call>" not in (message["content"] or "")
        assert choice == "auto" or "tool_calls" not in message


def test_a_call_that_does_not_fit_into_the_limit_says_so(service: Service) -> None:
    answer = service.post(ASK | {"tools": TOOLS, "tool_choice": "required", "max_tokens": 3})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "answer_incomplete", "max_tokens")


def test_json_mode_and_schemas_always_fit(service: Service) -> None:
    for seed in range(3):
        hot = ASK | {"temperature": 1.5, "seed": seed, "max_tokens": 300}
        loose = service.post(hot | {"response_format": {"type": "json_object"}})
        if loose.json()["choices"][0]["finish_reason"] == "stop":
            assert isinstance(json.loads(loose.json()["choices"][0]["message"]["content"]), dict)
        wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
        streamed = events(service.post(hot | {"response_format": wanted, "stream": True}).content)
        text = "".join(e["choices"][0]["delta"].get("content", "") for _, e in streamed[:-1])
        if streamed[-2][1]["choices"][0]["finish_reason"] == "stop":
            jsonschema.validate(json.loads(text), WEATHER)


class Person(pydantic.BaseModel):
    name: str
    age: int = pydantic.Field(gt=0, lt=150)
    likes: list[str] = pydantic.Field(max_length=2)


class GetWeather(pydantic.BaseModel):
    """The weather in a city."""

    city: str
    unit: str = pydantic.Field(max_length=10)


def test_the_openai_package_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Ann is 31 and likes tea."}],
        response_format=Person,
        max_tokens=200,
        temperature=0,
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    called = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "The weather in Rome?"}],
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        max_tokens=300,
        temperature=0,
    )
    calls = called.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, GetWeather)


def test_the_openai_package_s_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "The weather in Rome?"}],
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        max_tokens=300,
        temperature=0,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    calls = final.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, GetWeather)
    with client.responses.stream(
        model=MODEL, input="Ann is 31 and likes tea.", text_format=Person, max_output_tokens=200, temperature=0
    ) as told:
        for _ in told:
            pass
        assert isinstance(told.get_final_response().output_parsed, Person)


def test_the_anthropic_package_runs_tools(service: Service) -> None:
    asked: list[str] = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: The city's name.
        """
        asked.append(city)
        return "18 degrees and sunny"

    with anthropic.Anthropic(base_url=service.root, api_key=service.key, max_retries=0) as client:
        message = client.messages.create(
            model=MODEL,
            max_tokens=300,
            messages=[{"role": "user", "content": "The weather in Oslo?"}],
            tools=[
                {
                    "name": "get_weather",
                    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
                }
            ],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
        )
        check("anthropic", "Message", message.model_dump(mode="json"))
        use = message.content[-1]
        assert use.type == "tool_use"
        assert set(use.input) == {"city"}
        result = get_weather.call(use.input)
        told = client.messages.create(
            model=MODEL,
            max_tokens=30,
            messages=[
                {"role": "user", "content": "The weather in Oslo?"},
                {"role": "assistant", "content": message.content},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": str(result)}]},
            ],
        )
        assert told.content[0].type == "text"
        runner = client.beta.messages.tool_runner(
            model=MODEL,
            max_tokens=200,
            tools=[get_weather],
            max_iterations=1,
            thread=False,
            messages=[{"role": "user", "content": "Hello!"}],
        )
        assert runner.until_done().role == "assistant"
    assert len(asked) >= 1
