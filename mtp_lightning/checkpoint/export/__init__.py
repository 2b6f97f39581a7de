"""Models as folders that others serve: a table of formats, one writer each, and one way to disk for all of them.

`formats` is the table, `contents` what a writer makes, `write` puts it on disk, whole or not at all.
"""
