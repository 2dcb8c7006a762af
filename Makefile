# Two commands matter: `make demo` (see it work) and `make test` (prove it works). Both set everything up first.
PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
PIPFLAGS ?=
THREADS ?= 2
# A CPU-only PyTorch where the registry's default is a CUDA build: make test TORCH_INDEX=<PyTorch's CPU wheel index>
ifdef TORCH_INDEX
PIPFLAGS += --extra-index-url $(TORCH_INDEX)
endif
export IN_TEST := 1

.PHONY: help demo test setup lab docs bench parity export clean

help:
	@echo "make demo               the main job on the shipped clips; VIDEO=my.mp4 or DATA=folder for your own"
	@echo "make test               everything that CI runs"
	@echo "make lab                JupyterLab on the notebooks"
	@echo "make docs               the site: with Quarto on PATH the real one, else a labelled preview"
	@echo "make bench              the benchmark notebooks, recorded under runs/"
	@echo "make parity             our library against arrays made by the authors' code"
	@echo "make export             notebooks -> timet_nb/, cleaned"
	@echo "make setup | clean      the environment in $(VENV) | remove it and all build products"

setup: $(VENV)/.ok

$(VENV)/.ok: settings.ini setup.py pyproject.toml constraints.txt
	@command -v $(PY) >/dev/null 2>&1 || { echo "timet_nb needs Python 3.11 or later, but '$(PY)' was not found: install it, or name yours: make PY=python3.12 ..."; exit 1; }
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "timet_nb needs Python 3.11 or later, but '$(PY)' is $$($(PY) -V 2>&1): install a newer one, or name yours: make PY=python3.12 ..."; exit 1; }
	@$(PY) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PY)' lacks the venv module: on Debian or Ubuntu run 'apt-get install python3-venv', then make again."; exit 1; }
	@test -x $(BIN)/python || $(PY) -m venv $(VENV)
	@echo "installing into $(VENV) (about 1.5 GB, a few minutes) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --retries 2 $(PIPFLAGS) -c constraints.txt -e ".[$(EXTRAS)]" \
	  && $(BIN)/python -m pip install -q --disable-pip-version-check --retries 2 --no-deps -c constraints.txt vos-benchmark \
	  || { echo "The installation failed (the reason is above). Most often the package registry cannot be reached: check the network or the proxy, then make again."; exit 1; }
	@touch $@

demo: $(VENV)/.ok
	@$(BIN)/timet run quickstart --budget cpu --threads $(THREADS) $(if $(VIDEO),-p "data=$(VIDEO)") $(if $(DATA),-p "data=$(DATA)")

test: $(VENV)/.ok
	@$(BIN)/python -m pytest -n $(THREADS) --dist worksteal $(TESTS)

lab: EXTRAS := dev,lab
lab: $(VENV)/.ok
	@$(BIN)/python -c "import jupyterlab" 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,lab]"
	IN_TEST=0 $(BIN)/jupyter lab --notebook-dir=nbs

docs: $(VENV)/.ok
	@$(BIN)/python -m tests.site

bench: $(VENV)/.ok
	@$(BIN)/timet run bench/speed --budget cpu --threads 1
	@$(BIN)/timet run bench/speed_evaluate --budget cpu --threads 2
	@$(BIN)/timet run bench/gpu --budget gpu
	@$(BIN)/timet run bench/claims --budget cpu --threads $(THREADS)
	@$(BIN)/timet run bench/claims_sine --budget cpu --threads 1
	@$(BIN)/timet run bench/speed_sine --budget cpu --threads 1
	@$(BIN)/timet run bench/claims_dcsam --budget cpu --threads 1
	@$(BIN)/timet run bench/speed_sam --budget cpu --threads 1
	@$(BIN)/timet run bench/claims_tau --budget cpu --threads 1
	@$(BIN)/timet run bench/claims_stcr --budget cpu --threads 1
	@$(BIN)/timet run bench/readings_stcr --budget cpu --threads 1
	@$(BIN)/timet run bench/speed_tau --budget cpu --threads 1

parity: $(VENV)/.ok
	@$(BIN)/python -m tests.parity $(DIR)

export: $(VENV)/.ok
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean

clean:
	rm -rf $(VENV) _proc _docs runs build *.egg-info nbs/_quarto.yml nbs/nbdev.yml .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
