"""Recipes: a comparison of several runs in one YAML file, its plan and its execution."""
