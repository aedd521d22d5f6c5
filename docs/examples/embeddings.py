"""Embeddings with the openai package, and what they are good for: which text is nearest?"""

from openai import OpenAI

client = OpenAI()
TEXTS = ["A cat sits on the mat.", "A kitten rests on a rug.", "The bank raised its interest rate."]

found = client.embeddings.create(model="all-minilm-l6-v2", input=TEXTS)
cat, kitten, bank = (one.embedding for one in found.data)


def alike(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


print(f"cat and kitten {alike(cat, kitten):.2f}, cat and bank {alike(cat, bank):.2f}, {len(cat)} dimensions")
