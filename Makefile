# make run: the whole path on this machine · make test · make lab: the course · make lessons: rebuild what is generated
PYTHON ?= python3
PY := .venv/bin/python
TOUR := $(CURDIR)/build/tour
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYDEVD_DISABLE_FILE_VALIDATION=1

.PHONY: setup run test lab lessons

setup: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { echo "error: cannot make .venv: install venv (Debian: apt install python3-venv)"; exit 1; }
	$(PY) -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

run: setup
	$(PY) -m nanochat_lib.pipeline --preset laptop

lab: setup
	$(PY) -m jupyterlab lessons/00_tour.ipynb

lessons: setup
	OMP_NUM_THREADS=1 $(PY) -m nanochat_lib.course build

# First that all generated files agree, then a short run of the whole path, then the tests, then every notebook with that run's model.
test: setup
	$(PY) -m nanochat_lib.course check
	rm -rf $(TOUR)
	NANOCHAT_BASE_DIR=$(TOUR) $(PY) -m nanochat_lib.course ready
	$(QUIET) NANOCHAT_TOUR=$(TOUR) $(PY) -m pytest -n 2 --dist loadfile tests
	$(QUIET) NANOCHAT_BASE_DIR=$(TOUR) $(PY) -m pytest -n 2 --dist loadfile --nbval --nbval-cell-timeout 120 lessons solutions
