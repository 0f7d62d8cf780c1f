"""What holds for any whole run: ids are unique, parents exist, pairs are ordered, all is counted."""

import tempfile
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

from hypothesis import strategies as st

from self_rewarding_lm import RewardConfig, Run
from self_rewarding_lm.errors import PairingError
from self_rewarding_lm.scores import candidate_scores
from self_rewarding_lm.stages import pair_maker
from tests.support.mutants import over
from tests.test_trainer import PROMPTS, model64, self_reward, trainer_of

JUDGES = {
    "letters": lambda text: float(len(set(text))),
    "few letters": lambda text: float(len(set(text))) if len(set(text)) > 3 else None,
    "length": lambda text: float(len(text) > 4),
}


@over(
    "stages.pairing",
    st.fixed_dictionaries(
        {
            "num_candidate_responses": st.integers(2, 4),
            "num_generated_preference_pairs": st.integers(1, 6),
            "prompts_per_block": st.integers(1, 12),
            "num_sampled_reward_responses": st.integers(1, 2),
        }
    ).flatmap(
        lambda options: st.tuples(
            st.just(options), st.sampled_from(sorted(JUDGES)), st.integers(0, 99)
        )
    ),
    mutants={
        "chosen_id=one.id,": "chosen_id=prompt.id,",
        "(best[0], worst[0])": "(worst[0], best[0])",
        'drops.prompts[problems[0] if problems else "unpaired"] += 1': "pass",
        "if pairs else prompt.id": "if pairs else candidates[0].id",
    },
    examples=40,
)
def a_run_keeps_every_record_with_its_parents(pairing, case):
    options, judge, seed = case
    reward = RewardConfig(
        prompt_template="{{ prompt }}>{{ response }}:", parse_reward=JUDGES[judge]
    )
    stage = self_reward(min_parse_rate=0, max_prompt_passes=2, **options)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(pair_maker, "make_pairs", pairing.make_pairs),
    ):
        try:
            trainer_of(
                folder, [stage], model64(seed), seed=seed, self_reward_prompt_config=reward
            )()
        except PairingError:
            _nothing_could_be_paired(Run.open(Path(folder)))
            return
        run = Run.open(Path(folder))
        prompts, candidates, judgements, pairs = (
            {one.id: one for one in _unique(found)}
            for found in (run.prompts(0), run.candidates(0), run.judgements(0), run.pairs(0))
        )
        last = [line for line in run.metrics(0) if "pairs/kept" in line][-1]
    assert all(0 <= prompt.row < len(PROMPTS) for prompt in prompts.values())
    assert all(one.prompt_id in prompts for one in candidates.values())
    assert len(candidates) == options["num_candidate_responses"] * len(prompts)
    assert all(parent in candidates for one in judgements.values() for parent in one.candidate_ids)
    assert all((one.score is None) == (one.reason is not None) for one in judgements.values())
    for pair in pairs.values():
        chosen, rejected = candidates[pair.chosen_id], candidates[pair.rejected_id]
        assert chosen.prompt_id == rejected.prompt_id == pair.id in prompts
        assert pair.chosen_score > pair.rejected_score
        assert (pair.chosen_ids, pair.rejected_ids) == (chosen.ids, rejected.ids)
    assert 0 < len(pairs) <= options["num_generated_preference_pairs"]
    dropped = sum(n for name, n in last.items() if name.startswith("pairs/dropped"))
    assert last["pairs/kept"] + dropped == len(prompts) or last["pairs/kept"] > len(pairs)


def _nothing_could_be_paired(run):
    """Of each prompt's candidates that can be used, all that differ have one score."""
    scores = candidate_scores(run.candidates(0), run.judgements(0))
    for prompt in run.prompts(0):
        own = [c for c in run.candidates(0) if c.prompt_id == prompt.id]
        usable = [c for c in own if c.finished is not False and scores[c.id] is not None]
        for one, other in combinations(usable, 2):
            alike = one.ids == other.ids or one.text.strip() == other.text.strip()
            assert scores[one.id] == scores[other.id] or alike


def _unique(records):
    found = list(records)
    assert len({one.id for one in found}) == len(found)
    return found
