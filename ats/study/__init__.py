"""The paper's tables and studies: what is run, kept, compared and written.

* `results.py`: results kept in files, so that an interrupted study resumes;
* `digits.yaml`, `digits.py`: the studies on the Digits data (`tools/study.py`); `study_page.*` writes docs/STUDY.md;
* `compare.py`: accuracies with their spread, differences with their interval, and the verdicts on the claims;
* `paper.yaml`, `reproduce.py`: the paper's numbers, and its tables on the paper's data (`tools/reproduce.py`);
  `reproduced_table.py` writes them;
* `charts.py`: tables and figures for both.
"""
