# Needs Python 3.11 or newer and a C++ compiler; everything else is installed into .venv in this folder.
PYTHON ?= python3
BIN := .venv/bin
UNSLOTH := .venv-unsloth
comma := ,
READY := .venv/installed$(if $(GPU),-gpu)
LLAMA = $(shell sed -n 's/.*"llama-cpp-python==\(.*\)".*/\1/p' pyproject.toml)
# llama.cpp's image and audio tools are not used; without them the build takes 7 minutes instead of 11.
# Without __AMX_INT8__ it does not use AMX: some virtual machines list AMX and then kill the process (SIGILL at tileloadd).
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__$(if $(GPU), -DGGML_CUDA=on)

define check_python
@$(PYTHON) -c 'import sys; sys.exit(sys.platform != "linux")' || { echo "error: tapir-local runs on Linux only" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
endef

.PHONY: distill test campaign test-real test-unsloth check docs install llama clean nvcc

distill: $(READY)              ## install, then run the quickstart: three rounds with the pocket teacher and student
	$(BIN)/tapir-local distill --rounds 3

test: .venv/installed          ## run every test
	$(BIN)/pytest -n auto --dist worksteal

campaign: .venv/installed      ## kill and harm small runs for about 20 minutes, and feed every reader garbage
	$(BIN)/pytest -n0 -m campaign tests/faults
	$(BIN)/python bench/crash.py --kills $(or $(KILLS),200)

test-unsloth: $(UNSLOTH)/installed  ## train tiny models through Unsloth's GPU code, on the CPU
	$(UNSLOTH)/bin/python -m pytest -m unsloth -n 2 --dist worksteal tests/unsloth

test-real: .venv/installed     ## fetch published weights (0.8 GB, into cache/models) and run the tests that need them
	PYTHON=$(BIN)/python tests/fetch_models cache/models
	TAPIR_LOCAL_TEST_MODELS=cache/models $(BIN)/pytest -n0 -m real

check: .venv/installed         ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed          ## write docs/commands.md and docs/settings.md from the code
	$(BIN)/python docs/generate.py

install: $(READY)              ## make the environment only; GPU=1: with Unsloth, and llama.cpp with CUDA

.venv/installed: pyproject.toml
	$(check_python)
	@command -v c++ g++ clang++ >/dev/null || { echo "error: llama.cpp is built from source and there is no C++ compiler. Debian: apt-get install g++; Fedora: dnf install gcc-c++" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch'>=2.11,<=2.13.0'
	@echo "installing; llama.cpp is compiled, which takes about 7 minutes on two cores$(if $(GPU),$(comma) with CUDA perhaps half an hour)"
	$(BIN)/pip install -q -e '.[dev]'
	@$(BIN)/python -P -m tapir_local.doctor.llama_check 2>/dev/null || { echo "llama.cpp does not run on this processor: pip reused a build for another one; compiling it again"; $(MAKE) llama; }
	@touch $@

# Without nvcc, the order-only prerequisite stops make before anything is installed. pip's cache does not know CMAKE_ARGS:
# a llama.cpp without CUDA that it returns is compiled again.
.venv/installed-gpu: pyproject.toml | nvcc
	$(MAKE) .venv/installed
	$(BIN)/pip install -q -e '.[dev,gpu]'
	@ls .venv/lib/python*/site-packages/llama_cpp/lib/libggml-cuda.so >/dev/null 2>&1 || $(MAKE) llama
	@touch $@

# Without llama.cpp, which takes minutes to compile. A GPU's torch is not needed, and nothing of .venv is changed.
$(UNSLOTH)/installed: pyproject.toml tests/unsloth/requirements.py
	$(check_python)
	rm -rf $(UNSLOTH)
	$(PYTHON) -m venv $(UNSLOTH)
	$(UNSLOTH)/bin/pip install -q torch'>=2.11,<=2.13.0'
	$(UNSLOTH)/bin/python tests/unsloth/requirements.py >$(UNSLOTH)/requirements.txt
	$(UNSLOTH)/bin/python tests/unsloth/requirements.py gpu >$(UNSLOTH)/gpu.txt
	$(UNSLOTH)/bin/pip install -q -r $(UNSLOTH)/requirements.txt
	$(UNSLOTH)/bin/pip install -q --no-deps -r $(UNSLOTH)/gpu.txt
	@touch $@

nvcc:
	@command -v "$${CUDACXX:-nvcc}" >/dev/null || { echo "error: llama.cpp with CUDA is compiled by nvcc, which is not on the PATH. Install NVIDIA's cuda-toolkit (Debian: apt-get install nvidia-cuda-toolkit), or export PATH=/usr/local/cuda/bin:\$$PATH" >&2; exit 1; }

llama: $(if $(GPU),nvcc)        ## compile llama.cpp again for this machine's processor; GPU=1: with CUDA
	$(BIN)/pip install -q --no-cache-dir --force-reinstall --no-deps llama-cpp-python==$(LLAMA)
	$(BIN)/python -P -m tapir_local.doctor.llama_check

clean:                         ## delete the environments, not the cache: paid calls stay
	rm -rf .venv $(UNSLOTH) build dist *.egg-info
