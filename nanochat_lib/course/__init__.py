"""The course's own tools: lessons to modules, solutions to exercises, notebooks, checks. Hand-written."""
