"""What networks cost in seconds, beside what they cost in FLOPs: `tools/benchmark.py` is the command.

`counts` imposes the numbers of tokens that trained networks keep, `timing` measures variants, whose passes `turns` runs
in turn, `parts` says where the time goes and `blocks` where the FLOPs do, `report` writes tables, JSON and plots,
`suites` lists what docs/BENCHMARKS.md shows.
"""
