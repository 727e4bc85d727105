# make demo and make test need nothing but Python 3.11+ and an internet connection to the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test test-slow check bench clean

help:
	@echo "make demo       set up, encode the clips of this repository, read them back, decode them"
	@echo "make test       set up, check style and types, run the tests (minutes)"
	@echo "make test-slow  the tests, the long ones too"
	@echo "make check      style and types"
	@echo "make bench      the measurements of docs/benchmarks.md"
	@echo "make clean      remove the virtual environment and the demo's output"

demo: $(VENV)/.installed
	@echo "== demo: encoding the clips in configs/quickstart/clips"
	@rm -rf demo
	@$(BIN)/python jobs/encode_dataset.py --config configs/quickstart.yaml --output.uri demo/latents
	@echo "== demo: reading the dataset back"
	@$(BIN)/python jobs/show_dataset.py demo/latents
	@echo "== demo: decoding its latents to videos"
	@$(BIN)/python jobs/decode_latents.py --input.uri demo/latents --output.uri demo/videos \
		--vae.weights configs/quickstart/vae --vae.dtype float32
	@echo
	@echo "demo/latents              the dataset: Parquet shards, index, manifest, plan, README.md"
	@echo "demo/latents/report.html  the account, for a browser"
	@echo "demo/videos               the latents decoded again; report.html plays them. Coloured noise: the small model is not trained"
	@echo "Next: your own videos, with published weights (see README.md):"
	@echo "  $(BIN)/python jobs/encode_dataset.py --config configs/cogvideox-5b.yaml --input.uri FOLDER --output.uri FOLDER"
	@echo "To look at the dataset in a browser:"
	@echo "  $(BIN)/python jobs/serve_decoder.py --config configs/serve.yaml --datasets.demo demo/latents"

test: $(VENV)/.installed-test check
	@echo "== test: pytest, without the tests marked slow"
	@$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(VENV)/.installed-test check
	@echo "== test-slow: pytest, everything"
	@$(BIN)/python -m pytest -q --timeout 3600

check: $(VENV)/.installed-test
	@echo "== check: ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.installed-test
	@for file in benchmarks/bench_*.py; do echo "== bench: $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) demo build *.egg-info

$(VENV)/.created:
	@echo "== set-up: creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "== set-up: installing the pipeline (torch and Ray are large; minutes the first time)"
	@$(PIP) install --constraint constraints.txt --editable ".[serve]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "== set-up: installing what the tests need"
	@$(PIP) install --constraint constraints.txt --editable ".[test]"
	@touch $@
