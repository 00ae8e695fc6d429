# Every target works alone on a machine that has only make and Python 3.11 or newer.
#   make train   the first experiment, into runs/digits
#   make test    all tests, the docstrings' examples and the README's
#   make notebooks-smoke  runs colab/*.ipynb with small parameters
#   make figures the paper's figures 3, 4 and 5 and ours, into figures; figures-smoke
#                is a minute's worth of them, into runs/figures-smoke
#   make battery-smoke  an example rule beside all baselines, into runs/battery-smoke
#   make notebooks  colab/*.ipynb from their sources; run, they lie in runs/notebooks
# PYTHON=python3.12 chooses the interpreter, EXTRAS=experiments,test the extras.

# The first one on the path that is new enough and can make virtual environments.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	  2>/dev/null && echo $$python && break; done)
EXTRAS ?= experiments,ray,test

BIN := .venv/bin
comma := ,
STAMP := .venv/installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: venv train test docs notebooks notebooks-smoke bench figures figures-smoke
.PHONY: battery-smoke lint types

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  python="$(PYTHON)"; \
	  test -n "$$python" || { \
	    echo "No Python 3.11 or newer with venv found; try make PYTHON=..." >&2; exit 1; }; \
	  echo "Making .venv with $$python"; \
	  "$$python" -m venv .venv; }
	@echo "Installing dbjax[$(EXTRAS)] into .venv; the first time takes some minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

train: venv
	$(BIN)/python -m experiments.main \
	  --config=configs/digits_downpour.py --workdir=runs/digits

test: venv
	$(BIN)/python -m pytest

docs: venv
	$(BIN)/python -m pytest dbjax tests/readme_test.py

notebooks: venv
	$(BIN)/jupytext --quiet --to ipynb --update colab/*.py
	mkdir -p runs/notebooks
	$(BIN)/jupyter-execute --output='../runs/notebooks/{notebook_name}' colab/*.ipynb

bench:
	$(MAKE) venv EXTRAS=$(EXTRAS),bench
	$(BIN)/python -m experiments.bench_downpour
	$(BIN)/python -m experiments.bench_lbfgs
	$(BIN)/python -m experiments.bench_partitions
	$(BIN)/python -m experiments.bench_ray
	$(BIN)/python -m experiments.bench_data

figures: venv
	$(BIN)/python -m experiments.figure3 --out=figures
	$(BIN)/python -m experiments.figure4 --out=figures
	$(BIN)/python -m experiments.figure5 --out=figures

figures-smoke: venv
	$(BIN)/python -m experiments.figure3 --out=runs/figures-smoke --smoke
	$(BIN)/python -m experiments.figure4 --out=runs/figures-smoke --smoke
	$(BIN)/python -m experiments.figure5 --out=runs/figures-smoke --smoke

battery-smoke: venv
	$(BIN)/python -m experiments.battery --rule=experiments/rules/compensate.py \
	  --smoke --out=runs/battery-smoke --cache=runs/battery-smoke/baselines

notebooks-smoke: venv
	$(BIN)/python -m pytest tests/colab_test.py -m notebooks

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: venv
	$(BIN)/pyrefly check
