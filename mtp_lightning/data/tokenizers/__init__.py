"""Bytes, `tokenizer.json` and SentencePiece as one interface."""
