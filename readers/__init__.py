"""Readers of datasets as their owners publish them: from files to a stream of rows.

A reader is a function from the section `dataset` of the settings, the folder it may write to, and the seed, to
`published.Published`. To add one,

1. write the function in a file of this folder,
2. name it in `READERS` of pipeline/registry.py, and in `FILES_IN_ROOT` what it needs in `dataset.root`,
3. test it on small files in the published format, as tests/readers/ does.
"""
