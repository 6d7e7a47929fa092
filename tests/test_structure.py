"""The house rules: which folder may import which, what needs no torch, names that would shadow a package."""

import ast
import subprocess
import sys

import pytest
from launching import ROOT

MAY_IMPORT = {
    "model": {"model"},
    "curation": {"curation"},
    "train": {"train", "model", "curation"},
    "eval": {"eval", "train", "model", "curation"},
    "launch": {"launch", "model", "train", "curation"},
}
WITHOUT_TORCH = [
    "model.config",
    "train.config",
    "train.hardware",
    "train.memory",
    "train.run_dir",
    "train.schedule",
    "train.watch",
    "curation.shards",
    "launch.estimate",
    "launch.cluster",
    "launch.supervise",
    "launch.drill",
    "launch.check",
    "launch.measure",
]
FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path):
    """Modules that a file imports, and whether each is imported with `from`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module, True
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_and_with_from(path):
    room = path.relative_to(ROOT).parts[0]
    for module, with_from in imports(path):
        if module.split(".")[0] in MAY_IMPORT:
            assert module.split(".")[0] in MAY_IMPORT[room], f"{path} imports {module}"
            assert with_from, f"{path}: `import {module}` would hide a name; use from"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_planning_needs_no_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_file_shadows_a_module_of_python_or_of_a_requirement():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.split("==")[0].split("[")[0].replace("-", "_") for line in lines if "==" in line}
    for path in FILES:
        if path.stem != "__init__":
            assert path.stem not in sys.stdlib_module_names | required, path


def test_every_folder_is_a_package_with_a_readme():
    for folder in MAY_IMPORT:
        assert (ROOT / folder / "__init__.py").is_file()
        assert (ROOT / folder / "README.md").is_file(), folder
    assert (ROOT / "ds_configs/README.md").is_file()
