# make demo     build all, convert the shipped model, chat with it
# make dev      install so that an edited Python file counts at once (see docs/architecture.md)
# make test     all checks and tests (also builds the stock llama.cpp they compare with, once)
# make bench    docs/measurements.md: our build against stock llama.cpp (20 minutes on an idle machine)
# make fuzz     spoiled checkpoints and GGUF files and adapters, 5,000 of each: CASES=n, FUZZ_ARGS='--seed n'
# make test-arm ARM's kernels, cross-compiled, under qemu-user (Debian: g++-aarch64-linux-gnu and qemu-user)
# make bench-arm  what a token takes on ARM, counted under qemu-user (also llvm-mca-19): docs/measurements.md
# make wheels   dist/: wheels for x86-64 and ARM, each for all processors of its kind, and one of the bindings
# make test-wheels   tries that for x86-64, installed as a user would, on processors that qemu-user emulates
# make test-arm-main   the main job with the wheel for ARM, in a Debian for it under qemu-user
# make elsewhere  compiles our C++ for macOS on ARM and for Windows, where nothing of it was run
# make clients  programs of others over our package: LangChain, outlines, llm, ... (docs/clients.md)
# make quant-model   trains what quantization is measured on (two hours on a core; called again, it goes on)
# make lint | stock | sanitize | clean

PYTHON ?= python3
BIN := .venv/bin
UPSTREAM := mobilellm_cpp/native/upstream/upstream.py

# llama-cpp-python is installed as bindings only: the library they load is ours
export CMAKE_ARGS := -DLLAMA_BUILD=OFF $(CMAKE_ARGS)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
INSTALL := $(PIP) --no-build-isolation --config-settings=build-dir=build/wheel

SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE \
    $(shell find convert quant kernels mobilellm_cpp site -type f -not -name '*.pyc')

.PHONY: demo dev test test-arm test-arm-main elsewhere wheels test-wheels bench bench-arm quant-model clients lint stock sanitized sanitized-threads sanitize fuzz clean

demo: .venv/installed
	@if [ -t 0 ]; then $(BIN)/mobilellm chat; else \
	    echo '> Hello! Who are you?'; echo 'Hello! Who are you?' | $(BIN)/mobilellm chat; fi

# The other targets install the package itself again: tests and types are about what users get.
dev: .venv/tests-installed
	rm -f .venv/installed .venv/tests-installed
	$(INSTALL) --no-deps --editable .

test: lint .venv/tests-installed stock
	$(BIN)/cmake --build build/wheel --target kernels_test packed_test thread_pool_test callers_test >/dev/null
	MOBILELLM_STOCK="$$($(BIN)/python $(UPSTREAM) fetch)" \
	    MOBILELLM_NATIVE_TESTS="$(CURDIR)/build/wheel" $(BIN)/pytest $(PYTEST_ARGS)

# each in a virtual environment of its own under build/clients: CLIENTS='langchain llm'
clients: .venv/tests-installed stock
	MOBILELLM_STOCK="$$($(BIN)/python $(UPSTREAM) fetch)" $(BIN)/python tests/clients $(CLIENTS)

bench: .venv/tests-installed stock
	$(BIN)/python benchmarks/versus_stock.py --write docs/measurements.md $(STOCK_CXX:%=--stock %)

# upstream's kernels are compiled for one processor each, ours chosen when it is known
bench-arm: .venv/tests-installed
	for build in arm:armv8-a arm-a76:armv8.2-a+dotprod+fp16 arm-max:armv8.6-a+dotprod+fp16+sve+i8mm; do \
	    $(CONFIGURE) -B build/$${build%:*} -DCMAKE_TOOLCHAIN_FILE=tests/arm/aarch64.cmake -DGGML_NATIVE=OFF \
	        -DGGML_CPU_ARM_ARCH=$${build#*:} >/dev/null && \
	    $(BIN)/cmake --build build/$${build%:*} --target native >/dev/null || exit 1; \
	done
	$(BIN)/python benchmarks/instructions.py --write docs/measurements.md

# A layer-shared model of MobileLLM-125M's widths and the text it is measured on, in build/quant: MINUTES=n
quant-model: .venv/tests-installed
	$(BIN)/python training/texts.py build/quant --model
	$(BIN)/python training/quant_model.py build/quant/train.txt build/quant/calibration.txt \
	    --out build/quant/shared --minutes $(or $(MINUTES),120)

lint: .venv/tests-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml -p mobilellm_cpp  # as installed
	$(BIN)/mypy site/_mobilellm_cpp_library.py
	$(BIN)/clang-format --dry-run --Werror $(shell find benchmarks kernels mobilellm_cpp/native tests/native -name '*.cpp' -o -name '*.h')

.venv/created:
	$(PYTHON) -m venv .venv
	@$(PIP) 'pip>=24' 'scikit-build-core>=0.11' 'cmake>=3.21' ninja || \
	    { echo 'mobilellm-cpp: pip could not install the build tools; check the network'; exit 1; }
	touch $@

.venv/installed: .venv/created $(SOURCES)
	@command -v $(or $(CXX),c++) >/dev/null || \
	    { echo 'mobilellm-cpp: no C++ compiler found; install one (Debian, Ubuntu: apt install g++)'; exit 1; }
	@$(if $(findstring LLAMA_CPP_DIR,$(CMAKE_ARGS)),,$(BIN)/python $(UPSTREAM) fetch >/dev/null)
	@echo 'Building mobilellm-cpp: the first time takes a few minutes.'
	$(INSTALL) .
	touch $@

.venv/tests-installed: .venv/installed
	$(INSTALL) '.[test]'
	touch $@

# The unpatched peer for tests and benchmarks, in the build cache, once for all checkouts. `make bench
# STOCK_CXX=clang++-19` compares with a stock of that compiler.
STOCK_TOOLS := llama llama-bench llama-quantize llama-imatrix llama-perplexity
stock: .venv/created
	@src="$$($(BIN)/python $(UPSTREAM) fetch)" && build="$$src-stock$(STOCK_CXX:%=-%)" && \
	if ! (cat mobilellm_cpp/native/upstream/flags.cmake; echo '# $(STOCK_TOOLS)') | cmp -s - "$$build/done"; then \
	    echo "Building the stock llama.cpp: once, a few minutes; log in $$build.log" && \
	    $(BIN)/cmake -S "$$src" -B "$$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
	        $(if $(STOCK_CXX),-DCMAKE_CXX_COMPILER=$(STOCK_CXX) -DCMAKE_C_COMPILER=$(subst clangcc,clang,$(subst g++,gcc,$(STOCK_CXX)))) \
	        -DCMAKE_BUILD_TYPE=Release -DCMAKE_PROJECT_INCLUDE="$(CURDIR)/mobilellm_cpp/native/upstream/flags.cmake" \
	        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
	        -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF >"$$build.log" 2>&1 && \
	    $(BIN)/cmake --build "$$build" --target $(STOCK_TOOLS) >>"$$build.log" 2>&1 && \
	    (cat mobilellm_cpp/native/upstream/flags.cmake; echo '# $(STOCK_TOOLS)') >"$$build/done" || { tail -n 20 "$$build.log"; exit 1; }; \
	fi

# The hostile files of the tests and the kernels again, with C++ programs and all libraries under ASan and UBSan, and
# what computes on several threads under TSan.
sanitize: sanitized sanitized-threads
	MOBILELLM_USE_FILE="$(CURDIR)/build/sanitize/use_file" \
	    MOBILELLM_NATIVE_TESTS="$(CURDIR)/build/sanitize" \
	    $(BIN)/pytest tests/engine/test_hostile.py tests/fuzz tests/kernels
	MOBILELLM_NATIVE_TESTS="$(CURDIR)/build/sanitize-threads" $(BIN)/pytest tests/kernels -k 'not scalar'

test-arm: .venv/tests-installed
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	    { echo 'make test-arm: install a cross compiler and qemu (Debian: apt install g++-aarch64-linux-gnu qemu-user)'; exit 1; }
	$(CONFIGURE) -B build/arm -DCMAKE_TOOLCHAIN_FILE=tests/arm/aarch64.cmake -DGGML_NATIVE=OFF \
	    -DGGML_CPU_ARM_ARCH=armv8-a >/dev/null
	$(BIN)/cmake --build build/arm --target $(or $(ARM_TESTS),kernels_test packed_test) >/dev/null
	MOBILELLM_ARM="$(CURDIR)/build/arm" $(BIN)/pytest tests/arm/kernels.py $(PYTEST_ARGS)

wheels: .venv/created
	@$(BIN)/python $(UPSTREAM) fetch >/dev/null
	PYTHON=$(BIN)/python packaging/wheels

test-wheels: .venv/tests-installed
	@command -v qemu-x86_64 >/dev/null || { echo 'make test-wheels: apt install qemu-user'; exit 1; }
	$(BIN)/cmake --build build/wheel-x86_64 --target kernels_test >/dev/null
	$(BIN)/pytest tests/wheels/x86.py $(PYTEST_ARGS)

# In a Debian for ARM, where pip installs the wheel from dist/ and the rest from PyPI.
test-arm-main: .venv/tests-installed
	@command -v qemu-aarch64-static >/dev/null || \
	    { echo 'make test-arm-main: apt install qemu-user-static debootstrap'; exit 1; }
	packaging/debian-root bookworm arm64 build/roots/bookworm-arm64 python3-venv,ca-certificates,libstdc++6
	MOBILELLM_ARM_ROOT="$(CURDIR)/build/roots/bookworm-arm64" $(BIN)/pytest tests/arm/main_job.py $(PYTEST_ARGS)

elsewhere: .venv/installed
	$(PIP) ziglang==0.17.1
	PYTHON=$(BIN)/python packaging/elsewhere

fuzz: sanitized
	$(BIN)/python tests/fuzz --cases $(or $(CASES),5000) --sanitized build/sanitize/use_file $(FUZZ_ARGS)

CONFIGURE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
    -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python"

sanitized: .venv/tests-installed
	$(CONFIGURE) -B build/sanitize -DMOBILELLM_SANITIZE=address,undefined >/dev/null
	$(BIN)/cmake --build build/sanitize --target use_file kernels_test packed_test thread_pool_test callers_test

sanitized-threads: .venv/tests-installed
	$(CONFIGURE) -B build/sanitize-threads -DMOBILELLM_SANITIZE=thread >/dev/null
	$(BIN)/cmake --build build/sanitize-threads --target packed_test thread_pool_test callers_test

clean:
	rm -rf .venv build
