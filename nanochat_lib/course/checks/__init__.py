"""Checks of the exercises, one module per lesson and one function per exercise, used by notebooks and tests alike."""
