"""`/v1/rerank`: what a caller may ask, and the order that comes of scores or of embeddings."""

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vendor import document

from fallow.model.errors import EngineFailed, InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire.rerank import (
    DOCUMENTS_MAX,
    RerankRequest,
    answer_from_embeddings,
    answer_from_scores,
    as_embeddings,
    engine_bodies,
    read,
)

PROMISE = settings(max_examples=150)
ABC = ["about a", "about b", "about c"]


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "query": "what?", "documents": ABC, **fields}).encode()


def request(**fields: Any) -> RerankRequest:
    return read(body(**fields))


def scores(values: list[Any], *, indices: list[Any] | None = None, tokens: Any = 9) -> bytes:
    results = [{"index": index, "relevance_score": value} for index, value in zip(indices or range(len(values)), values, strict=True)]
    return json.dumps(
        {"model": "x", "object": "list", "usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "results": results}
    ).encode()


def vectors(rows: list[Any]) -> bytes:
    data = [{"index": index, "embedding": row} for index, row in enumerate(rows)]
    return json.dumps({"data": data, "usage": {"prompt_tokens": 9, "total_tokens": 9}}).encode()


def ranked(asked: RerankRequest, values: list[Any], **settings: Any) -> list[dict[str, Any]]:
    text, usage = answer_from_scores(asked, [scores(values)], model="m", **settings)
    assert usage == Usage(prompt_tokens=9)
    return list(json.loads(text)["results"])


# asking
def test_a_reranker_gets_plain_texts_and_scores_them_all() -> None:
    asked = request(documents=["a", {"text": "b"}], top_n=1, return_documents=True, user="u", fallow={"ring": ["own"]})
    assert json.loads(engine_bodies(asked)[0]) == {"query": "what?", "documents": ["a", "b"]}


def test_an_embedding_model_gets_the_query_first() -> None:
    assert json.loads(as_embeddings(request(documents=["a", {"text": "b"}]))[0])["input"] == ["what?", "a", "b"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"query": ""}, "query"),
        ({"query": ["a"]}, "query"),
        ({"query": None}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": None}, "documents"),
        ({"documents": ["a"] * (DOCUMENTS_MAX + 1)}, "documents"),
        ({"documents": ["a", ""]}, "documents[1]"),
        ({"documents": ["a", {"text": ""}]}, "documents[1].text"),
        ({"documents": ["a", {}]}, "documents[1].text"),
        ({"documents": [{"text": 1}]}, "documents[0].text"),
        ({"documents": [{"text": "a", "title": "b"}]}, "documents[0].title"),
        ({"documents": [1]}, "documents[0]"),
        ({"documents": [None]}, "documents[0]"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": 1.5}, "top_n"),
        ({"top_n": True}, "top_n"),
        ({"top_n": "1"}, "top_n"),
        ({"return_documents": 1}, "return_documents"),
        ({"user": 1}, "user"),
        ({"fallow": 1}, "fallow"),
        ({"max_chunks": 3}, "max_chunks"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize("missing", ["model", "query", "documents"])
def test_a_missing_field_is_named(missing: str) -> None:
    fields = {"model": "m", "query": "q", "documents": ["a"]}
    del fields[missing]
    with pytest.raises(InvalidRequest) as refused:
        read(json.dumps(fields).encode())
    assert refused.value.param == missing


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2),
    max_leaves=8,
)


@PROMISE
@given(st.dictionaries(st.sampled_from(["model", "query", "documents", "top_n", "return_documents", "fallow", "x"]), anything))
def test_any_body_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        asked = read(body(**fields))
    except InvalidRequest:
        return
    assert all(json.loads(as_embeddings(asked)[0])["input"])


@PROMISE
@given(st.integers(0, 120), st.binary(max_size=3), st.integers(0, 3))
def test_damaged_bytes_are_read_or_refused(at: int, put: bytes, cut: int) -> None:
    with contextlib.suppress(InvalidRequest):
        read(body(top_n=2)[:at] + put + body(top_n=2)[at + cut :])


# scores
def test_a_rerankers_answer_is_jinas() -> None:
    text, _ = answer_from_scores(request(return_documents=True, top_n=2), [scores([-1.0, 2.0, 0.0])], model="m")
    assert json.loads(text) == {
        "model": "m",
        "object": "list",
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
        "results": [
            {"index": 1, "relevance_score": pytest.approx(1 / (1 + math.exp(-2))), "document": {"text": "about b"}},
            {"index": 2, "relevance_score": 0.5, "document": {"text": "about c"}},
        ],
    }


def test_a_result_has_all_that_coheres_has() -> None:
    schema = document("cohere")["paths"]["/v2/rerank"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    text, _ = answer_from_scores(request(), [scores([1.0, 2.0, 3.0])], model="m")
    got = json.loads(text)
    assert set(schema["required"]) <= got.keys()
    assert all(set(schema["properties"]["results"]["items"]["required"]) <= one.keys() for one in got["results"])


@pytest.mark.parametrize(
    ("asked", "values", "order"),
    [
        ({}, [1, 2, 3], [2, 1, 0]),
        ({}, [5, 5, 5], [0, 1, 2]),
        ({}, [1, 5, 5], [1, 2, 0]),
        ({}, [50, 60, 55], [1, 2, 0]),  # all of them 1 as shown
        ({}, [-900, -800, 1000], [2, 1, 0]),
        ({"top_n": 1}, [1, 2, 3], [2]),
        ({"top_n": 3}, [1, 2, 3], [2, 1, 0]),
        ({"top_n": 99}, [1, 2, 3], [2, 1, 0]),
    ],
)
def test_the_best_come_first(asked: dict[str, Any], values: list[float], order: list[int]) -> None:
    got = ranked(request(**asked), values)
    assert [one["index"] for one in got] == order
    assert all(one.keys() == {"index", "relevance_score"} for one in got)


@PROMISE
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_any_scores_become_shares_in_falling_order(values: list[float]) -> None:
    got = ranked(request(documents=["d"] * len(values)), values)
    shown = [one["relevance_score"] for one in got]
    assert shown == sorted(shown, reverse=True)
    assert all(0 <= one <= 1 for one in shown)
    assert sorted(one["index"] for one in got) == list(range(len(values)))


def test_shares_of_an_engine_stay_as_they_are() -> None:
    assert [one["relevance_score"] for one in ranked(request(), [0.25, 1, 0], are_logits=False)] == [1, 0.25, 0]
    with pytest.raises(EngineFailed):
        ranked(request(), [0.25, 1.5, 0], are_logits=False)


def test_the_engines_order_does_not_matter() -> None:
    text, _ = answer_from_scores(request(), [scores([3, 1, 2], indices=[1, 2, 0])], model="m")
    assert [one["index"] for one in json.loads(text)["results"]] == [1, 0, 2]


@pytest.mark.parametrize(
    "engine_answer",
    [
        b"",
        b"{}",
        b"\xff",
        scores([None, None, None]),
        scores([1, 2, math.nan]),
        scores([1, 2]),
        scores([1, 2, 3, 4]),
        scores([1, 2, 3], indices=[0, 1, 1]),
        scores([1, 2, 3], indices=[1, 2, 3]),
        scores([1, 2, "3"]),
        scores([1, 2, 3], tokens=-1),
        scores([1, 2, 3]).replace(b"usage", b"other"),
        scores([1, 2, 3]).replace(b"2", b"1e999", 1),
    ],
)
def test_nonsense_of_a_reranker_is_its_failure(engine_answer: bytes) -> None:
    with pytest.raises(EngineFailed):
        answer_from_scores(request(), [engine_answer], model="m")


# embeddings
def test_cosines_are_said_as_they_are() -> None:
    rows = [[2.0, 0.0], [-3.0, 0.0], [1.0, 1.0], [0.5, 0.0]]
    text, usage = answer_from_embeddings(request(return_documents=True), [vectors(rows)], model="m", size=2)
    assert usage == Usage(prompt_tokens=9)
    assert json.loads(text)["results"] == [
        {"index": 2, "relevance_score": 1, "document": {"text": "about c"}},
        {"index": 1, "relevance_score": pytest.approx(0.5**0.5), "document": {"text": "about b"}},
        {"index": 0, "relevance_score": -1, "document": {"text": "about a"}},
    ]


def test_equal_documents_stand_in_their_order() -> None:
    row = [0.1 * number for number in range(1, 400)]
    asked = request(documents=["same"] * 37, top_n=30)
    text, _ = answer_from_embeddings(asked, [vectors([row[::-1], *[row] * 37])], model="m")
    assert [one["index"] for one in json.loads(text)["results"]] == list(range(30))


def test_a_vector_of_zeros_is_like_nothing() -> None:
    text, _ = answer_from_embeddings(request(documents=["a", "b"]), [vectors([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])], model="m")
    assert [one["relevance_score"] for one in json.loads(text)["results"]] == [0, -1]


@PROMISE
@given(st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3), min_size=2, max_size=8))
def test_cosines_are_between_minus_1_and_1(rows: list[list[float]]) -> None:
    text, _ = answer_from_embeddings(request(documents=["d"] * (len(rows) - 1)), [vectors(rows)], model="m")
    assert all(-1 <= one["relevance_score"] <= 1 for one in json.loads(text)["results"])


@pytest.mark.parametrize("rows", [[[1.0]] * 3, [[1.0]] * 5, [[1.0], [1.0], [1.0], [1.0, 2.0]], [[1.0], [1.0], [1.0], [None]]])
def test_nonsense_of_an_embedding_engine_is_its_failure(rows: list[Any]) -> None:
    with pytest.raises(EngineFailed):
        answer_from_embeddings(request(), [vectors(rows)], model="m")
