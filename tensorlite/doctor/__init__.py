"""Whether `--backend cupy` works on this machine, and if not, why and what to do: python -m tensorlite.doctor

checks.py     what is looked at, one function each
examine.py    all of them in turn, each with its outcome and what to do about it, and a verdict in the last line
__main__.py   the examination in a process of its own, since a library that does not fit can end that without a word
"""
