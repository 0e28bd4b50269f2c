"""What networks cost in seconds, compared with FLOPs. The command is `tools/benchmark.py`.

`timing` measures the `variants` of a network in turn (`ats/interleave.py`); `synthetic_counts` imposes the numbers of
tokens that trained networks keep. `tables` shows results. `suite` runs what docs/BENCHMARKS.md shows.
"""
