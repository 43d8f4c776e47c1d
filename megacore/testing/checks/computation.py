"""Checks of the computation: logits and gradients against the reference, in segments, token by token and at tp 2."""

from __future__ import annotations

import pytest
import torch

from megacore.parallel import ParallelSizes
from megacore.testing.case import Case
from megacore.testing.checks.base import CPU, FamilyChecks
from megacore.testing.diagnosis import explain
from megacore.testing.numerics import (
    agree,
    differing_gradients,
    largest_difference,
    logits_and_gradients,
    logits_token_by_token,
)
from megacore.testing.ranks import shared_pool


class ComputationChecks(FamilyChecks):
    """Checks of the logits and gradients."""

    def test_the_reference_is_independent_and_repeatable(self, case: Case) -> None:
        """The reference has the published weights, is in evaluation mode, and is not megacore's own code.

        Without a path it has random weights, in the requested dtype.

        Troubleshooting: ``TransformersReference.load`` in ``megacore.verification`` does all of that.
        """
        with torch.no_grad():
            logits = case.reference(case.input_ids)
            assert torch.equal(logits, case.reference_logits), "two calls of the reference differ: is dropout on?"
            assert logits.shape == (*case.input_ids.shape, case.config.vocab_size)
            fresh = case.family.load_reference(case.config, None, torch.float64, CPU)(case.input_ids)
        assert (fresh.shape, fresh.dtype) == (logits.shape, torch.float64), "with path=None and dtype float64"
        model = getattr(case.reference, "model", case.reference)
        assert not type(model).__module__.startswith("megacore."), f"{type(model)} is not independent"
        parameters = case.tests.reference_parameters(case.reference)
        missing = [name for name in case.tensors if name not in parameters]
        assert not missing, f"the reference has no parameters {', '.join(missing)}: override reference_parameters()"
        different = [name for name, tensor in case.tensors.items() if not torch.equal(parameters[name], tensor)]
        assert not different, (
            f"the reference has other weights than the files: {', '.join(different)}; does it load path?"
        )

    def test_logits_are_those_of_the_reference(self, case: Case) -> None:
        """The logits agree in float32 within rtol 1.3e-6 and atol 1e-5, on logits of order 1.

        Troubleshooting: the message names the change that makes them agree if it is one of the usual mistakes, and
        otherwise where to look.
        """
        spread = case.reference_logits.std().item()
        assert 0.3 < spread < 3, f"the bounds are for logits of order 1; these vary by {spread:.2g}: see publish()"
        if not agree(case.logits, case.reference_logits):
            pytest.fail(explain(case))

    def test_gradients_are_those_of_the_reference(self, case: Case) -> None:
        """The gradient of the loss with respect to every published tensor is the reference's.

        Troubleshooting: if the logits agree, something in the layer is detached, or computed twice.
        """
        problems = differing_gradients(case.to_source(case.gradients), case.reference_gradients)
        assert not problems, f"other gradients than the reference's: {', '.join(problems)}"

    def test_segments_of_a_row_do_not_see_each_other(self, case: Case) -> None:
        """Two segments packed into one row have the same logits as the reference computes for each alone.

        Troubleshooting: does the layer pass ``positions`` to its attention? An attention of your own must respect
        ``positions.segments``; everything else in the layer must treat each token separately.
        """
        first = max(1, case.input_ids.shape[1] // 3)
        numbers = (torch.arange(case.input_ids.shape[1]) >= first).int().expand(case.input_ids.shape)
        with torch.no_grad():
            packed = case.model()(case.input_ids, segments=numbers)
            parts = (case.input_ids[:, :first], case.input_ids[:, first:])
            alone = torch.cat([case.reference(part) for part in parts], dim=1)
        difference = largest_difference(packed, alone)
        assert agree(packed, alone), f"packed into one row, the logits differ by up to {difference:.2g}"

    def test_tokens_that_come_one_by_one_have_the_logits_of_the_whole(self, case: Case) -> None:
        """Generation token by token, with cached keys and values, computes the logits of the whole sequence.

        Troubleshooting: megacore's ``SelfAttention`` uses the cache. An attention of your own calls
        ``positions.cache.attend(self, query, key, value, positions)`` if ``positions.cache`` is not ``None``, and takes
        the rotary angles from ``positions``; everything else in the layer must treat each token separately.
        """
        third = max(1, case.input_ids.shape[1] // 3)
        starts = [third + row for row in range(len(case.input_ids))]
        stepwise = logits_token_by_token(case.model(), case.input_ids, starts)
        for ours, theirs, start in zip(stepwise, case.reference_logits, starts, strict=True):
            expected = theirs[start : start + len(ours)]
            difference = largest_difference(ours, expected)
            assert agree(ours, expected), f"token by token, the logits differ by up to {difference:.2g}"

    @pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence-parallel"])
    def test_logits_and_gradients_at_tp_2(self, case: Case, sequence_parallel: bool) -> None:
        """Two tensor-parallel processes compute the reference's logits, and the gradients of a single process.

        The check is skipped for a configuration that cannot be cut over two ranks: a single query head, or an odd
        number of query heads that share one key-value head.

        Troubleshooting: build the layer from modules in ``megacore.model``, with its argument ``parallel``; a module of
        your own with parameters derives from ``megacore.parallel.ReplicatedModule`` and reads them with
        ``self.replicated(name)``.
        """
        if case.max_tp == 1:
            pytest.skip("this configuration cannot be cut over two ranks")
        results = shared_pool().run(
            logits_and_gradients,
            case.checkpoint(tp=2, pp=2),
            case.input_ids,
            case.targets,
            sizes=ParallelSizes(tp=2, sequence_parallel=sequence_parallel),
        )
        for logits, gradients in results:
            difference = largest_difference(logits, case.reference_logits)
            assert agree(logits, case.reference_logits), f"at tp 2 the logits differ by up to {difference:.2g}"
            problems = differing_gradients(gradients, case.gradients)
            assert not problems, f"at tp 2 the gradients differ from one process: {', '.join(problems)}"
