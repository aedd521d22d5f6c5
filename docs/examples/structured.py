"""An answer that fits a type, with the openai package and pydantic."""

from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


client = OpenAI()
answer = client.chat.completions.parse(
    model="smollm2-135m-instruct",
    messages=[{"role": "user", "content": "Ann is 31 years old. Who is it?"}],
    response_format=Person,
    max_tokens=60,
    temperature=0,
)
person = answer.choices[0].message.parsed
print(person.name, person.age)
