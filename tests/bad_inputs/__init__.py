"""Bad inputs, a row of a table each: what is refused, with which message, and what is odd but right.

The page of errors is made of them, by make docs.
"""
