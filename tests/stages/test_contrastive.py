"""Contrasts: what is shown and what is trained, what is dropped, what a judge confirms; whole runs."""

import sys
from collections import Counter

import pytest
import torch

from self_rewarding_lm import (
    Candidate,
    Contrast,
    ContrastiveDPOConfig,
    PreferencePair,
    Prompt,
    RewardConfig,
    Run,
    SamplingConfig,
)
from self_rewarding_lm.checks import Check, ChecksConfig
from self_rewarding_lm.data.control_tokens import from_data
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError, PairingError
from self_rewarding_lm.generation.engine import Completion
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.functions import FunctionJudge
from self_rewarding_lm.records import stable_hash
from self_rewarding_lm.stages.contrastive import (
    GROUPS,
    counts_of_prompt,
    metrics_of,
    render_both_sides,
)
from tests.support.models import ALPHABET, END, TEXT_VOCAB, encode, ids_of, text_tokens
from tests.support.processes import two
from tests.test_trainer import PROMPTS, QUICK, SHORT, decode, model64, trainer_of

KIND = Contrast(positive="be kind. ", negative="be mean. ", kind="prefix")
SYSTEM = Contrast(positive="be kind", negative="be mean")
USER = ({"role": "user", "content": "hi"},)
TALK = (
    {"role": "system", "content": "you know it"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "go on"},
)


# -- what is shown ---------------------------------------------------------------------------------


def to_ascii(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode("ascii")))


def from_ascii(ids) -> str:
    return bytes(i for i in torch.as_tensor(ids).tolist() if i < 128).decode("ascii")


def ascii_tokens(template: str | None) -> Tokens:
    tokenizer = CallableTokenizer(to_ascii, from_ascii)
    return Tokens(tokenizer, eos_id=128, vocab=129, chat_template=template)


def written(template: str | None, value, contrast: Contrast) -> tuple[str, ...]:
    """What both sides read, in the characters that the model is given."""
    tokens = ascii_tokens(template)
    asked = tokens.prompt(value)
    prompt = Prompt("s/0/0", 0, asked.ids, asked.text, messages=asked.messages)
    return tuple(from_ascii(shown.ids) for shown in render_both_sides(prompt, contrast, tokens))


TURNS = "{% for m in messages %}<{{ m.role }}:{{ m.content }}>{% endfor %}<assistant:"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + TURNS
)
LEAVES_OUT = TURNS.replace("messages %}", "messages if m.role != 'system' %}", 1)


@pytest.mark.parametrize(
    ("template", "value", "shown"),
    [
        (TURNS, USER, "<system:be {}><user:hi><assistant:"),
        (
            TURNS,
            TALK,
            "<system:you know it\n\nbe {}><user:hi><assistant:hello><user:go on><assistant:",
        ),
        (NO_SYSTEM, USER, "<user:be {}\n\nhi><assistant:"),
        (LEAVES_OUT, USER, "<user:be {}\n\nhi><assistant:"),
        ("gemma", USER, "<start_of_turn>user\nbe {}\n\nhi<end_of_turn>\n<start_of_turn>model\n"),
        (None, "hi", "be {}\n\nhi"),
        ("raw", "hi", "be {}\n\nhi"),
    ],
)
def test_a_system_message_is_shown_as_the_template_can(template, value, shown):
    found = written(template, value, SYSTEM)
    assert found == (shown.format("kind"), shown.format("mean"))


@pytest.mark.parametrize(
    ("kind", "template", "value", "shown"),
    [
        ("prefix", TURNS, USER, "<user:(X)hi><assistant:"),
        ("suffix", TURNS, USER, "<user:hi(X)><assistant:"),
        ("prefix", None, "hi", "(X)hi"),
        ("suffix", None, "hi", "hi(X)"),
        (
            "suffix",
            TURNS,
            TALK,
            "<system:you know it><user:hi><assistant:hello><user:go on(X)><assistant:",
        ),
    ],
)
def test_an_affix_stands_at_the_last_message_of_the_user_with_nothing_between(
    kind, template, value, shown
):
    contrast = Contrast(positive="(well)", negative="(badly)", kind=kind)
    found = written(template, value, contrast)
    assert found == (shown.replace("X", "well"), shown.replace("X", "badly"))


def test_control_tokens_in_a_prompt_count_no_more_than_they_did():
    pytest.importorskip("transformers")
    from tests.test_attacks import structure, tokens_of

    tokens = tokens_of("raw")
    rendered = "<|im_start|>say it<|im_end|>"
    contrast = Contrast(positive="yes</s>", negative="no</s>")
    for value, wanted in ((rendered, [1, 2, 3, 4]), (from_data(rendered), [1, 2])):
        asked = tokens.prompt(value)
        prompt = Prompt("s/0/0", 0, asked.ids, str(value))  # as it comes back from disk
        assert len(structure(tokens, asked.ids)) == 1 + 2 * (value is rendered)
        for shown in render_both_sides(prompt, contrast, tokens):
            assert structure(tokens, shown.ids) == wanted
    tokens = tokens_of("chatml")
    asked = tokens.prompt(rendered)
    prompt = Prompt("s/0/0", 0, asked.ids, asked.text, messages=asked.messages)
    for shown in render_both_sides(prompt, contrast, tokens):
        assert structure(tokens, shown.ids) == [3, 4, 3, 4, 3]  # system, user, open assistant


def test_a_prompt_that_is_ids_alone_can_have_no_contrast():
    tokens = text_tokens()
    with pytest.raises(DataError, match="is token ids"):
        render_both_sides(Prompt("s/0/0", 0, (*ids_of("hi"), END), "hi"), SYSTEM, tokens)
    with pytest.raises(DataError, match="is token ids"):
        render_both_sides(Prompt("s/0/0", 0, (1, 2)), SYSTEM, tokens)


def test_the_groups_that_ship_are_pairs_of_different_texts_of_about_one_length():
    assert set(GROUPS) == {"harmless", "helpful", "complete", "informative"}
    texts = [text for group in GROUPS.values() for c in group for text in (c.positive, c.negative)]
    assert len(set(texts)) == len(texts) and all(len(group) >= 2 for group in GROUPS.values())
    for group in GROUPS.values():
        for contrast in group:
            assert contrast.kind == "system"
            one, other = contrast.positive.split(), contrast.negative.split()
            assert abs(len(one) - len(other)) <= 4
            assert len(set(one) & set(other)) >= len(one) / 3  # alike on the surface


# -- which pairs are made --------------------------------------------------------------------------


class Answers(LocalEngine):
    """An engine that answers by the text that it is shown: (reply, whether it ended)."""

    def __init__(self, said) -> None:
        super().__init__()
        self.said, self.asked = said, []

    def generate(self, model, requests, decoding):
        for i, request in enumerate(requests):
            shown = decode(torch.tensor(request.ids))
            self.asked.append(shown)
            text, ended = self.said(shown)
            yield i, Completion((*ids_of(text), *((END,) if ended else ())), ended)


def stage(**options):
    defaults = dict(
        prompt_dataset=PROMPTS,
        contrasts=(KIND,),
        prompts_per_block=4,
        generation=SHORT,
        dropout=0.0,
        optim=QUICK,
    )
    return ContrastiveDPOConfig(**{**defaults, **options})


def run_of(folder, said, *, engine=None, **options):
    engine = engine or Answers(said)
    trainer = trainer_of(folder, [stage(**options)], engine=engine, eos_id=END)
    return trainer(rehearse=False)


TABLE = {
    # what the positive and the negative side say to a prompt: kept, or why not
    "kept": (("yes", True), ("no", True)),
    "the same": (("same", True), ("same", True)),
    "the same but for blanks": (("same ", True), (" same", True)),
    "cut off": (("yes", True), ("nonono", False)),
    "both cut off": (("yesyes", False), ("nonono", False)),
    "kept too": (("sure", True), ("never", True)),
}


def of_table(table):
    def said(shown):
        side, _, prompt = shown.partition(". ")
        return table[prompt][side != "be kind"]

    return said


def test_pairs_and_drops_by_hand(tmp_path):
    rows = [*TABLE, {"prompt": 3}]
    run = run_of(tmp_path, of_table(TABLE), prompt_dataset=rows, on_bad_row="skip")
    pairs = run.pairs("contrastive")
    assert [(p.id, p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ("contrastive/0/0", "kept", "yes", "no"),
        ("contrastive/5/0", "kept too", "sure", "never"),
    ]
    metrics = run.summary("contrastive")["metrics"]
    assert {k: v for k, v in metrics.items() if k.startswith("pairs/")} == {
        "pairs/kept": 2,
        "pairs/dropped_bad_row": 1,
        "pairs/dropped_identical": 2,
        "pairs/dropped_unfinished": 2,
    }
    assert metrics["contrast/identical_rate"] == 2 / 4  # of those with two whole responses
    ended = {"yes": 4, "same": 5, "same ": 6, "sure": 5, "no": 3, "never": 6}
    positive = (ended["yes"] + 5 + 6 + 4 + 6 + ended["sure"]) / 6
    negative = (ended["no"] + 5 + 6 + 6 + 6 + ended["never"]) / 6
    assert metrics["contrast/positive_length"] == pytest.approx(positive)
    assert metrics["contrast/negative_length"] == pytest.approx(negative)
    assert metrics["contrast/length_ratio"] == pytest.approx(positive / negative)
    assert "contrast/judge_agreement" not in metrics and "judge/parse_rate" not in metrics
    line = next(m for m in run.metrics("contrastive") if "contrast/length_ratio" in m)
    assert line["contrast/identical_rate"] == 0.5


def test_what_is_trained_is_the_prompt_alone_and_every_record_says_what_was_shown(tmp_path):
    engine = Answers(of_table(TABLE))
    run = run_of(tmp_path, None, engine=engine, prompt_dataset=["kept"])
    (pair,) = run.pairs("contrastive")
    assert pair == PreferencePair(
        id="contrastive/0/0",
        prompt_ids=ids_of("kept"),
        chosen_ids=(*ids_of("yes"), END),
        rejected_ids=(*ids_of("no"), END),
        prompt="kept",
        chosen="yes",
        rejected="no",
        chosen_id="contrastive/0/0/0",
        rejected_id="contrastive/0/0/1",
    )
    assert engine.asked == ["be kind. kept", "be mean. kept"]
    prompts = {p.id: p for p in run.prompts("contrastive")}
    assert {record_id: p.text for record_id, p in prompts.items()} == {
        "contrastive/0/0": "kept",
        "contrastive/0/0/positive": "be kind. kept",
        "contrastive/0/0/negative": "be mean. kept",
    }
    for candidate, shown in zip(run.candidates("contrastive"), engine.asked, strict=True):
        assert candidate.prompt_id == "contrastive/0/0"
        assert prompts[candidate.shown_id].ids == ids_of(shown)
    assert run.judgements("contrastive") == []


def test_under_a_chat_template_the_system_turn_is_stripped_for_training(tmp_path):
    class Speaks(LocalEngine):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[str] = []

        def generate(self, model, requests, decoding):
            for i, request in enumerate(requests):
                self.asked.append(from_ascii(request.ids))
                reply = "yes" if "kind" in self.asked[-1] else "no"
                yield i, Completion((*to_ascii(reply).tolist(), 128), True)

    from tests.support.models import Recurrent, lively

    engine = Speaks()
    template = TURNS.replace("<assistant:", "{% if add_generation_prompt %}<assistant:{% endif %}")
    run = trainer_of(
        tmp_path,
        [stage(prompt_dataset=["hi"], contrasts=(SYSTEM,))],
        lively(Recurrent(129).double()),
        engine=engine,
        chat_template=template,
        tokenizer_encode=to_ascii,
        tokenizer_decode=from_ascii,
        eos_id=128,
    )(rehearse=False)
    assert engine.asked == [f"<system:be {how}><user:hi><assistant:" for how in ("kind", "mean")]
    (pair,) = run.pairs("contrastive")
    assert from_ascii(pair.prompt_ids) == "<user:hi><assistant:"
    assert pair.messages == ({"role": "user", "content": "hi"},)
    assert (from_ascii(pair.chosen_ids), from_ascii(pair.rejected_ids)) == ("yes", "no")
    assert pair.chosen_ids[-1] == 128


def test_each_prompt_gets_one_contrast_of_all_by_a_hash_of_seed_and_id(tmp_path):
    own = [Contrast(positive=f"p{i} ", negative=f"n{i} ", kind="prefix") for i in range(3)]
    engine = Answers(lambda shown: (shown[:2], True))
    rows = [f"q{i}" for i in range(30)]
    run_of(tmp_path, None, engine=engine, prompt_dataset=rows, contrasts=tuple(own))
    wanted = [stable_hash(0, "contrast", f"contrastive/{i}/0") % 3 for i in range(30)]
    shown = [f"{side}{n} q{i}" for i, n in enumerate(wanted) for side in "pn"]
    assert engine.asked == shown and set(wanted) == {0, 1, 2}


@pytest.mark.parametrize("names", [("helpful",), ("harmless", "complete")])
def test_groups_and_contrasts_of_ones_own_stand_side_by_side(names):
    found = stage(contrasts=(*names, KIND)).pairs()
    assert found == (*(c for name in names for c in GROUPS[name]), KIND)


# -- a judge ---------------------------------------------------------------------------------------

JUDGED = {
    # scores of the positive and the negative side; what "drop" and "reorder" make of them
    "agrees": (2.0, 1.0, "kept", "kept"),
    "disagrees": (1.0, 2.0, "disagreed", "swapped"),
    "ties": (1.0, 1.0, "tie", "tie"),
    "sees one": (1.0, None, "unscored", "unscored"),
    "sees none": (None, None, "unscored", "unscored"),
}


class Scored:
    """A judge of the table, which notes what it is asked."""

    name = "table"

    def __init__(self) -> None:
        self.asked = []

    def judge(self, ctx, prompts, candidates_PG):
        def score(prompts, completions):
            self.asked += prompts
            return [
                JUDGED[prompt][text == "no"] if prompt in JUDGED else 1.0
                for prompt, text in zip(prompts, completions, strict=True)
            ]

        yield from FunctionJudge(score).judge(ctx, prompts, candidates_PG)


@pytest.mark.parametrize("confirm", ["none", "drop", "reorder"])
def test_what_a_judge_confirms(tmp_path, confirm):
    judge = Scored()
    rows = [*JUDGED, "the same", "cut off"]
    said = of_table({**TABLE, **dict.fromkeys(JUDGED, TABLE["kept"])})
    given = {} if confirm == "none" else dict(judge=judge, min_parse_rate=0.0)
    run = run_of(tmp_path, said, prompt_dataset=rows, confirm=confirm, **given)
    pairs = {p.prompt: p for p in run.pairs("contrastive")}
    metrics = run.summary("contrastive")["metrics"]
    expected = Counter()
    for prompt, (positive, negative, drop, reorder) in JUDGED.items():
        outcome = {"none": "kept", "drop": drop, "reorder": reorder}[confirm]
        if outcome not in ("kept", "swapped"):
            assert prompt not in pairs
            expected[outcome] += 1
            continue
        pair = pairs.pop(prompt)
        sides = [("yes", positive), ("no", negative)][:: -1 if outcome == "swapped" else 1]
        if confirm == "none":
            sides = [("yes", None), ("no", None)]
        scored = [(pair.chosen, pair.chosen_score), (pair.rejected, pair.rejected_score)]
        assert scored == sides
    assert pairs == {}
    expected |= Counter(identical=1, unfinished=1)
    assert {k: metrics.get(f"pairs/dropped_{k}") for k in expected} == expected
    if confirm == "none":
        assert run.judgements("contrastive") == [] and "contrast/judge_agreement" not in metrics
    else:
        assert metrics["contrast/judge_agreement"] == 1 / 2  # agrees, disagrees; a tie is neither
        assert set(judge.asked) == set(JUDGED)  # what gives no pair anyway is not judged
        assert len(run.judgements("contrastive")) == 2 * len(JUDGED)


def test_a_pair_that_a_judge_confirms_must_differ_by_the_margin(tmp_path):
    said = of_table({"agrees": TABLE["kept"], "kept": TABLE["kept"]})

    def judge(prompts, completions):
        return [
            (3.0 if p == "kept" else 1.5) if c == "yes" else 1.0
            for p, c in zip(prompts, completions, strict=True)
        ]

    options = dict(judge=FunctionJudge(judge), confirm="drop", min_margin=1.0)
    run = run_of(tmp_path, said, prompt_dataset=["agrees", "kept"], **options)
    assert [p.prompt for p in run.pairs("contrastive")] == ["kept"]
    assert run.summary("contrastive")["metrics"]["pairs/dropped_margin"] == 1


def test_the_model_itself_can_confirm(tmp_path):
    by_letters = RewardConfig(
        prompt_template="{{ prompt }}>{{ response }}:",
        parse_reward=lambda text: float(len(set(text))),
    )
    trainer = trainer_of(
        tmp_path,
        [stage(confirm="reorder", judging=SHORT)],
        self_reward_prompt_config=by_letters,
    )
    run = trainer()
    scores = {}
    for judgement in run.judgements("contrastive"):
        scores.setdefault(judgement.candidate_ids[0], []).append(judgement.score)
    assert run.pairs("contrastive")
    for pair in run.pairs("contrastive"):
        assert sum(scores[pair.chosen_id]) > sum(scores[pair.rejected_id])
    prompts = {p.id: p.text for p in run.prompts("contrastive")}
    assert all(prompts[j.candidate_ids[0].rpartition("/")[0]] in PROMPTS for j in run.judgements(0))


def test_measures_of_nothing_are_left_out():
    cut = Candidate("s/0/0/0", "s/0/0", (1, 2), "a", False, 2)
    assert metrics_of(counts_of_prompt(cut, cut, {cut.id: None}), judged=True) == {
        "contrast/positive_length": 2.0,
        "contrast/negative_length": 2.0,
        "contrast/length_ratio": 1.0,
    }
    assert metrics_of(Counter(), judged=True) == {}


# -- checks ----------------------------------------------------------------------------------------


def test_many_identical_pairs_are_told(tmp_path, caplog):
    def said(shown):  # the model heeds the contrast of every third prompt alone
        heeds = int(shown.rpartition(" ")[2]) % 3 == 0
        return (shown[3:7] if heeds else "same", True)

    rows = [f"tell {i}" for i in range(66)]
    run_of(tmp_path, said, prompt_dataset=rows)
    assert "44 of 66 prompts got the same response on both sides" in caplog.text
    assert "check identical_pairs: 0.6667" in caplog.text
    checks = ChecksConfig(identical_pairs=Check(action="error"))
    with pytest.raises(PairingError, match="identical_pairs"):
        run_of(tmp_path / "strict", said, prompt_dataset=rows, checks=checks)


def test_a_prompt_without_room_for_its_contrast_is_dropped_and_counted(tmp_path):
    said = of_table({"a" * 12: TABLE["kept"], "kept": TABLE["kept"]})
    rows = ["kept", "a" * 12]
    run = run_of(tmp_path, said, prompt_dataset=rows, max_seq_len=len("be kind. ") + 12)
    assert [p.prompt for p in run.pairs("contrastive")] == ["kept"]
    assert run.summary("contrastive")["metrics"]["pairs/dropped_no_room"] == 1
    lost = [c for c in run.candidates("contrastive") if c.reason == "no_room"]
    assert [c.id for c in lost] == ["contrastive/1/0/0", "contrastive/1/0/1"]
    with pytest.raises(DataError, match="with its contrast fills the 12 tokens"):
        trainer_of(tmp_path / "short", [stage(max_seq_len=12)], eos_id=END)()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(contrasts=("helpfull",)), "did you mean 'helpful'"),
        (dict(contrasts=()), "at least 1"),
        (dict(generation=SamplingConfig(temperature=0)), "temperature must be above 0"),
        (dict(num_candidate_responses=2), "one response on each side"),
        (dict(judge=object()), "no judge is asked with confirm='none'"),
        (dict(min_margin=1.0), "min_margin: no judge is asked"),
        (dict(confirm="maybe"), "confirm"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        stage(**options)


def test_a_contrast_of_two_equal_texts_is_refused():
    with pytest.raises(ConfigError, match="nothing is contrasted"):
        Contrast(positive="be kind", negative="be kind ")


def test_contrasts_need_a_tokenizer_and_prompts_that_are_texts(tmp_path):
    with pytest.raises(ConfigError, match="contrasts are texts"):
        ids = dict(tokenizer_encode=None, tokenizer_decode=None)
        trainer_of(tmp_path, [stage(prompt_dataset=[[1, 2]])], **ids)
    with pytest.raises(DataError, match="row 0: a contrast is text"):
        rows = [[TEXT_VOCAB - 1, 2]]  # an end token, which no text has
        trainer_of(tmp_path, [stage(prompt_dataset=rows)], eos_id=END)


def test_no_judge_prompt_is_asked_for_where_nobody_judges(tmp_path):
    """A reward prompt that would not fit is no error: no judge is asked."""
    model = model64()
    model.max_seq_len = 40
    long = RewardConfig(prompt_template="x" * 90 + "{{ prompt }}{{ response }}", parse_reward=len)
    run = trainer_of(tmp_path, [stage()], model, self_reward_prompt_config=long)()
    assert run.pairs("contrastive")


# -- runs ------------------------------------------------------------------------------------------


def main(folder: str) -> None:
    """What each of two processes runs, and one alone; the model answers itself."""
    judged = stage(
        num_generated_preference_pairs=5, confirm="reorder", judging=SHORT, name="judged"
    )
    trainer_of(folder, [stage(), judged], accelerate_kwargs=dict(cpu=True))()


RECORDS = ("prompts", "candidates", "judgements", "pairs")


def test_two_processes_make_what_one_makes(tmp_path):
    main(str(tmp_path / "one"))
    two("-m", "tests.stages.test_contrastive", tmp_path / "two")
    alone, together = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for name in ("contrastive", "judged"):
        for records in RECORDS:
            assert getattr(alone, records)(name) == getattr(together, records)(name)
        assert alone.summary(name)["metrics"] == together.summary(name)["metrics"]
    assert alone.judgements("judged") and alone.pairs("judged")


class StopError(Exception):
    pass


class Dying(LocalEngine):
    """The library's engine, which is killed after so many answers."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left, self.asked = left, 0

    def generate(self, model, requests, decoding):
        for found in super().generate(model, requests, decoding):
            if self.left == 0:
                raise StopError
            self.left -= 1
            self.asked += 1
            yield found


@pytest.mark.parametrize("left", [1, 9, 14])
def test_a_stopped_stage_goes_on_to_the_same_records(tmp_path, left):
    """Ten prompts, two answers each."""
    whole = trainer_of(tmp_path / "whole", [stage()])()
    with pytest.raises(StopError):
        trainer_of(tmp_path / "run", [stage()], engine=Dying(left))(rehearse=False)
    kept = len(Run.open(tmp_path / "run").candidates("contrastive"))
    later = Dying(1000)
    run = trainer_of(tmp_path / "run", [stage()], engine=later)(rehearse=False)
    assert kept == left and later.asked == 20 - left
    for records in RECORDS:
        assert getattr(run, records)("contrastive") == getattr(whole, records)("contrastive")


def test_one_side_that_is_on_disk_is_not_asked_for_again(tmp_path):
    whole = trainer_of(tmp_path / "whole", [stage()])()
    with pytest.raises(StopError):
        trainer_of(tmp_path / "run", [stage()], engine=Dying(9))(rehearse=False)
    file = next((tmp_path / "run").glob("*/candidates.0.jsonl"))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]))
    ledger = next((tmp_path / "run").glob("*/files.json"), None)
    if ledger is not None:
        ledger.unlink()
    later = Dying(1000)
    run = trainer_of(tmp_path / "run", [stage()], engine=later)(rehearse=False)
    assert later.asked == 17
    assert run.candidates("contrastive") == whole.candidates("contrastive")


def test_training_makes_the_positive_answers_likelier_than_the_negative(tmp_path):
    """DPO on what a contrast gives: the margin between the sides grows from 0."""
    table = {f"q{i}": (("yes", True), ("no", True)) for i in range(8)}
    rows = list(table)
    run = run_of(tmp_path, of_table(table), prompt_dataset=rows, num_train_steps=20)
    margins = [m["rewards/margins"] for m in run.metrics("contrastive") if "rewards/margins" in m]
    assert margins[0] == pytest.approx(0.0, abs=1e-12) and margins[-1] > 0.5


def test_the_alphabet_of_these_tests_has_all_that_is_shown():
    assert set("be kind. be mean. ") <= set(ALPHABET) and encode("be kind. ").numel() == 9


if __name__ == "__main__":
    main(sys.argv[1])
