"""Every family of models that transformers has, built small.

`tiny.py` makes configurations small, `extra.py` has what some families need beside; `decode.py`
compares the caches, `page.py` writes and reads docs/reference/model-families.md.
"""
