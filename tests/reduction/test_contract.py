"""What a reduction of one's own meets outside its file: the network's demands, names in messages, warnings."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import test_rivals
import torch
from torch import Tensor

from ats.benchmark.synthetic_counts import synthetic_counts
from ats.config import get_cfg
from ats.config.schema import unread_keys
from ats.errors import UserError
from ats.models.block import ats_blocks
from ats.options import Range, option
from ats.reduction import REDUCTIONS, Candidates, Reduction, register, register_sampler
from ats.reduction.plan import plan_reductions
from ats.tokens import LAYOUTS


@pytest.fixture
def every_nth() -> Iterator[type[Reduction]]:
    """A reduction with an option that ToMe has, too, and with a short help text."""

    @register("every_nth")
    @dataclass(frozen=True)
    class EveryNth(Reduction):
        r: int = option(2, "Every r.", within=Range(1))

        def select(self, candidates: Candidates) -> Tensor:
            return candidates.valid & (torch.arange(candidates.valid.shape[1]) % self.r == 0)

    yield EveryNth
    del REDUCTIONS["every_nth"]


def test_it_runs_by_config(every_nth):
    model = test_rivals.tiny("ATS.ENABLE", True, "ATS.SAMPLER", "every_nth", "ATS.BLOCKS", [1], "EVERY_NTH.R", 4)
    _, trace = model.forward_tokens(test_rivals.pictures(2))
    num_in = trace.records[0].num_in
    assert trace[0].num_tokens.tolist() == (1 + (num_in - 1 + 3) // 4).tolist()


def test_scores_by_cls_need_one(every_nth):
    """Else the first patch would be taken for CLS."""
    with pytest.raises(
        UserError, match=r"^ATS.SAMPLER every_nth needs a CLS token .* none; choose from tome, pitome, or"
    ):
        plan_reductions([{"sampler": "every_nth", "blocks": [0]}], depth=2, num_prefix_tokens=0)


def test_messages_name_its_own_key(every_nth):
    with pytest.raises(UserError, match=r"EVERY_NTH\.R 0: "):
        plan_reductions([{"sampler": "every_nth", "blocks": [0], "r": 0}], depth=2)
    with pytest.raises(UserError, match=r"TOME\.R -1"):
        plan_reductions([{"sampler": "tome", "blocks": [0], "r": -1}], depth=2)


@pytest.mark.parametrize(
    ("stages", "unread"),
    [
        ([{"BLOCKS": [1]}, {"SAMPLER": "tome", "BLOCKS": [0]}], ["ATS.BLOCKS"]),
        ([{"SAMPLER": "topk"}], ["ATS.SAMPLER"]),
        ([], []),
    ],
    ids=["one takes the sampler from ATS.SAMPLER", "takes the blocks from ATS.BLOCKS", "none"],
)
def test_keys_that_no_stage_takes_are_unread(stages, unread):
    cfg = get_cfg()
    cfg.merge_from_list(["ATS.ENABLE", True, "ATS.STAGES", stages, "ATS.SAMPLER", "random", "ATS.BLOCKS", [0, 1]])
    assert unread_keys(cfg).get("ATS.STAGES", []) == unread


def test_counts_are_imposed_on_inverse_transform_sampling_alone():
    """Not on a function of one's own, whose counts would then be another method's."""

    @register_sampler("first_three")
    def first_three(candidates, num_points, options):
        return candidates.valid & (torch.arange(candidates.valid.shape[1]) < 3)

    try:
        names = ("first_three", "inverse_transform")
        models = [test_rivals.tiny("ATS.ENABLE", True, "ATS.SAMPLER", name) for name in names]
        with synthetic_counts(models):
            imposed = [[block.imposed is not None for block in ats_blocks(model)] for model in models]
        assert not any(imposed[0])
        assert all(imposed[1])
    finally:
        del REDUCTIONS["first_three"]


STAGES_TO_REFUSE = [
    (1, "ATS.STAGES must be"),
    ([[1]], "ATS.STAGES must be"),
    ([{"BLOCKS": 1}], r"ATS.STAGES\[0\] BLOCKS 1: give a list of blocks"),
    ([{"BLOCKS": []}], r"ATS.STAGES\[0\] BLOCKS \[\]: give a list"),
    ([{"BLOCKS": [1.0]}], "give a list of blocks"),
    ([{"BLOCKS": [True]}], "give a list of blocks"),
    ([{"BLOCKS": [1], "blocks": [2]}], "a key is listed twice"),
    ([{"SAMPLER": ["tome"]}], r"SAMPLER \['tome'\]: choose from.*Did you mean tome"),
    ([{"SAMPLER": None}], "SAMPLER None: choose from"),
    ([{"SAMPLER": "tome", "TOME.R": 3}], "choose from SCHEDULE, R, PROP_ATTN. Did you mean R?"),
    ([{"BLOCKS": [0, 1]}, {"BLOCKS": [1]}], "block 1 is in two stages"),
]


@pytest.mark.parametrize(("stages", "message"), STAGES_TO_REFUSE, ids=lambda value: str(value)[:40])
def test_stages_that_are_wrong_are_refused(stages, message):
    with pytest.raises(UserError, match=message):
        test_rivals.tiny("ATS.ENABLE", True, "ATS.STAGES", stages)


def test_names_of_stages_are_read_in_any_case():
    cfg = get_cfg()
    stages = [{"sampler": "tome", "blocks": [1]}]
    cfg.merge_from_list(["ATS.ENABLE", True, "ATS.STAGES", stages, "TOME.R", 3])
    assert unread_keys(cfg) == {}
    assert ats_blocks(test_rivals.tiny("ATS.ENABLE", True, "ATS.STAGES", stages, "TOME.R", 3))[0].reduction.r == 3


def test_a_function_of_ones_own_can_be_pickled():
    """With the model it is in."""

    @register_sampler("all_of_them")
    def all_of_them(candidates, num_points, options):
        return candidates.valid

    try:
        model = test_rivals.tiny("ATS.ENABLE", True, "ATS.SAMPLER", "all_of_them", "ATS.MIN_TOKENS", 5)
        again = pickle.loads(pickle.dumps(model))
        assert [block.reduction for block in ats_blocks(again)] == [block.reduction for block in ats_blocks(model)]
    finally:
        del REDUCTIONS["all_of_them"]


@torch.no_grad()
def test_tome_on_ragged_tokens_does_not_look_at_the_batch():
    """A sequence too short to merge alone keeps the same bound and sizes as beside longer ones."""
    stages = [{"BLOCKS": [0], "NUM_TOKENS": 3, "MIN_TOKENS": 0, "RULE": "paper"}, {"SAMPLER": "tome", "BLOCKS": [1]}]
    stages += [{"BLOCKS": [2], "NUM_TOKENS": 0.5, "MIN_TOKENS": 0}]
    models = [test_rivals.tiny("ATS.ENABLE", True, "ATS.STAGES", stages, "ATS.LAYOUT", own) for own in LAYOUTS]
    x = test_rivals.pictures(12)
    want = torch.cat([models[0](image[None]) for image in x])
    for model in models:
        logits, trace = model.forward_tokens(x)
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-11)
        assert trace.records[1].max_tokens == models[0].forward_tokens(x[:1])[1].records[1].max_tokens == 2


BEHIND_EVIT = {
    "ToMe": {"SAMPLER": "tome", "R": 7},
    "paper's rule": {"NUM_TOKENS": 6, "MIN_TOKENS": 0, "RULE": "paper"},
    "a ratio": {"SAMPLER": "topk", "NUM_TOKENS": 0.2, "MIN_TOKENS": 0},
}


@pytest.mark.parametrize("behind", BEHIND_EVIT)
@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_evit_on_ragged_tokens_does_not_look_at_the_batch(behind, fuse):
    """At a high keep rate a short sequence keeps all its tokens; in a batch with longer ones the result is the same."""
    evit = {"SAMPLER": "evit", "KEEP_RATE": 0.95, "FUSE_TOKEN": fuse, "BLOCKS": [1]}
    stages = [{"BLOCKS": [0], "NUM_TOKENS": 40}, evit, BEHIND_EVIT[behind] | {"BLOCKS": [2]}]
    models = [test_rivals.tiny("ATS.ENABLE", True, "ATS.STAGES", stages, "ATS.LAYOUT", own) for own in LAYOUTS]
    x = test_rivals.pictures(6)
    want = torch.cat([models[0](image[None]) for image in x])
    for model in models:
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-11)
