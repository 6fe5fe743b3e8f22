# `make demo` and `make test` set everything up by themselves. They need Python 3.11 or newer, and make.

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready

# One thread: small models lose more time to threads that wait for each other than they gain. Override it for large ones.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint docs package lowest bench

demo: $(READY)
	@if [ -e demo ]; then echo "Removing the demo folder of an earlier run."; rm -rf demo; fi
	$(BIN)/gradleak demo --out demo

# Two tests at a time, each process with its half of the files, so that what tests share is made once; `make test WORKERS=0` runs them in one process.
WORKERS ?= 2
test: lint
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The documentation as a site, in site/; warnings are errors. GRADLEAK_EXECUTE=true shows what the notebooks print.
docs: $(READY)
	$(BIN)/mkdocs build

# The wheel and the sdist, checked in an environment that holds nothing else.
package: $(READY)
	rm -rf dist build .venv-package
	$(BIN)/python -m build
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install --quiet -c constraints.txt dist/*.whl
	cd dist && ../.venv-package/bin/gradleak --version && ../.venv-package/bin/gradleak demo

# The unit tests with the lowest versions that pyproject.toml allows. TORCH: another torch, where the lowest is not to be had. What torch needs of
# CUDA, it says itself: a build for CPUs needs nothing of it.
lowest:
	rm -rf .venv-lowest && $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip compile --quiet --no-annotate --no-header --resolution lowest-direct pyproject.toml | grep -Ev '^(nvidia|cuda|triton)' \
		$(if $(TORCH),| grep -v '^sympy' | sed 's/^torch==.*/torch==$(TORCH)/') > .venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --quiet -r .venv-lowest/lowest.txt -e . 'pytest>=8' 'pytest-xdist>=3.6'
	.venv-lowest/bin/pytest -n $(WORKERS) --dist worksteal tests/unit -W default

# Side by side with another library. DATA: CIFAR-10, a name on the Hugging Face hub or a folder. PEER: a Python that has
# breaching; without it gradleak is measured alone.
DATA ?= cifar10
bench: $(READY)
	$(BIN)/python benchmarks/against_breaching.py --data $(DATA) $(if $(PEER),--peer-python $(PEER))

# Once, and again when what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "gradleak needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "Setting up .venv, once; torch is a large download."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
