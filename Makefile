# Two commands do everything on a machine with Python 3.11+ and a C++ compiler: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_FILES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/fuzz/*.cpp tests/simt/*.h tests/simt/*.cpp)
FUZZ_SECONDS ?= 600
# Processes that tests are divided among; most of a test is the start of processes, one after the other.
WORKERS ?= 2
# What `make test` runs: make TESTS="tests/ops tests/model" test
TESTS ?= tests

# Transformer Engine's Python alone (0.7 MB), for tests/te on a machine without it; not where megatron-core would find it
TE_PYTHON := $(VENV)/share/transformer-engine

.PHONY: help demo test test-all test-te gpu check format fuzz fuzz-formats clean
help:
	@echo "make demo      text -> tokenizer -> shards -> training -> restart at TP2 x PP2 -> evaluation -> generation"
	@echo "make test      the test suite;  make test-all: with the slow tests"
	@echo "make test-te   the tests of the Transformer Engine path on the real package, without a GPU (Python 3.12)"
	@echo "make gpu       on a machine with one GPU, in about 8 minutes: the tests that want one, then its speed"
	@echo "make check     ruff, mypy, clang-format"
	@echo "make fuzz      libFuzzer on the parser of shard indexes (needs clang; FUZZ_SECONDS=600)"
	@echo "make fuzz-formats  atheris on what is read of checkpoints, exports, corpora, templates and configurations"
	@echo "make format    let ruff and clang-format rewrite the sources"

$(VENV)/.runtime: requirements.txt pyproject.toml setup.py $(CXX_FILES)
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "illada-megatron needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c 'from illada_megatron.ops import kernels; why = kernels.without_cuda(); print("CUDA kernels: " + ("not built, because " + why if why else "built"))'
	touch $@

$(VENV)/.dev: $(VENV)/.runtime $(TE_PYTHON)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(TE_PYTHON)/.installed: $(VENV)/.runtime requirements-te.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TE_PYTHON) -r requirements-te.txt
	touch $@

demo: $(VENV)/.runtime
	$(BIN)/python examples/demo/run.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(TESTS)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest

# makes .venv-te: Python 3.12, the CUDA build of torch, Transformer Engine built from its source (17 CPU minutes)
test-te:
	tools/test_te.sh

# in the environment that is active, where Transformer Engine is: no virtual environment is made for it
gpu:
	$(PYTHON) -m benchmarks.gpu

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# finds are written to build/fuzz/ as crash-*; what it learns is kept in build/fuzz/corpus
fuzz:
	mkdir -p build/fuzz/corpus
	clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc/indexed_dataset \
	    tests/fuzz/index_fuzzer.cpp csrc/indexed_dataset/index_view.cpp -o build/fuzz/index_fuzzer
	build/fuzz/index_fuzzer -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -artifact_prefix=build/fuzz/ \
	    -print_final_stats=1 build/fuzz/corpus tests/fuzz/seeds

# finds are written to build/fuzz/FORMAT-crash-*; what it learns is kept in build/fuzz/FORMAT
FORMATS ?= legacy metadata record configuration safetensors chat_template manifest config_json legacy_archive safetensors_index
fuzz-formats: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	for format in $(FORMATS); do \
	    $(BIN)/python -W ignore tests/fuzz/run_formats.py $$format build/fuzz/$$format -max_total_time=$(FUZZ_SECONDS) \
	        -print_final_stats=1 || exit 1; \
	done

clean:
	rm -rf $(VENV) build *.egg-info demo illada_megatron/*/*.so  illada_megatron/*/*/*.so
