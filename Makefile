# The project's commands. Each runs `make setup` first.

.PHONY: help setup demo test qemu-test soak lint clean

# How many times `make soak` runs the storm.
RUNS ?= 20

help:
	@echo "make demo       run the demo: domains on bare metal, and libpng in a domain on Linux"
	@echo "make test       run all tests and print a table of the results"
	@echo "make qemu-test  run the bare-metal suites, and the guest suites on Linux 6.1 and 6.12"
	@echo "make soak       run the storm of signals, faults and forks 20 times for a minute on each kernel (RUNS=20)"
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

soak: setup
	@scripts/heartbeat cargo run -q -p pkru-tests -- soak $(RUNS)

lint: setup
	@scripts/heartbeat scripts/lint

clean:
	@cargo clean
