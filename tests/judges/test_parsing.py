"""What a judge's text says, what a judge is asked, and how it did."""

import decimal
import math
import re
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from self_rewarding_lm.config import (
    DEFAULT_REWARD_CONFIG,
    PAPER_REWARD_CONFIG,
    ComparisonConfig,
    RewardConfig,
)
from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.judges.parsing import (
    PARSED_CHARACTERS,
    call_parse_reward,
    comparison_form,
    compile_score_pattern,
    find_score,
    opened_thought,
    parse_score,
    parser_form,
    score_form,
)
from self_rewarding_lm.judges.tally import judge_metrics
from self_rewarding_lm.judges.templates import compile_comparison_template, compile_prompt_template
from self_rewarding_lm.records import Candidate, Judgement
from self_rewarding_lm.scores import candidate_scores, mean_score, score_of

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


WRITTEN_OTHERWISE = [  # default template, 0 to 5: text, score, reason
    ("Score: 4 on a scale of 1 to 10", None, "other_scale"),
    ("Score: 4 on a scale of 1 to 5", 4, None),
    ("Score: **4** on a scale from 0-10.", None, "other_scale"),
    ("Score: 4 on a 10-point scale", None, "other_scale"),
    ("Score: 4 on the 0–5 scale", 4, None),
    ("Score: 4 (scale: 1 to 10)", None, "other_scale"),
    ("Score: 4 (out of 10)", None, "other_scale"),
    ("Score: 4 points out of 10", None, "other_scale"),
    ("Score: 4 (3 out of 10 facts are right)", 4, None),
    ("Score: 4, the scale is hard", 4, None),
    ("Good.\n4 on a scale of 1 to 10", None, "other_scale"),
    ("Good.\n4 on a scale of 1 to 5.", 4, None),
    ("0-5 scale", None, "no_score"),
    ("Score: 5 -> 4", 4, None),
    ("Score: 5 → **4**", 4, None),
    ("Score: 3 => 5 => 2", 2, None),
    ("Score: 5/5 -> 4/5", 4, None),
    ("Score: 4/5 -> 80%", 4, None),
    ("Score: 4/5 -> 0.8", 4, None),
    ("Score: 4 -> good", 4, None),
    ("5 -> 4", 4, None),
    ("Good.\n5 -> 4", 4, None),
    ('{"score": 4}', 4, None),
    ("{'score': 4}", 4, None),
    ('{"reason": "Score: 5, it says", "score": "2/5", "max_score": 5}', 2, None),
    ('{"score": {"relevance": 4}}', None, "no_score"),
    ("Score (0-5): 4", 4, None),
    ("**Score (0 to 5):** 4", 4, None),
    ("Score [1-10]: 4", None, "other_scale"),
    ("Score out of 5: 4", 4, None),
    ("Score/10: 4", None, "other_scale"),
    ("Score 1: 4", None, "no_score"),
    ("Score (relevance): 4", None, "no_score"),
]
OTHERWISE = [  # template, text, score, reason
    ("Rating: {{ reward }}", "Rating (0-5): 4", 4, None),
    ("Rating: {{ reward }}", "{'rating': 4}", 4, None),
    ("Final score: {{ reward }}", '{"final_score": 4}', 4, None),
    ("Score = {{ reward }}", "Score (1-10) = 4", None, "other_scale"),
    ("评分：{{ reward }}", "评分（0-5）：４", 4, None),
    ("{{ reward }} stars", "4 stars on a scale of 1 to 10", None, "other_scale"),
    ("{{ reward }} stars", "5 -> 4 stars", 4, None),
    ("<score>{{ reward }}</score>", "<score>5 -> 4</score>", 4, None),
    ("<score>{{ reward }}</score>", "<score>4 (out of 10)</score>", None, "other_scale"),
    ("[[{{ reward }}]]", "[[4 on a scale of 0 to 5]]", 4, None),
    ("{{ reward }}", "4 on a 10-point scale", None, "other_scale"),
]


@pytest.mark.parametrize(
    ("template", "text", "score", "reason"),
    [*(("Score: {{ reward }}", *case) for case in WRITTEN_OTHERWISE), *OTHERWISE],
)
def test_a_score_with_a_scale_in_words_an_arrow_or_a_key_is_read(template, text, score, reason):
    found = score_form(template, score_range=(0, 5)).read(text)
    assert (found.score, found.reason) == (score, reason)


def test_runs_that_0_1_0_began_read_as_it_did():
    form = score_form("Score: {{ reward }}", score_range=(0, 5))
    said = {text: form.of(1).read(text).score for text, _, _ in WRITTEN_OTHERWISE}
    assert said["Score: 4 on a scale of 1 to 10"] == 4 and said["Score: 5 -> 4"] == 5
    assert said['{"score": 4}'] is said["Score (0-5): 4"] is said["5 -> 4"] is None
    assert form.of(2) is form
    for text, score in SAID:
        assert form.of(1).read(text).score == score


CUT = [  # template, text, score
    ("Score: {{ reward }}", "Score: 1", None),
    ("Score: {{ reward }}", "Score: 4.", None),
    ("Score: {{ reward }}", "Score: 4/", None),
    ("Score: {{ reward }}", "Score: 1/5", None),
    ("Score: {{ reward }}", "Score: 4 out of", None),
    ("Score: {{ reward }}", "Score: 3 or", None),
    ("Score: {{ reward }}", "Score: 5 ->", None),
    ("Score: {{ reward }}", "Score: 2. No, Score:", None),
    ("Score: {{ reward }}", '{"score": 4', None),
    ("Score: {{ reward }}", "Good.\n4/5", None),
    ("Score: {{ reward }}", "<think>Maybe Score: 3 as", None),
    ("Score: {{ reward }}", "[THINK]Score: 3 as", None),
    ("Score: {{ reward }}", "<think>a</think>Score: 3. <think>No", None),
    ("Score: {{ reward }}", "<think>a</think>Score: 3 as", 3),
    ("Score: {{ reward }}", "Score: 4\n", 4),
    ("Score: {{ reward }}", "**Score: 4**", 4),
    ("Score: {{ reward }}", '{"score": 4}', 4),
    ("Score: {{ reward }}", "Score: 4 because", 4),
    ("Score: {{ reward }}", "Score: 4\nFirst, 3", 4),
    ("{{ reward }} stars", "4 stars", 4),
    ("<score>{{ reward }}</score>", "<score>4</score>", 4),
]


@pytest.mark.parametrize(("template", "text", "score"), CUT)
def test_a_text_that_was_cut_off_states_no_half_number(template, text, score):
    form = score_form(template, score_range=(0, 5))
    found = form.read_answer(text, False)
    assert (found.score, found.reason) == (score, "unfinished" if score is None else None)
    assert form.read_answer(text, True) == form.read(text)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Better: A", None),
        ("Better: A or", None),
        ("Better: A/", None),
        ("<think>Better: A, for", None),
        ("Better: A, for", 1.0),
        ("Better: [[B]].", 0.0),
    ],
)
def test_a_verdict_that_was_cut_off_is_none_if_it_could_go_on(text, score):
    assert comparison_form("Better: ", ("A", "B"), "Tie").read_answer(text, False).score == score


def test_a_thought_that_the_prompt_opened_is_open_until_it_is_closed():
    form = score_form("Score: {{ reward }}", score_range=(0, 5))
    opened = opened_thought("<user>What does <think> mean?<assistant><think>\n")
    assert opened == "<think>"
    assert form.read_answer("Score: 3 as", False, before=opened).reason == "unfinished"
    assert form.read_answer("so</think>Score: 3 as", False, before=opened).score == 3
    for prompt in ("What does <think> mean?", "<think>\n\n</think>\n", ""):
        assert opened_thought(prompt) == ""


def test_a_parser_of_the_user_gets_what_was_cut_but_no_open_thought():
    form = parser_form(len)
    assert form.read_answer("12", False).score == 2
    assert form.read_answer("<think>12", False).reason == "unfinished"


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
        ("Rate {{ response }}", "It has: {{ response }}"),
        ("Rate {{ prompt }}", "It has: {{ prompt }}"),
        ("Rate it", "It has: none"),
        ("{{ prompt }} {{ response }} {{ rubric }}", "{{ rubric }}"),
        ("{{ prompt }} {{ response", "not a valid jinja2"),
        ("{% if %} {{ prompt }} {{ response }}", "not a valid jinja2"),
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
        ("Score: {{ reward", "not a valid jinja2"),
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


STATEMENTS = [  # text, what is said, what leads to it
    ("Good.\nScore: 4", "4", "Score: "),
    ("score : **4/5** and more", "4", "score : **"),
    ("Score: 1. No, Score: 2", "2", "Score: "),
    ("Score: 1 + 1 + 1 = 3", "3", "Score: 1 + 1 + 1 = "),
    ("well done\n  **4/5**  \n", "4", "  **"),
    ("well done\n**4**", "4", "**"),
    ("  4 \n", "4", "  "),
]


@pytest.mark.parametrize(("text", "said", "before"), STATEMENTS)
def test_a_statement_says_where_its_number_stands(text, said, before):
    found = find_score(text, compile_score_pattern("Score: {{ reward }}"))
    assert found is not None and (found.said, found.before) == (said, before)
    assert text[found.start - len(before) : found.start + len(said)] == before + said


def test_the_place_counts_from_the_beginning_of_a_text_of_any_length_and_script():
    pattern = compile_score_pattern("Score: {{ reward }}")
    long = "x " * PARSED_CHARACTERS + "Score: 4"
    found = find_score(long, pattern)
    assert found is not None and long[found.start :] == "4"
    arabic = find_score("gut\nScore: ٤ ok", pattern)
    assert arabic is not None and (arabic.said, arabic.start) == ("4", 11)


def form(numbers=(), **limits):
    return score_form("Score: {{ reward }}", numbers=numbers, **limits)


def test_the_form_of_scores_has_the_words_before_them_and_their_texts():
    made = form([0, 0.5, 10.0], score_range=(0, 10))
    assert made.prefix == "Score: " and made.numeric
    assert made.values == {"0": 0.0, "0.5": 0.5, "10": 10.0}
    assert made.read("Score: 10").score == 10 and made.read("Score: 11").reason == "out_of_range"


VERDICTS = [  # text, verdict
    ("Both fine.\nBetter: A", 1.0),
    ("**better:** [[B]].", 0.0),
    ("Better: A. On second thought, better: B", 0.0),
    ("Better: Tie", 0.5),
    ("B", 0.0),
    ("[[A]]", 1.0),
    ("Better: A or B", None),
    ("Better: A/B", None),
    ("Better: <A or B>", None),
    ("Better: A and by far.", 1.0),
    ("Better: A or [[B]]", None),
    ("Better: Although", None),
    ("Better: a long answer", None),  # labels count in their own case
    ("A is longer, B is shorter.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "verdict"), VERDICTS)
def test_verdicts_between_two(text, verdict):
    made = comparison_form("Better: ", ("A", "B"), "Tie")
    found = made.read(text)
    assert (found.score, found.reason) == (verdict, "no_verdict" if verdict is None else None)
    assert (not made.find(text)) == (verdict is None)


def test_a_label_that_begins_another_is_not_taken_for_it():
    made = comparison_form("Winner: ", ("Response 1", "Response 10"), None)
    assert made.read("Winner: Response 10").score == 0.0
    assert made.read("Winner: Response 1!").score == 1.0


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ prompt }} {{ response_a }}", "{{ prompt }}, {{ response_a }}"),
        ("{{ prompt }} {{ response_a }} {{ response_b }} {{ x }}", "{{ x }}"),
    ],
)
def test_a_comparison_template_needs_its_three_variables(template, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        compile_comparison_template(template, auto_dedent=True)


def test_the_default_comparison_shows_all_three_and_states_no_verdict():
    config = ComparisonConfig()
    render = compile_comparison_template(config.prompt_template, auto_dedent=config.auto_dedent)
    shown = render("What is it?", "It is one.", "It is the other.")
    order = [shown.index(text) for text in ("What is it?", "It is one.", "It is the other.")]
    assert order == sorted(order)
    made = comparison_form(config.verdict_prefix, config.labels, config.tie_label)
    assert made.read(shown).score is None
    assert made.read(shown + "\nThe first.\nBetter: A").score == 1.0


def candidates_of(*samples):
    return [candidate("p", sample) for sample in samples]


def compared(first, second, score, judge="self"):
    ids = (f"p/{first}", f"p/{second}")
    return Judgement(f"{ids[0]}/vs/{second}", ids, judge, score, source="compared")


def test_the_score_of_judgements_is_their_mean():
    said = [*judgements("p/0", 4.0, None, 1.0), *judgements("p/1", None)]
    assert candidate_scores(candidates_of(0, 1, 2), said) == {"p/0": 2.5, "p/1": None, "p/2": None}


def test_several_judges_count_alike_however_often_each_judged():
    def by(judge, candidate_id, *scores):
        return [replace(j, judge=judge) for j in judgements(candidate_id, *scores)]

    said = [
        *by("self", "p/0", 1.0, 2.0, 3.0),
        *by("self:strict", "p/0", 0.0),
        *by("self", "p/1", 4.0),
        *by("self:strict", "p/1", None),
    ]
    # p/1: what it comes to with one judge fewer could not be compared
    assert candidate_scores(candidates_of(0, 1), said) == {"p/0": 1.0, "p/1": None}


def test_the_score_of_comparisons_by_hand():
    said = [
        compared(0, 1, 1.0), compared(1, 0, 0.0),  # 0 wins in both orders
        compared(0, 2, 1.0), compared(2, 0, 1.0),  # whoever is first: a tie
        compared(1, 2, 0.5), compared(2, 1, 1.0),  # a tie, and 2 wins: a tie
    ]  # fmt: skip
    scores = candidate_scores(candidates_of(0, 1, 2, 3), said)
    assert scores == {"p/0": 0.75, "p/1": 0.25, "p/2": 0.5, "p/3": None}


def test_a_comparison_that_is_not_known_in_both_orders_does_not_count():
    said = [
        compared(0, 1, 1.0), compared(1, 0, None),
        compared(0, 2, 1.0), compared(2, 0, 0.0),
        compared(1, 2, 0.0),
    ]  # fmt: skip
    assert candidate_scores(candidates_of(0, 1, 2), said) == {"p/0": 1.0, "p/1": None, "p/2": 0.0}


def test_probabilities_of_the_first_are_verdicts_of_either_side_of_a_half():
    said = [compared(0, 1, 0.51), compared(1, 0, 0.02), compared(0, 2, 0.9), compared(2, 0, 0.6)]
    assert candidate_scores(candidates_of(0, 1, 2), said) == {"p/0": 0.75, "p/1": 0.0, "p/2": 0.5}


def wins(judge, candidates):
    """The scores of a tournament, counted naively: each two, both orders."""
    found = {}
    for one in candidates:
        results = []
        for other in candidates:
            if other is not one:
                there, back = judge(one, other), 1 - judge(other, one)
                results.append(there if there == back else 0.5)
        found[one.id] = sum(results) / len(results)
    return found


def test_a_tournament_is_what_counting_gives():
    random = Random(1)
    table = {(i, j): random.choice([0.0, 0.5, 1.0]) for i in range(6) for j in range(6)}
    candidates = candidates_of(*range(6))
    said = [compared(i, j, table[i, j]) for i in range(6) for j in range(6) if i != j]
    random.shuffle(said)

    def judge(one, other):
        return table[int(one.id[2:]), int(other.id[2:])]

    assert candidate_scores(candidates, said) == pytest.approx(wins(judge, candidates))


def test_the_metrics_of_comparisons_are_no_scores_of_candidates():
    said = [
        compared(0, 1, 1.0), compared(1, 0, 0.0),  # agree
        compared(0, 2, 1.0), compared(2, 0, 1.0),  # do not
        compared(1, 2, 0.5), compared(2, 1, None),  # not known
    ]  # fmt: skip
    assert judge_metrics(candidates_of(0, 1, 2), said) == {
        "judge/parse_rate": 5 / 6,
        "judge/position_agreement": 1 / 2,
        "judge/tie_rate": 0.0,
    }


def test_the_metrics_of_expected_scores():
    said = [
        replace(j, source=source, score_mass=mass)
        for j, source, mass in zip(
            [*judgements("p/0", 3.04, 2.96), *judgements("p/1", 2.91, None)],
            ["expected", "forced", "expected", "expected"],
            [0.9, 0.7, 0.8, 0.04],
            strict=True,
        )
    ]
    found = judge_metrics(candidates_of(0, 1), said)
    assert found["judge/score_mass"] == pytest.approx((0.9 + 0.7 + 0.8 + 0.04) / 4)
    assert found["judge/forced_share"] == 1 / 4
    assert found["judge/modal_share"] == 2 / 3  # 3.0 twice, 2.9
    assert found["judge/self_agreement"] == 1.0
    assert found["judge/tie_rate"] == 0.0  # 3.0 and 2.91
    assert found["judge/parse_rate"] == 3 / 4


WITH_NUMBERS = {
    "prompt_template": "{{ prompt }} {{ response }}",
    "reward_regex_template": "S: {{ reward }}",
}


def test_the_numbers_that_may_be_expected():
    def numbers(**fields):
        return RewardConfig(**WITH_NUMBERS, **fields).allowed_numbers()

    assert numbers(score_range=(0, 5)) == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert numbers(score_range=(-1.5, 1.5)) == (-1.0, 0.0, 1.0)
    assert numbers(score_range=(0, 5), allowed_scores=(3, 0.5, 3)) == (0.5, 3.0)
    assert numbers() == ()


@pytest.mark.parametrize("mode", [{"score_mode": "expected"}, {"forced_ending": True}], ids=str)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "allowed_scores, or a score_range"),
        ({"score_range": (0.2, 1.4)}, "at least two"),
        ({"score_range": (0, 1e6)}, "more than 1001 whole numbers"),
        ({"score_range": (0, 5), "parse_reward": float}, "parse_reward"),
    ],
)
def test_expected_scores_without_numbers_to_expect_are_a_config_error(mode, fields, words):
    with pytest.raises(ConfigError, match=words):
        RewardConfig(**WITH_NUMBERS, **fields, **mode)


def test_a_reward_prompt_as_it_is_written():
    reward = RewardConfig(
        **WITH_NUMBERS, score_range=(0, 5), score_mode="expected", forced_ending="at_once"
    )
    plain = reward.as_written()
    assert (plain.score_mode, plain.forced_ending) == ("sampled", False)
    assert (plain.prompt_template, plain.score_range) == (reward.prompt_template, (0, 5))
    for ours in OURS:
        assert (ours.score_mode, ours.forced_ending) == ("sampled", False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"labels": ("A", "A")}, "different"),
        ({"labels": ("A", "B"), "tie_label": "B"}, "different"),
        ({"labels": ("A", " ")}, "without white space"),
        ({"verdict_prefix": " "}, "verdict_prefix"),
    ],
)
def test_a_comparison_whose_verdicts_cannot_be_told_is_a_config_error(fields, words):
    with pytest.raises(ConfigError, match=words):
        ComparisonConfig(**fields)


@pytest.mark.parametrize("broken", ["{{ 1 / 0 }}", "{{ prompt + 1 }}", "{{ range(10 ** 9) }}"])
def test_a_judge_template_that_breaks_is_refused_at_once(broken):
    with pytest.raises(ConfigError, match="prompt_template cannot be rendered with texts"):
        compile_prompt_template("{{ prompt }}{{ response }}" + broken, auto_dedent=True)


def test_a_judge_template_that_breaks_at_one_text_says_so():
    template = "{{ prompt }}{{ response }}{{ 1 / (response | length - 3) }}"
    render = compile_prompt_template(template, auto_dedent=True)
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        render("a", "abc")


@pytest.mark.parametrize("template", ["{{ reward }}{{ 1 / 0 }}", "{{ 'Score:' }} {{ reward }}"])
def test_a_reward_template_has_one_field_and_nothing_else_of_jinja(template):
    with pytest.raises(ConfigError, match=r"plain text with \{\{ reward \}\} in it once"):
        compile_score_pattern(template)
