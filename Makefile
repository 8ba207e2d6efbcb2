# The project's commands. Each runs `make setup` first.

.PHONY: help setup demo test qemu-test lint clean

help:
	@echo "make demo       run the demo: domains on bare metal, and libpng in a domain on Linux"
	@echo "make test       run all tests and print a table of the results"
	@echo "make qemu-test  run the bare-metal suites, and the guest suites on Linux 6.1 and 6.12"
	@echo "make lint       check formatting, clippy and documentation; warnings are errors"
	@echo "make setup      install missing packages and guest kernels"

setup:
	@scripts/heartbeat scripts/setup

demo: setup
	@scripts/heartbeat scripts/demo

test: setup
	@scripts/heartbeat cargo run -q -p pkru-tests -- all

qemu-test: setup
	@scripts/heartbeat cargo run -q -p pkru-tests -- qemu

lint: setup
	@scripts/heartbeat scripts/lint

clean:
	@cargo clean
