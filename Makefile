# Everything runs in .venv, which is made and filled once; it is filled again when pyproject.toml or constraints.txt
# change. `make test PYTHON=python3.12` chooses the interpreter of a new .venv (`make clean` removes an old one).

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.PHONY: install test docs demo bench endure interop lint types format clean

install: $(INSTALLED)

test: $(INSTALLED)
	OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 $(RUN) -m pytest -q -m 'not matrix' --numprocesses 2 --dist loadfile

docs: $(DOCS_INSTALLED)
	$(RUN) -m sphinx --fresh-env -W --keep-going -q -b html docs docs/_build/html
	@echo 'open docs/_build/html/index.html'

demo: $(INSTALLED)
	$(RUN) examples/quickstart.py

bench: $(INSTALLED)
	$(RUN) profiling/step_memory.py
	$(RUN) profiling/packing.py
	$(RUN) profiling/base_formats.py
	$(RUN) profiling/step_growth.py
	$(RUN) profiling/tokenizing.py
	$(RUN) profiling/streaming_io.py
	$(RUN) profiling/versus_peft.py
	$(RUN) profiling/versus_trl.py
	$(RUN) profiling/generation.py
	$(RUN) profiling/learn_like_peft.py
	$(RUN) profiling/learn_like_trl.py

# Kills, signals, full disks, damaged files, wrong arguments, resumed and long runs, and the tests marked `matrix`:
# about twelve minutes on two cores.
endure: $(INSTALLED)
	$(RUN) tests/reliability/endure.py
	$(RUN) -m pytest -q -m matrix

# Adapters of every kind between peft and qlora_lite, both ways: some minutes on two cores.
interop: $(INSTALLED)
	$(RUN) tests/interop/matrix.py
	$(RUN) tests/interop/families.py
	$(RUN) tests/interop/peft_matrix.py
	$(RUN) tests/interop/trl_trainers.py
	$(RUN) examples/name_colours.py

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(INSTALLED)
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# torch goes first and by its exact pin, so that no other package's range can choose a build of several gigabytes.
# The build backend goes with it: without build isolation it is installed once, and in the pinned version.
$(INSTALLED): pyproject.toml constraints.txt
	@echo 'filling $(VENV): a few minutes, once'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH) hatchling editables
	$(INSTALL) --no-build-isolation --editable '.[hf,plot,test,dev]'
	touch $@

# Sphinx is for `make docs` alone: no test needs it.
$(DOCS_INSTALLED): $(INSTALLED)
	$(INSTALL) --no-build-isolation --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find qlora_lite profiling examples tests -type d -name __pycache__ -prune -exec rm -rf {} +
