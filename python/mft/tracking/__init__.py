"""The output of a run while it trains and afterwards: console, progress bars, metrics, curves, trackers."""
