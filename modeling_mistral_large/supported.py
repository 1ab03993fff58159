"""The versions of transformers that the whole test suite has passed on, as literals that setup.py reads as text."""

OLDEST_TRANSFORMERS = "5.17"
# The last minor version; a newer one is raised here once the suite has passed on it.
NEWEST_TRANSFORMERS = "5.24"
