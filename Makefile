# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv if it is missing.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
EXTRAS := models,viz,bench,test,lint
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo test check bench bench-cpu report lint format gpu clean

demo: $(VENV)/.built
	$(BIN)/fastvit demo $(ARGS)

test: $(VENV)/.built $(VENV)/.emulator
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

check: $(VENV)/.built
	$(BIN)/fastvit check $(ARGS)

# The CPU's tables, its goals and which of them are met, and its rows in benchmarks/results; README's table, the report
# and the figures are drawn from them.
bench bench-cpu: $(VENV)/.built
	$(BIN)/python -m benchmarks cpu $(ARGS)
	$(BIN)/python -m benchmarks report

report: $(VENV)/.built
	$(BIN)/python -m benchmarks report $(ARGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(wildcard tests/*.h tests/*.cpp)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(wildcard tests/*.h tests/*.cpp)

# With what is there: a machine with a GPU may have no network, and its own torch. BUDGET=seconds OUT=folder.
# Without a GPU it says so in one line and exits 3. Make has no status of its own but 2: it adds a line with "Error 3" and
# exits 2. Where the status counts: `python -m benchmarks gpu`, which is all that this does.
gpu: GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	@BUDGET=$(BUDGET) OUT=$(OUT) $(GPU_PYTHON) -m benchmarks gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist demo *.egg-info fastvit/_C.* fastvit/_emulator.*

# --no-build-isolation: the build uses the torch that is installed here, instead of downloading another for itself.
# FASTVIT_BUILD_NATIVE=0: the native part is built in place, next, and need not be built twice.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fastvit needs Python >= 3.11; this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) setuptools pybind11 ninja numpy torch torchvision
	FASTVIT_BUILD_NATIVE=0 $(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(CPP)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# The CUDA kernels for the host: they run on every change, on machines without a GPU.
$(VENV)/.emulator: $(VENV)/.installed setup.py $(CPP)
	FASTVIT_BUILD_EMULATOR=only $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
