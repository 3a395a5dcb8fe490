# demo: build the program, build tiny-chat into an engine package, and talk to it
# test: everything that can be tested without a GPU
# check: formatting, lints, tests, documentation
# tensorrt: the library of TensorRT for RTX, into .tensorrt/ (95 MB from PyPI; no GPU needed)
# bench: tokens per second of an engine (ENGINE=folder), tiny-chat if none is named

AOTRON := target/release/aotron
TINY_CHAT := engines/tiny-chat
ENGINE ?= $(TINY_CHAT)

.PHONY: demo test check tensorrt bench

$(AOTRON): FORCE
	cargo build --release --locked

$(TINY_CHAT): $(AOTRON)
	$(AOTRON) build tests/data/tiny-chat --recipe cpu --force -o $@

demo: $(TINY_CHAT)
	$(AOTRON) chat $(TINY_CHAT) < tools/demo.txt

test:
	cargo test --locked

check:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo test --locked
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items

tensorrt:
	python3 tools/fetch_tensorrt.py

bench: $(ENGINE)
	$(AOTRON) bench $(ENGINE)

.PHONY: FORCE
FORCE:
