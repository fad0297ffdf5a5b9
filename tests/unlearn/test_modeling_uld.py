"""The rule of a difference against a slow oracle, the defects of the released code, and that the file stands alone."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unlearn.checkpoints import modeling_uld
from unlearn.checkpoints.modeling_uld import Rule, combine

RULES = [
    Rule(alpha, share, ratio, outside)  # type: ignore[arg-type]
    for alpha in (0.0, 0.75, 2.0)
    for share, ratio in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2), (0.004, 0.0), (1.0, 1.0))
    for outside in ("original", "never")
]


def logits(rows: int, width: int, seed: int, size: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def kept_by_hand(target: Sequence[float], rule: Rule) -> list[bool]:
    width, top = len(target), max(target)
    last = max(1, math.floor(round(rule.rank_share * width, 9)))
    if not rule.rank_share and not rule.ratio:
        return [True] * width
    out = []
    for value in target:
        by_rank = rule.rank_share > 0 and sum(other > value for other in target) < last
        by_ratio = rule.ratio > 0 and math.exp(value - top) >= rule.ratio
        out.append(by_rank or by_ratio)
    return out


def by_hand(target: Sequence[float], assistant: Sequence[float], rule: Rule) -> list[float]:
    """One row, element by element."""
    log_b = [value - log_sum(target) for value in target]
    log_a = [value - log_sum(assistant) for value in assistant]
    keep = kept_by_hand(target, rule)
    c = [b - rule.alpha * a for b, a in zip(log_b, log_a, strict=True)]
    total = log_sum([value for value, kept in zip(c, keep, strict=True) if kept])
    mass = log_sum([b for b, kept in zip(log_b, keep, strict=True) if kept]) if rule.outside == "original" else 0.0
    rest = log_b if rule.outside == "original" else [-math.inf] * len(c)
    return [value - total + mass if kept else other for value, kept, other in zip(c, keep, rest, strict=True)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("width", [7, 60])
def test_combination_against_element_by_element(rule: Rule, width: int) -> None:
    target, assistant = logits(5, width, 0), logits(5, width, 1)
    target[0, 3] = target[0].sort(descending=True).values[max(1, width // 10) - 1]  # a tie with the last rank
    target[1] = target[1].round()  # many ties
    want = [by_hand(b, a, rule) for b, a in zip(target.tolist(), assistant.tolist(), strict=True)]
    got = combine(target, assistant, rule)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.logsumexp(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def kept(target: Tensor, rule: Rule) -> list[list[int]]:
    out = combine(target, torch.zeros_like(target), rule)
    return [row.isfinite().nonzero().flatten().tolist() for row in out]


def test_rank_and_ratio_each_alone_and_together() -> None:
    target = torch.tensor([[0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0]])
    assert kept(target, Rule(1.0, 0.3, 0.0, "never")) == [[0, 1, 2]]
    assert kept(target, Rule(1.0, 0.0, 0.2, "never")) == [[0, 1]]  # e^-1 > 0.2 > e^-2
    assert kept(target, Rule(1.0, 0.3, 0.2, "never")) == [[0, 1, 2]]
    assert kept(target, Rule(1.0, 0.1, 0.01, "never")) == [[0, 1, 2, 3, 4]]
    assert kept(target, Rule(1.0, 0.0, 0.0, "never")) == [list(range(10))]


def test_ties_with_the_last_rank_stay() -> None:
    target = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]])
    assert kept(target, Rule(1.0, 0.2, 0.0, "never")) == [[0, 1, 2, 3]]
    assert kept(torch.zeros(1, 10), Rule(1.0, 0.2, 0.0, "never")) == [list(range(10))]


@pytest.mark.parametrize("ratio", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.003, 0.01, 0.1])
def test_what_is_kept_of_many_tokens_is_found_without_sorting_them(share: float, ratio: float) -> None:
    target, rule = logits(7, 1003, 0).float(), Rule(0.75, share, ratio, "never")
    count = math.floor(share * 1003)
    target[1] = target[1].sort().values
    target[2] = target[2].round()  # many ties
    target[3, :: 1003 // (1003 // (3 * count))] += 20
    target[4, : 3 * count] -= 20
    target[5, 2 * count :] = -math.inf
    target[6] = target[6, 0]
    ranked = target.sort(descending=True).values
    limit = ranked[:, count - 1 : count]
    if ratio:
        limit = torch.minimum(limit, ranked[:, :1] + math.log(ratio))
    want = (target >= limit) & target.isfinite()
    assert torch.equal(combine(target, torch.zeros_like(target), rule).isfinite(), want)


def test_a_share_counts_exactly() -> None:
    """0.29 * 100 is 28.999... in floating point."""
    assert len(kept(-torch.arange(100.0)[None], Rule(1.0, 0.29, 0.0, "never"))[0]) == 29


def test_a_vocabulary_below_one_over_the_share_keeps_one_token() -> None:
    """The released code takes rank int(share * V) - 1 = -1 there, the last: its filter is off without a word."""
    target = logits(4, 50, 2)
    assert kept(target, Rule(1.0, 0.01, 0.0, "never")) == target.argmax(-1, keepdim=True).tolist()
    official = target >= target.sort(descending=True).values[:, int(0.01 * 50) - 1][:, None]
    assert official.all()


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_alpha_0_is_the_target_to_the_last_bit(share: float) -> None:
    target, assistant = logits(5, 60, 0).float(), logits(5, 60, 1).float()
    assert torch.equal(combine(target, assistant, Rule(0.0, share, share, "original")), target.log_softmax(-1))


def test_an_assistant_equal_to_the_target_leaves_one_minus_alpha() -> None:
    target = logits(5, 60, 0)
    want = (0.25 * target.log_softmax(-1)).log_softmax(-1)
    torch.testing.assert_close(combine(target, target, Rule(0.75, 0, 0)), want, rtol=1e-12, atol=1e-12)


def test_a_uniform_assistant_changes_nothing() -> None:
    target = logits(5, 60, 0)
    for share in (0.0, 0.1):
        got = combine(target, torch.full_like(target, 4.2), Rule(0.75, share, share, "original"))
        torch.testing.assert_close(got, target.log_softmax(-1), rtol=1e-12, atol=1e-12)


def test_an_assistant_that_rules_out_every_kept_token_changes_nothing() -> None:
    target = logits(3, 60, 0)
    rule = Rule(0.75, 0.1, 0.0, "original")
    kept = torch.tensor([kept_by_hand(row, rule) for row in target.tolist()])
    assistant = torch.where(kept, -math.inf, logits(3, 60, 1))
    torch.testing.assert_close(combine(target, assistant, rule), target.log_softmax(-1), rtol=1e-12, atol=1e-12)


def test_constants_added_to_the_logits_change_nothing_and_did_in_the_released_formula() -> None:
    """The released forward subtracts raw logits and gives filtered tokens the target's alone: a constant counts."""
    target, assistant = logits(20, 60, 0), logits(20, 60, 1)
    labels = torch.arange(20) % 60
    rule = Rule(0.75, 0.1, 0.1, "original")

    def loss(out: Tensor) -> float:
        return float(-out.gather(-1, labels[:, None]).mean())

    def official(shift: float) -> float:
        keep = torch.tensor([kept_by_hand(row, rule) for row in target.tolist()])
        raw = target - rule.alpha * torch.where(keep, assistant + shift, torch.zeros_like(assistant))
        return loss(raw.log_softmax(-1))

    ours = combine(target, assistant, rule)
    for shift in (-20.0, 10.0, 20.0):
        torch.testing.assert_close(combine(target, assistant + shift, rule), ours, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(combine(target + shift, assistant, rule), ours, rtol=1e-10, atol=1e-10)
        assert abs(official(shift) - official(0.0)) > 0.1


def test_a_masked_token_never_wins_where_all_kept_scores_are_negative() -> None:
    """The released code takes argmax(scores * ~mask): a filtered -1000 becomes -0 and beats negative scores."""
    target, assistant = logits(20, 60, 0) - 50, logits(20, 60, 1)
    rule = Rule(0.75, 0.1, 0.0, "never")
    out = combine(target, assistant, rule)
    keep = torch.tensor([kept_by_hand(row, rule) for row in target.tolist()])
    best = out.argmax(-1)
    assert keep[torch.arange(20), best].all()
    assert (out[~keep] == -math.inf).all()
    raw = torch.where(keep, target - rule.alpha * assistant, torch.full_like(target, -1e3))
    official = (raw * keep).argmax(-1)
    assert not keep[torch.arange(20), official].any()
    scores = torch.where(keep, target.log_softmax(-1) - rule.alpha * assistant.log_softmax(-1), -math.inf)
    assert torch.equal(best, scores.argmax(-1))


def test_outside_keeps_the_targets_own_probability() -> None:
    target, assistant = logits(5, 60, 0), logits(5, 60, 1)
    rule = Rule(0.75, 0.1, 0.1, "original")
    keep = torch.tensor([kept_by_hand(row, rule) for row in target.tolist()])
    got, before = combine(target, assistant, rule), target.log_softmax(-1)
    assert torch.equal(got[~keep], before[~keep])
    for row in range(5):
        torch.testing.assert_close(got[row][keep[row]].logsumexp(0), before[row][keep[row]].logsumexp(0))
    never = combine(target, assistant, Rule(0.75, 0.1, 0.1, "never"))
    torch.testing.assert_close(got[keep].exp().sum(), (never.exp() * before.exp().where(keep, 0).sum(-1, True)).sum())


def test_types_shapes_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    target, assistant = logits(6, 60, 0), logits(6, 60, 1)
    rule = Rule(0.75, 0.1, 0.1)
    whole = combine(target, assistant, rule)
    assert whole.dtype == torch.float64
    assert combine(target.bfloat16(), assistant.bfloat16(), rule).dtype == torch.float32
    assert torch.equal(combine(target.view(2, 3, 60), assistant.view(2, 3, 60), rule), whole.view(2, 3, 60))
    assert torch.equal(combine(target[0], assistant[0], rule), whole[0])
    assert combine(target[:0], assistant[:0], rule).shape == (0, 60)
    monkeypatch.setattr(modeling_uld, "TILE_ELEMENTS", 100)
    assert torch.equal(combine(target, assistant, rule), whole)
    with pytest.raises(ValueError, match=r"logits of one shape, found .* vocabulary"):
        combine(target, assistant[:, :-1], rule)


def test_tokens_that_a_model_rules_out() -> None:
    target, assistant = logits(4, 60, 0), logits(4, 60, 1)
    target[:, 5], assistant[:, 6] = -math.inf, -math.inf
    for rule in (Rule(0.75, 0, 0), Rule(0.75, 0.1, 0.1), Rule(0.75, 1.0, 0, "never")):
        out = combine(target, assistant, rule)
        assert not out.isnan().any()
        assert (out[:, 5] == -math.inf).all()
        torch.testing.assert_close(out.logsumexp(-1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("outside", ["original", "never"])
def test_gradients(outside: str) -> None:
    target, assistant = logits(2, 12, 0), logits(2, 12, 1)
    rule = Rule(0.75, 0.3, 0.1, outside)  # type: ignore[arg-type]
    keep = torch.tensor([kept_by_hand(row, rule) for row in target.tolist()])
    seen = keep | (outside == "original")

    def finite(b: Tensor, a: Tensor) -> Tensor:
        return combine(b, a, rule)[seen]

    assert torch.autograd.gradcheck(finite, (target.requires_grad_(), assistant.requires_grad_()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": -0.1}, "alpha of at least 0"),
        ({"alpha": math.nan}, "alpha of at least 0"),
        ({"rank_share": 1.5}, "rank_share from 0 to 1"),
        ({"ratio": -0.1}, "ratio from 0 to 1"),
        ({"outside": "sometimes"}, "original or never"),
    ],
)
def test_rules_out_of_range(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rule(**({"alpha": 0.5, "rank_share": 0.1, "ratio": 0.1, "outside": "original"} | change))  # type: ignore[arg-type]


# -- the file alone ----------------------------------------------------------------------------------------------------


def test_the_file_imports_nothing_of_the_toolkit() -> None:
    tree = ast.parse(Path(modeling_uld.__file__).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module).partition(".")[0])
    assert found - set(sys.stdlib_module_names) == {"torch", "transformers", "safetensors"}
