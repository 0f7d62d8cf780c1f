"""Answers that grow step by step: against an enumeration, stopped, by processes, with other judges."""

import math
import sys
from collections import Counter
from contextlib import nullcontext
from itertools import combinations, permutations

import pytest
import torch

from self_rewarding_lm import (
    CertaintyJudge,
    ComparisonConfig,
    ConsistencyConfig,
    OptimConfig,
    PairingConfig,
    Run,
    SamplingConfig,
    ShuffledJudge,
    StepComparisonConfig,
    StepwiseDPOConfig,
    generate,
)
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, NoPairError
from self_rewarding_lm.generation.candidates import sample_candidates
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.reward_model import RewardModelJudge
from self_rewarding_lm.judges.self_judge import PairwiseJudge
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.records import Candidate, Judgement, Prompt, prompt_id_of
from self_rewarding_lm.stages.rehearsal import rehearse_stages
from self_rewarding_lm.stages.stepwise import name_of_next_try
from self_rewarding_lm.stages.work import Counting
from tests.support.hf_models import tiny
from tests.support.models import ALPHABET, END, TEXT_VOCAB, Successor, encode
from tests.support.processes import two
from tests.test_trainer import PROMPTS, decode, external, model64, same, trainer_of, weights_of

WHOLE = OptimConfig(batch_size=64, learning_rate=1e-2, eval_every=1, save_state_every=1)
KEPT = [ALPHABET.index(letter) for letter in "abc."] + [END]
MAX_STEPS, ROLLBACKS, WIDTH = 3, 1, 3


def few_letters(logits):
    """Of the vocabulary a, b, c, the point that ends a step, and the end."""
    masked = torch.full_like(logits, -torch.inf)
    masked[:, KEPT] = 0.1 * logits[:, KEPT]
    return masked


STEPS = SamplingConfig(
    temperature=1.0, top_p=None, max_new_tokens=12, stop=(".",), filter_fn=few_letters
)
SHOWN = ComparisonConfig(prompt_template="{{ prompt }}|{{ response_a }}|{{ response_b }}")


class StopError(Exception):
    pass


def worth(step: str) -> int:
    """What the scripted judge thinks of a step: many are worth the same."""
    return (step.count("a") + 2 * step.count("b")) % 3


class Script:
    """Answers comparisons by the worth of the two steps. left: questions until it is killed."""

    def __init__(self, left: int = -1) -> None:
        self.left, self.texts = left, []

    def ask(self, ctx, questions):
        for question in questions:
            if self.left == 0:
                raise StopError
            self.left -= 1
            self.texts.append(str(question.text))
            _, one, other = question.text.split("|")
            score = 0.5 + 0.5 * (worth(one) > worth(other)) - 0.5 * (worth(one) < worth(other))
            yield Judgement(question.id, question.candidate_ids, "script", score)


def scripted(left: int = -1) -> PairwiseJudge:
    return PairwiseJudge(SHOWN, asker=Script(left))


def stepwise(judge=None, **options):
    defaults = dict(
        judge=judge or scripted(),
        prompt_dataset=PROMPTS[:6],
        num_candidate_responses=WIDTH,
        prompts_per_block=4,
        max_steps=MAX_STEPS,
        max_rollbacks=ROLLBACKS,
        generation=STEPS,
        dropout=0.0,
        dpo_beta=0.5,
        optim=WHOLE,
    )
    return StepwiseDPOConfig(**{**defaults, **options})


def run_of(folder, *stages, model=None, **options):
    model = model or model64()
    trainer = trainer_of(folder, list(stages), model, eos_id=END, **options)
    return trainer(rehearse=False), model


def enumerated(question: Prompt, candidates: dict[str, Candidate]):
    """What must come of a question, by the rules as docs/pairs.md has them, from the steps alone.

    Pairs as (position's id, its ids, chosen id, rejected id), all ids of candidates that had to be
    sampled, why the answer ended and how many steps were taken back.
    """
    path, seen, back = [], [], 0  # path: (position's id, ids, pair)
    name, ids = question.id, question.ids
    while True:
        steps = [candidates[f"{name}/{k}"] for k in range(WIDTH)]
        seen += [step.id for step in steps]
        whole = [step for step in steps if step.finished]
        texts = {step.text.strip() for step in whole}
        best = pair = None
        if len(texts) == 1:
            best = whole[0]
        elif texts:
            wins = Counter({step.id: 0.0 for step in whole})
            for one, other in permutations(whole, 2):
                difference = worth(one.text) - worth(other.text)
                wins[(one if difference > 0 else other).id] += 1 if difference else 0
                if not difference:
                    wins[one.id] += 0.5
                    wins[other.id] += 0.5
            if len(set(wins.values())) > 1:
                ranked = sorted(whole, key=lambda step: -wins[step.id])
                best, worst = ranked[0], min(whole, key=lambda step: wins[step.id])
                pair = (name, ids, best.id, worst.id)
        if best is None:
            if back == ROLLBACKS:
                return [p for *_, p in path if p], seen, "stuck", back
            back += 1
            name, ids, _ = path.pop() if path else (name, ids, None)
            name = f"{name}/again1" if "again" not in name.split("/")[-1] else name[:-1] + "2"
            continue
        path.append((name, ids, pair))
        end = None
        if best.ids[-1] == END:
            end = "finished"
        elif len(path) == MAX_STEPS:
            end = "max_steps"
        if end:
            return [p for *_, p in path if p], seen, end, back
        name, ids = f"{best.id}/then", (*ids, *best.ids)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    judge = scripted()
    folder = tmp_path_factory.mktemp("stepwise") / "run"
    run, model = run_of(folder, stepwise(judge))
    return run, weights_of(model), judge.asker.texts


def test_a_run_does_what_an_enumeration_of_its_steps_says(straight):
    run, _, _ = straight
    candidates = {c.id: c for c in run.candidates("stepwise")}
    questions = [p for p in run.prompts("stepwise") if p.id.count("/") == 2]
    assert len(questions) == 6
    wanted, seen, ends, back = [], [], Counter(), 0
    for question in questions:
        pairs, sampled, end, taken_back = enumerated(question, candidates)
        wanted += pairs
        seen += sampled
        ends[end] += 1
        back += taken_back
    assert sorted(seen) == sorted(candidates)  # no step more, none less
    found = [(p.id, p.prompt_ids, p.chosen_id, p.rejected_id) for p in run.pairs("stepwise")]
    assert sorted(found) == sorted(wanted) and wanted
    metrics = run.summary("stepwise")["metrics"]
    assert metrics["steps/rolled_back"] == back
    assert {e: metrics[f"answers/{e}"] for e in ends} == ends
    assert metrics["pairs/kept"] == len(wanted)
    # or nothing was shown
    assert len(ends) >= 2 and back and any("/then" in name for name, *_ in wanted)


def test_records_lead_back_to_the_question_and_its_steps(straight):
    run, _, _ = straight
    prompts = {p.id: p for p in run.prompts("stepwise")}
    candidates = {c.id: c for c in run.candidates("stepwise")}
    for name, prompt in prompts.items():
        place, steps = name.removesuffix("/again1").removesuffix("/again2"), []
        while place.endswith("/then"):
            step = candidates[place.removesuffix("/then")]
            steps.insert(0, step)
            place = step.prompt_id.removesuffix("/again1").removesuffix("/again2")
        question = prompts[prompt_id_of(name)]
        assert place == question.id
        ids = tuple(i for step in steps for i in step.ids)
        assert prompt.ids == (*question.ids, *ids)
        assert prompt.text == question.text + "".join(step.text for step in steps)
    for pair in run.pairs("stepwise"):
        assert pair.prompt_ids == prompts[pair.id].ids
        assert pair.chosen_ids == candidates[pair.chosen_id].ids
        assert candidates[pair.rejected_id].prompt_id == pair.id
        assert pair.chosen_score > pair.rejected_score


def test_all_steps_of_a_position_are_compared_in_both_orders_and_shown_with_what_is_before(
    straight,
):
    run, _, texts = straight
    prompts = {p.id: p for p in run.prompts("stepwise")}
    candidates = {c.id: c for c in run.candidates("stepwise")}
    groups = {}
    for candidate in candidates.values():
        groups.setdefault(candidate.prompt_id, []).append(candidate)
    wanted, shown = [], []
    for name, steps in groups.items():
        whole = [step for step in steps if step.finished]
        if any(one.text.strip() != other.text.strip() for one, other in combinations(whole, 2)):
            for one, other in permutations(whole, 2):
                wanted.append((one.id, other.id))
                shown.append(f"{prompts[name].text}|{one.text}|{other.text}")
    assert sorted(j.candidate_ids for j in run.judgements("stepwise")) == sorted(wanted)
    assert sorted(texts) == sorted(shown)


def test_each_step_is_sampled_from_the_position_alone(straight):
    run, _, _ = straight
    prompts = {p.id: p for p in run.prompts("stepwise")}
    candidates = {c.id: c.ids for c in run.candidates("stepwise")}
    tokens = Tokens(CallableTokenizer(encode, decode), eos_id=END, vocab=TEXT_VOCAB)
    asked = [prompts[name] for name in {name.rpartition("/")[0] for name in candidates}]
    found = sample_candidates(
        adapt(model64()),
        asked,
        STEPS,
        WIDTH,
        engine=LocalEngine(),
        tokens=tokens,
        seed=0,
        limit=None,
    )
    assert {c.id: c.ids for c in found} == candidates


@pytest.mark.parametrize("left", [3, 20, 41])
def test_a_stage_that_was_stopped_goes_on_as_if_it_was_not(straight, tmp_path, left):
    wanted, weights, texts = straight
    assert left < len(texts)
    with pytest.raises(StopError):
        run_of(tmp_path / "run", stepwise(scripted(left)))
    judge = scripted()
    found, model = run_of(tmp_path / "run", stepwise(judge))
    for read in (Run.prompts, Run.candidates, Run.judgements, Run.pairs, Run.reference):
        assert list(read(found, "stepwise")) == list(read(wanted, "stepwise"))
    assert same(weights_of(model), weights)
    assert found.summary("stepwise") == wanted.summary("stepwise")


def test_scores_that_are_moved_by_chance_move_alike_when_a_stage_was_stopped(tmp_path):
    def run(folder, left=-1):
        stage = stepwise(ShuffledJudge(of=scripted(left)))
        with nullcontext() if left < 0 else pytest.raises(StopError):
            run_of(tmp_path / folder, stage)
        return Run.open(tmp_path / folder)

    wanted = run("straight")
    run("stopped", 60)
    found = run("stopped")
    assert list(found.judgements(0)) == list(wanted.judgements(0))
    assert list(found.pairs(0)) == list(wanted.pairs(0))
    assert any(j.is_moved for j in found.judgements(0))


def test_a_judge_without_words_scores_the_step_behind_what_is_before(tmp_path):
    run, _ = run_of(tmp_path, stepwise(CertaintyJudge("logprob"), rounds=2, prompts_per_round=3))
    prompts = {p.id: p for p in run.prompts("stepwise")}
    candidates = {c.id: c for c in run.candidates("stepwise")}
    first = model64()
    checked = 0
    for judgement in run.judgements("stepwise"):
        step = candidates[judgement.candidate_ids[0]]
        prompt = prompts[step.prompt_id]
        if int(prompt.id.split("/")[1]) < 3:  # of the first round
            with torch.no_grad():
                logits = first(torch.tensor([[*prompt.ids, *step.ids]]))[0].log_softmax(-1)
            start = len(prompt.ids) - 1
            values = [float(logits[start + i, t]) for i, t in enumerate(step.ids)]
            assert judgement.score == pytest.approx(sum(values) / len(values), abs=1e-9)
            checked += 1
    assert checked and run.summary("stepwise")["rounds"] == 2


def test_steps_of_an_adapter_train_the_adapter_alone(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama", vocab=TEXT_VOCAB), lora)
    before = weights_of(model)
    run, _ = run_of(tmp_path, stepwise(CertaintyJudge()), model=model)
    after = weights_of(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
    assert any(pair.id.endswith("/then") for pair in run.pairs("stepwise"))


def test_a_step_may_end_where_a_function_of_its_text_says(tmp_path):
    model = Successor(TEXT_VOCAB)
    told = []

    def ends(text):
        told.append(text)
        return text.endswith("e")

    sampling = SamplingConfig(temperature=0.0, stop=("z",), stop_fn=ends)
    tokenizer = dict(tokenizer_encode=encode, tokenizer_decode=decode)
    [[answer]] = generate(model, [torch.tensor([1])], sampling=sampling, **tokenizer)
    assert answer.text == "cde" and answer.finished and told == ["c", "cd", "cde"]
    with pytest.raises(ConfigError, match="stop texts and stop_fn need a tokenizer"):
        generate(model, [torch.tensor([1])], sampling=sampling)
    short = STEPS.model_copy(update={"stop": (), "stop_fn": lambda text: len(text) >= 2})
    run, _ = run_of(tmp_path, stepwise(generation=short))
    assert {len(c.ids) for c in run.candidates("stepwise") if c.ids[-1] != END} == {2}


def test_in_a_conversation_the_steps_are_the_beginning_of_the_answer(tmp_path):
    """For TRL's columns, whose prompt may end so, and for a reward model's own template."""
    rendered = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    run, _ = run_of(tmp_path, stepwise(), chat_template=rendered)
    deeper = [p for p in run.prompts("stepwise") if p.id.endswith("/then")]
    assert deeper
    for prompt in deeper:
        question, begun = prompt.messages
        assert begun["role"] == "assistant" and begun["content"]
        assert decode(torch.tensor(prompt.ids)) == (
            f"user:{question['content']}<>assistant:{begun['content']}"
        )
        assert prompt.text == f"User: {question['content']}\n\nAssistant: {begun['content']}"
    judge = RewardModelJudge.__new__(RewardModelJudge)
    judge.tokens = Tokens(
        CallableTokenizer(encode, decode), eos_id=END, vocab=TEXT_VOCAB, chat_template=rendered
    )
    step = Candidate("c", "p", (1,), "ab.", True, 9)
    ids = judge.conversation(deeper[0], step)
    question, begun = deeper[0].messages
    assert decode(torch.tensor(ids)) == (
        f"user:{question['content']}<>assistant:{begun['content']}ab.<>"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generation": SamplingConfig()}, "does not say where a step ends"),
        ({"pairing": PairingConfig(pick="best_random")}, "what pairing picks by"),
        ({"consistency": ConsistencyConfig()}, "consistency: this stage samples each step"),
        ({"candidates_from": "m1"}, "candidates_from: this stage samples each step"),
        ({"comparison": ComparisonConfig()}, "comparison"),
    ],
)
def test_settings_that_do_not_go_with_steps_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        stepwise(**options)


def test_steps_are_no_responses_for_another_stage(tmp_path):
    stages = [stepwise(), external(candidates_from="stepwise", prompt_dataset=PROMPTS[:6])]
    with pytest.raises(ConfigError, match="are steps of answers"):
        run_of(tmp_path, *stages)


def test_the_model_compares_its_own_steps_and_the_stage_is_rehearsed(tmp_path):
    shown = StepComparisonConfig(
        prompt_template="{{ prompt }}{{ response_a }}{{ response_b }}",
        forced_ending="at_once",
        verdict_prefix="is ",
        labels=("a", "b"),
    )
    evenly = STEPS.model_copy(update={"filter_fn": lambda logits: few_letters(0.0 * logits)})
    options = dict(prompt_dataset=PROMPTS[:2], comparison=shown, generation=evenly)
    stage = stepwise(**options).model_copy(update={"judge": None})
    model = model64()
    with torch.no_grad():
        model.head.bias[:2] += torch.tensor([99.0, 96.0])  # it says a, the first, in both orders
    trainer = trainer_of(tmp_path, [stage], model, eos_id=END)
    assert rehearse_stages(trainer) == ["stepwise: well"]
    with pytest.raises(NoPairError, match="Dropped: 4 tie"):  # each question, and once again
        trainer(rehearse=False)
    found = list(Run.open(tmp_path).judgements("stepwise"))
    assert found and all(len(j.candidate_ids) == 2 for j in found)
    assert {j.source for j in found} == {"compared"}
    assert all(j.score == pytest.approx(1 / (1 + math.exp(-3)), abs=0.2) for j in found)


def test_a_plan_counts_one_step_at_least_and_all_that_there_may_be():
    stage = stepwise(judge=None, prompt_dataset=["abc"] * 5).model_copy(update={"judge": None})
    codes = CallableTokenizer(lambda text: torch.tensor(list(text.encode())), lambda ids: "")
    tokens = Tokens(codes, eos_id=None, vocab=256)
    work = Counting({}, tokens, 100).work(stage, "stepwise")
    most = 5 * (MAX_STEPS + 2 * ROLLBACKS)
    assert (work.candidates.count.least, work.candidates.count.most) == (5 * WIDTH, most * WIDTH)
    judgements = work.judgements.count
    assert judgements.least == 5 * WIDTH * (WIDTH - 1)
    assert judgements.most == most * WIDTH * (WIDTH - 1)
    assert (work.made.least, work.made.most) == (0, 5 * MAX_STEPS)
    before = (MAX_STEPS - 1) * 12
    assert (work.candidates.read.least, work.candidates.read.most) == (15, most * (3 + before))
    assert work.candidates.longest == 3 + before


def test_names_of_tries_go_on():
    assert name_of_next_try("s/0/0") == "s/0/0/again1"
    assert name_of_next_try("s/0/0/again1/2/then") == "s/0/0/again1/2/then/again1"
    assert name_of_next_try("s/0/0/2/then/again9") == "s/0/0/2/then/again10"


def main(folder):
    stages = [stepwise(), stepwise(ShuffledJudge(of=scripted()), name="moved")]
    _, model = run_of(folder, *stages, accelerate_kwargs=dict(cpu=True))
    torch.save(weights_of(model), f"{folder}/weights.pt")


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    main(tmp_path / "one")
    two("-m", "tests.stages.test_stepwise", tmp_path / "two")
    one, other = (Run.open(tmp_path / name) for name in ("one", "two"))
    for stage in ("stepwise", "moved"):
        for read in (Run.prompts, Run.candidates, Run.judgements, Run.pairs):
            assert list(read(one, stage)) == list(read(other, stage))
        numbers = [run.summary(stage)["metrics"] for run in (one, other)]
        assert numbers[0] == numbers[1]
    weights = [torch.load(tmp_path / n / "weights.pt", weights_only=True) for n in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-9)


if __name__ == "__main__":
    main(sys.argv[1])
