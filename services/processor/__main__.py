"""`python -m services.processor`: works one lane until it is told to stop."""

from services.processor.main import run

run()
