"""What the code imports is what pyproject.toml declares."""

import ast
import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = {
    "hydra": "hydra-core",
    "PIL": "pillow",
    "lm_eval": "lm-eval",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
}
"""Of what is installed, where it is imported by another name."""
BROUGHT = {"omegaconf": "hydra-core", "pyyaml": "omegaconf", "huggingface-hub": "transformers", "jinja2": "torch"}
"""What a declared requirement, or one that is brought, requires itself."""
OWN = {"fusionbench", "fusionbench_zoo"}  # the zoo is looked for, and need not be there


def imported(file: Path) -> set[str]:
    """The packages that a file imports anywhere in it, by whole names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value).partition(".")[0])
    return names - set(sys.stdlib_module_names) - OWN


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=~! ;(]", requirement, maxsplit=1)[0].lower()


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: extra for name, extra in project["optional-dependencies"].items() if name not in ("dev", "docs")}
    return {name_of(line) for lines in (project["dependencies"], *extras.values()) for line in lines}


def test_every_package_that_is_imported_is_declared_or_brought_by_one_that_is() -> None:
    files = sorted((ROOT / "src" / "fusionbench").rglob("*.py"))
    found = {NAMES.get(name, name): str(file.relative_to(ROOT)) for file in files for name in imported(file)}
    assert {"numpy", "torch", "ray", "scipy", "pyyaml"} <= set(found)
    assert {name: file for name, file in found.items() if name not in declared() | set(BROUGHT)} == {}
    for name, by in BROUGHT.items():
        assert by in declared() | set(BROUGHT)
        assert name in {name_of(line) for line in requires(by) or [] if "extra ==" not in line}, (
            f"{by} brings no {name}"
        )
