# make demo and make test do everything on a machine that has python3, a C++ compiler and make.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11
PY = $(VENV)/bin/python
# A process for each core, which takes some 2 GB; the tests of a file share one, and what they leave
# for each other. Threads that wait for work leave the cores to the other processes.
PYTEST = OMP_WAIT_POLICY=passive $(abspath $(PY)) -m pytest -q -n logical --maxprocesses 8 --dist loadfile
CPP = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: demo test build bench stub lint format pytest pytest-native pytest-reference \
	pytest-isa pytest-ptx traffic sanitize gpu-check clean

demo: build
	$(PY) -m gradfuse demo
	$(PY) -m gradfuse bench --quick

test: build lint pytest

build: $(VENV)/.installed
	$(PY) setup.py -q build_ext --inplace

# Once for each environment; the editable install also builds, into build/, from where `build` goes on.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "$(TORCH)" numpy "setuptools>=77" wheel ninja pybind11
	$(PY) -m pip install -q --no-build-isolation -e ".[demo,test,lint,docs]"
	touch $@

bench: build
	$(PY) -m gradfuse bench
	$(PY) -m gradfuse bench-batch-norm
	$(PY) -m gradfuse bench-step

# The signatures of the compiled module, from its bindings. The values of its attributes differ
# between machines, and the spelling of numbers between versions of pybind11.
STUB = build/stubs/gradfuse/_C.pyi
$(STUB): build
	$(PY) -m pybind11_stubgen gradfuse._C -o build/stubs
	sed -i -E 's/^(\w+: str) = .*/\1/; s/^codes: dict = .*/codes: dict[str, dict[str, int]]/; \
		s/typing.SupportsFloat \| typing.SupportsIndex/float/g; \
		s/typing.SupportsInt \| typing.SupportsIndex/int/g' $@
	$(PY) -m ruff check -q --fix --select I,F,UP $@
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
	$(PYTEST)

# Of the tests that take the implementations in turn, all but those of the pure-torch one.
pytest-native: build
	$(PYTEST) -k "not reference"

# Without the compiled module. What takes long and does not depend on that is left out: examples,
# large models, and what `make pytest` runs on the pure-torch path.
pytest-reference: build
	GRADFUSE_NATIVE=0 GRADFUSE_PTX=0 $(PYTEST) \
		-k "not models_of_torchvision and not thousand_steps and not opcheck" \
		--ignore tests/test_examples.py --ignore tests/ptx

# What differs between instruction sets is the kernels' arithmetic. Those tests run for each below
# this machine's best one, which is that of `make pytest`.
KERNEL_TESTS = tests/test_clip.py tests/test_range.py tests/test_value.py tests/test_adaptive_clip.py \
	tests/test_nonfinite.py tests/test_quiet.py tests/test_hypothesis.py tests/test_batch_norm.py \
	tests/test_batch_norm_hypothesis.py tests/test_optim.py
ISAS = $(shell grep -q avx512vl /proc/cpuinfo && echo avx2) $(shell grep -q avx2 /proc/cpuinfo && echo baseline)
pytest-isa: build
	for isa in $(ISAS); do \
		GRADFUSE_PTX=0 GRADFUSE_ISA=$$isa $(PYTEST) -k "not reference" $(KERNEL_TESTS) || exit 1; done

# Every test that takes a backend, on the emulated CUDA kernels; `make test` runs a part of each.
pytest-ptx: build
	GRADFUSE_PTX=all $(PYTEST) -k ptx

# What the CUDA kernels move and take, counted by the emulator and by ptxas, into the tables of a page.
traffic: build
	PYTHONPATH=tests:. $(PY) -m ptx.traffic --into docs/cuda.md

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
SANITIZED = build/sanitize
sanitize: $(VENV)/.installed
	mkdir -p $(SANITIZED)
	cp -r gradfuse $(SANITIZED)/ && rm -f $(SANITIZED)/gradfuse/_C*.so
	CXX="$(abspath tests/sanitize-c++)" GRADFUSE_CUDA=0 GRADFUSE_SANITIZE=1 $(PY) setup.py -q build_ext --build-lib $(SANITIZED)
	cd $(SANITIZED) && env GRADFUSE_PTX=0 GRADFUSE_SANITIZE=1 PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		$(PYTEST) -p no:cacheprovider -k "not reference" \
		$(addprefix ../../,$(KERNEL_TESTS)) ../../tests/test_errors.py ../../tests/test_clipper.py \
		../../tests/test_optim_state.py \
		../../tests/test_batch_norm_errors.py

# All that wants a real GPU, against the python3 it is given, in under nine minutes.
gpu-check:
	TORCH_CUDA_ARCH_LIST=$$($(PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") \
		GRADFUSE_CUDA=1 timeout 180 $(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. timeout 150 $(PYTHON) -m pytest -q -k cuda
	PYTHONPATH=. timeout 90 compute-sanitizer --error-exitcode 1 $(PYTHON) -m pytest -q -x \
		tests/test_cuda.py tests/test_adaptive_clip.py -k cuda
	PYTHONPATH=. timeout 110 $(PYTHON) -m gradfuse bench --device cuda --quick

clean:
	rm -rf build *.egg-info gradfuse/_C*.so

.PHONY: docs wheel

# The pages and the reference, into build/site; a warning is an error.
docs: build
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q --strict

# A wheel, and a fresh environment that has it and no compiler: torch and what torch needs come from
# $(VENV) by a path, whose .pth files Python does not read, so that the checkout stays out of sight.
# The build goes on from the objects of `build`, so that it only links. What an older layout left in
# build/lib would be packed too.
WHEEL_ENV = build/wheel-env
wheel: build
	rm -rf dist build/lib.* build/bdist.* $(WHEEL_ENV)
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	$(PY) -m venv --without-pip $(WHEEL_ENV)
	$(PY) -m pip --python $(WHEEL_ENV)/bin/python install -q --no-deps dist/*.whl
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(WHEEL_ENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch.pth
	env -i PATH=$(abspath $(WHEEL_ENV))/bin $(WHEEL_ENV)/bin/python tests/smoke.py $(WHEEL_ENV)
