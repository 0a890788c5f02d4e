"""Stands in Matplotlib's way in the scripts that tests run: it takes longer to load than they take to train."""

raise ImportError("not in these tests")
