"""Typed sections of a recipe, and questions to their types."""
