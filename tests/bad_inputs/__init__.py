"""Bad inputs, a row of a table each: what is refused, with which message, and what is odd but right.

docs/errors.md is made of them: PYTHONPATH=tests python -m bad_inputs > docs/errors.md
"""
