"""Verification of a conversion: our model against an independent implementation.

Start with ``comparison.py``, the public call ``verify``. The references are what plugins return from
``load_reference``.
"""

from megacore.verification.comparison import Iteration, Tolerance, VerificationReport, verify
from megacore.verification.meta_reference import MetaReference
from megacore.verification.samples import dataset_samples, random_samples, text_samples
from megacore.verification.standard_reference import load_standard_reference
from megacore.verification.transformers_reference import TransformersReference

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
