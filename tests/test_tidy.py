"""What no linter sees: the habits of this project, held by reading its files.

Every exception stands in a table here with its reason. Needles that must not be in any file are put together from
pieces, so that this one does not hold them either.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.errors import Code, WorkCode
from services.settings import Settings

ROOT = Path(__file__).parent.parent
LINES_MAX = 450
TEST_LINES_MAX = 1_000
LONGER: dict[str, tuple[int, str]] = {
    "schemas/batch.py": (600, "what facts mean stands in one place"),
    "services/tail.py": (600, "one component, whose parts share its state"),
}
"""Files that may be longer, how long, and why."""
SLEEPS: dict[str, str] = {
    "tests/faults/simulation/": "time is simulated there, and costs none",
    "tests/unit/test_simulation_loop.py": "time is simulated there, and costs none",
    "tests/work_handlers.py": "handlers that hang on purpose",
    "tests/contract/test_eventlog.py::test_closing_is_bounded": "nothing tells when it begins",
    "tests/integration/test_notifier.py::test_progress_comes": "that nothing comes can only be waited for",
}
"""Where a test may sleep outside a loop that asks whether something has come about: a file, or the beginning of a
function's name in it."""
NO_SETTINGS = {"SLUICE_API_URL", "SLUICE_TOKEN", "SLUICE_CACHE_DIR"}
"""What the command line reads; the services do not."""
PURE = [*sorted((ROOT / "schemas").glob("*.py")), *sorted((ROOT / "services").glob("*/decisions.py"))]
PURE_IMPORTS = set(
    """collections dataclasses datetime enum hashlib heapq json math operator re typing unicodedata urllib uuid
    pydantic pydantic_core schemas""".split()  # noqa: SIM905  # one long list reads worse
)
MORE_IMPORTS = {"schemas/generate.py": {"pathlib", "sys"}}
"""The generator writes files: it is no part of what the services import."""


def tracked() -> list[Path]:
    """The project's files: what git knows or would add; all but what tools leave behind, where there is no git."""
    if (ROOT / ".git").exists() and (git := shutil.which("git")):
        command = [git, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    hidden = (".venv", "build", "__pycache__")
    return [path for path in ROOT.rglob("*") if path.is_file() and not any(part in hidden for part in path.parts)]


TRACKED = tracked()
MODULES = [path for path in TRACKED if path.suffix == ".py" and path.read_text(encoding="utf-8").strip()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    """The file's text; empty for a picture and the like."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_there_are_files_to_read() -> None:
    assert {"README.md", "schemas/events.py", "tests/test_tidy.py"} <= {name_of(path) for path in TRACKED}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_opens_with_its_purpose(path: Path) -> None:
    said = ast.get_docstring(ast.parse(text_of(path)))

    assert said, f"{name_of(path)} has no docstring"
    assert len(said.splitlines()) <= 12


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_tells_one_story(path: Path) -> None:
    usual = TEST_LINES_MAX if name_of(path).startswith("tests/") else LINES_MAX
    lines_max, _ = LONGER.get(name_of(path), (usual, ""))

    assert len(text_of(path).splitlines()) <= lines_max, "split it by what it tells"


def test_no_file_names_this_machine() -> None:
    homes = ["home/", "root/", "Users/"]
    roots = [r"(?<![\w.~}/])/" + home + r"[a-z]" for home in homes]
    needles = re.compile("|".join([re.escape(str(ROOT)) + r"\b", re.escape(sys.prefix), *roots]))

    found = [f"{name_of(path)}: {match[0]}" for path in TRACKED for match in needles.finditer(text_of(path))]

    assert found == []


def test_no_file_names_where_packages_are_fetched_from() -> None:
    options = ["index" + "-url", "find" + "-links", "trusted" + "-host", "artifact" + "ory"]
    needles = re.compile("|".join(rf"{option}[ =\"]+\S*(?:://|\w\.\w)" for option in options))

    found = [f"{name_of(path)}: {match[0]}" for path in TRACKED for match in needles.finditer(text_of(path))]

    assert found == []


def sleeps(path: Path) -> Iterator[tuple[str, int]]:
    """Each sleep that is not a step of a loop, as the function it stands in and the line; one of no time is none."""

    def walk(node: ast.AST, function: str, *, in_loop: bool) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function, in_loop = node.name, False
        if isinstance(node, ast.While | ast.For | ast.AsyncFor):
            in_loop = True
        if _is_sleep(node) and not in_loop:
            yield function, getattr(node, "lineno", 0)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function, in_loop=in_loop)

    yield from walk(ast.parse(text_of(path)), "", in_loop=False)


def _is_sleep(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and node.args):
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return called == "sleep" and not (isinstance(node.args[0], ast.Constant) and node.args[0].value == 0)


def test_tests_await_conditions_and_never_just_time() -> None:
    found = [
        f"{name_of(path)}:{line} in {function}"
        for path in MODULES
        if name_of(path).startswith("tests/")
        for function, line in sleeps(path)
        if not f"{name_of(path)}::{function}".startswith(tuple(SLEEPS))
    ]

    assert found == [], "await what the test waits for"


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_pure_files_import_nothing_impure(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").split(".")[0])

    assert imported - PURE_IMPORTS - MORE_IMPORTS.get(name_of(path), set()) == set()


def test_every_setting_is_explained_and_every_explained_one_exists() -> None:
    documents = [path for path in TRACKED if path.suffix == ".md" and not name_of(path).startswith("tests/")]
    explained = set(re.findall(r"\bSLUICE_[A-Z0-9_]*[A-Z0-9]\b", "\n".join(map(text_of, documents))))
    settings = {f"SLUICE_{name.upper()}" for name in Settings.model_fields}

    assert settings - explained == set(), "explain them in the README or in docs/"
    assert {name for name in explained - settings - NO_SETTINGS if not name.startswith("SLUICE_TEST_")} == set()


@pytest.mark.skipif(not (ROOT / "docs/errors.md").exists(), reason="there is no docs/errors.md to hold to the codes")
def test_every_error_code_is_documented() -> None:
    documented = text_of(ROOT / "docs/errors.md")

    assert [code for code in (*Code, *WorkCode) if f"`{code}`" not in documented] == []
