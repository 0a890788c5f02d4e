"""Models of the next token: gpt.py and bigram.py, what they have in common (language_model.py), their shape (shape.py),
their kinds in one table (kinds.py), and a GPT that reads each token once (cached.py). Nothing here knows of training.
"""
