"""Everything that measures: `python -m bench COMMAND`."""
