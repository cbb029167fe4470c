# Everything runs in .venv, made from $(PYTHON) with the torch named here. For another build of
# torch: make TORCH="torch==2.13.0 --index-url <its index>".
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
STAMP := .venv/.installed
# written anew only when TORCH changes, so that another torch is installed when it is asked for
$(shell mkdir -p .venv && { echo '$(TORCH)' | cmp -s - .venv/torch-wanted || echo '$(TORCH)' > .venv/torch-wanted; })
BUILD_INPUTS := pyproject.toml setup.py $(shell find build_backend csrc -type f -not -name '*.pyc')
CXX_FILES := $(shell find csrc -type f)

.PHONY: demo test test-hf lint format bench sanitize clean install

demo: install
	$(BIN)/lego run

# a file stays in one process, since its fixtures compile things
test: lint
	$(BIN)/pytest -n 2 --dist loadfile

# the version in .venv, then the oldest in a folder of its own, put before it
test-hf: install
	$(BIN)/pytest -q tests/hf
	$(BIN)/pip install --quiet --upgrade --target build/transformers-5.0 transformers==5.0.0
	PYTHONPATH=build/transformers-5.0 $(BIN)/pytest -q tests/hf

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: install
	$(BIN)/pytest benchmarks/ --benchmark-only

# the CPU kernels with ASan and UBSan, in a folder of their own, under the tests that reach them; the
# first report ends it. libstdc++ is there for ASan to find, which Python does not link. Programs that
# a test compiles itself are left out, since the compilers leak and crash under ASan.
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all
UNDER_ASAN = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 LEGO_BACKEND=native \
	$(BIN)/pytest -q -s -o pythonpath="$(SANITIZED) ."
sanitize: install
	CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(BIN)/python setup.py -q build \
		--build-lib=$(SANITIZED) --build-temp=$(SANITIZED).temp
	$(UNDER_ASAN) tests/ops \
		-k "(scalar or avx2 or avx512 or dispatched or threads) and not compile and not host"
	$(UNDER_ASAN) tests/decoder

install: $(STAMP)

# torch first, so that the native libraries are compiled against it; then it is a constraint, so
# that no dependency replaces it
$(STAMP): $(BUILD_INPUTS) .venv/torch-wanted | $(BIN)/python
	@echo "Installing $(TORCH), LEGO and its tools into .venv"
	@$(BIN)/pip install --quiet $(TORCH)
	@$(BIN)/pip list --format=freeze | grep '^torch==' > .venv/torch.txt
	@$(BIN)/pip install --quiet --constraint .venv/torch.txt -e ".[dev]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(STAMP) lego_kernels/*.so lego_kernels/build_record.json
