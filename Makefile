# Everything a person types. `make demo` and `make test` need nothing but Python 3.11+ on PATH.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
T := --opt notebook_metadata_filter=-all --opt cell_metadata_filter=-all
NEW := {"jupytext":null,"kernelspec":{"display_name":"python3","language":"python","name":"python3"}}

.PHONY: open close export

# Notebooks as text: `make open NB=06_pool`, edit nbs/.txt/06_pool.py, `make close NB=06_pool`.
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
