"""The checkpoint folder on disk: safetensors shards, state documents, a manifest, atomic commits."""
