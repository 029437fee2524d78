"""The house rules that a machine can check: style, types, docstrings, tidy folders, examples that run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    ".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "benchmarks",
    "constraints.txt", "docs", "notebooks", "pyproject.toml", "scvi_lite", "tests",
}  # fmt: skip
SOURCES = sorted((ROOT / "scvi_lite").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_module(*command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def tracked_files():
    """Files under version control, or skip where this is no checkout."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_ruff_finds_nothing():
    run_module("ruff", "check", ".")


def test_code_is_laid_out_by_ruff():
    run_module("ruff", "format", "--check", ".")


def test_types():
    run_module("mypy")


def test_top_level_is_tidy():
    assert {path.relative_to(ROOT).parts[0] for path in tracked_files()} <= TOP_LEVEL


def test_no_machine_paths():
    """A path or a host that only one machine knows has no place in the project."""
    private = re.compile(r"(?<![\w.])/(?:work|opt|root|home|mnt|tmp)/\w|file://|https?://(?:localhost|[\d.]+[:/])")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".ipynb", ".json", ""}
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line) and path != Path(__file__)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert tree.body == [] or path.name == "__init__.py" or ast.get_docstring(tree), "the module has no docstring"
    assert not [node.name for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents(path):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", path.read_text())
    assert not [target for target in targets if not (path.parent / target).exists()]


def test_python_of_the_readme_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = code.replace("max_epochs=20", "max_epochs=2")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"umap.png", "my_model"}


def test_make_targets_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)", readme)) <= targets
