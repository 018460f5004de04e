# Two commands: `make demo` and `make test`. Everything else is one line that a person could type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOT ?= artifacts
RECIPE ?= world
CLUSTER ?= cluster/local.yaml
# Tests that start no runtime and no server run beside each other in so many processes, of one thread and ~2 GB each.
TEST_PROCESSES ?= 2
BESIDE := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION := false
# Minutes altogether. Left out: rsicd.py, which trains for a quarter of an hour a run (make bench-rsicd).
BENCHMARKS ?= $(wildcard $(addprefix benchmarks/,localize.py train_step.py read_data.py scaling.py gpu_step.py))

.PHONY: demo real test unit lint format bench bench-rsicd serve mlflow clean help

help:
	@echo "make demo    the whole chain over the built-in world, 5 to 10 minutes on 2 cores"
	@echo "make test    all tests      make unit   those without Ray      make lint   ruff and pyright"
	@echo "make serve   search and map page over the demo's index      make mlflow   what every job recorded"
	@echo "make real    the same chain over real data (RSPLATFORM_TEST_DATA=/your/data)"
	@echo "make bench   the measured claims      make bench-rsicd   retrieval trained on RSICD, three times 7 to 15 minutes"
	@echo "make clean   remove $(VENV) and caches; artifacts stay"

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rsplatform needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.run
	$(BIN)/python jobs/demo.py configs/demo/world.yaml $(CLUSTER)

real: $(VENV)/.run
	$(BIN)/python jobs/demo.py configs/demo/real.yaml $(CLUSTER)

test: $(VENV)/.dev
	$(BIN)/python -m pytest --durations 15 $(BESIDE) tests --ignore tests/ray --ignore tests/e2e
	$(BIN)/python -m pytest --durations 15 tests/ray tests/e2e

unit: $(VENV)/.dev
	$(BIN)/python -m pytest $(BESIDE) tests/unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.run
	set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

bench-rsicd: $(VENV)/.run
	$(BIN)/python benchmarks/rsicd.py --seeds 0 1 2

serve: $(VENV)/.run
	$(BIN)/python jobs/serve.py configs/serve/$(RECIPE).yaml $(CLUSTER)

mlflow: $(VENV)/.run
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(abspath $(ROOT))/mlflow.db --host 127.0.0.1 --port 5000

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	@echo "artifacts stay in $(ROOT)/; delete that folder yourself if you mean it"
