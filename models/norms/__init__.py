"""How normalizations are written down; `models.spellings` is the catalogue made from it."""
