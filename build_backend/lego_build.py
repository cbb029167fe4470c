"""PEP 517 backend: setuptools, which here also sees the torch of the target environment.

pip builds in an isolated environment that hides the installed packages, but the native code must
be compiled against the torch it will run with. So the target's site-packages go to the end of
sys.path, behind the build tools that pip installed. Where there is no torch yet, pip is asked to
put one beside the build tools.
"""

import importlib.util
import sys
import sysconfig

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

sys.path.extend({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} - set(sys.path))


def _missing_torch(config_settings: object = None) -> list[str]:
    return [] if importlib.util.find_spec("torch") else ["torch>=2.10"]


get_requires_for_build_editable = _missing_torch
get_requires_for_build_sdist = _missing_torch
get_requires_for_build_wheel = _missing_torch
