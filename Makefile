# Thin: every recipe is set-up plus one command. `make help` lists them.
PRESET ?= release
JOBS ?= $(shell nproc)
MODEL ?=
ARGS ?=
BENCH_ARGS ?=

BUILD := build/$(PRESET)
# A new hash of the script is a new stamp, so that set-up runs again only where it changed.
DEPS := build/.deps-$(shell sha256sum deploy/install-deps.sh | cut -c1-16)
SOURCES := $(shell find kernels kvstore engine server tests bench -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
endif

.PHONY: help serve test test-aarch64 build bench bench-papers lint format clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

serve: program ## build and serve: make serve [MODEL=<folder or Hub id>] [ARGS="--port 8080"]
	@exec $(BUILD)/spillway serve $(MODEL) $(ARGS)

test: build ## build everything and run every test
	@ctest --preset $(PRESET) -j$(JOBS)

test-aarch64: ## the kernels' suite for aarch64: cross-compiled, under qemu-user
	@tests/aarch64/fetch_packages.sh build/aarch64-packages
	@cmake -S tests/aarch64 -B build/aarch64 -G Ninja -DSPILLWAY_AARCH64_PACKAGES=$(CURDIR)/build/aarch64-packages >/dev/null
	@cmake --build build/aarch64 -j$(JOBS)
	@ctest --test-dir build/aarch64 --output-on-failure -j$(JOBS)

build: configure ## the program, the tests: make build [PRESET=release|asan|tsan]
	@cmake --build --preset $(PRESET) -j$(JOBS)

bench: configure ## build the benchmarks too
	@cmake --preset $(PRESET) -DSPILLWAY_BENCH=ON >/dev/null
	@cmake --build --preset $(PRESET) -j$(JOBS)

bench-papers: bench ## the papers' experiments, scaled to this machine: measured beside predicted
	@$(BUILD)/papers_bench overhead $(BENCH_ARGS)

lint: build ## formatting and clang-tidy
	@clang-format --dry-run -Werror $(SOURCES)
	@printf '%s\n' $(filter-out tests/% bench/% kernels/cuda/%,$(filter %.cc,$(SOURCES))) | xargs -P $(JOBS) -n 4 clang-tidy --quiet -p $(BUILD)

format: ## rewrite our sources in the project's style
	@clang-format -i $(SOURCES)

clean: ## remove everything that was built
	@rm -rf build

.PHONY: program configure
program: configure
	@cmake --build --preset $(PRESET) -j$(JOBS) --target spillway

configure: $(BUILD)/build.ninja

$(BUILD)/build.ninja: $(DEPS) CMakePresets.json
	@cmake --preset $(PRESET)
	@touch $@

$(DEPS):
	@deploy/install-deps.sh
	@mkdir -p build && rm -f build/.deps-* && touch $@
