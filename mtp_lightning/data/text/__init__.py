"""Documents from files: plain text, JSON lines, Parquet, compressed."""
