"""Regimes in which gain is not the deciding criterion; one command each, an estimated hour on two cores.

mft compare --config benchmarks/studies/little-data.yaml     little data, trained on for long
python -m benchmarks.regimes.federated                       ten clients that send at most 1 bit per weight
"""
