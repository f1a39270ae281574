"""Builds the operator library; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import compileall
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HOME = Path("onnxnorm", "ops")


def builder() -> ModuleType:
    """onnxnorm/ops/build.py, by its path: the package cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location("onnxnorm_ops_build", HOME / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_ext):
    """Compiles the library into the wheel, or beside its package for an editable install.

    Without a compiler nothing is built, and the install goes on; `onnxnorm ops` says so.
    """

    def _folder(self) -> Path:
        home = HOME / "built"
        return home if self.inplace or self.editable_mode else Path(self.build_lib) / home

    def run(self) -> None:
        """Build."""
        built = builder().build(self._folder())
        for line in built.missing:
            self.announce(f"operator library: {line}", 3)
        if self.inplace or self.editable_mode:
            # pip compiles what it copies, and of an editable install it copies nothing: without
            # this, a command takes 0.2 s longer wherever Python may not write what it compiles.
            for folder in ("onnxnorm", "passes"):
                compileall.compile_dir(folder, quiet=2)

    def get_outputs(self) -> list[str]:
        """What `run` made."""
        build = builder()
        made = (self._folder() / name for name in (build.LIBRARY, build.RECORD))
        return [str(path) for path in made if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing to link: an editable install builds in place."""
        return {}


class PlatformWheel(bdist_wheel):
    """The library depends on the platform and not on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag: py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    # The name is not used: an extension is what makes a wheel one of a platform.
    ext_modules=[Extension("onnxnorm.ops.library_of_kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
