# Everything runs from .venv, whatever environment is active. `make demo` and `make test` need python3 (3.11+) alone.
PYTHON ?= python3
BIN := .venv/bin
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check docs site tpu install install-core lock clean
.NOTPARALLEL:

MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

demo: install-core
	$(BIN)/semid demo --out runs/demo

test: install  ## two workers, since compiling is most of the time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## the documentation, on http://localhost:8000
	$(MKDOCS) serve

site: install  ## the same in build/site; a warning is an error, a broken link too
	$(MKDOCS) build

tpu: install  ## compile the default generator's step and search for a slice of TPUs, where libtpu is installed
	@if $(BIN)/python -c 'import libtpu' 2>/dev/null; then $(BIN)/semid compile --topology v5e:4x4; \
	else echo "libtpu is not installed, so nothing is compiled for TPUs: .venv/bin/python -m pip install -e '.[tpu]'"; fi

install: .venv/dev  ## everything: core, extras, tools for tests and checks

install-core: .venv/core  ## what `make demo` needs: core and the extra `report`

define install_lock
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "semid needs Python 3.11 or newer; set PYTHON=/path/to/it"; exit 1; }
@test -x $(BIN)/python || $(PYTHON) -m venv .venv
@echo "installing $< into .venv (about a minute) ..."
@$(BIN)/python -m pip install --quiet --require-hashes -r $<
@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
endef

.venv/core: requirements.lock pyproject.toml
	$(install_lock)
	@touch $@

# The development lock contains the core lock at equal versions, hence both stamps.
.venv/dev: requirements-dev.lock pyproject.toml
	$(install_lock)
	@touch .venv/core $@

COMPILE = uv pip compile --quiet $(UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header pyproject.toml
lock:  ## needs uv: pip install uv; newer versions: UPGRADE=--upgrade
	$(COMPILE) --extra dev -o requirements-dev.lock
	$(COMPILE) --extra report --group build --constraint requirements-dev.lock -o requirements.lock

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .jax_cache build dist *.egg-info
