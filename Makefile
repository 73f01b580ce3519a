# make learn      set everything up, write your copies of the notebooks into learn/, and open them
# make test       set everything up and check everything
#                 TORCH=2.6.0: with another torch, in an environment of its own
# make peers      fetch the part of vLLM's source that tests run against, into build/: seconds
# make fuzz       let a stranger write 100,000 inputs into the stores of live groups, and unpickle
#                 1,000,000 hostile messages as plain data: minutes
# make nemesis    kill, stop and interrupt ranks at random for SECONDS=600, and check their logs
# make notebooks  execute all notebooks and store them with their outputs
# make clean      remove what make installed and built; learn/ stays

PYTHON ?= python3
TORCH ?=
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: learn test peers fuzz nemesis notebooks format clean

learn: $(READY)
	$(BIN)/python -m refdist.lab.learn notebooks learn
	@# without a browser, it prints an address: that of the notebook
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/learn/00_start_here.ipynb

test: $(READY)
	$(BIN)/python tests/check_all.py

peers: $(READY)
	$(BIN)/python tests/vllm_module.py

fuzz: $(READY)
	$(BIN)/python tests/fuzz.py
	$(BIN)/python tests/test_plain_data.py --inputs 1000000

nemesis: $(READY)
	TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python tests/nemesis.py $(or $(SECONDS),600)

notebooks: $(READY)
	$(BIN)/python tests/store_notebooks.py

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
	@echo "Installing refdist and what it needs into $(VENV): a minute or more, 1.4 GB or more"
	$(PYTHON) -m venv $(VENV)
	@# each torch asks for a sympy of its own
	@sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/; /^sympy==/d)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt --editable '.[notebooks,dev]'
	@touch $(READY)
