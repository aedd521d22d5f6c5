"""Anthropic's Messages API with the anthropic package. ANTHROPIC_BASE_URL is the gateway's address without /v1."""

from anthropic import Anthropic

client = Anthropic()
MODEL = "smollm2-135m-instruct"
question = [{"role": "user", "content": "Name one animal."}]

print(client.messages.count_tokens(model=MODEL, messages=question).input_tokens, "tokens")
answer = client.messages.create(model=MODEL, max_tokens=20, messages=question)
print(answer.content[0].text)

with client.messages.stream(model=MODEL, max_tokens=20, messages=question) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()
