"""A chat, whole and streamed, with the openai package. OPENAI_BASE_URL and OPENAI_API_KEY tell it where Fallow is."""

from openai import OpenAI

client = OpenAI()
MODEL = "smollm2-135m-instruct"

answer = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "Name one colour."}],
    max_tokens=20,
    temperature=0,
)
print(answer.choices[0].message.content)

with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "Count to five."}], max_tokens=30) as stream:
    for event in stream:
        if event.type == "content.delta":
            print(event.delta, end="", flush=True)
print()
