"""Verification of a conversion: our model against an independent implementation.

Start with ``comparison.py``, the public call ``verify``. Plugins build their references with ``references.py``.
"""

from megacore.verification.comparison import (
    Iteration as Iteration,
    Tolerance as Tolerance,
    VerificationReport as VerificationReport,
    verify as verify,
)
from megacore.verification.meta_reference import MetaReference as MetaReference
from megacore.verification.references import (
    TransformersReference as TransformersReference,
    load_standard_reference as load_standard_reference,
)
from megacore.verification.samples import (
    dataset_samples as dataset_samples,
    random_samples as random_samples,
    text_samples as text_samples,
)
