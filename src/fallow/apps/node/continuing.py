"""How an attached server is asked to go on with an answer that another node began, where its kind can."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec

from fallow.adapters.http_engine import HttpAnswer
from fallow.apps.node.served import Past, Piece
from fallow.model.errors import CannotContinue
from fallow.model.messages import Head
from fallow.model.receipt import Usage
from fallow.wire import openai, sse
from fallow.wire.llama_answer import added

KINDS: Mapping[str, Mapping[str, bool]] = {
    "llamacpp": {},
    "vllm": {"continue_final_message": True, "add_generation_prompt": False},
}
"""Servers that go on with the assistant's words at a conversation's end, by the owner that they name in their list of models.

llama.cpp does so by itself, vLLM (from 0.6.2) if it is told so. Others would begin anew, and the caller would read things twice.
"""
_LIMITS = ("max_tokens", "max_completion_tokens")
_OTHER = ("tools", "functions", "logprobs", "top_logprobs")
_fields = msgspec.json.Decoder(dict[str, Any])


def continued(path: str, body: bytes, past: Past, owner: str) -> bytes:
    """The body that asks for the rest of the answer; raises CannotContinue."""
    if path != openai.CHAT or owner not in KINDS:
        raise CannotContinue("the attached server can't go on with another one's answer")
    fields = _fields.decode(body)
    said, count = "".join(past.delivered or ()), len(past.delivered or ())
    is_plain = fields.get("n") in (None, 1) and fields.get("response_format") in (None, {"type": "text"})
    if not fields.get("stream") or not is_plain or any(fields.get(name) for name in _OTHER):
        raise CannotContinue("tools, schemas, several choices and log probabilities can't be continued elsewhere")
    messages = list(fields.get("messages") or [])
    last = messages[-1] if messages else {}
    if not said:
        return msgspec.json.encode({**fields, "stream": True})
    if last.get("role") == "assistant":
        if not isinstance(last.get("content"), str):
            raise CannotContinue("an assistant's words in parts can't be gone on with")
        messages[-1] = last | {"content": last["content"] + said}
    else:
        messages.append({"role": "assistant", "content": said})
    for name in _LIMITS:
        if isinstance(fields.get(name), int):
            fields[name] = max(1, fields[name] - count)
    return msgspec.json.encode({**fields, "messages": messages, **KINDS[owner]})


class ContinuedAnswer:
    """The rest of an answer, event by event: without the role at its beginning, which the caller has read already."""

    def __init__(self, answer: HttpAnswer, head: Head, past: Past) -> None:
        self._answer = answer
        self._head = head
        self._past = past
        self.usage: Usage | None = None
        self.tokens: tuple[int, ...] = ()

    def head(self) -> Head:
        return self._head

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        cutter, held = sse.EventCutter(), b""
        async for chunk in self._answer.body():
            events = [event for event in cutter.feed(chunk) if not _is_opening(event)]
            for event in events:
                if b'"usage"' in event:
                    self._note(event)
            said, held = held + b"".join(events), b""
            if self._answer.is_complete or said.endswith(sse.DONE):
                held = said  # what says that all came goes with the last message
            elif said:
                yield Piece(said)
            if self._answer.is_complete:
                break
        yield Piece(held, is_last=True)

    def _note(self, event: bytes) -> None:
        """What was delivered before counts as written, not as read."""
        found = _fields.decode(sse.payload(event)).get("usage")
        if found:
            used, before = added(None, found), len(self._past.delivered or ())
            prompt = max(0, used.prompt_tokens - before)
            cached = min(used.cached_tokens, prompt)
            self.usage = Usage(prompt_tokens=prompt, cached_tokens=cached, output_tokens=used.output_tokens + before)


def _is_opening(event: bytes) -> bool:
    """Whether an event tells the role and no text."""
    if b'"role"' not in event:
        return False
    try:
        (choice,) = _fields.decode(sse.payload(event))["choices"]
        return not choice["delta"].get("content") and choice.get("finish_reason") is None
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
        return False
