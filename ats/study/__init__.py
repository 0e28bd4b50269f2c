"""The paper's tables and studies: what is run, run once, compared, and written down.

* `tasks.py`: a list of measurements that are kept in files, so that an interrupted list goes on;
* `compare.py`: accuracies with their spread, differences with their interval, and what follows for a claim;
* `budget.py`: K for a budget;
* `digits*.py`: the studies on the Digits data (`tools/study.py`);
* `paper.py`, `reproduce*.py`: the paper's numbers, and its tables on the paper's data (`tools/reproduce.py`);
* `report.py`: markdown tables and figures for both.
"""
