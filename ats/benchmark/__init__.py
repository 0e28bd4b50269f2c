"""What networks cost in seconds, beside what they cost in FLOPs: `tools/benchmark.py` is the command.

`counts` imposes the numbers of tokens that trained networks keep, `timing` runs variants in turn and takes their time,
`parts` says where it goes, `report` writes tables, JSON and plots, `suites` lists what docs/BENCHMARKS.md shows.
"""
