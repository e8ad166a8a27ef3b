# Everything a person needs, on a fresh machine with Python 3.11+ and nothing else.
#
#   make serve    set up, fetch the default model once, serve http://127.0.0.1:8000/v1
#   make test     set up (redis-server too, by Debian's package, where it is absent), pass the tests
#   make test-fleet
#                 the gateway before real vLLM and llama-server; their first set-up takes minutes and 4 GB
#   make setup    the set-up alone; leaves .venv/bin/stockpot
#   make check    format, lint, strict types (what CI runs before the tests)
#   make lock     resolve the dependencies anew into requirements.lock
#
# uv lives in a small environment of its own (.uv), so that nothing outside this folder changes.

PYTHON ?= python3
UV := .uv/bin/uv
BIN := .venv/bin
UV_VERSION := 0.13.9
ARGS ?=

.PHONY: setup serve test test-fleet check format lock clean

setup: .venv/.stamp

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Stockpot needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 serve")'
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/.stamp: $(UV) pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes --requirement requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

serve: setup
	$(BIN)/stockpot serve $(ARGS)

test: setup
	scripts/bootstrap-debian
	$(BIN)/pytest $(ARGS)

test-fleet: setup
	$(BIN)/pytest tests/fleet $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(UV)
	$(UV) pip compile --quiet --universal --generate-hashes --no-annotate --python-version 3.11 \
		--custom-compile-command 'make lock' --group dev --output-file requirements.lock pyproject.toml

clean:
	rm -rf .venv .uv
