"""Data: files -> checked rows -> documents -> packed rows of tokens -> shards. One module per step, in that order:

sources (and builtin), readers (and hub), schema, formats, splitting, packing, shards. `accounting` keeps the books.
"""
