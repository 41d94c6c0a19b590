# Everything is set up in $(VENV) when it is missing. `make help` lists the targets and settings.

VENV   ?= .venv
PYTHON ?=
DEVICE ?= auto
MODEL  ?= loadtest/model/weights
PORT   ?= 8000
ARGS   ?=
SCENARIO ?= smoke
RELEASE ?= release
VERSION ?=

set_up  = @PYTHON='$(PYTHON)' VENV='$(VENV)' DEVICE='$(DEVICE)' tools/setup.sh
# vLLM and torch start tools of the environment (ninja) by name.
in_venv = PATH="$(abspath $(VENV))/bin:$$PATH"

.PHONY: help serve loadtest test test-fast test-gpu test-vllm lint format setup chart docs image-test release release-files clean

help:
	@echo 'make serve     set up what is missing and serve the bundled model with sparse attention'
	@echo 'make loadtest  set up what is missing, serve the bundled model and load-test it (SCENARIO=smoke)'
	@echo 'make test      set up what is missing and run the whole test suite'
	@echo 'make test-fast only the tests that need no server, no interpreter of Triton, no GPU and little time'
	@echo 'make test-gpu  only the tests that need a GPU; one of them: ARGS="-k name"'
	@echo 'make test-vllm VERSION=0.33.0   with another vLLM, what needs none of its kernels: in an environment of its own'
	@echo 'make lint      ruff check, ruff format --check, mypy'
	@echo 'make format    let ruff fix and format the code'
	@echo 'make setup     only set up'
	@echo 'make chart     write the generated files of the Helm chart and the dashboard'
	@echo 'make docs      write the tables of knobs in docs/configuration.md'
	@echo 'make image-test ARGS="--store folder"   build the CPU image, run it and restart it under load (needs root)'
	@echo 'make release   wheel, source archive, chart and images with checksums in RELEASE=release; says how to sign and push'
	@echo 'make release-files   the same without the images, which need docker with buildx'
	@echo 'make clean     remove the environment and the caches'
	@echo
	@echo 'Settings: PORT=8000           port of the server'
	@echo '          ARGS="..."          more arguments, for vllm serve, loadtest.load or pytest'
	@echo '          MODEL=folder        another model than the bundled one'
	@echo '          DEVICE=auto         cpu or cuda where the choice by nvidia-smi is not wanted'
	@echo '          PYTHON=python3.12   Python 3.11 or 3.12, where the one found is not wanted'
	@echo '          VENV=.venv          folder of the environment'

# The model is checked first: nobody should wait for an installation to learn that it is missing.
check_model = @test -f '$(MODEL)/config.json' || { echo "make $@: MODEL: no model in '$(MODEL)' (no config.json there). The bundled one is loadtest/model/weights: restore it with 'git checkout -- loadtest/model/weights', or name another folder: make $@ MODEL=folder" >&2; exit 2; }
serve_model = vllm serve $(MODEL) --served-model-name needle --attention-backend sparse --port $(PORT) $$(cat $(VENV)/serve-flags)

serve:
	$(check_model)
	$(set_up) serve
	$(in_venv) exec $(serve_model) $(ARGS)

loadtest:
	$(check_model)
	$(set_up) serve
	$(in_venv) exec python -m loadtest.load $(SCENARIO) --url http://127.0.0.1:$(PORT) --serve "$(serve_model)" $(ARGS)

test:
	$(set_up) test
	$(in_venv) exec python -m pytest $$(cat $(VENV)/test-flags) $(ARGS)

test-fast:
	$(set_up) test
	$(in_venv) exec python -m pytest $$(cat $(VENV)/test-flags) -m "not served and not interpreted and not gpu and not slow" $(ARGS)

test-gpu:
	$(set_up) test
	$(in_venv) exec python -m pytest -n 10 -m gpu $(ARGS)

test-vllm:
	@test -n '$(VERSION)' || { echo 'make $@: VERSION: name a release of vLLM: make $@ VERSION=0.33.0' >&2; exit 2; }
	$(set_up) test
	$(in_venv) VENV='$(VENV)' exec python -m tools.another_vllm '$(VERSION)' $(ARGS)

lint:
	$(set_up) test
	$(in_venv) ruff check
	$(in_venv) ruff format --check
	$(in_venv) mypy

format:
	$(set_up) test
	$(in_venv) ruff check --fix
	$(in_venv) ruff format

setup:
	$(set_up) all

chart:
	$(set_up) test
	$(in_venv) python deploy/grafana/generate.py
	$(in_venv) exec python deploy/helm/generate.py

docs:
	$(set_up) test
	$(in_venv) exec python tools/knob_tables.py

# Needs nothing of the environment, but buildah, podman, runc and mmdebstrap.
image-test:
	exec python3 deploy/docker/test_image.py $(ARGS)

release:
	$(set_up) test
	$(in_venv) exec python -m tools.release '$(RELEASE)' $(ARGS)

release-files:
	$(set_up) test
	$(in_venv) exec python -m tools.release '$(RELEASE)' --without-images $(ARGS)

# Only an environment that the set-up made: VENV may name anything.
clean:
	test ! -e '$(VENV)/set-up.json' || rm -rf '$(VENV)'
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
