"""A tool that the model must call, with the openai package: the arguments always fit the schema."""

import json

from openai import OpenAI

client = OpenAI()
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}

messages = [{"role": "user", "content": "What's the weather in Paris?"}]
asked = client.chat.completions.create(
    model="smollm2-135m-instruct",
    messages=messages,
    tools=[TOOL],
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
    parallel_tool_calls=False,
    max_tokens=100,
    temperature=0,
)
call = asked.choices[0].message.tool_calls[0]
arguments = json.loads(call.function.arguments)
print(call.function.name, arguments)

messages += [asked.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": f"18 degrees {arguments['unit']}, sunny"}]
told = client.chat.completions.create(model="smollm2-135m-instruct", messages=messages, max_tokens=40, temperature=0)
print(told.choices[0].message.content)
