"""Recipes: one file per run, named as on the command line."""
