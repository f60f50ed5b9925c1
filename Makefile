# make demo and make test do everything on a machine that has python3, a C++ compiler and make.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11
PY = $(VENV)/bin/python
EXTRAS ?= demo,test,models,lint,docs
# --no-compile: Python compiles a file on its first import, and most of these are never imported.
PIP = $(PY) -m pip install -q --no-compile
# One process per core, at about 2 GB each. The tests of a file share a process and its caches.
# OMP_WAIT_POLICY=passive makes waiting threads leave the cores to the other processes.
PYTEST = OMP_WAIT_POLICY=passive $(abspath $(PY)) -m pytest -q -n logical --maxprocesses 8 --dist loadfile
CPP = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: demo test check test-full build compile bench stub lint format pytest pytest-torch \
	pytest-reference mutants traffic sanitize gpu-check gpu-wheels clean

demo: build
	$(PY) -m gradfuse demo
	$(PY) -m gradfuse guide --short
	$(PY) -m gradfuse bench clip --quick

test: lint pytest

# For use after each edit: lint, and the tests that a change is likely to break.
CHECKED = $(addprefix tests/test_,ops.py errors.py batch_norm_errors.py clipper.py nn.py \
	optim_state.py policies.py docs.py)
check: lint
	GRADFUSE_PTX=0 $(PYTEST) $(CHECKED)

# All combinations of the tests' parameters, and the emulator's own tests.
test-full: lint
	$(PYTEST) --full

build: $(VENV)/.installed compile

# Without MAKEFLAGS, because Python closes the pipe in which ninja would look for make's jobs.
compile: $(VENV)/.tools
	MAKEFLAGS= $(PY) setup.py -q build_ext --inplace

# Once per environment. With make -j the module compiles while pip installs the rest. The editable
# install compiles nothing, because Python finds the module of `compile` in the tree.
$(VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" numpy "setuptools>=77" wheel ninja pybind11
	touch $@

$(VENV)/.installed: $(VENV)/.tools pyproject.toml
	GRADFUSE_NATIVE=0 $(PIP) --no-build-isolation "$(TORCH)" -e ".[$(EXTRAS)]"
	touch $@

bench: build
	$(PY) -m gradfuse bench --history bench/history.jsonl
	$(PY) -m gradfuse bench history --history bench/history.jsonl --out docs/assets

# The signatures of the compiled module, from its bindings. Attribute values differ between machines
# and number types between versions of pybind11, so sed makes them uniform.
STUB = build/stubs/gradfuse/_C.pyi
$(STUB): build
	$(PY) -m pybind11_stubgen gradfuse._C -o build/stubs
	sed -i -E -e 's/^(\w+: str) = .*/\1/' -e 's/^codes: dict = .*/codes: dict[str, dict[str, int]]/' \
		-e 's/typing.SupportsFloat \| typing.SupportsIndex/float/g' \
		-e 's/typing.SupportsInt \| typing.SupportsIndex/int/g' $@
	$(PY) -m ruff check -q --fix-only --select I,F,UP,PYI $@
	$(PY) -m ruff format -q $@

stub: $(STUB)
	cp $(STUB) gradfuse/_C.pyi

lint: build $(STUB)
	diff -u gradfuse/_C.pyi $(STUB) # make stub brings it up to date
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(PY) -m mypy

format: build
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

pytest: build
	$(PYTEST) --slowest-files=10

# The tests that depend on torch's version: binding, autograd, compile, AMP, fuse. Kernels do not.
TORCH_TESTS = $(addprefix tests/test_,batch_norm_autograd.py batch_norm_errors.py \
	batch_norm_modes.py blocks.py bench.py \
	distributed_norm.py distributed_optim.py \
	cli.py clip_in_step.py compile.py dropout.py errors.py fuse.py fuse_graph.py \
	fuse_graph_norms.py fuse_norms.py layer_norm.py nn.py optim_amp.py optim_parameters.py \
	optim_skips.py optim_state.py process.py sync_batch_norm.py tracing.py)
pytest-torch: build
	GRADFUSE_PTX=0 $(PYTEST) --slowest-files=5 -k "not reference" $(TORCH_TESTS)

# Without the compiled module. Leaves out the large models, which do not depend on it.
pytest-reference: build
	GRADFUSE_NATIVE=0 GRADFUSE_PTX=0 $(PYTEST) --slowest-files=5 -k "not models_of_torchvision" \
		$(TORCH_TESTS) tests/test_clipper.py tests/test_ops.py tests/test_policies.py

# Puts faults into a copy of the sources, and fails unless a test finds each of them.
mutants: build
	$(PY) tests/mutants.py

# Updates the tables of docs/cuda.md: the CUDA kernels' traffic, which the emulator counts, and
# registers, which ptxas reports.
traffic: build
	PYTHONPATH=tests:. $(PY) -m ptx.traffic --into docs/cuda.md

# The CPU kernels of the widest instruction set under AddressSanitizer and
# UndefinedBehaviorSanitizer, in a build of their own.
SANITIZED = build/sanitize
SANITIZED_TESTS = $(addprefix ../../tests/test_,adaptive_clip.py batch_norm.py batch_norm_errors.py \
	batch_norm_modes.py clip.py clipper.py dropout.py errors.py fuse.py fuse_norms.py layer_norm.py ops.py optim.py \
	optim_groups.py optim_parameters.py optim_state.py quiet.py range.py value.py)
sanitize: $(VENV)/.installed
	mkdir -p $(SANITIZED)
	cp -r gradfuse $(SANITIZED)/ && rm -f $(SANITIZED)/gradfuse/_C*.so
	CXX="$(abspath tests/sanitize-c++)" GRADFUSE_CUDA=0 GRADFUSE_SANITIZE=1 GRADFUSE_UNITY=1 \
		$(PY) setup.py -q build_ext --build-lib $(SANITIZED)
	cd $(SANITIZED) && env GRADFUSE_PTX=0 GRADFUSE_SANITIZE=1 PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		$(PYTEST) -p no:cacheprovider --slowest-files=5 -k "not reference and not baseline and not avx2 and not thousand_steps and not compile and not opcheck and not torchvision and not of_models and not fifty" \
		$(SANITIZED_TESTS)

# Everything that needs a real GPU, with the given python3. STAGES: A (build and tests), B
# (compute-sanitizer), C (benches), each under nine minutes; OUT gets the results.
OUT ?= results/gpu
gpu-check:
	$(PYTHON) -m tests.gpu.check --out $(OUT) $(STAGES)

# Wheels for the tests on a machine that has torch but no network.
GPU_PYTHON ?= 3.12
gpu-wheels: $(VENV)/.installed
	$(PY) -m pip download -q --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
		-d results/wheels pytest pluggy iniconfig packaging pygments pytest-xdist execnet psutil \
		hypothesis sortedcontainers expecttest sybil 'setuptools<82'

clean:
	rm -rf build *.egg-info gradfuse/_C*.so

.PHONY: docs wheel

# Builds the pages and the reference into build/site; a warning is an error.
docs: build
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q --strict

# Tests a wheel in a fresh environment without a compiler. A .pth file there adds the packages of
# $(VENV), for torch and its dependencies; Python does not read the .pth files of that path, so the
# checkout stays invisible. The wheel reuses the objects of `build` and only links. build/lib is
# removed first, because files that an older layout left there would be packed too.
WHEEL_ENV = build/wheel-env
wheel: build
	rm -rf dist build/lib.* build/bdist.* $(WHEEL_ENV)
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	$(PY) -m venv --without-pip $(WHEEL_ENV)
	$(PY) -m pip --python $(WHEEL_ENV)/bin/python install -q --no-deps dist/*.whl
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(WHEEL_ENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch.pth
	env -i PATH=$(abspath $(WHEEL_ENV))/bin $(WHEEL_ENV)/bin/python tests/smoke.py $(WHEEL_ENV)
