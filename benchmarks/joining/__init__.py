"""The cost of mft compare --join: measured on this machine for one process, simulated for up to 64.

python -m benchmarks.joining               simulates the stored study board-small with 1 to 64 processes
python -m benchmarks.joining.overhead      measures what a unit costs in addition to its own work
python -m benchmarks.joining.scaling       measures a small study with one process and with two
"""
