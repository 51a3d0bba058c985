"""Data: files -> checked rows -> documents -> packed rows of tokens -> shards. One module per step, in that order:

readers (and builtin), schema, formats, splitting, packing, shards. `accounting` counts what goes in and comes out.
"""
