"""`make gpu WHAT=sweep`: every tile that a kernel could take, timed, and what plan.py's choice costs beside the best.

configurations.py   which tiles are legal; the one place that knows how plan.py is asked, and how its answer is replaced
ahead.py            compiled into Triton's cache by as many processes as there are cores
measure.py          checked, timed, judged
__main__.py         judged anew, by the plan of now: python -m benchmarks.gpu.sweep gpu-sweep.json
"""
