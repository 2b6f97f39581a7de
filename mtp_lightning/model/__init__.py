"""The model: a trunk, heads that stop at hidden states, and one unembedding that touches the vocabulary.

Axes: B batch, T positions, D width, V vocabulary, N offsets, H attention heads, K key/value heads, W head width.
A new head kind is one class in one file: docs/develop/add_a_head.md.
"""
