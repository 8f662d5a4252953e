"""The kinds of arms: a class each, with its keys, what it trains, makes and weighs; kinds.py has them all."""
