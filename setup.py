"""`pip install .` installs the package `ats`. The rest is in pyproject.toml, which can find packages or rename one, but
not both: `ats.configs` is the folder configs/.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["ats", "ats.*"]), "ats.configs"])
