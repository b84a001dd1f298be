"""The README lists every setting as it is: name, default and meaning; and links to files that are there."""

import re
from pathlib import Path

import pytest
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from services.settings import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_setting_stands_in_the_readme_with_its_default_and_meaning(name: str) -> None:
    field = Settings.model_fields[name]

    row = f"| `SLUICE_{name.upper()}` | {shown_default(field)} | {field.description} |"

    assert row in README.splitlines()


def test_the_readme_names_no_setting_that_there_is_not() -> None:
    known = {f"SLUICE_{name.upper()}" for name in Settings.model_fields} | {
        "SLUICE_API_URL",
        "SLUICE_TOKEN",
        "SLUICE_CACHE_DIR",
    }

    assert set(re.findall(r"SLUICE_[A-Z_]+", README)) <= known


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_a_link_of_the_readme_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def shown_default(field: FieldInfo) -> str:
    default = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    if default in (None, ""):
        return "–"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
