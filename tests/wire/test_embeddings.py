"""`/v1/embeddings`: what a caller may ask, and what becomes of an engine's vectors."""

import base64
import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse
from vendor import check

from fallow.model.errors import EngineFailed, InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire.embeddings import BATCH_INPUTS, INPUTS_MAX, EmbeddingsRequest, answer, check_dimensions, engine_bodies, read, unit

PROMISE = settings(max_examples=150)
floats = st.floats(-1000, 1000, width=32)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "input": "hello", **fields}).encode()


def request(**fields: Any) -> EmbeddingsRequest:
    return read(body(**fields))


def as_base64(row: list[float]) -> str:
    return base64.b64encode(np.array(row, "<f4").tobytes()).decode()


def engine(rows: list[Any], *, tokens: Any = 7, indices: list[Any] | None = None) -> bytes:
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in zip(indices or range(len(rows)), rows, strict=True)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps({"object": "list", "model": "/somewhere/m.gguf", "usage": usage, "data": data}).encode()


def answered(asked: EmbeddingsRequest, engine_answer: bytes, *, size: int | None = None, may_shorten: bool = False) -> dict[str, Any]:
    text, _ = answer(asked, [engine_answer], model="m", size=size, may_shorten=may_shorten)
    return dict(json.loads(text))


# asking
@pytest.mark.parametrize(
    ("value", "inputs"),
    [
        ("hello", ["hello"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([0, 2**31 - 1], [[0, 2**31 - 1]]),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a"] * INPUTS_MAX, ["a"] * INPUTS_MAX),
        ([1] * (INPUTS_MAX + 1), [[1] * (INPUTS_MAX + 1)]),  # one input: the model's own limit decides
        ("\u0000 \U0001f980", ["\u0000 \U0001f980"]),
    ],
)
def test_the_engine_always_gets_a_list(value: Any, inputs: list[Any]) -> None:
    assert [one for body in engine_bodies(request(input=value)) for one in json.loads(body)["input"]] == inputs


@pytest.mark.parametrize(
    "fields",
    [
        {"encoding_format": "float"},
        {"encoding_format": "base64"},
        {"encoding_format": None},
        {"dimensions": 1},
        {"dimensions": None},
        {"user": "u"},
        {"fallow": {"ring": ["own"], "deep": {"er": 1}}},
    ],
)
def test_what_does_not_concern_the_engine_does_not_reach_it(fields: dict[str, Any]) -> None:
    assert engine_bodies(request(**fields)) == engine_bodies(request())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 1}, "model"),
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": 1}, "input"),
        ({"input": True}, "input"),
        ({"input": {}}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a"] * (INPUTS_MAX + 1)}, "input"),
        ({"input": [[1]] * (INPUTS_MAX + 1)}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": [1, "a"]}, "input[1]"),
        ({"input": [1, [1]]}, "input[1]"),
        ({"input": [[1], "a"]}, "input[1]"),
        ({"input": [None]}, "input[0]"),
        ({"input": [True]}, "input[0]"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": [-1]}, "input[0]"),
        ({"input": [2**31]}, "input[0]"),
        ({"input": [[-1]]}, "input[0][0]"),
        ({"input": [["a"]]}, "input[0][0]"),
        ({"input": [[[1]]]}, "input[0][0]"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"encoding_format": 1}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": -1}, "dimensions"),
        ({"dimensions": 1.5}, "dimensions"),
        ({"dimensions": "3"}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"user": 1}, "user"),
        ({"fallow": []}, "fallow"),
        ({"truncate": True}, "truncate"),
        ({"stream": True}, "stream"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request(**fields)
    assert refused.value.param == param
    assert refused.value.message


@pytest.mark.parametrize("missing", ["model", "input"])
def test_a_missing_field_is_named(missing: str) -> None:
    fields = {"model": "m", "input": "a"}
    del fields[missing]
    with pytest.raises(InvalidRequest) as refused:
        read(json.dumps(fields).encode())
    assert refused.value.param == missing


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b'{"model":"m","input":"\\ud800"}', b'{"fallow":' + b'{"a":' * 100_000]
)
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(text)


def test_a_refusal_says_nothing_of_the_texts() -> None:
    with pytest.raises(InvalidRequest) as refused:
        request(input=["secret", 1])
    assert "secret" not in refused.value.message


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@PROMISE
@given(st.dictionaries(st.sampled_from(["model", "input", "encoding_format", "dimensions", "user", "fallow", "x"]), anything))
def test_any_body_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        asked = read(body(**fields))
    except InvalidRequest:
        return
    inputs = json.loads(engine_bodies(asked)[0])["input"]
    assert inputs
    assert len({type(one) for one in inputs}) == 1
    assert all(len(one) > 0 for one in inputs)


@PROMISE
@given(st.integers(0, 200), st.binary(max_size=3), st.integers(0, 3))
def test_damaged_bytes_are_read_or_refused(at: int, put: bytes, cut: int) -> None:
    whole = body(input=["a", "b"], dimensions=3, encoding_format="float")
    with contextlib.suppress(InvalidRequest):
        read(whole[:at] + put + whole[at + cut :])


# answering
ROWS = [[0.6, 0.8, 0.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("form", [None, "float", "base64"])
@pytest.mark.parametrize("sent", ["float", "base64"])
def test_an_answer_is_openais(form: str | None, sent: str) -> None:
    asked = request(input=["a", "b", "c"], encoding_format=form)
    rows = ROWS if sent == "float" else [as_base64(row) for row in ROWS]
    text, usage = answer(asked, [engine(rows)], model="minilm", size=3, may_shorten=False)
    got = json.loads(text)
    assert usage == Usage(prompt_tokens=7)
    assert got["model"] == "minilm"
    assert got["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    if form == "base64":
        assert [one["embedding"] for one in got["data"]] == [as_base64(row) for row in ROWS]
    else:
        check("openai", "CreateEmbeddingResponse", got)
        CreateEmbeddingResponse.model_validate(got)
        assert [one["embedding"] for one in got["data"]] == [np.array(row, np.float32).tolist() for row in ROWS]


def test_the_vectors_come_in_the_order_of_the_inputs() -> None:
    got = answered(request(input=["a", "b", "c"]), engine([[3.0], [1.0], [2.0]], indices=[2, 0, 1]))
    assert [(one["index"], one["embedding"]) for one in got["data"]] == [(0, [1.0]), (1, [2.0]), (2, [3.0])]


@PROMISE
@given(st.integers(1, 5).flatmap(lambda size: st.lists(st.lists(floats, min_size=size, max_size=size), min_size=1, max_size=4)))
def test_base64_and_floats_say_the_same(rows: list[list[float]]) -> None:
    texts = ["a"] * len(rows)
    plain = answered(request(input=texts), engine(rows))
    packed = answered(request(input=texts, encoding_format="base64"), engine([as_base64(row) for row in rows]))
    unpacked = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4").tolist() for one in packed["data"]]
    assert unpacked == [one["embedding"] for one in plain["data"]] == rows


@PROMISE
@given(st.lists(floats, min_size=2, max_size=6), st.integers(1, 5))
def test_shortened_vectors_have_length_1(row: list[float], wanted: int) -> None:
    wanted = min(wanted, len(row) - 1)
    (got,) = answered(request(dimensions=wanted), engine([row]), may_shorten=True)["data"]
    assert len(got["embedding"]) == wanted
    length = math.sqrt(sum(one * one for one in got["embedding"]))
    assert length == pytest.approx(1 if any(row[:wanted]) else 0, abs=1e-6)
    if length:
        assert max(row[:wanted], key=abs) * max(got["embedding"], key=abs) > 0


@pytest.mark.parametrize("form", ["float", "base64"])
def test_dimensions_are_cut_in_both_forms(form: str) -> None:
    got = answered(request(dimensions=1, encoding_format=form), engine([[-3.0, 4.0]]), may_shorten=True)["data"][0]["embedding"]
    assert got == ([-1.0] if form == "float" else as_base64([-1.0]))


def test_the_models_own_dimensions_change_nothing() -> None:
    assert answered(request(dimensions=2), engine([[3.0, 4.0]]))["data"][0]["embedding"] == [3.0, 4.0]


@pytest.mark.parametrize(
    ("wanted", "size", "may_shorten", "is_fine"),
    [
        (None, 4, False, True),
        (4, 4, False, True),
        (3, 4, True, True),
        (1, 4, True, True),
        (3, 4, False, False),
        (5, 4, False, False),
        (5, 4, True, False),
        (5, None, False, True),  # the answer will tell
    ],
)
def test_dimensions_can_be_refused_before_the_engine_works(wanted: int | None, size: int | None, may_shorten: bool, is_fine: bool) -> None:
    asked = request(dimensions=wanted)
    if is_fine:
        check_dimensions(asked, size, may_shorten=may_shorten)
        return
    with pytest.raises(InvalidRequest) as refused:
        check_dimensions(asked, size, may_shorten=may_shorten)
    assert refused.value.param == "dimensions"
    assert "4" in refused.value.message


@pytest.mark.parametrize("wanted", [1, 3])
def test_dimensions_of_a_model_of_unknown_size_are_refused_afterwards(wanted: int) -> None:
    with pytest.raises(InvalidRequest) as refused:
        answered(request(dimensions=wanted), engine([[3.0, 4.0]]))
    assert refused.value.param == "dimensions"


@pytest.mark.parametrize(
    "engine_answer",
    [
        b"",
        b"null",
        b"{}",
        b"\xff",
        b'{"data":' + b"[" * 100_000,
        engine([]),
        engine([[1.0, 2.0]]),
        engine([[1.0, 2.0]] * 3),
        engine([[1.0, 2.0]] * 2, indices=[0, 0]),
        engine([[1.0, 2.0]] * 2, indices=[1, 2]),
        engine([[1.0, 2.0]] * 2, indices=[0, None]),
        engine([[1.0, 2.0], [1.0]]),
        engine([[1.0]] * 2),
        engine([[], []]),
        engine([[1.0, None], [1.0, 2.0]]),
        engine([[1.0, "2"], [1.0, 2.0]]),
        engine([[1.0, 1e39], [1.0, 2.0]]),
        engine([None, [1.0, 2.0]]),
        engine([as_base64([math.nan, 1.0]), as_base64([1.0, 1.0])]),
        engine([as_base64([1.0, math.inf]), as_base64([1.0, 1.0])]),
        engine(["AAAA", "AAAA"]),
        engine(["é", "é"]),
        engine([[1.0, 2.0]] * 2, tokens=-1),
        engine([[1.0, 2.0]] * 2, tokens=None),
        engine([[1.0, 2.0]] * 2).replace(b"usage", b"other"),
        engine([[1.0, math.nan]] * 2),
    ],
)
def test_nonsense_of_an_engine_is_its_failure(engine_answer: bytes) -> None:
    with pytest.raises(EngineFailed):
        answered(request(input=["a", "b"]), engine_answer, size=2)


def test_vectors_without_numbers_are_an_engines_failure_even_if_the_size_is_unknown() -> None:
    with pytest.raises(EngineFailed):
        answered(request(), engine([[]]))


def test_tiny_vectors_keep_their_direction() -> None:
    assert unit(np.array([[1e-30, -1e-30], [0, 0]], np.float32)) == pytest.approx(np.array([[0.5**0.5, -(0.5**0.5)], [0, 0]]))


def test_a_long_list_is_asked_for_in_batches_and_stays_in_order() -> None:
    asked = request(input=[f"text {number}" for number in range(2 * BATCH_INPUTS + 1)])
    bodies = [json.loads(body)["input"] for body in engine_bodies(asked)]
    assert [len(batch) for batch in bodies] == [BATCH_INPUTS, BATCH_INPUTS, 1]
    assert [one for batch in bodies for one in batch] == asked.inputs
    rows = [[float(number), 1.0] for number in range(len(asked.inputs))]
    answers = [engine(rows[at : at + BATCH_INPUTS]) for at in range(0, len(rows), BATCH_INPUTS)]
    text, usage = answer(asked, answers, model="m", size=2, may_shorten=False)
    told = json.loads(text)
    assert [one["embedding"] for one in told["data"]] == rows
    assert told["usage"]["prompt_tokens"] == usage.prompt_tokens == sum(json.loads(one)["usage"]["prompt_tokens"] for one in answers)
    with pytest.raises(EngineFailed):
        answer(asked, [*answers[:2], engine([[1.0, 2.0, 3.0]])], model="m", size=None, may_shorten=False)
