"""Prints pip's constraints for the lowest versions that setup.py allows: python .ci/lowest.py > constraints.txt"""

import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

os.chdir(Path(__file__).parent.parent)
setuptools = mock.MagicMock()  # a Python of today may come without it
with mock.patch.dict(sys.modules, setuptools=setuptools):
    runpy.run_path("setup.py")
given = setuptools.setup.call_args.kwargs
requirements = [*given["install_requires"], *(one for extra in given["extras_require"].values() for one in extra)]
lowest = {}
for requirement in requirements:
    name, version = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()
    assert lowest.setdefault(name, version) == version, f"{name} has two lower bounds"
print("\n".join(f"{name}=={version}" for name, version in lowest.items()))
