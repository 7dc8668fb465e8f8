# Two commands do everything on a fresh machine with python3 (3.11 or newer), make and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo quick pep8 grid field noise after finetuning test lint site golden-exact newest clean

demo: $(READY)  ## PII in READMEs, four objectives, a page (about 8 minutes on 2 cores, with the installation)
	$(BIN)/phf run demo

quick: $(READY)  ## The demo with a tiny budget: checks every step, too small for conclusions
	$(BIN)/phf run demo quick

pep8: $(READY)  ## PEP8 on the Python standard library
	$(BIN)/phf run pep8

grid: $(READY)  ## The demo with six objectives and three seeds (about 25 minutes on 2 cores)
	$(BIN)/phf run grid

field: $(READY)  ## Every objective on equal source text, three seeds (about 50 minutes on 2 cores)
	$(BIN)/phf run field

noise: $(READY)  ## Five objectives with errors of six sizes in the scores, three seeds (about an hour on 2 cores)
	$(BIN)/phf run noise

after: $(READY)  ## Six objectives after release: tampered with, tuned, attacked, three seeds (about 95 minutes on 2 cores)
	$(BIN)/pip install -q 'trl>=1.0,<2' && $(BIN)/phf run after

finetuning: $(READY)  ## Feedback from the first token, or for the last half or tenth (about 13 minutes on 2 cores)
	$(BIN)/phf run finetuning

test: $(READY) lint  ## The test suite, on up to four cores, one thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

site: $(READY)  ## The documentation as a site, in site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

golden-exact: $(READY)  ## Train at another commit and here, compare bit for bit: make golden-exact REV=main
	@test -n "$(REV)" || { echo "usage: make golden-exact REV=COMMIT"; exit 2; }
	$(BIN)/python tests/golden/exact.py $(REV)

newest:  ## Build and check the packages; a short recipe with the newest allowed versions; a plain installation, elsewhere
	@set -e; place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; \
	$(PYTHON) -m venv $$place/venv; \
	$$place/venv/bin/python -m pip install -q torch==2.13.0; \
	$(PYTHON) -m venv $$place/tools; \
	$$place/tools/bin/python -m pip install -q build twine; \
	$$place/tools/bin/python -m build --outdir $$place/wheel . > $$place/build.log || { cat $$place/build.log; exit 1; }; \
	$$place/tools/bin/twine check --strict $$place/wheel/*; \
	$$place/venv/bin/python -m pip install -q "$$(echo $$place/wheel/*.whl)[report]"; \
	$$place/venv/bin/python -m pip freeze | grep -iE '^(torch|transformers|tokenizers|pydantic|datasets|pyarrow|numpy)=='; \
	$(PYTHON) -m venv $$place/plain; \
	$$place/plain/bin/python -m pip install -q $$place/wheel/*.whl; \
	(cd $$place && venv/bin/phf run pep8 quick corpus.max_files=60); \
	tokens=$$(echo $$place/runs/*/tokens); \
	for name in venv plain; do $$place/$$name/bin/python tests/plain_install.py "$$tokens" > $$place/$$name.txt; done; \
	cmp $$place/venv.txt $$place/plain.txt && cat $$place/plain.txt && $$place/plain/bin/phf --help > $$place/help.txt

# torch first and on its own: an index may offer a smaller build for this machine.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "phf needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all,eval,ray,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist site
