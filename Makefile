# Two commands do all on a fresh machine with Python 3.10+, git and make: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
ENV := .venv/.ready

.PHONY: demo test test-oldest fuzz lint bench bench-large bench-methods bench-networks bench-scenes clean

demo: $(ENV)
	@mkdir -p build
	$(BIN)/onnx-lwdf models/mobilenetv2-torchvision-bn.onnx --bits 6 -o build/mobilenetv2.w6a6.onnx --force
	$(BIN)/python bench/demo.py

test: $(ENV) lint
	$(BIN)/python -m pytest

# The same tests in the oldest versions that pyproject.toml allows.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest

.venv-oldest/.ready: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable . hypothesis pytest --constraint tests/oldest.txt
	@touch $@

# Ten thousand random networks; half a second each.
fuzz: $(ENV)
	FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest tests/test_fuzz.py

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(ENV)
	$(BIN)/python bench/compare.py

# Makes a network of 2.3 GiB in build/large, and compresses it: 8 GiB of disk.
bench-large: $(ENV)
	$(BIN)/python bench/large.py build/large $(if $(OPTIONS),--options '$(OPTIONS)')

# With a folder of photographs: make bench-methods IMAGES=folder
bench-methods: $(ENV)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python bench/methods.py --out build $(if $(IMAGES),--images $(IMAGES))

# The table of docs/networks.md: make bench-networks NETWORKS=folder IMAGES=folder
bench-networks: $(ENV)
	$(BIN)/python bench/networks.py $(NETWORKS) $(IMAGES) --into docs/networks.md

# What judges the synthetic images: make bench-scenes NETWORKS='one.onnx other.onnx'
bench-scenes: $(ENV)
	$(BIN)/python bench/scenes.py $(NETWORKS)

$(ENV): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(ENV)

clean:
	rm -rf .venv .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
