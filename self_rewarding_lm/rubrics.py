"""The library's own judge prompts, as texts. How they are rendered and read is in `judges/`."""

DEFAULT_JUDGE_PROMPT = """\
Rate the response to the user's request on an additive scale from 0 to 5. Start at 0 and add one
point for each statement that is true:
- The response is about the request and gives some relevant information.
- It covers a good part of what was asked, if not all of it.
- It answers the main points in a way that helps the user.
- It is written as an assistant speaking to this user: direct, complete and well ordered.
- It fits the request exactly: expert, engaging, nothing superfluous.
Write a short review of at most 100 words, then end with the total on a line of its own, in the
form "Score: <points>".

Request: {{ prompt }}

Response: {{ response }}

Review:"""


TEN_POINT_JUDGE_PROMPT = """\
Grade the response to the user's request with a whole number from 0 to 10:
- 0: empty, unreadable or harmful.
- 1 to 2: beside the point, or wrong in what matters.
- 3 to 4: about the request, but most of what was asked is missing or wrong.
- 5 to 6: helps in part; has gaps or mistakes that the user has to mend.
- 7 to 8: right and complete in all that matters; small flaws in clarity, order or length.
- 9: right, complete, clear, and no longer than it has to be.
- 10: nothing could be made better.
Use the whole scale, and do not grade higher for length. Write a short review of at most 100 words,
then end with the grade on a line of its own, in the form "Score: <0 to 10>".

Request: {{ prompt }}

Response: {{ response }}

Review:"""


PAPER_LENGTH_JUDGE_PROMPT = """\
You are given a question of a user and a response to it. Judge the response with the additive
scale of five points that is described here. A point is added to the ones before it when its
criterion is met:
- One point if the response has to do with the question and offers some information on it, even
if much is missing or part of it is beside the point.
- A second point if the response deals with a considerable part of the question, without settling
it completely or answering it outright.
- A third point if the response gives a useful answer to the essential parts of the question. It
does not matter here whether an AI assistant seems to have written it or whether it reads like a
blog post or a search result.
- A fourth point if the response is plainly written from the point of view of an AI assistant,
takes up the question directly and in full, is well organised and helpful, and leaves only little
to improve in clarity, brevity or focus.
- A fifth point if the response is tailored to the question without a flaw, contains nothing that
is not needed, shows the knowledge of an expert, and is engaging and full of insight.

User: {{ prompt }}

<response>{{ response }}</response>

Once you have examined the question and the response:
- Give reasons for your total in at most 100 words.
- End with the total, in this form: "Score: <total points>"

Keep the point of view of an AI assistant, and draw on what a web search would tell where that
helps. Go through the criteria one after the other and let the total follow from them.
"""


COMPARISON_PROMPT = """\
Two responses to one request of a user are shown, A and B. Decide which of them serves the user
better: which is more helpful, more correct and more to the point. Their order does not count, nor
does their length. Write a short review of at most 100 words, then end with the verdict on a line
of its own, in the form "Better: <A or B>".

Request: {{ prompt }}

Response A: {{ response_a }}

Response B: {{ response_b }}

Review:"""


STEP_COMPARISON_PROMPT = """\
A question is shown with an answer to it as far as it is written, and two steps, A and B, with which
the answer could go on. Decide which of them is the better next step: what it says is right, it
follows from what is there, and it brings the answer nearer to its end. Their order does not count,
nor does their length. Do not write the answer yourself. Write a short review of at most 100 words,
then end with the verdict on a line of its own, in the form "Better: <A or B>".

The question, and the answer so far: {{ prompt }}

Step A: {{ response_a }}

Step B: {{ response_b }}

Review:"""


META_JUDGE_PROMPT = """\
A judge was given a task: to rate a response to a user's request by a rubric. The task is shown
below with the rubric, the request and the response, and then two answers that the judge gave to
it, A and B. Decide which of them is the better judgement. In the better one

- every criterion of the rubric is applied to this response, and to nothing else,
- what is said of the response is true, and can be seen in it,
- the score follows from what is said, and is the score that the rubric asks for,
- the form that the task asks for is kept, without words that do no work.

Do not carry out the task yourself, and do not favour a judgement because it is shown first, is
longer or gives more points.

<task>
{{ judge_prompt }}
</task>

<judgement_a>
{{ judgement_a }}
</judgement_a>

<judgement_b>
{{ judgement_b }}
</judgement_b>

Compare the two in at most 100 words. Then end with the verdict on a line of its own, in the form
"Better: <A or B>"."""
