# `make demo` and `make test` each set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests that don't mind others beside them. The rest of the acceptance tests watch what the machine does, and have it to themselves.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile
BESIDE := $(wildcard tests/acceptance/test_api_*.py) $(addprefix tests/acceptance/test_,attacks.py key_budgets.py calls.py canary.py \
  errors.py examples.py fuzz.py hostile_broker.py idempotency.py identity.py lent_server.py proxy.py quotes.py rolling.py)

.PHONY: setup demo lint test fuzz bench bench-peers lock clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fallow needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "could not make a virtual environment: on Debian, 'apt-get install python3-venv' first"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $(STAMP)

# On a machine that can't keep engines in a jail: make demo ISOLATION=none
demo: setup
	@$(BIN)/python examples/demo.py $(if $(ISOLATION),--isolation $(ISOLATION))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	@$(BIN)/fallow models pull smollm2-135m-instruct all-minilm-l6-v2
	$(BIN)/pytest tests --ignore=tests/acceptance $(SIDE_BY_SIDE)
	$(BIN)/pytest $(BESIDE) $(SIDE_BY_SIDE)
	$(BIN)/pytest tests/acceptance $(addprefix --ignore=,$(BESIDE))

# Promises with examples that differ in each run, each decoder for a minute, then 5,000 generated bodies per endpoint against a real
# model: an hour or more.
fuzz: setup
	$(BIN)/pytest tests/core tests/wire --hypothesis-profile=search $(SIDE_BY_SIDE)
	FUZZ_SECONDS=60 $(BIN)/pytest tests/wire/test_decoder_fuzz.py -n auto --maxprocesses 4
	@$(BIN)/fallow models pull smollm2-135m-instruct all-minilm-l6-v2
	FUZZ_EXAMPLES=5000 $(BIN)/pytest tests/acceptance/test_fuzz.py

bench: setup
	@$(BIN)/fallow models pull
	$(BIN)/python -m bench
	$(BIN)/python -m bench.owner

bench-peers: setup
	$(BIN)/python -m bench.peers

lock:
	$(BIN)/uv pip compile pyproject.toml --extra all --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
