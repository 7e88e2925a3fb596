"""Everything that measures: `python -m bench COMMAND` (__main__.py)."""
