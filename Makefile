# make learn      set everything up, write your copies of the notebooks into learn/, and open them
# make test       set everything up and check everything
#                 TORCH=2.6.0: with another torch, in an environment of its own
#                 TORCH_INDEX=URL: look for torch in this index too. On Linux without an NVIDIA GPU,
#                 it is PyTorch's index of CPU builds, unless you say another, or none: TORCH_INDEX=
# make tools      let apt install what the tests of hosts and launchers need, where it may; one is an
#                 SSH server, which Debian starts
# make peers      fetch the part of vLLM's source that tests run against, into build/: seconds
# make fuzz       let a stranger write 100,000 inputs into the stores of live groups, and unpickle
#                 1,000,000 hostile messages as plain data: minutes
# make nemesis    kill, stop and interrupt ranks at random for SECONDS=600, and check their logs;
#                 and as long again with groups that split, shrink and grow
# make notebooks  execute all notebooks and store them with their outputs
# make docs       build the pages of docs/, with the notebooks and every docstring, into build/docs
# make clean      remove what make installed and built; learn/ stays

PYTHON ?= python3
TORCH ?=
CPU_TORCH := https://download.pytorch.org/whl/cpu
# on Linux, the torch of a package index has CUDA: gigabytes that are of no use without an NVIDIA GPU
TORCH_INDEX ?= $(shell [ "$$(uname)" != Linux ] || [ -e /dev/nvidiactl ] || nvidia-smi -L >/dev/null 2>&1 || echo $(CPU_TORCH))
TOOLS := iproute2 nftables openmpi-bin openssh-client openssh-server
APT := $(if $(filter-out 0,$(shell id -u)),sudo -n) env DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt

.PHONY: learn test tools peers fuzz nemesis notebooks docs format clean

learn: $(READY)
	$(BIN)/python -m refdist.lab.learn notebooks learn
	@# without a browser, it prints an address: that of the notebook
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/learn/00_start_here.ipynb

test: $(READY)
	$(BIN)/python tests/check_all.py

tools:
	@dpkg --status $(TOOLS) >/dev/null 2>&1 || \
	    { $(APT) update && $(APT) install --no-install-recommends $(TOOLS); } </dev/null >/dev/null || \
	    echo "Some tests of hosts and launchers will be skipped. Debian's packages that they need: $(TOOLS)"

peers: $(READY)
	$(BIN)/python tests/vllm_module.py

fuzz: $(READY)
	$(BIN)/python tests/fuzz.py
	$(BIN)/python tests/test_plain_data.py --inputs 1000000

nemesis: $(READY)
	TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python tests/nemesis.py $(or $(SECONDS),600)
	TORCH_CPP_LOG_LEVEL=FATAL $(BIN)/python tests/regrouping_nemesis.py $(or $(SECONDS),600)

notebooks: $(READY)
	$(BIN)/python tests/store_notebooks.py

docs: $(READY)
	@# -E reads every page again, or a second run would not repeat the warnings of the first
	$(BIN)/sphinx-build -c docs -E -W -q . build/docs
	@echo "Open build/docs/index.html"

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build refdist.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "refdist needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) lacks venv. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing refdist and what it needs into $(VENV): a minute or more, 1.5 GB; several with CUDA$(if $(TORCH_INDEX), where $(TORCH_INDEX) cannot be reached)"
	$(PYTHON) -m venv $(VENV)
	@# each torch asks for a sympy of its own
	@sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/; /^sympy==/d)' constraints.txt > $(VENV)/constraints.txt
	@# --group is from pip 25.1; a new environment of Python 3.11 has 23.2
	$(PIP) pip
	@# a version that ends in +cpu is above the same one of a package index. What pip's own settings
	@# say stays in force, and where this index cannot be reached, pip goes on without it
	$(if $(TORCH_INDEX),-$(PIP) --no-deps --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) torch)
	$(PIP) --editable '.[notebooks]' --group dev
	@touch $(READY)
