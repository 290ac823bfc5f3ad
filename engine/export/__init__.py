"""Exports: what a run has learnt, in forms that need no engine to be used."""
