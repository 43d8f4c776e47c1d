"""The checks of the conformance kit, by subject.

Each check's docstring says what it demands and, under *Troubleshooting*, what to look at when it fails. ``base.py`` has
what the author of a plugin provides; :class:`~megacore.testing.ModelFamilyTests` puts all checks together.
"""
