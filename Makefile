# demo: build the program, build tiny-chat into an engine package, and talk to it
# test: everything that can be tested without a GPU; the last line says what was skipped
# test-cpus: the same, once for each instruction set this machine has
# check: formatting, lints, tests, documentation, dependencies, half a minute of fuzzing for each reader
# dist: the program to hand out, dist/aotron, with its symbols and line numbers beside it
# tensorrt: the library of TensorRT for RTX, into .tensorrt/ (95 MB from PyPI; no GPU needed)
# bench: tokens per second of an engine (ENGINE=folder), tiny-chat if none is named
# fuzz: one fuzz target (TARGET=tar) for SECONDS=1200; fuzz-all: all of them, two at a time; fuzz-smoke: 30 seconds each

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

test:
	tools/test.sh

test-cpus:
	tools/test.sh cpus

# The quickest to fail first. All of it is the release profile's, so that nothing is compiled twice.
check:
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	tools/deny.sh
	cargo clippy --release --locked --all-targets -- -D warnings
	cargo clippy --release --locked --all-targets --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps --document-private-items
	tools/test.sh
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
	printf '%s\n' $(FUZZ_TARGETS) | xargs -P 2 -I TARGET fuzz/run.sh run TARGET 30 -seed=1

tensorrt:
	python3 tools/fetch_tensorrt.py

bench: $(ENGINE)
	$(AOTRON) bench $(ENGINE)

.PHONY: FORCE
FORCE:
