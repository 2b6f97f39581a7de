"""Tokens in: shards, rows, order, batches.

Documents become token ids in tar shards that stock webdataset reads (`build`, `shard_writer`), with a manifest
that names them by a fingerprint and an index that makes every row addressable (`manifest`, `index`, `rows`).
The order of a run is a keyed bijection (`order`), so sample i is a pure function of (shards, seed, i) and the
position of a run is one integer (`datamodule`). `verify` proves a folder to the last byte; `peek` shows a row
as training sees it.

To add a tokenizer, write a class in `tokenizers` and name it in `TOKENIZERS`; to add a kind of source, extend
`sources.find_files`. Importing this package loads nothing: import from the module that you need.
"""
