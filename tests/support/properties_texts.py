"""What holds for any text: scores, verdicts, templates, chat templates, instructions."""

import math
import re
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import assume
from hypothesis import strategies as st

from self_rewarding_lm.config import DEFAULT_REWARD_CONFIG, SamplingConfig
from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.judges import parsing
from self_rewarding_lm.judges.ensemble import EnsembleJudge
from self_rewarding_lm.judges.functions import FunctionJudge
from self_rewarding_lm.judges.marks import marks_form
from self_rewarding_lm.judges.self_judge import PairwiseJudge, SelfJudge
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.stages.self_instruct.filters import FilterCounts
from tests.support.models import Successor, context
from tests.support.mutants import over

ANY_TEXT = st.text(st.characters(), max_size=40)
"""Of all characters, lone surrogates too: JSON can hold them."""
PIECES = st.sampled_from(
    [
        *(
            "Score:",
            "score",
            "Score",
            "Final score: ",
            "4",
            "/5",
            " out of ",
            "10",
            "3.5",
            "0",
            "-1",
            "1,5",
        ),
        *(
            "**",
            "_",
            "`",
            '"',
            "(",
            ")",
            "[",
            "]",
            "$\\boxed{",
            "}",
            "1 + 1 + 1 = ",
            "+ 2",
            "%",
            "½",
        ),
        *(
            " ",
            "\n",
            "\t",
            " to ",
            " or ",
            "–",
            "٣",
            "：",
            "５",
            "\u00b2",
            "1e9",
            "999999999999",
            "A",
            "B",
        ),
    ]
)
JUDGE_TEXT = st.lists(PIECES | st.text(st.characters(), max_size=3), max_size=14).map("".join)
REASONS = {"no_score", "other_scale", "out_of_range", "not_allowed"}
LITERAL = ANY_TEXT.map(lambda text: re.sub(r"[{}%#\r\n\ufdd0-\ufdef]", "", text))
PLAIN_WORDS = st.text("abcxyz .!?\n", max_size=20)
JINJA = st.lists(
    st.sampled_from(
        [
            *(
                "{{ prompt }}",
                "{{ response }}",
                "{{ reward }}",
                "{{ messages }}",
                "{{ prompt",
                "}}",
                "{% if",
            ),
            *(
                "{% for m in messages %}",
                "{% endfor %}",
                "{{ m.role }}",
                "{{ m['content'] }}",
                " %}",
                "{#",
                "#}",
            ),
            *(
                "{{ 1 / 0 }}",
                "{{ prompt + 1 }}",
                "{{ prompt.x.y }}",
                "{{ prompt | nothing }}",
                "{{ response[9] }}",
            ),
            *(
                "{{ range(10 ** 9) | list }}",
                "{{ messages[9]['role'] }}",
                "{{ prompt.__class__ }}",
                "Score: ",
            ),
            *(
                "{{ prompt % 3 }}",
                "{{ prompt | int // 0 }}",
                "{{ response | tojson }}",
                "{{ raise_exception(1) }}",
            ),
            *(
                "{% set prompt = 3 %}",
                "{% include 'x' %}",
                "{{ self }}",
                "{{ prompt() }}",
                "{{ strftime_now(3) }}",
            ),
        ]
    )
    | st.text(max_size=4),
    max_size=7,
).map("".join)
LIMITS = st.fixed_dictionaries(
    {
        "score_range": st.none() | st.sampled_from([(0, 5), (1, 10), (-1, 1)]),
        "allowed_scores": st.none() | st.sampled_from([(1, 2, 3), (0.5, 4)]),
    }
)


@over(
    "judges.parsing",
    st.tuples(
        st.sampled_from(
            ["Score: {{ reward }}", "{{reward}}", "[[{{ reward }}]]", "I give {{ reward }} points"]
        ),
        JUDGE_TEXT,
        LIMITS,
    ),
    mutants={
        "if not low <= score <= high:": "if not low <= score:",
        "score not in allowed_scores": "score in allowed_scores",
        'return ParsedScore(None, "no_score")\n    score = number_of': "return ParsedScore(0.0)\n    score = number_of",
    },
    examples=750,
)
def a_score_is_within_its_limits_or_none_with_a_reason(judging, case):
    template, text, limits = case
    found = judging.parse_score(text, judging.compile_score_pattern(template), **limits)
    assert (found.score is None) == (found.reason in REASONS)
    if found.score is not None:
        low, high = limits["score_range"] or (-math.inf, math.inf)
        assert found.reason is None and math.isfinite(found.score) and low <= found.score <= high
        assert limits["allowed_scores"] is None or found.score in limits["allowed_scores"]
        assert any(character.isdecimal() for character in text)
    elif found.reason == "other_scale":
        assert limits["score_range"] is not None


WRITTEN = st.sampled_from(
    [
        "{lead} {n}",
        "**{lead}** {n}",
        "{lead}{n}",
        "{lead} [{n}]",
        '"{lead} {n}"',
        "{lead} {n}/{high}",
        "{lead} **{n}** out of {high}",
    ]
)


@over(
    "judges.parsing",
    st.tuples(
        JUDGE_TEXT,
        WRITTEN,
        st.integers(0, 5),
        st.sampled_from(["Score:", "SCORE:", "score:"]),
        PLAIN_WORDS,
    ),
    mutants={
        "number_of(statement.scale) != high": "number_of(statement.scale) == high",
        "score = number_of(statement.said)": "score = float(statement.start)",
    },
    examples=600,
)
def the_last_score_that_is_written_is_the_one_that_is_read(judging, case):
    before, form, score, lead, after = case
    pattern = judging.compile_score_pattern("Score: {{ reward }}")
    text = f"{before}\n{form.format(lead=lead, n=score, high=5)}\n{after}"
    assert judging.parse_score(text, pattern, score_range=(0, 5)).score == score
    other = f"{before}\n{lead} {score}/10\n{after}"
    assert judging.parse_score(other, pattern, score_range=(0, 5)).reason == "other_scale"
    assert (
        judging.parse_score(
            f"{before}\n{lead} {score + 6}\n{after}", pattern, score_range=(0, 5)
        ).reason
        == "out_of_range"
    )


@over(
    "judges.parsing",
    st.tuples(
        st.sampled_from([0, 3, 20_000, 20_001, 25_000]),
        JUDGE_TEXT,
        st.sampled_from(["Score:", "", "rate"]),
    ),
    mutants={
        "match[group], start + skipped,": "match[group], start,",
        "matches[-1].start(), skipped)\n    return _bare_score": "0, skipped)\n    return _bare_score",
        "text = _ascii_digits(text[skipped:])": "text = _ascii_digits(text[:PARSED_CHARACTERS])",
    },
)
def a_statement_stands_where_it_says(statements, case):
    filling, end, lead = case
    pattern = statements.score_pattern(lead, "")
    text, near = (f"{'x' * count}\n{end}" for count in (filling, 3))
    found, wanted = statements.find_score(text, pattern), statements.find_score(near, pattern)
    if found is None or wanted is None:
        assert found is wanted is None or not filling
        return
    assert found.said == wanted.said or not filling
    plain = statements._ascii_digits(text)
    assert plain[found.start : found.start + len(found.said)] == found.said
    assert plain[: found.start].endswith(found.before)
    led = found.before.lstrip("\"'“‘").lower()  # the words may be a key
    assert led.startswith(lead.lower().rstrip(":")) or found.before.strip(' \n\t*_`"([$') == ""
    assert math.isfinite(statements.number_of(found.said))


@over(
    "judges.parsing",
    st.tuples(
        PLAIN_WORDS,
        st.sampled_from(
            [
                *("Score: {} -> {}", "Score: {}/5 => {}/5", '{{"was": {}, "score": {}}}'),
                *("Score: {}? No.\nScore (0-5): {}", "({})\nScore out of 5: {}", "{} → {}"),
                *("({}) Score: {} on a scale of 0 to 5", "({}) Score: {}, on a 5-point scale"),
            ]
        ),
        st.integers(0, 5),
        st.integers(0, 5),
        st.integers(6, 99),
    ),
    mutants={
        'lead = f"{_lead_of(words)}': 'lead = f"{_word_start(words_pattern(words))}{words_pattern(words)}',
        "(?:{_CHANGED}{{1,4}}|{_SUM})": "{_SUM}",
        "scale = next((": "scale = groups.get('scale') and next((",
        "return any(read(text + more) != read(text) for more in": "return any(False for more in",
    },
    examples=500,
)
def a_score_is_read_in_other_ways_of_writing_and_not_where_it_was_cut(judging, case):
    before, form, first, score, other = case
    form_of_scores = judging.score_form("Score: {{ reward }}", score_range=(0, 5))
    text = f"{before}\n{form.format(first, score)}"
    assert form_of_scores.read(text).score == score
    wide = text.replace(" 5:", f" {other}:").replace("-5)", f"-{other})")
    wide = wide.replace("to 5", f"to {other}").replace("a 5-", f"a {other}-")
    assert wide == text or form_of_scores.read(wide).reason == "other_scale"
    assert form_of_scores.read_answer(f"Score: {score}", False).reason == "unfinished"
    assert form_of_scores.read_answer(f"Score: {score}", True).score == score
    assert form_of_scores.read_answer(f"Score: {score} because", False).score == score


LABELS = st.sampled_from([("A", "B", "C"), ("1", "2", "tie"), ("[[A]]", "[[B]]", "[[C]]")])


@over(
    "judges.parsing",
    st.tuples(JUDGE_TEXT, LABELS, st.integers(0, 2), PLAIN_WORDS),
    mutants={
        "labels[0]: 1.0, labels[1]: 0.0": "labels[0]: 0.0, labels[1]: 1.0",
        'return ParsedScore(None, "no_verdict")': "return ParsedScore(0.5)",
    },
)
def the_last_verdict_that_is_written_is_the_one_that_is_read(judging, case):
    before, labels, chosen, after = case
    form = judging.comparison_form("Better:", labels[:2], labels[2])
    values = (1.0, 0.0, 0.5)
    assert form.read(f"{before}\nBetter: {labels[chosen]}\n{after}").score == values[chosen]
    found = form.read(before)
    assert found.score in values if found.reason is None else found.score is None
    assert (
        "better" in before.lower()
        or any(label in before for label in labels)
        or found.score is None
    )


@over(
    "judges.parsing",
    st.tuples(
        JUDGE_TEXT,
        LABELS,
        st.permutations([0, 1, 2]),
        st.sampled_from(["/", " / ", " or ", "|", " and ", "\nand **"]),
    ),
    mutants={r"{_OPENING}(?P<label>{either}){no_choice}": r"{_OPENING}(?P<label>{either})"},
)
def a_choice_between_labels_is_no_verdict(statements, case):
    before, labels, order, between = case
    assume("better" not in before.lower())
    pattern = statements.verdict_pattern("Better:", list(labels))
    text = f"{before}\nBetter: {labels[order[0]]}{between}{labels[order[1]]}\n"
    assert statements.find_verdict(text, pattern, list(labels)) is None


MARK_WORDS = st.sampled_from(
    [(", yes.", ", no."), ("yes", "no"), ("[x]", "[ ]"), ("ok", "ok not"), ("+-", "+"), ("✓", "✗")]
)
NAMES = ("First word", "milk", "Last: home")
MARKED = st.tuples(
    MARK_WORDS,
    st.lists(  # of each mark: whether it is yes, how it is written, what stands around it
        st.tuples(
            st.booleans(),
            st.sampled_from([str, str.upper, str.title]),
            st.sampled_from(["none", "eyes: 4", "**warm**", "knows", "a, b. c!", "", "Ja: 是"]),
            st.sampled_from(["", "\n", " Score: 1"]),
        ),
        max_size=5,
    ),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["", "<think>{}, yes. no + ✗ [ ] ok</think>"]),
)


def _review(case):
    """The pieces of a review, each with its mark; its thought; and the words."""
    (yes, no), marks, _, named, thought = case
    pieces = []
    for n, (is_met, way, before, after) in enumerate(marks):
        name = NAMES[n % 3].upper() if named else f"item {'abcde'[n]}"
        pieces.append(f"{name}: {before} {way(yes if is_met else no)} ;{after}")
    return thought, pieces, (yes, no)


@over(
    "judges.marks",
    MARKED,
    mutants={
        "len(found) != len(points)": "len(found) < len(points)",
        "if is_yes.fullmatch(s.said)": "if not is_yes.fullmatch(s.said)",
        "key=len, reverse=True": "key=len",
        "name.search(text, begin, mark.start())": "name.search(text)",
        "pattern.finditer(text, behind_thoughts(text))": "pattern.finditer(text)",
        "return before + words_pattern(bare)": "return words_pattern(bare)",
    },
)
def marks_are_counted_if_there_are_as_many_as_items(marks_file, case):
    _, marks, items, named, _ = case
    thought, pieces, words = _review(case)
    points = [0.1, 0.2, 0.3, 1][:items]
    form = marks_file.marks_form(*words, points, NAMES[:items] if named else ())
    met = sum(
        (Fraction(str(p)) for p, (is_met, *_) in zip(points, marks, strict=False) if is_met),
        Fraction(),
    )
    wanted = float(met) if len(marks) == items else None
    found = form.read(thought + " ".join(pieces))
    assert (found.score, found.reason) == (wanted, "no_score" if wanted is None else None)
    statements = form.find(thought + " ".join(pieces))
    assert [s.points for s in statements] == (points if wanted is not None else [])
    text = thought + " ".join(pieces)
    assert all(text.startswith(s.said, s.start) for s in statements)
    assert all(text[: s.start].endswith(s.before) for s in statements)
    if named and len(pieces) == items > 1:  # another order of the names
        assert form.read(" ".join(reversed(pieces))).score is None


@over(
    "judges.marks",
    st.tuples(MARKED, st.integers(0, 200)),
    mutants={
        "return any(read(text + more) != read(text)": "return any(False",
        'for more in ("a", *ends)': 'for more in ("a",)',
        "    return True\n        ends": "    return False\n        ends",
    },
)
def a_cut_review_is_read_as_the_whole_one_or_not_at_all(marks_file, case):
    marked, cut = case
    _, pieces, words = _review(marked)
    assume(pieces)
    form = marks_file.marks_form(*words, [1] * len(pieces))
    whole = " ".join(pieces)
    kept = max(0, len(whole) - cut)  # most cuts lie near the end, where a mark may be half there
    found = form.read_answer(whole[:kept], finished=False)
    assert (found.score, found.reason) in [
        (form.read(whole).score, None),
        (None, "unfinished"),
    ]


JOINED = (" yes", ", ", "yes.", " [", "e:", "s.", ": ", "n, ", ", yes", " ok", "k no", "+-", "e, Y")


class Joining:
    """A tokenizer of characters and of some texts that are one token; the longest is taken.

    joined: those that it takes itself. It decodes all of JOINED.
    """

    def __init__(self, joined=JOINED):
        self.joined = joined

    def encode(self, text):
        ids, place = [], 0
        while place < len(text):
            fits = [joined for joined in self.joined if text.startswith(joined, place)]
            piece = max(fits, key=len, default=text[place])
            ids.append(0x110000 + JOINED.index(piece) if fits else ord(piece))
            place += len(piece)
        return ids

    def decode(self, ids):
        return "".join(chr(i) if i < 0x110000 else JOINED[i - 0x110000] for i in ids)


@over(
    "judges.expected",
    st.tuples(MARKED, st.sets(st.sampled_from(JOINED)), st.booleans()),
    mutants={
        "trie, statement.points)": "trie, 1.0)",
        "statement.start - self._lead(trie, opens)": "statement.start",
        "DIGITS[0] if self.form.several": "'' if self.form.several",
        "return found if len(found) == len(places) else ()": "return found",
    },
)
def a_mark_has_its_place_where_it_stands_or_the_review_has_none(expected, case):
    marked, joined, is_its_own = case
    thought, pieces, words = _review(marked)
    text = thought + " ".join(pieces)
    form = marks_form(*words, [n + 0.5 for n in range(len(pieces))])
    tokenizer = Joining(tuple(sorted(joined)))
    writer = tokenizer if is_its_own else Joining()
    tokens = Tokens(tokenizer, eos_id=None, vocab=0x110000 + len(JOINED))
    places = expected.VerdictReader(form, tokens).stated((), tuple(writer.encode(text)))
    statements = form.find(text)
    assert len(places) in (0, len(statements))
    assert joined or not is_its_own or len(places) == len(statements)
    for statement, place in zip(statements, places, strict=False):
        assert place.points == statement.points
        assert len(tokenizer.decode(place.ids)) <= statement.start
        said = {value: word for word, value in form.values.items()}
        for value, path in place.trie.paths:
            before = text[: statement.start]
            assert tokenizer.decode((*place.ids, *path)) == before + said[value]


GIVEN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
    | st.just(10**400)
)


@over(
    "scores",
    GIVEN,
    mutants={
        "ParsedScore(score) if math.isfinite(score)": "ParsedScore(score) if True",
        "bool | str | bytes": "str | bytes",
        "except OverflowError:\n        return": "except ZeroDivisionError:\n        return",
    },
    examples=250,
)
def what_a_function_gives_is_a_finite_number_or_none_with_a_reason(scores, value):
    found = scores.score_of(value)
    if isinstance(value, bool | str | list | None):
        assert found.score is None and found.reason
    elif abs(value) < 1e300:
        assert found == scores.ParsedScore(float(value))
    else:
        assert (found.score is None) == (found.reason is not None)
        assert found.score is None or math.isfinite(found.score)


NESTED = st.lists(
    st.lists(st.sampled_from(["0", "1", "10", "anchor", "m0"]), min_size=1, max_size=3).map(
        "/".join
    ),
    max_size=5,
    unique=True,
).map(lambda names: [Candidate(f"s/0/0/{n}", "s/0/0", (1,), n, True, 4) for n in names])
"""Candidates of one prompt whose ids may begin and end alike."""


class Echo:
    """Answers a question with its own text in place of a judge."""

    def ask(self, ctx, questions):
        for q in questions:
            yield Judgement(q.id, q.candidate_ids, "echo", 1.0, text=q.text)


def _compared(judge, candidates):
    prompt = Prompt("s/0/0", 0, (1,), "say")
    return list(judge.judge(context(Successor()), [prompt], [candidates]))


@over(
    "judges.self_judge",
    NESTED,
    mutants={
        "other.id.removeprefix(f'{other.prompt_id}/')": "other.id.rsplit('/', 1)[-1]",
        "if ctx.format == 1 and self.num_judgements == 1:": "if self.num_judgements == 1:",
        "for two in permutations(candidates, 2) for": "for two in zip(candidates, candidates[1:]) for",
    },
    examples=150,
)
def each_comparison_has_an_id_of_its_own(self_judge, candidates):
    judge = self_judge.PairwiseJudge(asker=Echo())
    found = _compared(judge, candidates)
    assert [j.id for j in found] == judge.judgement_ids(candidates)
    assert len({j.id for j in found}) == len(found)
    assert [j.candidate_ids for j in found] == list(permutations([c.id for c in candidates], 2))


@over(
    "judges.ensemble",
    NESTED,
    mutants={
        "key=len, reverse=True": "key=len",
        "judgement.id.removeprefix(f'{head}/{label}/')": "judgement.id.removeprefix(f'{head}/')",
    },
    examples=150,
)
def a_member_keeps_its_judgements_and_gives_them_back(ensemble, candidates):
    inner = EnsembleJudge(
        [
            PairwiseJudge(asker=Echo()),
            SelfJudge(DEFAULT_REWARD_CONFIG, SamplingConfig(), 2, asker=Echo()),
        ]
    )
    member = ensemble.Member(inner, "m0")
    kept, own = _compared(member, candidates), _compared(inner, candidates)
    assert [j.id for j in kept] == member.judgement_ids(candidates)
    assert len({j.id for j in kept}) == len(kept) and member.own(kept) == own


SHARES = st.sampled_from([Fraction(n, d) for d in (3, 7, 10) for n in (1, 2, 3, 8)])
"""That floats hold only nearly."""


def _meant(number):
    """The fraction of SHARES, or the whole number, that a float stands for."""
    return Fraction(round(number * 210), 210)


@over(
    "judges.ensemble",
    st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=4),
    mutants={
        "(exact(score), exact(weight))": "(score, weight)",
        "/ total)": "/ float(total))",
        "float(exact_sum(score * weight for": "float(exact_sum(score for",
    },
    examples=250,
)
def a_weighted_mean_is_that_of_the_fractions(ensemble, case):
    judge = ensemble.EnsembleJudge(
        [(FunctionJudge(lambda prompts, completions: []), float(weight)) for _, weight in case]
    )
    said = [
        Judgement(f"s/0/0/0/m{i}/j0", ("s/0/0/0",), f"m{i}:f", float(score))
        for i, (score, _) in enumerate(case)
    ]
    candidate = Candidate("s/0/0/0", "s/0/0", (1,), "", True, 4)
    wanted = sum(score * weight for score, weight in case) / sum(weight for _, weight in case)
    assert judge.scores([candidate], said) == {"s/0/0/0": float(wanted)}


@st.composite
def _judged(draw):
    """Candidates, and judgements of one or of two of them by several judges."""
    ids = [f"sr/0/0/{k}" for k in range(draw(st.integers(1, 4)))]
    score = st.none() | st.integers(0, 5).map(float) | SHARES.map(float)
    verdict = st.none() | st.sampled_from([0.0, 0.5, 1.0])
    alone = [
        ((one,), name, draw(score))
        for one in ids
        for name in ("self", "other")
        for _ in range(draw(st.integers(0, 3)))
    ]
    both = [(two, "compared", draw(verdict)) for two in permutations(ids, 2) if draw(st.booleans())]
    made = draw(st.permutations(alone + both))
    judgements = [
        Judgement(f"j{i}", who, judge, s, None if s is not None else "no_score")
        for i, (who, judge, s) in enumerate(made)
    ]
    return [Candidate(one, "sr/0/0", (1,), one, True, 4) for one in ids], judgements


def _naive_scores(candidates, judgements):
    found = {}
    for one in (candidate.id for candidate in candidates):
        per_judge = []
        for name in ("self", "other"):
            own = [j.score for j in judgements if (j.candidate_ids, j.judge) == ((one,), name)]
            known = [_meant(s) for s in own if s is not None]
            if own:
                per_judge.append(sum(known) / len(known) if known else None)
        met = {
            other
            for j in judgements
            for other in j.candidate_ids
            if len(j.candidate_ids) == 2 and one in j.candidate_ids
        } - {one}
        if met:
            outcomes = []
            for other in met:
                there = [
                    j.score
                    for j in judgements
                    if j.candidate_ids == (one, other) and j.score is not None
                ]
                back = [
                    1 - j.score
                    for j in judgements
                    if j.candidate_ids == (other, one) and j.score is not None
                ]
                if there and back:
                    outcomes.append(
                        1.0
                        if there[0] == back[0] == 1
                        else 0.0
                        if there[0] == back[0] == 0
                        else 0.5
                    )
            known = list(map(Fraction, outcomes))
            per_judge.append(sum(known) / len(known) if known else None)
        found[one] = None if not per_judge or None in per_judge else sum(per_judge) / len(per_judge)
    return found


@over(
    "scores",
    _judged(),
    mutants={
        "None if None in scores else _mean(scores)": "_mean(scores)",
        "won = there if there == back else 0.5": "won = there",
        "outcomes[other].append(exact(1 - won))": "outcomes[other].append(exact(won))",
        "exact_sum(known) / len(known)": "max(known)",
        "else sum(numbers, Fraction())": "else math.fsum(numbers)",
        "near if float(near) == number else held": "held",
        "held.limit_denominator(MOST)": "held.limit_denominator(5)",
    },
    examples=600,
)
def scores_of_candidates_are_those_of_a_second_way_to_count(judging, case):
    candidates, judgements = case
    found, wanted = judging.candidate_scores(candidates, judgements), _naive_scores(*case)
    assert found.keys() == wanted.keys()
    for one, score in wanted.items():
        assert found[one] == (None if score is None else float(score))


@over(
    "judges.templates",
    st.tuples(st.lists(LITERAL, min_size=3, max_size=3), ANY_TEXT | JINJA, ANY_TEXT | JINJA),
    mutants={
        "autoescape=False": "autoescape=True",
        "keep_trailing_newline=True": "keep_trailing_newline=False",
    },
    examples=500,
)
def a_judge_prompt_holds_its_texts_as_they_are(judging, case):
    (a, b, c), *texts = case
    prompt, response = (re.sub("[\ufdd0-\ufdef]", "", text) for text in texts)  # no characters
    render = judging.compile_prompt_template(
        f"{a}{{{{ prompt }}}}\n{b}{{{{ response }}}}{c}\n", auto_dedent=False
    )
    assert render(prompt, response) == f"{a}{prompt}\n{b}{response}{c}\n"


@over(
    "judges.templates",
    st.tuples(JINJA | JINJA.map(lambda text: text + "{{ prompt }}{{ response }}"), st.booleans()),
    mutants={
        'except TemplateError as error:\n        raise ConfigError(f"{name}': 'except KeyError as error:\n        raise ConfigError(f"{name}',
        "if names != set(wanted):": "if not names:",
        "except Exception as error:\n            raise _unrenderable": "except TemplateError as error:\n            raise _unrenderable",
    },
    examples=750,
)
def any_judge_template_renders_or_is_refused(judging, case):
    template, auto_dedent = case
    try:
        render = judging.compile_prompt_template(template, auto_dedent=auto_dedent)
    except ConfigError:
        return
    assert isinstance(render("a prompt", "a response"), str)
    assert "prompt" in template and "response" in template


@over(
    "judges.templates",
    JINJA | JINJA.map(lambda text: text + "{{ reward }}"),
    mutants={
        "if len(parts) != 2 or": "if",
        ' or any(mark in "".join(parts) for mark in ("{{", "{#", "{%"))': "",
    },
)
def any_score_template_is_a_pattern_or_refused(templates, template):
    try:
        before, after = templates.template_parts(template)
    except ConfigError:
        with pytest.raises(ConfigError):
            parsing.compile_score_pattern(template)
        return
    pattern = parsing.compile_score_pattern(template)
    assert re.fullmatch(
        re.escape(before) + r"\{\{\s*reward\s*\}\}" + re.escape(after), template.strip()
    )
    assert not any(mark in before + after for mark in ("{{", "{#", "{%"))
    assert parsing.parse_score(f"{before} 4 {after}\n", pattern).score in (4, None)


ROLE = st.sampled_from(["user", "assistant", "system", "tool"])
CONTENT = st.text(max_size=12) | st.sampled_from(["{{ 1 }}", "{% raw %}", "<b>&", " padded \n", ""])
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": CONTENT})
MESSAGES = st.tuples(
    st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": CONTENT}), max_size=1),
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": CONTENT}),
        min_size=1,
        max_size=4,
    ),
).map(lambda two: [*two[0], *two[1]])


@over(
    "data.chat",
    st.tuples(st.sampled_from(sorted(TEMPLATES)), MESSAGES, CONTENT),
    mutants={
        "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}": "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}",
        "{{ lead if loop.first else '' }}": "",
        "{{ message['content'] }}{{ eos_token }}\\n": "{{ message['content'] | e }}{{ eos_token }}\\n",
        "trim_blocks=True, lstrip_blocks=True, extensions": "autoescape=True, trim_blocks=True, lstrip_blocks=True, extensions",
    },
    examples=500,
)
def a_rendering_holds_every_message_and_goes_on_as_it_began(chat, case):
    """In the order of the messages; and a prompt is the beginning of itself with its answer."""
    name, messages, answer = case
    render = chat.renderer(chat.TEMPLATES[name], eos_token="</s>")
    open_text = render(messages, True)
    whole = render([*messages, {"role": "assistant", "content": answer}], False)
    assert whole.startswith(open_text)
    place = 0
    for message in messages:
        content = message["content"].strip() if name in ("llama-3", "gemma") else message["content"]
        found = open_text.find(content, place)
        assert found >= 0
        place = found + len(content)
    assert answer.strip() in whole[len(open_text) :]


@over(
    "data.chat",
    st.tuples(JINJA, st.lists(MESSAGE, min_size=1, max_size=3)),
    mutants={
        "except TemplateError as error:\n        raise ConfigError": "except KeyError as error:\n        raise ConfigError",
    },
    examples=500,
)
def any_chat_template_renders_or_is_refused(chat, case):
    template, messages = case
    try:
        text = chat.renderer(template)(messages, True)
    except (ConfigError, DataError):
        return
    assert isinstance(text, str)


CONTROLS, THOUGHTS = ("<s>", "</s>", "<s></s>", "<|im_end|>"), ("<think>", "</think>")
MARKED = st.lists(
    st.sampled_from(
        [*CONTROLS, *THOUGHTS, "a", " ", "\n", "|", "\U000f0000", "\U000f0001", "\ue000"]
    )
    | st.text(st.characters(), max_size=2),
    max_size=8,
).map("".join)


@over(
    "data.control_tokens",
    st.lists(MARKED, min_size=1, max_size=3),
    mutants={
        "and self.controls.is_plain(part)": "",
        "if mark not in used": "",
        "_any_of(_longest_first([*self.texts, *thoughts]))": "self._pattern",
        "parts += [text[last:start], self._marks[text[start:end]]]": "parts += [text[last:start]]",
    },
    examples=500,
)
def what_is_hidden_comes_back_as_text_and_nothing_else_does(control_tokens, texts):
    controls = control_tokens.Controls(CONTROLS, THOUGHTS)
    mask = controls.mask_for(texts)
    if mask is None:
        assert not any(map(controls.spans, texts))
        return
    masked = "".join(f"<s>{mask.hide(text)}</s>" for text in texts)
    pieces = mask.pieces(masked)
    assert "".join(text for text, _ in pieces) == "".join(f"<s>{text}</s>" for text in texts)
    open_text = "\0".join(text for text, is_plain in pieces if not is_plain)
    spelled = [open_text[start:end] for start, end in controls.spans(open_text)]
    assert "".join(spelled) == "<s></s>" * len(texts)  # those around the texts alone
    for thought in THOUGHTS:
        assert open_text.count(thought) == sum(text.count(thought) for text in texts)


JSON_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT


@over(
    "data.chat",
    st.one_of(
        ANY_TEXT,
        st.lists(
            MESSAGE
            | JSON_SCALARS
            | st.fixed_dictionaries(
                {"role": ROLE | JSON_SCALARS, "content": CONTENT | JSON_SCALARS}
            ),
            max_size=3,
        ),
        JSON_SCALARS,
    ),
    mutants={
        "not isinstance(role, str) or not isinstance(content, str)": "not isinstance(role, str)",
        "not isinstance(value, Sequence) or not value:": "not isinstance(value, Sequence):",
    },
)
def any_messages_are_roles_and_texts_or_refused(chat, value):
    try:
        messages = chat.messages_of(value, "a row")
    except DataError:
        assert not isinstance(value, str)
        return
    assert messages and all(set(m) == {"role", "content"} for m in messages)
    assert all(isinstance(text, str) for m in messages for text in m.values())
    if not isinstance(value, str):
        assert [m["content"] for m in messages] == [m["content"] for m in value]
    text = chat.transcript(messages)
    assert all(m["content"] in text for m in messages)


MODEL_TEXT = st.lists(
    st.sampled_from(
        [
            *(
                "9. ",
                "10. ",
                "11) ",
                "\n",
                "\n\n",
                "- ",
                "* ",
                "Task 9: ",
                "Answer: ",
                "Instruction: ",
                "**",
                "1. ",
                "a) ",
            ),
            *(
                "Name a fruit.",
                "Write this down:",
                "```",
                "```python\n",
                "---",
                "### ",
                "Sure! Here are more tasks:\n",
            ),
            *(
                '"',
                "“",
                "”",
                "  ",
                "   1. ",
                "Q: ",
                "Output:",
                "12",
                "٣. ",
                "\u2028",
                "\r",
                "\x0b",
                "#",
                "_",
            ),
        ]
    )
    | st.text(st.characters(), max_size=4),
    max_size=20,
).map("".join)


@over(
    "stages.self_instruct.reading",
    st.tuples(MODEL_TEXT, st.integers(1, 12), st.booleans()),
    mutants={
        "return text if any(character.isalpha() for character in text)": "return text if True",
        "return reader.instructions[:whole]": "return reader.instructions",
        'counts.count("unfinished")': "pass",
    },
    examples=750,
)
def instructions_are_clean_and_what_is_cut_off_is_counted(reading, case):
    text, first, finished = case
    whole = reading.parse_instructions(text, first_number=first)
    assert all(item.strip() == item and any(map(str.isalpha, item)) for item in whole)
    assert sum(map(len, whole)) <= len(text)
    letters = "".join(text.split())
    assert all(
        "".join(line.split()) in letters
        for item in whole
        for line in item.splitlines()
        if "*" not in line + text
    )
    counts = None if finished else FilterCounts()
    found = reading.parse_instructions(text, first_number=first, finished=finished, counts=counts)
    assert found == whole[: len(found)]
    assert counts is None or len(whole) == len(found) + counts.dropped["unfinished"]


SENTENCE = st.lists(
    st.sampled_from(["name", "write", "fruit", "three", "city", "river"]), min_size=2, max_size=5
).map(lambda words: " ".join(words).capitalize() + ".")
NUMBERING = st.sampled_from(
    [
        "{n}. {text}\n",
        "{n}) {text}\n\n",
        "**{n}.** {text}\n",
        "Task {n}: {text}\n",
        "### Task {n}:\n{text}\n\n",
        "{n}. Task: {text}\n",
    ]
)


@over(
    "stages.self_instruct.reading",
    st.tuples(st.lists(SENTENCE, min_size=1, max_size=6), st.integers(1, 20), NUMBERING),
    mutants={
        '_LABEL.sub("", "\\n".join(kept).strip(), count=1)': '"\\n".join(kept)',
        "self.number < number <= self.number + 1 + SKIPPED_NUMBERS": "self.number + 1 < number <= self.number + 1 + SKIPPED_NUMBERS",
        "self.has_begun, self.number, self.item_indent, self.item = True, number, indent, []": "self.has_begun, self.number, self.item_indent, self.item = True, 1, indent, []",
    },
    examples=300,
)
def a_numbered_list_is_read_as_it_was_written(reading, case):
    sentences, first, form = case
    text = "".join(form.format(n=first + i, text=one) for i, one in enumerate(sentences))
    assert reading.parse_instructions(text, first_number=first) == sentences


WORDS = st.lists(st.sampled_from(["a", "b", "c", "B", "der", "é", "９"]), max_size=12).map(" ".join)


def _naive_rouge(a: str, b: str) -> float:
    one, other = (re.findall(r"[^\W_]+", text.lower()) for text in (a, b))
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, x in enumerate(one):
        for j, y in enumerate(other):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    total = len(one) + len(other)
    return 2 * table[-1][-1] / total if total else 0.0


@over(
    "stages.self_instruct.filters",
    st.tuples(WORDS | ANY_TEXT, WORDS | ANY_TEXT),
    mutants={
        "LCSseq.similarity(words_a, words_b)": "len({*words_a} & {*words_b})",
        "return 2 * common / total if total else 0.0": "return 2 * common / total",
        "text.lower()))": "text))",
    },
)
def rouge_l_is_that_of_a_table_and_of_both_orders(filters, case):
    a, b = case
    found = filters.rouge_l(a, b)
    assert found == filters.rouge_l(b, a) == _naive_rouge(a, b) and 0 <= found <= 1
    assert filters.rouge_l(a, a) in (0.0, 1.0)


@over(
    "stages.self_instruct.filters",
    st.tuples(st.lists(WORDS, max_size=6), WORDS, st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])),
    mutants={
        "[: n - k + 1]": "[: n - k]",
        "_f1(min(len(words), len(other)), total) <= self.max_rouge_l": "_f1(min(len(words), len(other)), total) <= 0.9",
        "if _fold(text) in self._folded:": "if text in self._folded:",
    },
)
def a_pool_finds_what_a_look_at_every_text_finds(filters, case):
    texts, new, limit = case
    found = filters.InstructionPool(texts, max_rouge_l=limit).problem(new)
    folded = [" ".join(text.casefold().split()) for text in (*texts, new)]
    naive = "duplicate" if folded[-1] in folded[:-1] else None
    if naive is None and any(_naive_rouge(text, new) > limit for text in texts):
        naive = "similar"
    assert found == naive


@over(
    "stages.self_instruct.filters",
    st.lists(
        WORDS
        | ANY_TEXT
        | st.sampled_from(
            [
                "Draw a map of the town.",
                "write  a program that counts",
                "a mapped area of towns",
                "¡Que tal amigo mio",
                "draws of the lottery here",
            ]
        ),
        max_size=5,
    ),
    mutants={
        "self.kept += 1": "pass",
        r"{'|'.join(filter(None, wanted))})(?!\w)": r"{'|'.join(filter(None, wanted))})",
        'return "too_short"': "return None",
        "not first.isascii()": "False",
    },
)
def instructions_are_kept_or_dropped_by_rules_that_can_be_said_again(filters, texts):
    counts = filters.FilterCounts()
    for text in texts:
        problem = filters.instruction_problem(text)
        counts.count(problem)
        words = text.split()
        tests = {
            "too_short": len(words) < 4,
            "too_long": len(words) > 150,
            "keyword": bool(
                {"draw", "map", "image", "graph"} & set(re.findall(r"\w+", text.lower()))
            ),
            "program": [word.lower().rstrip(".,:;") for word in words[:3]]
            == ["write", "a", "program"],
            "first_character": not re.match(r"\s*[A-Za-z0-9\x00-\x1f\x7f]", text),
        }
        assert problem == next((name for name, holds in tests.items() if holds), None)
    assert counts.kept + counts.dropped.total() == len(texts)
    assert sum(counts.metrics().values()) == len(texts)
