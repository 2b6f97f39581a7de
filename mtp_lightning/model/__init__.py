"""The model: a trunk, heads that stop at hidden states, and one unembedding that touches the vocabulary.

Axes: B batch, T positions, D width, V vocabulary, N offsets, H attention heads, K key/value heads, W head width.
A new head kind is one file in `heads/`, one row in `heads.KINDS` and one name in the recipe's `heads.kind`.
"""
