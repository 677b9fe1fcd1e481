# make demo | test | test-unit | test-long | test-page | test-portable | fuzz | lint | lint-page | vendor | docker-check | reference | client | bench | peers, in a virtual environment that make makes.
PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= .venv-peers
# Installed first, so that no later requirement chooses another build of PyTorch; any release from 2.6 on will do.
TORCH ?= torch==2.13.0
export GRADTRACE_DATA ?= $(abspath ../shared/data)
# digits, or with GRADTRACE_DATA: mnist, cifar10, california, dbpedia, sst2, wikitext
DATASET ?= digits
ONCE ?=
FUZZ_SECONDS ?= 90
# Processes of `make test`: two for each core, since many tests wait for a service.
TEST_PROCESSES ?= $(shell echo $$(( $$(nproc 2>/dev/null || echo 2) * 2 )))

.PHONY: demo test test-unit test-long test-page test-portable fuzz lint lint-page vendor docker-check reference client bench peers install compiled clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml client/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet -e ./client -e ".[dev]"
	@touch $@

demo: install
	$(VENV)/bin/gradtrace demo --dataset $(DATASET) $(if $(ONCE),--once)

# What tests start would otherwise compile all modules each time where PYTHONDONTWRITEBYTECODE is set, as in containers.
compiled: install
	@$(VENV)/bin/python -m compileall -q attribution indexer service client tests benchmarks examples

test: compiled  # in several processes; a file's tests share their fixtures; the longest files first: tests/conftest.py
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
		-m "not long and (not browser or everyday)"

test-long: compiled  # what `make test` leaves out, the browser apart; properties are looked at with more examples
	GRADTRACE_TEST_THOROUGH=1 $(VENV)/bin/python -m pytest -n logical --dist loadfile -m "long or hypothesis"

test-page: compiled  # the page in a real browser; skipped without one
	$(VENV)/bin/python -m pytest -m browser

test-unit: compiled  # those marked so, in under a minute
	$(VENV)/bin/python -m pytest -n logical --dist loadfile -m unit

PORTABLE = layers full_gradients basis search build methods
test-portable: compiled  # gradients, bases, search, builds and methods with several threads, without vector instructions
	GRADTRACE_TEST_THREADS=4 ATEN_CPU_CAPABILITY=default $(VENV)/bin/python -m pytest -n logical --dist loadfile \
		-m "not recipe" $(PORTABLE:%=tests/test_%.py)

fuzz: install  # for longer than `make test` does
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(VENV)/bin/python -m pytest tests/test_fuzz.py --timeout $$((2 * $(FUZZ_SECONDS) + 300))

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

PAGE_TOOLS = service/page_tools
vendor: $(PAGE_TOOLS)/node_modules/.package-lock.json  # the page's libraries, of the versions in its package.json; needs Node
	node $(PAGE_TOOLS)/vendor.mjs

lint-page: $(PAGE_TOOLS)/node_modules/.package-lock.json  # types and style of the page's JavaScript and CSS; needs Node
	cd $(PAGE_TOOLS) && npx tsc -p tsconfig.json
	cd $(PAGE_TOOLS) && npx biome check --config-path=. --error-on-warnings ../gradtrace_service/page vendor.mjs

$(PAGE_TOOLS)/node_modules/.package-lock.json: $(PAGE_TOOLS)/package.json $(PAGE_TOOLS)/package-lock.json
	cd $(PAGE_TOOLS) && npm ci
	@touch $@

docker-check: install  # what the images install and the compose file starts, without a container engine
	$(VENV)/bin/hadolint docker/Dockerfile
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	$(VENV)/bin/python docker/check.py

reference: install  # the pages of the settings and of the HTTP API, from the code
	$(VENV)/bin/python docs/reference/render.py

client: install  # the synchronous client, from the asynchronous one
	$(VENV)/bin/python client/generate_sync_client.py

bench: install
	$(VENV)/bin/python -m benchmarks

# Other libraries' scores beside Gradtrace's. They get an environment of their own.
peers: $(PEERS_VENV)/.installed
	$(PEERS_VENV)/bin/python -W ignore -m benchmarks.peers

$(PEERS_VENV)/.installed: pyproject.toml client/pyproject.toml benchmarks/peers/requirements.txt benchmarks/peers/imports.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(PEERS_VENV)/bin/python -m pip install --quiet -e ./client -e . -r benchmarks/peers/imports.txt
	$(PEERS_VENV)/bin/python -m pip install --quiet --no-deps -r benchmarks/peers/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS_VENV) runs
