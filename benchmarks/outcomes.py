"""A pytest plugin that writes a line of JSON for every test as it ends: --outcomes FILE.

What was done is kept when a run is cut off. A benchmark's line has its extra_info too. With
--every N only each Nth of the chosen tests runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_MESSAGE_CHARACTERS = 4000  # of a failure, from its end


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="where the lines go")
    parser.addoption("--every", type=int, default=1, help="run each Nth test alone")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers report to the process that has started them
        config.pluginmanager.register(_Outcomes(config.getoption("--outcomes")))


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[:: config.getoption("--every")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Iterator[Any]:
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if report.when == "call" and benchmark is not None:
        report.user_properties.append(("benchmark", benchmark.extra_info))
    return report


class _Outcomes:
    def __init__(self, path: Path) -> None:
        path.write_text("", encoding="utf-8")
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "when": report.when,
            "seconds": report.duration,
        }
        if not report.passed:
            line["message"] = report.longreprtext[-_MESSAGE_CHARACTERS:]
        line |= {name: value for name, value in report.user_properties if name == "benchmark"}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
