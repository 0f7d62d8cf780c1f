"""New instructions: what a model is shown, what is read of its text, and what is left out."""

import random
import time
from collections import Counter

import pytest

from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.stages.self_instruct.few_shot import Example, few_shot_prompt
from self_rewarding_lm.stages.self_instruct.filters import (
    FilterCounts,
    InstructionPool,
    instruction_problem,
    rouge_l,
)
from self_rewarding_lm.stages.self_instruct.reading import parse_instructions

SEEDS = [Example(f"seed/{i}", f"Seed task number {i}") for i in range(10)]
OWN = [Example(f"own/{i}", f"Own task number {i}") for i in range(5)]
TEXTS = {example.id: example.text for example in SEEDS + OWN}


def parse(text, *, first_number=9, **settings):
    return parse_instructions(text, first_number=first_number, **settings)


# --- the prompt


def kinds(shot):
    return Counter(parent.split("/")[0] for parent in shot.parents)


def test_six_seeds_and_two_generated_in_a_list_that_ends_with_9():
    shot = few_shot_prompt(SEEDS, OWN, key=1)
    assert kinds(shot) == {"seed": 6, "own": 2} and len(set(shot.parents)) == 8
    header, _, *listed, end = shot.text.split("\n")
    assert listed == [f"{i}. {TEXTS[p]}" for i, p in enumerate(shot.parents, start=1)]
    assert end == "9." and shot.first_number == 9
    assert "Go on with the list" in header and "under each number" in header


@pytest.mark.parametrize(("seeds", "own", "expected"), [(10, 0, 8), (10, 1, 7), (3, 0, 3)])
def test_seeds_take_the_places_of_missing_generated_examples(seeds, own, expected):
    shot = few_shot_prompt(SEEDS[:seeds], OWN[:own], key=5)
    assert kinds(shot) == Counter(seed=expected, own=own)
    assert shot.text.endswith(f"\n{len(shot.parents) + 1}.")
    assert len(set(shot.parents)) == len(shot.parents)


def test_generated_examples_do_not_take_the_places_of_missing_seeds():
    assert kinds(few_shot_prompt(SEEDS[:1], OWN, key=5)) == {"seed": 1, "own": 2}
    assert kinds(few_shot_prompt([], OWN, key=5)) == {"own": 2}


def test_the_choice_depends_on_the_key_and_not_on_global_state():
    random.seed(1)
    first = few_shot_prompt(SEEDS, OWN, key=2**64 - 1)
    random.seed(2)
    assert few_shot_prompt(SEEDS, OWN, key=2**64 - 1) == first
    assert len({few_shot_prompt(SEEDS, OWN, key=key).parents for key in range(50)}) == 50


def test_every_example_is_shown_equally_often_and_in_every_place():
    shots = [few_shot_prompt(SEEDS, OWN, key=key).parents for key in range(4000)]
    shown = Counter(parent for shot in shots for parent in shot)
    for example in SEEDS:  # 6 of 10; the standard deviation is 31
        assert shown[example.id] == pytest.approx(2400, abs=160)
    for example in OWN:  # 2 of 5
        assert shown[example.id] == pytest.approx(1600, abs=160)
    places = Counter(i for shot in shots for i, p in enumerate(shot) if p.startswith("own"))
    assert all(places[i] == pytest.approx(1000, abs=140) for i in range(8))  # 2 of 8 each


def test_all_orders_of_three_are_equally_likely():
    orders = Counter(few_shot_prompt(SEEDS[:3], [], key=key).parents for key in range(6000))
    assert len(orders) == 6
    assert all(count == pytest.approx(1000, abs=145) for count in orders.values())  # 5 deviations


def test_newlines_in_an_example_are_folded():
    shot = few_shot_prompt([Example("a", " Sort:\n\n- pears\r\n-\tapples ")], [], key=0)
    assert shot.text.split("\n")[2:] == ["1. Sort: - pears - apples", "2."]


def test_what_cannot_be_shown_is_an_error():
    with pytest.raises(DataError, match="0 seeds and 0 generated"):
        few_shot_prompt([], [], key=0)
    with pytest.raises(DataError, match="'blank' is empty"):
        few_shot_prompt([Example("blank", " \n")], [], key=0)
    with pytest.raises(ConfigError, match="num_seed=-1"):
        few_shot_prompt(SEEDS, OWN, num_seed=-1, key=0)
    with pytest.raises(ConfigError, match="num_seed=0 and num_generated=0"):
        few_shot_prompt(SEEDS, OWN, num_seed=0, num_generated=0, key=0)


# --- reading


NAMED = ["Name three kinds of cheese.", "Why is the sky blue?", "Tell me a joke"]


@pytest.mark.parametrize(
    "text",
    [
        " Name three kinds of cheese.\n10. Why is the sky blue?\n11. Tell me a joke",
        "Name three kinds of cheese.\n\n10. Why is the sky blue?\n\n\n11. Tell me a joke\n",
        "9. Name three kinds of cheese.\n10. Why is the sky blue?\n11. Tell me a joke",
        "1. Name three kinds of cheese.\n2. Why is the sky blue?\n3. Tell me a joke",
        "9) Name three kinds of cheese.\n10) Why is the sky blue?\n11) Tell me a joke",
        "(9) Name three kinds of cheese.\r\n(10) Why is the sky blue?\r\n(11) Tell me a joke",
        "Task 9: Name three kinds of cheese.\nTask 10: Why is the sky blue?\nTask 11: Tell me a joke",
        "**Task 9:** Name three kinds of cheese.\n**Task 10:** Why is the sky blue?\n"
        "**Task 11:** Tell me a joke",
        "### Task 9\nName three kinds of cheese.\n\n### Task 10\n\nWhy is the sky blue?\n\n"
        "### Task 11\nTell me a joke",
        "**9. Name three kinds of cheese.**\n**10. Why is the sky blue?**\n**11. Tell me a joke**",
        "**9.** Name three kinds of cheese.\n**10.** Why is the sky blue?\n**11.** Tell me a joke",
        "9. **Name three kinds of cheese.**\n10. **Why is the sky blue?**\n11. **Tell me a joke**",
        '9. "Name three kinds of cheese."\n10. “Why is the sky blue?”\n11. "Tell me a joke"',
        "- Name three kinds of cheese.\n- Why is the sky blue?\n- Tell me a joke",
        "* Name three kinds of cheese.\n\n* Why is the sky blue?\n\n* Tell me a joke",
        "  • Name three kinds of cheese.\n  • Why is the sky blue?\n  • Tell me a joke",
        "- 9. Name three kinds of cheese.\n- 10. Why is the sky blue?\n- 11. Tell me a joke",
        " 9. Name three kinds of cheese.\n10. Why is the sky blue?\n11. Tell me a joke",
        "9. Name three kinds of cheese.\n9. Why is the sky blue?\n9. Tell me a joke",
        "1. Name three kinds of cheese.\n1. Why is the sky blue?\n1. Tell me a joke",
        "9. Name three kinds of cheese.\n11. Why is the sky blue?\n14. Tell me a joke",
        "1. 1. Name three kinds of cheese.\n2. 2. Why is the sky blue?\n3. 3. Tell me a joke",
        "1. Task: Name three kinds of cheese.\n2. Task: Why is the sky blue?\n3. Task: Tell me a joke",
        "Instruction: Name three kinds of cheese.\nInstruction: Why is the sky blue?\n"
        "Instruction: Tell me a joke",
        "٩. Name three kinds of cheese.\n١٠. Why is the sky blue?\n١١. Tell me a joke",
        "９．Name three kinds of cheese.\n１０．Why is the sky blue?\n１１．Tell me a joke",
        "```\n9. Name three kinds of cheese.\n10. Why is the sky blue?\n11. Tell me a joke\n```",
        "9.\nName three kinds of cheese.\n10.\n\nWhy is the sky blue?\n11.\nTell me a joke",
        "Sure! Here are three more tasks:\n\n9. Name three kinds of cheese.\n"
        "10. Why is the sky blue?\n11. Tell me a joke",
        "Sure!\nHere are more tasks:\n1. Name three kinds of cheese.\n2. Why is the sky blue?\n"
        "3. Tell me a joke",
        "Below are three more tasks:\n\n---\n\n9. Name three kinds of cheese.\n"
        "10. Why is the sky blue?\n11. Tell me a joke",
        "Going on:\n9. Name three kinds of cheese.\n10. Why is the sky blue?\n11. Tell me a joke",
        "Here are more tasks:\n\n- Name three kinds of cheese.\n- Why is the sky blue?\n"
        "- Tell me a joke",
        "Here is the list:\n```\n9. Name three kinds of cheese.\n10. Why is the sky blue?\n"
        "11. Tell me a joke\n```\nI hope it helps.",
        "## New tasks\n\n9. Name three kinds of cheese.\n10. Why is the sky blue?\n"
        "11. Tell me a joke\n\nLet me know if you want more!",
    ],
)
def test_the_forms_in_which_models_go_on_with_a_list(text):
    assert parse(text) == NAMED


def test_random_instructions_come_back_from_every_form():
    draw = random.Random(3)
    words = ["write", "the", "7", "red,", "(big)", "John's", "3.5", "x-ray", "what?", "so;", "I"]
    forms = ["{n}. {t}", "{n}) {t}", "**{n}.** {t}", "Task {n}: {t}", "- {n}. {t}", "#{n}. {t}"]
    for _ in range(300):
        texts = [
            "Say " + " ".join(draw.choices(words, k=draw.randint(1, 12)))
            for _ in range(draw.randint(1, 8))
        ]
        first, gap = draw.randint(1, 9), draw.choice(["\n", "\n\n"])
        form = draw.choice(forms)
        listed = [form.format(n=n, t=t) for n, t in enumerate(texts, start=first)]
        assert parse(gap.join(listed), first_number=first) == texts
        base = gap.join([f" {texts[0]}", *listed[1:]])
        assert parse(base, first_number=first) == texts


@pytest.mark.parametrize(
    "answered",
    [
        "Name a fruit.\nAnswer: An apple.",
        "Name a fruit.\n\n**Answer:** An apple.",
        "Name a fruit.\nResponse: An apple.\nIt is red.",
        "Name a fruit.\nOutput:\nAn apple.",
        "Name a fruit.\nInput: red",
        "Name a fruit.\nExample output: An apple",
        "Name a fruit.\n### Response\nAn apple",
        "Name a fruit.\nA: An apple",
        "Name a fruit. Answer: An apple",
        "Name a fruit. **Response:** An apple",
        "Name a fruit.\n---\nAn apple",
        "Name a fruit.\n\n***\n\nAn apple\n\nA pear",
        "Name a fruit.\n###\nAn apple",
        "Name a fruit.\n- - -\n- An apple\n- A pear",
        "Name a fruit.\n\nAn apple is a fruit.",
        "Name a fruit.\nThe answer to this is: an apple.",
        "Name a fruit.\n## Fruit\nAn apple.",
        "Name a fruit.\n\n1. An apple\n2. A pear\n3. A plum",
        "Name a fruit.\n\n- An apple\n- A pear",
        "Name a fruit.\nAnswer:\n1. An apple\n2. A pear\n3. A plum",
        "Name a fruit.\nAnswer:\n```\n10. An apple\n```",
    ],
)
def test_an_answer_is_left_out_and_the_next_instruction_is_read(answered):
    """Appendix A.5 of arXiv:2401.10020: later models answer what they wrote themselves."""
    assert parse(f" {answered}") == ["Name a fruit."]
    assert parse(f"9. {answered}") == ["Name a fruit."]
    assert parse(f"9. {answered}\n10. Name a bird.") == ["Name a fruit.", "Name a bird."]
    assert parse(f" {answered}\n\n10. Name a bird.") == ["Name a fruit.", "Name a bird."]


def test_a5_several_instructions_a_separator_and_answers_with_the_same_numbers():
    text = "9. Name a fruit.\n10. Name a bird.\n\n---\n\n9. An apple.\n10. A wren.\n11. And so on."
    assert parse(text) == ["Name a fruit.", "Name a bird."]


def test_an_answer_in_points_hides_no_instruction_behind_it():
    points = "".join(f"{i}. A fine point\n" for i in range(1, 13))  # it counts past 10
    assert parse(f"9. Make points.\nAnswer:\n{points}10. Name a bird.") == [
        "Make points.",
        "Name a bird.",
    ]
    assert parse("1. Name two.\nAnswer:\n1. One\n2. Two\n2. Name a bird.") == [
        "Name two.",
        "Name a bird.",
    ]


@pytest.mark.parametrize(
    "item",
    [
        "Do both: 1. do a 2. do b",
        "1. do a 2. do b",
        "Do these in order:\n1. Peel it\n2. Eat it",
        "Do these in order:\n\n1. Peel it\n\n2. Eat it",
        "Do these in order:\n   1. Peel it\n   2. Eat it",
        "Rank the cities.\n- Rome\n- Oslo",
        "Rank the cities.\n1. Rome\n2. Oslo",
        "Rank the cities:\n\n- Rome\n- Oslo",
        "Rank the cities:\n\n- Rome\n\n- Oslo\n\n- Bonn",
        "Which is the largest?\nA) Rome\nB) Oslo",
        "Shorten this text:\n\nIt was a dark night. It rained.",
        "What does this do?\n```python\n1. + 2.\n\n---\nprint('9. x')  # Answer: 3\n```",
        "Write about the\nlong way home.",
        "Answer in one word: is it 3.14 or 2,718?",
        "Why did it begin in\n1914 and not later?",
        "Read this. Question: who is the best of them?",
    ],
)
def test_lists_code_and_announced_text_stay_in_their_instruction(item):
    plain = "\n".join(" ".join(line.split()) for line in item.split("\n") if line.strip())
    if "```" in item:
        plain = item
    assert parse(f"9. {item}\n10. Name a bird.") == [plain, "Name a bird."]
    assert parse(f" {item}\n10. Name a bird.") == [plain, "Name a bird."]
    assert parse(f"{item}\n\n10. Name a bird.") == [plain, "Name a bird."]


def test_an_indented_line_belongs_to_the_item_above_it():
    text = "9. Write a letter.\n   It is to a friend.\n\n   Keep it short.\n10. Name a bird."
    assert parse(text) == [
        "Write a letter.\nIt is to a friend.\nKeep it short.",
        "Name a bird.",
    ]


def test_a_list_with_the_numbers_of_the_items_is_told_from_them():
    deeper = "1. Do these:\n   1. Peel it\n2. Name a bird."
    assert parse(deeper) == ["Do these:\n1. Peel it", "Name a bird."]
    announced = "1. Do these:\n1. Peel it\n2. Eat it\n2. Name a bird."
    assert parse(announced) == ["Do these:\n1. Peel it\n2. Eat it", "Name a bird."]
    points = "- Rank these.\n    - Rome\n    - Oslo\n- Name a bird."
    assert parse(points) == ["Rank these.\n- Rome\n- Oslo", "Name a bird."]


def test_the_next_number_in_an_item_begins_none_within_a_line():
    assert parse("9. Tell me. 10. Tell him.") == ["Tell me. 10. Tell him."]


def test_a_lone_mark_of_code_is_taken_off():
    assert parse("9. Name a fruit.\n```") == ["Name a fruit."]


def test_questions_and_dialogues_keep_the_question():
    assert parse("Q: Why is it?\nA: So.\nQ: And this?\nA: So.") == ["Why is it?"]
    assert parse("User: Name a fruit.\nAssistant: An apple.") == ["Name a fruit."]
    text = "Instruction: Add them.\nInput: 1, 2\nOutput: 3\n\nInstruction: Halve it.\nInput: 4"
    assert parse(text) == ["Add them.", "Halve it."]


def test_powers_and_dunder_names_are_no_markup():
    text = "9. **Maths**: what is 2**10 and 3**2?\n10. What does __init__ do in a class?"
    assert parse(text) == ["Maths: what is 2**10 and 3**2?", "What does __init__ do in a class?"]


def test_what_a_cut_off_text_was_writing_is_dropped_and_counted():
    counts = FilterCounts()
    text = " Name a fruit.\n10. Name a bi"
    assert parse(text, counts=counts) == ["Name a fruit.", "Name a bi"] and not counts.dropped
    assert parse(text, finished=False, counts=counts) == ["Name a fruit."]
    assert parse(" Name a fr", finished=False, counts=counts) == []
    assert counts == FilterCounts(Counter(unfinished=2))


@pytest.mark.parametrize(
    "answer", ["\nAnswer: An ap", " Answer: An ap", "\n---\nAn ap", "\n\nAn ap"]
)
def test_an_instruction_with_a_cut_off_answer_is_whole(answer):
    counts = FilterCounts()
    assert parse(f"9. Name a fruit.{answer}", finished=False, counts=counts) == ["Name a fruit."]
    assert not counts.dropped


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t\n",
        "9.",
        "9.\n10.\n11.",
        "1 2 3 4 5 6 7",
        "9. 10. 11. 12.",
        "1\n2\n3\n",
        "9. 42\n10. 3.14 * 2 = 6.28",
        "---\n***\n###",
        "```\n```",
        "- \n- \n",
        "**",
        "9. **\n10. ****",
        "Answer: 5",
        "9. Answer: An apple",
        "Sure, here are some more tasks for you!",
        "I'm sorry, but I can't do that.",
        "😀\n9. 🎉🎉",
        "٣. ٤٥",
        "\x00\x0b\x1c",
        "²³ ½",
    ],
)
def test_a_text_without_an_instruction_gives_none(text):
    counts = FilterCounts()
    assert parse(text) == []
    assert parse(text, finished=False, counts=counts) == [] and not counts.dropped


def test_ten_thousand_words_are_one_instruction_that_is_too_long():
    text = " ".join(["word"] * 10_000)
    (read,) = parse(text[:19_999])
    assert instruction_problem(read) == "too_long"
    counts = FilterCounts()
    assert parse(f"9. Name a fruit.\n10. {text}", counts=counts) == ["Name a fruit."]
    assert counts.dropped == {"unfinished": 1}  # it goes on after what is read


@pytest.mark.parametrize(
    "piece",
    ["**a ", "- ", "-", "#", "*", "_ ", "1. ", "9. a\n", "1. a\n", "- a\n", "a\n", "\n", " ", "`",
     "```\n", ". Answer", "task 1 ", "Here list ", "“", "9. 10. ", ":\n", "1)\n", "Answer:\n", "( "],
)  # fmt: skip
def test_no_text_takes_long_to_read(piece):
    start = time.perf_counter()
    parse(piece * (20_000 // len(piece)))
    parse("Here are tasks " + piece * (19_000 // len(piece)) + "\n9. x")
    assert time.perf_counter() - start < 30  # with types checked at run time; without, 0.3


def test_any_mixture_of_lines_gives_clean_instructions():
    draw = random.Random(0)
    lines = [
        *("9. Name a fruit.", "10. Name a bird.", "1. Peel it", "2. Eat it", "- a point", "- - -"),
        *("Answer: x", "---", "```", "  3. deep", "Sort these:", "Sure!", "### Task 12", "Output:"),
        *("**13. Bold**", "plain words", "# Title", "11)", "A) one", '"quoted"', "Instruction:"),
        *("", "9.", "* star", "···", "Input: y", "Here are more tasks:"),
    ]
    for _ in range(1500):
        text = draw.choice(["", " "]) + "\n".join(draw.choices(lines, k=draw.randint(1, 12)))
        whole, cut = parse(text), parse(text, finished=False)
        assert cut in (whole, whole[:-1])
        for item in whole:
            assert item == item.strip() and any(c.isalpha() for c in item)
            if "```" not in item:
                assert "Answer:" not in item and "Input:" not in item and "---" not in item


# --- filters


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Tell a joke", "too_short"),
        ("Tell me a joke", None),
        ("", "too_short"),
        (" ".join(["word"] * 150), None),
        (" ".join(["word"] * 151), "too_long"),
        ("Describe this picture to me", "keyword"),
        ("Look at both MAPS, then answer", "keyword"),
        ("Please go  to the next page", "keyword"),
        ("Go\nto the next page please", "keyword"),
        ("What is an image-based test?", "keyword"),
        ("Explain the autograph and the mapping of profiles", None),
        ("He is going to the plotted place", None),
        ("Write a program that sorts numbers", "program"),
        ("write a  Program that sorts numbers", "program"),
        ("Write a programme for the school concert", None),
        ("Can you write a program for me?", None),
        ("Write a poem about a program", None),
        ("- tell me a joke", "first_character"),
        (" (tell me a joke)", "first_character"),
        ("“Tell me a joke", "first_character"),
        ("Écris une courte histoire drôle", "first_character"),
        ("Tell me about Édith Piaf", None),
        ("3 wishes: which are yours?", None),
        ("٣ wishes: which are yours?", "first_character"),
    ],
)
def test_filters_that_need_no_other_instruction(text, problem):
    assert instruction_problem(text) == problem


def test_the_limits_of_the_filters_are_settings():
    assert instruction_problem("Tell a joke", min_words=3) is None
    assert instruction_problem("Tell me a joke", max_words=3) == "too_long"
    assert instruction_problem("Draw a map of Rome", keywords=()) is None
    assert instruction_problem("Draw a map of Rome", keywords=[""]) is None
    assert instruction_problem("What is C++ good for?", keywords=["C++"]) == "keyword"
    assert instruction_problem("What is C good for?", keywords=["C++", "Rome"]) is None


def naive_rouge_l(a, b):
    """The textbook table over words; precision, recall and their harmonic mean."""
    a, b = ("".join(c if c.isalnum() else " " for c in text.lower()).split() for text in (a, b))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            longest = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else longest
    common = table[-1][-1]
    if not common:
        return 0.0
    precision, recall = common / len(b), common / len(a)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("the cat sat on the mat", "The cat sat on the mat!", 1.0),
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin (2004), section 3.1
        ("police killed the gunman", "the gunman kill police", 0.5),  # the same words, turned
        ("a b c d", "d c b a", 0.25),
        ("a a a b", "a b", 2 / 3),
        ("snake_case name", "snake case name", 1.0),
        ("tasks", "task", 0.0),  # no stemming
        ("", "", 0.0),
        ("...", "...", 0.0),
        ("日本語 東京", "東京", 2 / 3),
    ],
)
def test_rouge_l_by_hand(a, b, expected):
    assert rouge_l(a, b) == pytest.approx(expected)
    assert naive_rouge_l(a, b) == pytest.approx(expected)


def random_text(draw, words, length):
    return " ".join(draw.choices(words, k=draw.randint(0, length)))


def test_rouge_l_is_that_of_the_naive_table():
    draw = random.Random(7)
    for alphabet in (["a"], ["a", "b"], ["a", "B", "c", "D", "e"], [f"w{i}" for i in range(30)]):
        for _ in range(250):
            a, b = (random_text(draw, alphabet, 90) for _ in range(2))
            assert rouge_l(a, b) == pytest.approx(naive_rouge_l(a, b), abs=1e-12)
            assert rouge_l(a, b) == rouge_l(b, a)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 2 / 3, 0.7, 0.75, 0.9, 1.0])
def test_the_pool_finds_what_comparing_with_every_text_finds(threshold):
    """It skips most comparisons; the thresholds include scores that occur exactly."""
    draw = random.Random(11)
    words, found, held = [f"w{i}" for i in range(12)], Counter(), []
    pool = InstructionPool([], max_rouge_l=threshold)
    for _ in range(80):
        near = draw.choice(held or ["w1 w2"]).split()
        changed = near[: draw.randint(0, len(near))] + draw.choices(words, k=draw.randint(0, 3))
        for text in (" ".join(changed), random_text(draw, words, 9)):
            expected = None
            if text in held:
                expected = "duplicate"
            elif any(rouge_l(text, one) > threshold for one in held):
                expected = "similar"
            assert pool.problem(text) == expected
            found[expected] += 1
        held.append(text)
        pool.add(text)
    assert found[None] and (found["similar"] or threshold == 1.0)


def test_seven_of_ten_words_are_not_too_similar_and_eight_are():
    seed = "one two three four five six seven eight nine ten"
    pool = InstructionPool([seed])
    assert pool.problem("one two three four five six seven x y z") is None  # 0.7 is not above 0.7
    assert pool.problem("one two three four five six seven eight y z") == "similar"
    assert pool.problem("ten nine eight seven six five four three two one") is None  # 0.1


def test_the_same_text_but_for_case_and_white_space_is_a_duplicate():
    pool = InstructionPool(["Name  a\nfruit", "???"], max_rouge_l=1.0)
    assert pool.problem(" name a FRUIT ") == "duplicate"
    assert pool.problem("Name a fruit!") is None  # 1.0 is not above 1.0
    assert pool.problem("???") == "duplicate" and pool.problem("!!!") is None
    assert InstructionPool([]).problem("Name a fruit") is None


def test_later_instructions_are_held_against_those_that_were_added():
    pool = InstructionPool([])
    assert pool.problem("Name a red fruit") is None  # asking adds nothing
    assert pool.problem("Name a red fruit") is None
    pool.add("Name a red fruit")
    assert pool.problem("Name a red fruit") == "duplicate"
    assert pool.problem("Name a red fruit!") == "similar"


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        InstructionPool([], max_rouge_l=threshold)


def test_a_pool_of_thousands_is_quick_and_long_texts_are_no_trouble():
    draw = random.Random(5)
    words = [f"w{int(draw.paretovariate(0.6))}" for _ in range(20_000)]  # some in most texts
    pool = InstructionPool([" ".join(draw.choices(words, k=15)) for _ in range(2000)])
    start = time.perf_counter()
    for _ in range(20):
        pool.problem(" ".join(draw.choices(words, k=15)))
    assert pool.problem(" ".join(["w1"] * 10_000)) is None
    assert rouge_l(" ".join(["a", "b"] * 2500), " ".join(["b", "a"] * 2500)) == 4999 / 5000
    assert time.perf_counter() - start < 20


# --- counting


def test_what_is_left_out_is_counted_by_reason():
    counts = FilterCounts()
    for problem in ("similar", None, "too_short", "similar", None):
        counts.count(problem)
    assert counts.metrics() == {
        "prompts/kept": 2,
        "prompts/dropped_similar": 2,
        "prompts/dropped_too_short": 1,
    }
    assert counts.in_words() == "2 similar, 1 too_short"
    assert FilterCounts().in_words() == "none" and FilterCounts().metrics() == {"prompts/kept": 0}
    counts.add(FilterCounts(Counter(similar=1, keyword=4), kept=3))
    assert counts == FilterCounts(Counter(similar=3, keyword=4, too_short=1), kept=5)
