#!/bin/sh
# Every endpoint with curl. OPENAI_BASE_URL ends in /v1, OPENAI_API_KEY is a key of the gateway.
set -eu

ask() {
  curl --silent --show-error --fail-with-body "$OPENAI_BASE_URL/$1" \
    -H "Authorization: Bearer $OPENAI_API_KEY" -H 'Content-Type: application/json' -d "$2"
  echo
}

ask chat/completions '{"model": "smollm2-135m-instruct", "max_tokens": 10, "messages": [{"role": "user", "content": "Hello!"}]}'
ask completions '{"model": "smollm2-135m-instruct", "max_tokens": 10, "prompt": "Once upon a time"}'
ask responses '{"model": "smollm2-135m-instruct", "max_output_tokens": 10, "input": "Hello!"}'
ask responses/input_tokens '{"model": "smollm2-135m-instruct", "input": "Hello!"}'
ask messages '{"model": "smollm2-135m-instruct", "max_tokens": 10, "messages": [{"role": "user", "content": "Hello!"}]}'
ask messages/count_tokens '{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hello!"}]}'
ask embeddings '{"model": "all-minilm-l6-v2", "input": "Hello!", "encoding_format": "base64"}'
ask rerank '{"model": "all-minilm-l6-v2", "query": "a pet", "documents": ["a cat", "a bank"], "top_n": 1}'
curl --silent --show-error --fail-with-body "$OPENAI_BASE_URL/models" -H "Authorization: Bearer $OPENAI_API_KEY"
echo
