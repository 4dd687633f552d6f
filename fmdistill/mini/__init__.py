"""The teachers that ship with the package, sam_mini and clip_mini, and all that trained and judges them.

Registries alone name these modules, as "fmdistill.mini.MODULE:NAME"; they are imported when a recipe uses them.
"""
