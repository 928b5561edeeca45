# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv if it is missing.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
EXTRAS := models,viz,bench,test,lint
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)

.PHONY: demo test check bench lint format gpu clean

demo: $(VENV)/.built
	$(BIN)/fastvit demo $(ARGS)

test: $(VENV)/.built
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.built
	$(BIN)/fastvit check $(ARGS)

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks.cpu $(ARGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

gpu: $(VENV)/.built
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist demo *.egg-info fastvit/_C.*

# --no-build-isolation: the build uses the torch that is installed here, instead of downloading another for itself.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fastvit needs Python >= 3.11; this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) setuptools pybind11 ninja numpy torch torchvision
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(CPP)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
