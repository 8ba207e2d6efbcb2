# The project's commands. Each sets up first what it needs.

.PHONY: help setup demo test qemu-test lint clean

help:
	@echo "make demo       the main job: isolated domains on bare metal, and libpng in a domain on Linux"
	@echo "make test       every test, and a table of the results"
	@echo "make qemu-test  the bare-metal suites, and the guest suites on Linux 6.1 and 6.12"
	@echo "make lint       formatting, clippy and documentation, warnings denied"
	@echo "make setup      install what is missing"

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
