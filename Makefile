# Everything runs from .venv, whatever environment is active. `make demo` and `make test` need python3 (3.11+) alone.
PYTHON ?= python3
BIN := .venv/bin
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check install lock clean

demo: install
	$(BIN)/python -m experiments.demo --out runs/demo

test: install  ## two workers, since compiling is most of the time
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: install  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "semid needs Python 3.11 or newer; set PYTHON=/path/to/it"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the locked requirements into .venv (about a minute) ..."
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

lock:  ## needs uv: pip install uv
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra dev pyproject.toml -o requirements.lock

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .jax_cache *.egg-info
