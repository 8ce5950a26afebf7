# make workbook   run every notebook on this machine's CPU (PROFILE=smoke unless told otherwise)
# make test       the tests
# make test-kernels   our Triton kernels, interpreted on the CPU, and what flash-linear-attention's classes write
# make test-eval  our adapter for lm-evaluation-harness, run through the harness
# make test-browser   the walkthroughs in JupyterLab, driven by a headless Chromium; screenshots in build/browser
# make lab        JupyterLab
# make bench      the recurrences, side by side with what a user would pick instead
# make bench-gpu  models of 1.3B beside the libraries' own, parity, StateX at 64K, cold start; needs a GPU (docs/gpu.md)
# make bench-sliders   from a slider's move to its figure, for every control of the walkthroughs
# make check      lint; notebooks paired and stripped; parameter files valid

PROFILE ?= smoke
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
BROWSER := $(VENV)/.browser
EVAL    := $(VENV)/.eval
KERNELS := $(VENV)/kernels

# For test-browser: CHROMIUM=/path names a program; otherwise one of these, or Debian's package where root may install it
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

# On Linux PyPI's torch brings gigabytes of CUDA; PyTorch's own index has the CPU build. For a GPU: make TORCH_INDEX= ...
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),$(if $(PIP_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu))

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: workbook test test-kernels test-eval test-browser chromium lab bench bench-gpu bench-sliders check clean

workbook: $(READY)
	$(BIN)/lrm-recall run --profile $(PROFILE) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-kernels: $(KERNELS)
	PYTHONPATH=$(KERNELS) $(BIN)/python -m pytest tests/kernels tests/checkpoints/test_fla_classes.py -rs $(ARGS)

test-eval: $(EVAL)
	$(BIN)/python -m pytest tests/test_harness.py -rs $(ARGS)

test-browser: $(BROWSER) chromium
	$(BIN)/python -m pytest tests/browser -n 2 -rs $(ARGS)

chromium:
	@if [ -n "$(CHROMIUM)" ]; then exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium; \
	else echo "Chromium is missing: install it (Debian: apt install chromium) or set CHROMIUM=/path/to/it" >&2; exit 1; fi

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

bench: $(READY)
	$(BIN)/python bench/recurrences.py $(ARGS)

bench-gpu: $(READY)
	$(BIN)/python bench/gpu_models.py $(ARGS)
	$(BIN)/python bench/gpu_parity.py $(ARGS)
	$(BIN)/python bench/gpu_statex.py $(ARGS)
	$(BIN)/python bench/gpu_chunk_search.py $(ARGS)
	$(BIN)/python bench/gpu_chunk_attention.py $(ARGS)
	$(BIN)/python bench/gpu_resona_decode.py $(ARGS)
	$(BIN)/python bench/gpu_synthetic.py $(ARGS)
	$(BIN)/python bench/gpu_cold_start.py quick $(ARGS)
	$(BIN)/python bench/gpu_sanitize.py $(ARGS)

bench-sliders: $(READY)
	$(BIN)/python bench/sliders.py $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/lrm-recall check

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) -c constraints.txt -e '.[dev]'
	touch $@

# Beside the environment, not in it: with these transformers would take paths that need a GPU.
$(KERNELS): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $@.partial -c constraints.txt triton flash-linear-attention fla-core einops
	rm -rf $@ && mv $@.partial $@

$(EVAL): $(READY)
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) -c constraints.txt -e '.[eval]'
	touch $@

$(BROWSER): $(READY)
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) -c constraints.txt -e '.[browser]'
	touch $@

clean:
	rm -rf $(VENV) build/browser outputs/smoke outputs/results/*.smoke.jsonl
