"""Verification of a conversion: our model against an independent implementation.

Start with ``comparison.py``, the public call ``verify``. Plugins build their references with ``references.py``.
"""

from megacore.verification.comparison import Iteration, Tolerance, VerificationReport, verify
from megacore.verification.meta_reference import MetaReference
from megacore.verification.references import TransformersReference, load_standard_reference
from megacore.verification.samples import dataset_samples, random_samples, text_samples

__all__ = [
    "Iteration",
    "MetaReference",
    "Tolerance",
    "TransformersReference",
    "VerificationReport",
    "dataset_samples",
    "load_standard_reference",
    "random_samples",
    "text_samples",
    "verify",
]
