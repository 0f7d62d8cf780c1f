"""What a judge's text says, what a judge is asked, and how it did."""

import decimal
import math
import re
import time

import numpy as np
import pytest
import torch

from self_rewarding_lm.config import (
    DEFAULT_REWARD_CONFIG,
    PAPER_REWARD_CONFIG,
    RewardConfig,
)
from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.judging import (
    call_parse_reward,
    compile_prompt_template,
    compile_score_pattern,
    judge_metrics,
    mean_score,
    parse_score,
    score_of,
)
from self_rewarding_lm.records import Candidate, Judgement

# Texts of a judge who was asked to end with "Score: <points>", from 0 to 5, and the score that a
# person would read in each; None where a person would say that none is stated.
SAID = [
    # plainly
    ("Score: 4", 4),
    ("Score: 0", 0),
    ("Score: 5", 5),
    ("score: 3", 3),
    ("SCORE: 3", 3),
    ("Score:4", 4),
    ("Score : 4", 4),
    ("Score:    4", 4),
    ("Score: 4.", 4),
    ("Score: 4!", 4),
    ("Score: 4;", 4),
    ("Score: 4\n", 4),
    ("A clear and complete answer.\n\nScore: 4", 4),
    ("A clear answer. Score: 4 because it is short.", 4),
    ("Score: 4.5", 4.5),
    ("Score: 4,5", 4.5),
    ("Score: 4.0", 4),
    ("Score: +4", 4),
    ("Final Score: 2", 2),
    ("Total score: 4 points", 4),
    ("My score: 4 stars", 4),
    ("Score: 4 (good)", 4),
    ("Score: 4 — well done", 4),
    ("Score: 5 - one mistake less than the other", 5),
    ("Score: 4</s>", 4),
    # out of a maximum
    ("Score: 4/5", 4),
    ("Score: 4 / 5", 4),
    ("Score: 4/5.", 4),
    ("Score: 4/5 - a good answer", 4),
    ("Score: 4/5 (80%)", 4),
    ("Score: 4 out of 5", 4),
    ("Score: 4 of 5", 4),
    ("Score: 4 (out of 5)", 4),
    ("Score: 3.5/5", 3.5),
    ("Score: 4/5.0", 4),
    ("Score: 8/10", None),
    ("Score: 4/10", None),
    ("Score: 4 out of 10", None),
    ("Score: 80%", None),
    ("Score: 4%", None),
    # markup, brackets and quotes
    ("**Score:** 4", 4),
    ("**Score: 4**", 4),
    ("Score: **4**", 4),
    ("**Score**: 4/5", 4),
    ("**Score:** **4/5**", 4),
    ("## Score: 4", 4),
    ("*Score:* _4_", 4),
    ("Score: `4`", 4),
    ("Score: [4]", 4),
    ("Score: (4)", 4),
    ("Score: <4>", 4),
    ("| Score: 4 |", 4),
    ("“Score: 4”", 4),
    ('"Score: 4"', 4),
    ("«Score: 4»", 4),
    ("Score: “4”", 4),
    (r"Score: \boxed{4}", 4),
    (r"Score: $\boxed{4}$", 4),
    # line breaks and other white space
    ("Score:\n4", 4),
    ("Score:\n\n**4**", 4),
    ("Score:\r\n4\r\n", 4),
    ("Score:\t4", 4),
    ("Score:\u00a04", 4),
    # where in the text
    ("Score: 4\n\nThe answer is right but long: 3 of its sentences repeat the question.", 4),
    ("Score: 4\n5 reasons follow.", 4),
    ("Score: 4\n\n1. On topic\n2. Complete", 4),
    ("Score: 3\n\n- 1 point for being on topic\n- 2 points for a useful answer", 3),
    ("Score: 3\n- 1 point because it is on topic\n- 2 points because it helps", 3),
    ("Score: 2. On second thought it is better than that.\nScore: 4", 4),
    ("At first I thought Score: 5, but a point is missing. Score: 3", 3),
    ("Score: 5/5 for tone, Score: 2/5 overall", 2),
    ("1 + 1 + 1 = 3\nScore: 3", 3),
    ("Score: 1 + 1 + 1 = 3", 3),
    # the response's own claim, quoted before the judge's
    ('The response ends with "Score: 5", which is no merit of it.\n\nScore: 1', 1),
    ("> Score: 5\n\nThat was the response's own claim.\n\nScore: 2", 2),
    # none
    ("", None),
    (" \n", None),
    ("A good answer.", None),
    ("Score:", None),
    ("Score: unknown", None),
    ("Score: n/a", None),
    ("Score: <total points>", None),
    ("Score: {{ reward }}", None),
    ("Score: ?/5", None),
    ("I would give 4 points.", None),
    ("The response lists 3 of 5 countries.", None),
    ("Underscore: 4", None),
    ("Subscore: 4", None),
    ("Scores: 4", None),
    # ranges, and pieces of something else
    ("Score: 0-5", None),
    ("Score: 0–5", None),
    ("Score: 0 to 5", None),
    ("Score: 3 or 4", None),
    ("Score: 4th of 5", None),
    ("Score: 4a", None),
    ("Score: 4x better", None),
    ("Score: 4½", None),
    ("Score: 1.2.3", None),
    # out of range
    ("Score: 6", None),
    ("Score: 45", None),
    ("Score: -1", None),
    ("Score: −1", None),
    ("Score: 5.5", None),
    ("Score: 99999999999999999999", None),
    ("Score: 4. But really Score: 7", None),
    # other digits
    ("Score: ٤", 4),
    ("Score: ۴", 4),
    ("Score: ४", 4),
    ("Score: ৩/৫", 3),
    ("Score: ٤٫٥", 4.5),
    ("Score：４／５", 4),
    # the rubric quoted back
    ('End with the total, in this form: "Score: <total points>"\n\nOn topic. Score: 2', 2),
    ('On topic.\nScore: 2\n\n(Form: "Score: <total points>")', 2),
    ("The scale is Score: 0-5.\nMy verdict is Score: 3", 3),
    ("My verdict is Score: 3.\nThe scale was Score: 0-5.", 3),
    # a last line that is nothing but a score
    ("4", 4),
    (" 4 \n", 4),
    ("4/5", 4),
    ("**4**", 4),
    ("The answer is helpful.\n**4/5**", 4),
    ("The answer is helpful.\n\n4 out of 5", 4),
    ("The answer is helpful.\n8/10", None),
    # long
    ("word " * 30_000 + "Score: 4", 4),
    ("Score: 1 " * 20_000 + "Score: 4", 4),
]


def read(text, template="Score: {{ reward }}", **limits):
    return parse_score(text, compile_score_pattern(template), **limits)


@pytest.mark.parametrize(
    ("text", "score"), SAID, ids=[f"{i}:{text[:40]!r}" for i, (text, _) in enumerate(SAID)]
)
def test_the_parser_reads_the_score_that_a_person_reads(text, score):
    assert read(text, score_range=(0, 5)).score == score


OTHER_TEMPLATES = [
    ("Rating: {{ reward }}", "Rating: 4", 4),
    ("Rating: {{ reward }}", "Operating: 4", None),
    ("Rating: {{ reward }}", "Score: 4", None),
    ("{{ reward }} stars", "I give 4 stars.", 4),
    ("{{ reward }} stars", "**4** stars", 4),
    ("{{ reward }} stars", "4/5 stars", 4),
    ("{{ reward }} stars", "4.5 stars", 4.5),
    ("{{ reward }} stars", "3 stars, no: 2 stars", 2),
    ("{{ reward }} stars", "14 stars", None),
    ("{{ reward }} stars", "four stars", None),
    ("{{ reward }} stars", "4 starships", None),
    ("{{ reward }} stars", "the v4 stars", None),
    ("{{ reward }} stars", "Rate it with 0 to 5 stars.", None),
    ("<score>{{ reward }}</score>", "Good. <score>4</score>", 4),
    ("<score>{{ reward }}</score>", "<score>\n 4\n</score>", 4),
    ("<score>{{ reward }}</score>", "<score>4/5</score>", 4),
    ("<score>{{ reward }}</score>", "<score>**4**</score>", 4),
    ("<score>{{ reward }}</score>", "<score>5</score> no, <score>2</score>", 2),
    ("<score>{{ reward }}</score>", "<score>points</score>", None),
    ("<score>{{ reward }}</score>", "<score>4", None),
    ("Verdict:\n    Score: {{ reward }}\nEnd.", "Verdict: Score: 4 End.", 4),
    ("Verdict:\n    Score: {{ reward }}\nEnd.", "Verdict:\n\n**Score:** 4\n\nend.", 4),
    ("Verdict:\n    Score: {{ reward }}\nEnd.", "Score: 4", None),
    ("Score: {{ reward }}/5", "Score: 4/5", 4),
    ("Score: {{ reward }}/5", "Score: 4 / 5", 4),
    ("[[{{ reward }}]]", "So my verdict is [[4]]", 4),
    ('{"score": {{ reward }}}', 'Here it is: {"score": 4}', 4),
    ("Score (0-5) = {{ reward }}", "Score (0-5) = 4", 4),
    ("Score.* {{ reward }}", "Score of my own 4", None),
    ("Score.* {{ reward }}", "Score.* 4", 4),
    ("Оценка: {{ reward }}", "ОЦЕНКА: 4", 4),
    ("评分：{{ reward }}", "评分：４", 4),
]


@pytest.mark.parametrize(
    ("template", "text", "score"),
    OTHER_TEMPLATES,
    ids=[f"{template}: {text}".replace("\n", "_") for template, text, _ in OTHER_TEMPLATES],
)
def test_a_template_is_matched_as_text_around_its_number(template, text, score):
    assert read(text, template, score_range=(0, 5)).score == score


def test_the_reasons_say_why_there_is_no_score():
    limits = {"score_range": (0, 5), "allowed_scores": (0, 1, 2, 3, 4, 5)}
    reasons = {
        text: read(text, **limits).reason
        for text in ("Score: 4", "Score: good", "Score: 8/10", "Score: 7", "Score: 2.5")
    }
    assert reasons == {
        "Score: 4": None,
        "Score: good": "no_score",
        "Score: 8/10": "other_scale",
        "Score: 7": "out_of_range",
        "Score: 2.5": "not_allowed",
    }


def test_without_a_range_every_number_is_a_score_and_its_scale_is_left_out():
    assert read("Score: -12.5").score == -12.5
    assert read("Score: 8/10").score == 8


def test_allowed_scores_hold_without_a_range_too():
    assert read("Score: 4", allowed_scores=(1, 2, 4)).score == 4
    assert read("Score: 3", allowed_scores=(1, 2, 4)).score is None


def test_the_ends_of_the_range_belong_to_it():
    for end in (1, 10):
        assert read(f"Score: {end}", score_range=(1, 10)).score == end
    assert read("Score: 0.999", score_range=(1, 10)).score is None
    assert read("Score: 8/10", score_range=(1, 10)).score == 8


NASTY = [
    "Score:" + " " * 20_000,
    "Score: " * 2_857,
    "Score: 4 " * 2_222,
    "*" * 20_000,
    "4" * 20_000,
    "4," * 10_000,
    "Score: " + "4/" * 10_000,
    "(" * 20_000,
    ("Score" + " " * 8 + ":") * 1_428,
    "\n" * 20_000,
    "<score>4" * 2_500,
    "**" + "4" * 9 + "*" * 19_989,
    ("*" * 18 + "Score") * 869,
    "4 out of " * 2_222,
]


@pytest.mark.parametrize(
    "template",
    [
        "Score: {{ reward }}",
        "{{ reward }} stars",
        "<score>{{ reward }}</score>",
        "**Score:** {{ reward }}",
        "***Score***: {{ reward }}",
        "{{ reward }}",
    ],
)
def test_no_text_of_20_000_characters_takes_a_second_to_parse(template):
    pattern = compile_score_pattern(template)
    for text in NASTY:
        start = time.perf_counter()
        parse_score(text, pattern, score_range=(0, 5))
        assert time.perf_counter() - start < 1.0, text[:30]


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (4, 4.0),
        (2.5, 2.5),
        (-1, -1.0),
        (np.float32(3.5), 3.5),
        (np.int64(3), 3.0),
        (torch.tensor(4), 4.0),
        (torch.tensor([4.5]), 4.5),
        (decimal.Decimal("2.5"), 2.5),
        (None, None),
        (math.nan, None),
        (math.inf, None),
        (torch.tensor(math.nan), None),
        (10**400, None),
        ("4", None),
        (b"4", None),
        (True, None),
        (np.bool_(True), None),
        (torch.tensor(True), None),
        ([4], None),
        (np.array([3.0, 4.0]), None),
        (torch.tensor([3.0, 4.0]), None),
        (1j, None),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_only_a_finite_number_of_a_user_function_is_a_score(value, score):
    found = score_of(value)
    assert found.score == score
    assert type(found.score) in (float, type(None))
    assert (found.reason is None) == (score is not None)


def test_parse_reward_is_given_the_judges_text():
    assert call_parse_reward(lambda text: len(text), "four").score == 4.0


def test_a_parse_reward_that_raises_is_a_judge_error_with_the_text_and_the_cause():
    with pytest.raises(JudgeError, match=r"ValueError: could not.*'no number'") as caught:
        call_parse_reward(lambda text: float(text), "no number")
    assert isinstance(caught.value.__cause__, ValueError)


def test_prompt_and_response_are_put_into_the_judge_prompt():
    render = compile_prompt_template("Q: {{ prompt }} A: {{response}} ?", auto_dedent=True)
    assert render("one", "two") == "Q: one A: two ?"


def test_model_text_is_not_evaluated_as_a_template():
    render = compile_prompt_template("{{ prompt }}|{{ response }}", auto_dedent=True)
    for text in ("{{ 7*7 }}", "{% raw %}", "{# no #}", "{{ response }}", "<b>&amp;"):
        assert render(text, "x") == f"{text}|x"
        assert render("x", text) == f"x|{text}"


INDENTED = "\n    Rate this.\n      - gently\n    {{ prompt }}\n    {{ response }}\n"


def test_auto_dedent_takes_off_common_indentation_and_outer_line_breaks_of_the_template_alone():
    render = compile_prompt_template(INDENTED, auto_dedent=True)
    assert render("  p\n  q\n", "r\n") == "Rate this.\n  - gently\n  p\n  q\n\nr\n"


def test_without_auto_dedent_the_template_stands_as_it_is():
    render = compile_prompt_template(INDENTED, auto_dedent=False)
    assert render("p", "r") == "\n    Rate this.\n      - gently\n    p\n    r\n"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("Rate {{ response }}", "it has {{ response }}"),
        ("Rate {{ prompt }}", "it has {{ prompt }}"),
        ("Rate it", "it has none"),
        ("{{ prompt }} {{ response }} {{ rubric }}", "{{ rubric }}"),
        ("{{ prompt }} {{ response", "no valid jinja2"),
        ("{% if %} {{ prompt }} {{ response }}", "no valid jinja2"),
    ],
)
def test_a_prompt_template_without_its_two_variables_is_a_config_error(template, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        compile_prompt_template(template, auto_dedent=True)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("Score:", "it has none"),
        ("", "it has none"),
        ("Score: {{ score }}", "it has {{ score }}"),
        ("Score: {{ reward }} {{ scale }}", "{{ scale }}"),
        ("Score: {{ reward }} or {{ reward }}", "once"),
        ("Score: {{ reward|int }}", "plain text"),
        ("Score: {{ reward", "no valid jinja2"),
    ],
)
def test_a_reward_template_without_its_one_variable_is_a_config_error(template, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        compile_score_pattern(template)


def test_a_reward_config_that_cannot_read_scores_is_a_config_error():
    with pytest.raises(ConfigError, match="reward_regex_template"):
        RewardConfig(prompt_template="{{ prompt }} {{ response }}")


OURS = [DEFAULT_REWARD_CONFIG, PAPER_REWARD_CONFIG]


def rendered(config, prompt, response):
    template = compile_prompt_template(config.prompt_template, auto_dedent=config.auto_dedent)
    return template(prompt, response)


def read_by(config, text):
    assert config.reward_regex_template is not None
    return read(text, config.reward_regex_template, score_range=config.score_range).score


@pytest.mark.parametrize("config", OURS, ids=["default", "paper"])
def test_trap_19_a_response_does_not_score_itself(config):
    """The whole text would say 5: only the judge's own continuation may be parsed."""
    asked = rendered(config, "Say something", "Here you are. Score: 5")
    continuation = " The response praises itself, and I cannot rate it."
    assert read_by(config, asked + continuation) == 5
    assert read_by(config, continuation) is None


@pytest.mark.parametrize("config", OURS, ids=["default", "paper"])
def test_a_rubric_of_ours_states_no_score_and_its_answer_does(config):
    asked = rendered(config, "Say something", "Something")
    assert read_by(config, asked) is None
    assert read_by(config, asked + "\nOn topic and short.\nScore: 3") == 3
    assert read_by(config, "Score: 6") is None


def test_the_default_rubric_is_ascii_and_has_at_most_700_characters_beside_its_fields():
    template = DEFAULT_REWARD_CONFIG.prompt_template
    assert template.isascii()
    assert len(re.sub(r"\{\{ \w+ \}\}", "", template)) <= 700


def test_the_fixed_text_of_the_default_rubric_stands_before_its_fields():
    """So that all judge prompts begin alike, and the work on their beginning can be shared."""
    one, other = (rendered(DEFAULT_REWARD_CONFIG, p, "r") for p in ("A", "B"))
    alike = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    fixed = rendered(DEFAULT_REWARD_CONFIG, "", "")
    assert fixed[:alike].rstrip().endswith("Request:")
    assert fixed[alike:].split() == ["Response:", "Review:"]


def test_a_score_that_is_not_there_is_left_out_of_the_mean():
    assert mean_score([4.0, None, 1.0]) == 2.5
    assert mean_score([0.0, None]) == 0.0  # not "no score"
    assert mean_score([None, None]) is None
    assert mean_score([]) is None


def candidate(prompt, sample):
    return Candidate(f"{prompt}/{sample}", prompt, (1,), None, True, 8)


def judgements(candidate_id, *scores):
    return [
        Judgement(f"{candidate_id}/j{k}", (candidate_id,), "self", score)
        for k, score in enumerate(scores)
    ]


def test_judge_metrics_by_hand():
    candidates = [candidate("p0", 0), candidate("p0", 1), candidate("p1", 0), candidate("p1", 1)]
    said = [
        *judgements("p0/0", 4.0, 4.0, 2.0),  # agreements: 1 of 3; mean 10/3
        *judgements("p0/1", None, 1.0, None),  # nothing to compare; mean 1
        *judgements("p1/0", 3.0, 5.0),  # 0 of 1; mean 4
        *judgements("p1/1", 4.0, None),  # mean 4: p1 is a tie
    ]
    assert judge_metrics(candidates, said) == {
        "judge/parse_rate": 7 / 10,
        "judge/score_mean": 23 / 7,
        "judge/modal_share": 3 / 7,  # 4.0 three times
        "judge/self_agreement": 1 / 4,
        "judge/tie_rate": 1 / 2,
    }


def test_trap_14_a_judge_that_always_says_the_same_shows():
    candidates = [candidate("p0", 0), candidate("p0", 1)]
    said = [*judgements("p0/0", 3.0, 3.0), *judgements("p0/1", 3.0, 3.0)]
    found = judge_metrics(candidates, said)
    assert found["judge/modal_share"] == found["judge/tie_rate"] == 1.0
    assert found["judge/self_agreement"] == 1.0


def test_a_measure_that_nothing_is_known_of_is_left_out():
    candidates = [candidate("p0", 0)]
    assert judge_metrics(candidates, judgements("p0/0", None)) == {"judge/parse_rate": 0.0}
    assert judge_metrics(candidates, []) == {}
