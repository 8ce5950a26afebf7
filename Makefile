# make workbook   run every notebook on this machine's CPU (PROFILE=smoke unless told otherwise)
# make test       the tests
# make lab        JupyterLab
# make bench      the recurrences, side by side with what a user would pick instead
# make check      lint; notebooks paired and stripped; parameter files valid

PROFILE ?= smoke
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

# On Linux PyPI's torch brings gigabytes of CUDA; PyTorch's own index has the CPU build. For a GPU: make TORCH_INDEX= ...
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),$(if $(PIP_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu))

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: workbook test lab bench check clean

workbook: $(READY)
	$(BIN)/lrm-recall run --profile $(PROFILE) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

bench: $(READY)
	$(BIN)/python bench/recurrences.py $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/lrm-recall check

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs/smoke outputs/results/*.smoke.jsonl
