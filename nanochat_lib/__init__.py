"""nanochat_lib: a small ChatGPT, every module exported from a lesson of the course."""
