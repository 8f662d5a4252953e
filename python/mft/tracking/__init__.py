"""What a run says while it trains and afterwards: console, bars, metrics, curves, trackers."""
