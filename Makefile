# make demo          the whole job on a laptop: synthesise, train, recognise, score; nothing downloaded but packages
# make demo QUICK=1  the same in about a minute, with no claim on the figures
# make demo-duplex   after it: a model that listens and speaks at the same time; QUICK=1 as above
# make test          tests and lint
# make ... NO_GPU=1  without triton, which openai-whisper brings: 1 GB that only a GPU needs
PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo demo-duplex test format

demo: $(VENV)/installed
	python -m demo $(if $(QUICK),--quick)

demo-duplex: $(VENV)/installed
	python -m duplex $(if $(QUICK),--quick)

test: $(VENV)/installed-extra
	ruff check . && ruff format --check .
	python -m pytest -q -n 2

format: $(VENV)/installed-extra
	ruff check --fix . && ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "wanted Python 3.10 or newer, found %d.%d; give one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	python -m pip install -q -r requirements.txt
	$(if $(NO_GPU),python -m pip uninstall -q -y triton)
	touch $@

$(VENV)/installed-extra: requirements-extra.txt $(VENV)/installed
	python -m pip install -q -r requirements-extra.txt
	$(if $(NO_GPU),python -m pip uninstall -q -y triton)
	touch $@
