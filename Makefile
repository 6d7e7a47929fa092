# Every target sets up what it needs; `make` alone lists them.

PYTHON ?= python3
RECIPE ?= local
DATA ?= data/$(RECIPE)
OUT ?= $(DATA)
RUN ?= runs/demo
SIZE ?= nano
STEPS ?= 1600
ARGS ?=
CORPUS ?= ../shared/data/corpus

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
PROCESSES ?= $(if $(filter 0,$(GPUS)),2,$(GPUS))
PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
ifeq ($(GPUS),0)
export DS_ACCELERATOR := cpu
endif
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo curate plan verify inspect data-report bench-curation bench bench-peers bench-planner bench-decode train eval eval-data eval-diff eval-sandbox sample export report watch estimate supervise drill test test-gpu check format clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready  ## make .venv and install the pinned packages (again: does nothing)

# Debian and Ubuntu leave ensurepip out of python3: take the pip that is there, else, as root, the missing package.
venv_from_pip = $(PYTHON) -m pip --version >/dev/null 2>&1 && $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python .venv install --quiet pip
venv_from_apt = [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "python3-venv is missing: installing it with apt-get" && apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && $(PYTHON) -m venv .venv

.venv/ready: requirements.txt requirements-gpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or newer is needed; give one with make PYTHON=python3.12" >&2; exit 2; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv .venv; else { $(venv_from_pip); } || { $(venv_from_apt); } || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }; fi
	$(PY) -m pip install --quiet --progress-bar off "$$(grep '^torch==' requirements.txt)"
	$(PY) -m pip install --quiet --progress-bar off --use-pep517 -r requirements.txt
	@if [ "$(GPUS)" != 0 ] && command -v nvcc >/dev/null; then set -ex; $(PY) -m pip install --quiet setuptools wheel ninja packaging; $(PY) -m pip install --quiet --no-build-isolation -r requirements-gpu.txt; fi
	@touch $@

.venv/dev: .venv/ready requirements-dev.txt
	$(PY) -m pip install --quiet --progress-bar off -r requirements-dev.txt
	@# for its interpreter, on which the kernels are tested where there is no GPU; PyTorch for GPUs has a version of its own
	$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install --quiet --progress-bar off triton==3.6.0
	@touch $@

# dolma needs older libraries than ours, and only uv sorts them out in seconds.
.venv-dolma/ready: .venv/ready
	$(PY) -m venv .venv-dolma
	.venv-dolma/bin/python -m pip install --quiet uv
	.venv-dolma/bin/uv pip install --quiet --python .venv-dolma/bin/python dolma==1.2.1
	@touch $@

demo: setup  ## the main job on this machine's own text: curate, train, score, sample, report
	$(MAKE) --no-print-directory curate
	$(MAKE) --no-print-directory train DATA=$(OUT) ARGS='--steps $(STEPS) --eval-every 200 --eval-tokens 60000 --save-every 400 --keep 2 --resume $(ARGS)'
	CKPT="$$(ls -d $(RUN)/checkpoints/step_*[0-9] | tail -n 1)" && $(PY) -m eval.scoreboard "$$CKPT" --own-only && \
	$(MAKE) --no-print-directory sample report CKPT="$$CKPT"

CURATE = --recipe $(RECIPE) --out $(OUT) $(if $(TOKENS),--tokens $(TOKENS)) $(if $(MIRROR),--mirror $(MIRROR)) $(if $(INPUT),--input $(INPUT)) $(CURATE_ARGS)

curate: setup  ## text to token shards: make curate RECIPE=eight TOKENS=1B OUT=data/eight1B
	$(PY) -m curation.pipeline $(CURATE)

plan: setup  ## what a recipe reads, needs and takes, before anything starts: make plan RECIPE=eight TOKENS=1B
	$(PY) -m curation.pipeline $(CURATE) --plan

verify: setup  ## check every file of a data folder: make verify DATA=data/local
	$(PY) -m curation.shards verify $(DATA)

inspect: setup  ## documents of a data folder as text: make inspect DATA=data/local INSPECT_ARGS='--source stdlib_docs'
	$(PY) -m curation.shards inspect $(DATA) $(INSPECT_ARGS)

data-report: setup  ## data card and HTML report of a data folder: make data-report DATA=data/local
	$(PY) -m curation.report $(DATA)

# for runs beside one another
FREE_PORT = $(shell $(PY) -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

train: setup  ## train: make train SIZE=nano DATA=data/local RUN=runs/mine ARGS='--steps 100'
	deepspeed --quiet --num_gpus=$(PROCESSES) --master_port=$(FREE_PORT) train/launch.py --size $(SIZE) --data $(DATA) --run $(RUN) $(ARGS)

eval: setup need-CKPT  ## score a checkpoint beside GPT-3: make eval CKPT=runs/demo/checkpoints/step_0001600 DATA=data/evals TASKS='piqa mmlu'
	$(PY) -m eval.scoreboard $(CKPT) $(if $(findstring command,$(origin DATA)),--benchmarks $(DATA)) $(if $(TASKS),--tasks $(TASKS)) $(EVAL_ARGS)

eval-diff: setup  ## two scored checkpoints, item by item: make eval-diff A=runs/a/checkpoints/step_0001600 B=runs/b/checkpoints/step_0001600
	@[ -n "$(A)" ] && [ -n "$(B)" ] || { echo "error: two scored checkpoints are needed: make eval-diff A=... B=..." >&2; exit 2; }
	$(PY) -m eval.diff $(A) $(B) $(DIFF_ARGS)

eval-sandbox: setup  ## HumanEval's own solutions, which must all pass, in the sandbox: make eval-sandbox DATA=data/evals
	$(PY) -m eval.humaneval $(if $(findstring command,$(origin DATA)),$(DATA),data/evals)/humaneval/test.jsonl

eval-data: setup  ## the benchmarks' files, fetched and pinned: make eval-data DATA=data/evals [SOURCE=folder that has them]
	$(PY) -m eval.task_data $(if $(filter file,$(origin DATA)),data/evals,$(DATA)) $(if $(SOURCE),--source $(SOURCE)) $(if $(TASKS),--tasks $(TASKS))

sample: setup need-CKPT  ## text from a checkpoint: make sample CKPT=...
	$(PY) -m eval.sample $(CKPT) $(SAMPLE_ARGS)

export: setup need-CKPT  ## a Hugging Face folder: make export CKPT=... OUT=exports/mine
	$(PY) -m model.export $(CKPT) $(if $(filter file,$(origin OUT)),exports/$(notdir $(CKPT)),$(OUT)) $(EXPORT_ARGS)

report: setup  ## one page about a run: make report RUN=runs/demo
	$(PY) -m eval.report $(RUN)

watch: setup  ## runs in the terminal, live, q leaves: make watch RUN=runs
	$(PY) -m train.watch $(RUN)

estimate: setup  ## what a run needs, takes and costs: make estimate SIZE=6.7B ESTIMATE_ARGS='--gpu h100 --gpus 16'
	$(PY) launch/estimate.py --size $(SIZE) $(ESTIMATE_ARGS)

bench: setup  ## tokens/s, MFU, memory, start-up and kernels of a size: make bench SIZE=1.3B ARGS='--micro-batch 8'
	$(PY) -m train.bench --size $(SIZE) --gpus $(PROCESSES) $(if $(findstring command,$(origin DATA)),--data $(DATA)) $(BENCH_ARGS) -- $(ARGS)

bench-peers: setup  ## this network beside transformers' Bamba and mamba_ssm's LM of the same shape: make bench-peers SIZE=1.3B
	$(PY) -m train.bench_peers $(if $(filter file,$(origin SIZE)),,--size $(SIZE)) $(BENCH_ARGS)

bench-planner: setup  ## measure training steps on this machine's GPU for the planner, and show all points beside it
	$(PY) -m launch.measure $(BENCH_ARGS)
	$(PY) -m launch.check

bench-decode: setup  ## tokens/s of writing, by context and beside transformers' own class: make bench-decode SIZE=1.3B BENCH_ARGS='--dtype bfloat16'
	$(PY) -m model.bench_decode --size $(SIZE) --batch 1 64 --peer $(BENCH_ARGS)

supervise: setup  ## train, and start again by itself after a failure: make supervise SIZE=nano DATA=data/local RUN=runs/mine ARGS='--steps 100'
	$(PY) -m launch.supervise $(if $(HOSTFILE),--hostfile $(HOSTFILE),--processes $(PROCESSES)) $(SUPERVISE_ARGS) -- --size $(SIZE) --data $(DATA) --run $(RUN) $(ARGS)

drill: setup  ## break a job in nine ways on two hosts of this machine's own making (root): make drill DRILL_ARGS=--short
	$(PY) -m launch.drill $(DRILL_ARGS)

test: .venv/dev  ## run the tests (twenty minutes on two cores)
	$(PY) -m pytest

test-gpu: .venv/dev  ## compare the fused kernels with PyTorch on this machine's GPU
	$(PY) -m pytest --gpu tests/test_gpu.py

bench-curation: .venv/dev .venv-dolma/ready  ## every step against datatrove's (and dolma's) own: make bench-curation CORPUS=../shared/data/corpus
	$(PY) -m curation.contests --corpus $(CORPUS) $(BENCH_ARGS)

check: .venv/dev  ## lint, types, tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest

format: .venv/dev  ## format the code
	$(PY) -m ruff check --fix --quiet .
	$(PY) -m ruff format --quiet .

clean:  ## delete .venv and caches; data/ and runs/ stay
	rm -rf .venv .venv-dolma .pytest_cache .ruff_cache .mypy_cache

.PHONY: need-CKPT
need-CKPT:
	@[ -n "$(CKPT)" ] || { echo "error: no checkpoint given; for example: make eval CKPT=runs/demo/checkpoints/step_0001600" >&2; exit 2; }
