"""Synthetic tasks of Gloeckle et al. 2024, section 4: documents to train on, problems to test with."""
