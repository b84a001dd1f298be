"""How Hypothesis searches in this folder: moderately, and where `CI` is set, the same way in every run.

On a developer's machine each run looks elsewhere; a failure prints the blob that finds it again. To search for longer:
`pytest tests/unit --hypothesis-profile=thorough`.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "sluice",
    max_examples=100,
    deadline=None,  # machines that do other work besides are no bug
    derandomize="CI" in os.environ,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("sluice"), max_examples=2_000, derandomize=False)
settings.load_profile("sluice")
