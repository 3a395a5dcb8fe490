# demo: build the program, build tiny-chat into an engine package, chat with it, and say how to serve it
# test: run all tests that do not need a GPU; the last line lists the skipped ones
# test-cpus: the same, once per instruction set of this machine
# check: formatting, lints, tests, documentation, dependencies, and ten seconds of fuzzing per reader
# dist: the distributable program, dist/aotron, with its symbols and line numbers beside it
# tensorrt: download the TensorRT for RTX library into your data folder (95 MB from PyPI; no GPU needed, but Python with
#           pip); CUDA=12 for drivers before 580, TENSORRT_DIR=folder to put it elsewhere
# bench: tokens per second of an engine (ENGINE=folder), by default tiny-chat
# fuzz: one fuzz target (TARGET=tar) for SECONDS=1200; fuzz-all: all of them, two at a time; fuzz-smoke: 10 seconds each

AOTRON := target/release/aotron
TINY_CHAT := engines/tiny-chat
ENGINE ?= $(TINY_CHAT)
FUZZ_TARGETS := $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
TARGET ?= tar
SECONDS ?= 1200

.PHONY: demo test test-cpus check deny dist tensorrt bench fuzz fuzz-all fuzz-smoke fuzz-build

$(AOTRON): FORCE
	cargo build --release --locked

$(TINY_CHAT): $(AOTRON)
	$(AOTRON) build tests/data/tiny-chat --recipe cpu --force -o $@

demo: $(TINY_CHAT)
	$(AOTRON) chat $(TINY_CHAT) < tools/demo.txt
	@echo
	@echo 'Serve it, with a page at http://127.0.0.1:8000/ and the APIs of docs/serving.md:'
	@echo '    $(AOTRON) serve $(TINY_CHAT)'

test:
	tools/test.sh

test-cpus:
	tools/test.sh cpus

# Fastest to fail first. Everything uses the release profile, so that nothing is compiled twice.
check:
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	tools/deny.sh
	cargo clippy --release --locked --all-targets -- -D warnings
	cargo clippy --release --locked --all-targets --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps --document-private-items
	$(MAKE) test
	$(MAKE) fuzz-smoke

deny:
	tools/deny.sh

dist:
	cargo build --profile dist --locked --bin aotron
	mkdir -p dist
	objcopy --only-keep-debug target/dist/aotron dist/aotron.debug
	objcopy --strip-all --add-gnu-debuglink=dist/aotron.debug target/dist/aotron dist/aotron

fuzz-build:
	fuzz/run.sh build

fuzz: fuzz-build
	fuzz/run.sh run $(TARGET) $(SECONDS)

fuzz-all: fuzz-build
	printf '%s\n' $(FUZZ_TARGETS) | xargs -P 2 -I TARGET fuzz/run.sh run TARGET $(SECONDS)

fuzz-smoke: fuzz-build
	printf '%s\n' $(FUZZ_TARGETS) | xargs -P 2 -I TARGET fuzz/run.sh run TARGET 10 -seed=1

tensorrt:
	python3 tools/fetch_tensorrt.py $(if $(CUDA),--cuda $(CUDA)) $(TENSORRT_DIR)

bench: $(ENGINE)
	$(AOTRON) bench $(ENGINE)

.PHONY: FORCE
FORCE:
