"""Conditions between keys of a recipe, all checked together."""
