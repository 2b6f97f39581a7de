"""Asking questions of trained models and finished runs."""
