"""Bad inputs, one per row of a table: what is refused and with which message, and what is odd but right.

make docs makes the page of errors from them.
"""
