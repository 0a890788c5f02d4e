"""Texts and their tokens: where texts come from (sources.py), how they become numbers and text again (tokenizers.py),
and what of them is trained and validated on (dataset.py). Nothing here knows of models.
"""
