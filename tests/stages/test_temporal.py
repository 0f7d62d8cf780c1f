"""Losers of an earlier model and winners of the next: the rules, whole runs, stops, processes."""

import sys
from collections import Counter
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch

from self_rewarding_lm import (
    ComparisonConfig,
    DPOConfig,
    EnsembleJudge,
    OptimConfig,
    Run,
    SamplingConfig,
    ServerJudge,
    TemporalDPOConfig,
)
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.candidates import sample_candidates
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.self_judge import PairwiseJudge
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.records import Candidate, Judgement, PreferencePair, Prompt
from self_rewarding_lm.runs import resume
from self_rewarding_lm.scores import candidate_scores
from self_rewarding_lm.stages.pairing import DropCounts, PairingConfig, make_pairs
from self_rewarding_lm.stages.rehearsal import rehearse_stages
from self_rewarding_lm.stages.temporal import anchored, part_of
from tests.support.fake_server import FakeServer
from tests.support.models import TEXT_VOCAB, encode
from tests.support.processes import two
from tests.test_trainer import (
    PROMPTS,
    SHORT,
    decode,
    model64,
    same,
    sft,
    trainer_of,
    weights_of,
)

WHOLE = OptimConfig(batch_size=64, learning_rate=1e-2, eval_every=1, save_state_every=1)
PROMPT = Prompt("temporal/3/0", 3, (7,), "say")


class StopError(Exception):
    pass


class Letters:
    """Scores by letters, nearly all different; notes the weights that judge. left: until it is killed."""

    name = "letters"

    def __init__(self, left: int = -1) -> None:
        self.left, self.weights = left, set()

    def judge(self, ctx, prompts, candidates_PG):
        for candidates in candidates_PG:
            for candidate in candidates:
                if self.left == 0:
                    raise StopError
                self.left -= 1
                self.weights.add(sum(p.sum().item() for p in ctx.model.module.parameters()))
                score = float(sum(map(ord, candidate.text)))
                yield Judgement(f"{candidate.id}/j0", (candidate.id,), self.name, score)


def temporal(judge=None, **options):
    defaults = dict(
        judge=judge or Letters(),
        prompt_dataset=PROMPTS,
        num_generated_preference_pairs=6,
        num_candidate_responses=2,
        prompts_per_block=4,
        generation=SHORT,
        dropout=0.0,
        dpo_beta=0.5,
        optim=WHOLE,
    )
    return TemporalDPOConfig(**{**defaults, **options})


def first_pairs(run):
    return list(
        run.stage("temporal").stored(PreferencePair, lambda name: name.split("/")[1] == "first")
    )


def by_part(run):
    """Of each prompt the candidates of each model, in order."""
    found = {}
    for candidate in run.candidates("temporal"):
        own = found.setdefault(candidate.prompt_id, {})
        own.setdefault(part_of(candidate.id), []).append(candidate)
    return found


@pytest.mark.parametrize(
    ("own", "anchor", "ahead", "pair"),
    [
        # the table of docs/pairs.md
        ([4, 2, 3], [1, 5], [], ("0", "anchor/0")),  # 1 is under the own worst, 2
        ([4, 2, 3], [2, 5], [], ("0", "1")),  # it is not
        ([4, 2, 3], [1, 5], [4, 3], ("0", "anchor/0")),  # 4 is not above 4
        ([4, 2, 3], [1, 5], [3, 5], ("next/1", "anchor/0")),
        ([4, 2, 3], [], [5, 5], ("next/0", "1")),
        ([3, 3], [3], [], "tie"),
        ([3, 3], [1], [], ("0", "anchor/0")),
        ([None, None], [1, 2], [5], "unpaired"),
    ],
    ids=str,
)
def test_the_best_wins_against_the_worst_of_both_models(own, anchor, ahead, pair):
    scores = {str(k): s for k, s in enumerate(own)}
    scores |= {f"anchor/{k}": s for k, s in enumerate(anchor)}
    scores |= {f"next/{k}": s for k, s in enumerate(ahead)}
    made = [
        Candidate(f"{PROMPT.id}/{name}", PROMPT.id, (k,), name, True, 8)
        for k, name in enumerate(scores)
    ]
    drops = DropCounts()
    found = make_pairs(
        PROMPT,
        made,
        {f"{PROMPT.id}/{name}": s if s is None else float(s) for name, s in scores.items()},
        drops,
        pairing=PairingConfig(),
        pick=lambda rated: anchored(rated, "first"),
    )
    if isinstance(pair, str):
        assert not found and drops.prompts[pair] == drops.prompts.total() == 1
    else:
        assert [(p.chosen, p.rejected) for p in found] == [pair]


def test_a_whole_run_does_what_the_paper_says(tmp_path):
    judge = Letters()
    run = trainer_of(tmp_path / "run", [sft(), temporal(judge)], model64())(rehearse=False)
    scores = candidate_scores(run.candidates("temporal"), run.judgements("temporal"))
    first = {pair.chosen_id.rsplit("/", 1)[0]: pair for pair in first_pairs(run)}
    last = {pair.id: pair for pair in run.pairs("temporal")}
    assert first.keys() == last.keys() and len(last) == 6
    models = by_part(run)
    for name, pair in last.items():
        assert {part: len(found) for part, found in models[name].items()} == (
            {"": 2, "anchor": 2, "next": 2}
        )
        own, low, ahead = ([scores[c.id] for c in models[name][p]] for p in ("", "anchor", "next"))
        assert first[name].chosen_score == max(own)
        assert first[name].rejected_score == pair.rejected_score == min([*own, *low])
        assert part_of(pair.rejected_id) == ("anchor" if min(low) < min(own) else "")
        assert pair.rejected_id == first[name].rejected_id
        assert pair.chosen_score == max([*own, *ahead])
        assert part_of(pair.chosen_id) == ("next" if max(ahead) > max(own) else "")
    assert all("next" not in found for name, found in models.items() if name not in last)
    parts = {part_of(i) for p in last.values() for i in (p.chosen_id, p.rejected_id)}
    assert parts == {"", "anchor", "next"}  # or nothing was shown
    assert len(judge.weights) == 1  # those of the start judge all
    assert not list((tmp_path / "run").glob("*/ahead"))


def test_each_model_is_the_one_it_should_be(tmp_path):
    """Anchors are the initial model's, the next ones that of a DPO stage on the first pairs, and
    the last weights those of a DPO stage from the same start on the last pairs."""
    model = model64()
    run = trainer_of(tmp_path / "run", [sft(), temporal()], model)(rehearse=False)

    def trained_on(pairs, folder):
        plain = model64()
        stage = DPOConfig(train_dataset=list(pairs), dropout=0.0, dpo_beta=0.5, optim=WHOLE)
        trainer_of(tmp_path / folder, [sft(), stage], plain)(rehearse=False)
        return plain

    def sampled(module, part):
        tokens = Tokens(CallableTokenizer(encode, decode), eos_id=None, vocab=TEXT_VOCAB)
        asked = [
            Prompt(f"{p.id}/{part}", p.row, p.ids)
            for p in run.prompts("temporal")
            if part in models[p.id]
        ]
        found = sample_candidates(
            adapt(module), asked, SHORT, 2, engine=LocalEngine(), tokens=tokens, seed=0, limit=None
        )
        return {c.id: c.ids for c in found}

    models = by_part(run)
    ahead = trained_on(first_pairs(run), "ahead")
    for part, module in (("anchor", model64()), ("next", ahead)):
        made = {c.id: c.ids for own in models.values() for c in own.get(part, ())}
        assert made and made == sampled(module, part)
    again = trained_on(run.pairs("temporal"), "again")
    for name, tensor in weights_of(model).items():
        torch.testing.assert_close(tensor, again.state_dict()[name], rtol=0, atol=1e-9)


SHOWN = ComparisonConfig(prompt_template="{{ prompt }}:{{ response_a }}<{{ response_b }}")


def better(prompt: str) -> float:
    """1 if the first of two shown responses has the more letters as Letters counts them, or 0.5."""
    one, other = (sum(map(ord, text)) for text in prompt.partition(":")[2].split("<"))
    return 0.5 + 0.5 * (one > other) - 0.5 * (one < other)


class Compares:
    """Answers comparisons by the scores of Letters. left: until it is killed."""

    def __init__(self, left: int = -1) -> None:
        self.left, self.asked = left, []

    def ask(self, ctx, questions):
        for question in questions:
            if self.left == 0:
                raise StopError
            self.left -= 1
            self.asked.append(question.id)
            yield Judgement(question.id, question.candidate_ids, "it", better(question.text))


def comparing(left: int = -1):
    return PairwiseJudge(SHOWN, asker=Compares(left))


def compared_by(kind, server):
    if kind == "a server":
        server.says = lambda body: (
            f"Better: {SHOWN.labels[better(body['messages'][0]['content']) < 1]}"
        )
        return ServerJudge(url=server.url, model="m").comparing(SHOWN, SamplingConfig())
    judges = {
        "alone": comparing,
        "an ensemble": lambda: EnsembleJudge([(comparing(), 3)], filters=[(comparing(), 0.0)]),
        "an ensemble of ensembles": lambda: EnsembleJudge([EnsembleJudge([comparing()])]),
    }
    return judges[kind]()


@pytest.mark.parametrize("kind", ["alone", "an ensemble", "an ensemble of ensembles", "a server"])
def test_a_judge_that_compares_picks_as_one_that_scores_alike(tmp_path, kind):
    """Ids of the start's candidates end as those of the other models do: 1, anchor/1, next/1."""
    with FakeServer() as server:
        judge = compared_by(kind, server)
        stages = [sft(), temporal(judge)]
        run = trainer_of(tmp_path / "compared", stages, model64())(rehearse=False)
    scored = trainer_of(tmp_path / "scored", [sft(), temporal()], model64())(rehearse=False)
    assert list(run.candidates("temporal")) == list(scored.candidates("temporal"))

    def sides(pairs):
        return {pair.id: (pair.chosen_id, pair.rejected_id) for pair in pairs}

    assert sides(run.pairs("temporal")) == sides(scored.pairs("temporal"))
    assert sides(first_pairs(run)) == sides(first_pairs(scored))
    parts = {part_of(i) for two in sides(run.pairs("temporal")).values() for i in two}
    assert parts == {"", "anchor", "next"}
    twos = Counter(j.candidate_ids for j in run.judgements("temporal"))
    wanted = Counter()
    for models in by_part(run).values():
        ids = [c.id for own in models.values() for c in own]
        wanted.update(permutations(ids, 2))
    members = 2 if kind == "an ensemble" else 1
    assert twos == {two: members * count for two, count in wanted.items()}


def test_comparisons_of_a_stage_that_was_stopped_are_those_of_one_that_was_not(tmp_path):
    def run_of(folder, left=-1):
        judge = comparing(left)
        stages = [sft(), temporal(EnsembleJudge([judge, Letters()]))]
        return trainer_of(tmp_path / folder, stages, model64())(rehearse=False)

    wanted = run_of("straight")
    total = len(wanted.judgements("temporal"))
    for left in (total // 2, total - 40):
        with pytest.raises(StopError):
            run_of(str(left), left)
        found = run_of(str(left))
        for read in (Run.judgements, Run.pairs):
            assert list(read(found, "temporal")) == list(read(wanted, "temporal"))


def test_a_run_that_version_0_1_0_began_keeps_its_ids_of_comparisons(tmp_path, monkeypatch):
    def run_of(folder, left=-1):
        judge = comparing(left)
        stages = [sft(), temporal(judge, chosen_from_next=False)]
        with nullcontext() if left < 0 else pytest.raises(StopError):
            trainer_of(tmp_path / folder, stages, model64())(rehearse=False)
        return Run.open(tmp_path / folder), judge.asker.asked

    monkeypatch.setattr(resume, "FORMAT", 1)
    wanted, asked = run_of("straight")
    names = [j.id for j in wanted.judgements("temporal")]
    assert "temporal/0/0/0/vs/1" in names and len(names) < len(asked)  # some have one id
    assert all(name.rpartition("/vs/")[2] in ("0", "1") for name in names)
    _, before = run_of("stopped", 4 * 12 + 3)  # in the second block of four prompts
    monkeypatch.undo()
    found, after = run_of("stopped")
    assert found.format == 1
    assert list(found.judgements("temporal")) == list(wanted.judgements("temporal"))
    assert not {name for name in after if name.startswith("temporal/0/")}
    assert {name.split("/")[1] for name in before + after} == {n.split("/")[1] for n in asked}


def test_without_the_next_model_the_pairs_are_trained_on_at_once(tmp_path):
    stage = temporal(chosen_from_next=False, rejected_from="sft")
    run = trainer_of(tmp_path, [sft(), sft(name="more"), stage], model64())(rehearse=False)
    assert not first_pairs(run) and len(run.pairs("temporal")) == 6
    assert {part for own in by_part(run).values() for part in own} == {"", "anchor"}
    assert run.summary("temporal")["steps"] == 1


seen = [0, 0]  # evaluations, and the one that is killed


def evaluated(module):
    seen[0] += 1
    if seen[0] == seen[1]:
        raise StopError
    return float(seen[0])


@pytest.mark.parametrize(
    ("judged", "evaluation"),
    [
        pytest.param(10, 0, id="first judging", marks=pytest.mark.slow),
        pytest.param(-1, 2, id="first training", marks=pytest.mark.slow),
        pytest.param(-1, 4, id="last training"),
        pytest.param("all and 3", 0, id="next judging"),
    ],
)
def test_a_stage_that_was_stopped_goes_on_as_if_it_was_not(tmp_path, judged, evaluation):
    def stages(left):
        judge = Letters(left)
        return [sft(), temporal(judge, early_stopper_eval_module=evaluated)]

    seen[:] = [0, 0]
    straight, resumed = model64(), model64()
    wanted = trainer_of(tmp_path / "straight", stages(-1), straight)(rehearse=False)
    if judged == "all and 3":
        judged = 3 + sum(part_of(j.candidate_ids[0]) != "next" for j in wanted.judgements(1))
    seen[:] = [0, evaluation]
    with pytest.raises(StopError):
        trainer_of(tmp_path / "stopped", stages(judged), resumed)(rehearse=False)
    seen[1], resumed = 0, model64()
    found = trainer_of(tmp_path / "stopped", stages(-1), resumed)(rehearse=False)
    for read in (Run.prompts, Run.candidates, Run.judgements, Run.pairs, Run.reference):
        assert list(read(found, "temporal")) == list(read(wanted, "temporal"))
    assert same(weights_of(resumed), weights_of(straight))


def test_a_stage_that_version_0_1_0_began_goes_on_with_the_weights_that_it_trained_ahead(tmp_path):
    def stages():
        return [sft(), temporal(Letters(), early_stopper_eval_module=evaluated)]

    seen[:] = [0, 0]
    straight, resumed = model64(), model64()
    trainer_of(tmp_path / "straight", stages(), straight)(rehearse=False)
    seen[:] = [0, 4]  # in the last training
    with pytest.raises(StopError):
        trainer_of(tmp_path / "stopped", stages(), model64())(rehearse=False)
    (stage,) = (tmp_path / "stopped").glob("*-temporal")
    (stage / "ahead").rename(stage / "iteration-0")
    digests = (stage / "files.json").read_text()
    (stage / "files.json").write_text(digests.replace('"ahead/', '"iteration-0/'))
    seen[:] = [3, 0]
    trainer_of(tmp_path / "stopped", stages(), resumed)(rehearse=False)
    assert seen[0] == 5  # nothing was trained ahead again
    assert not (stage / "iteration-0").exists() and not (stage / "ahead").exists()
    assert same(weights_of(resumed), weights_of(straight))


def test_a_stage_is_rehearsed_before_the_first_begins(tmp_path):
    trainer = trainer_of(tmp_path, [sft(), temporal()], model64())
    assert rehearse_stages(trainer) == ["sft: well", "temporal: well"]
    assert trainer().is_done("temporal")


@pytest.mark.parametrize("name", ["later", "temporal"])
def test_losers_of_a_model_that_there_is_not_are_refused(tmp_path, name):
    stages = [sft(), temporal(rejected_from=name), sft(name="later")]
    with pytest.raises(ConfigError, match=r"(rejected_from|weights) must be"):
        trainer_of(tmp_path, stages)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairing": PairingConfig(pick="best_random")}, "leave out pairing.pick"),
        ({"pairing": PairingConfig(length_control=0.3)}, "leave out pairing.length_control"),
        ({"pick_paired_rewards_fn": lambda s: s}, "leave out pick_paired_rewards_fn"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_pickers_beside_the_stages_own_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        temporal(**options)


def main(folder):
    model = model64()
    options = dict(accelerate_kwargs=dict(cpu=True))
    trainer_of(folder, [sft(), temporal()], model, **options)(rehearse=False)
    torch.save(weights_of(model), f"{folder}/weights.pt")


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    main(tmp_path / "one")
    two("-m", "tests.stages.test_temporal", tmp_path / "two")
    one, other = (Run.open(tmp_path / name) for name in ("one", "two"))
    for read in (Run.candidates, Run.judgements, Run.pairs):
        assert list(read(one, "temporal")) == list(read(other, "temporal"))
    assert first_pairs(one) == first_pairs(other)
    weights = [torch.load(tmp_path / n / "weights.pt", weights_only=True) for n in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-9)


if __name__ == "__main__":
    main(sys.argv[1])
