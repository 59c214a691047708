"""Stage commands: `python -m nanochat_lib.scripts.NAME --help`."""
