"""The Responses API with the openai package."""

from openai import OpenAI

client = OpenAI()

answer = client.responses.create(
    model="smollm2-135m-instruct",
    instructions="Answer briefly.",
    input="Name one fruit.",
    max_output_tokens=20,
    store=False,  # answers are never stored here
)
print(answer.output_text)

with client.responses.stream(model="smollm2-135m-instruct", input="Count to three.", max_output_tokens=20) as stream:
    for event in stream:
        if event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
print()
