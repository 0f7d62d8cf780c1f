"""Draw the self-rewarding loop for the README.

Run `python docs/diagram.py` (needs matplotlib): it writes `diagram.png` at the repository root.
All lengths, font sizes included, are pixels of that image; y grows downwards.
"""

from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

WIDTH, HEIGHT, DPI = 1600, 1120, 100
INK, MUTED, FAINT, RING, LINE = "#1f2a44", "#4f596d", "#737d90", "#8b95a7", "#c3cad5"
PANEL, TRACK, BEST, WORST = "#f3f5f8", "#e9ecf1", "#0067a5", "#b84a00"
LEFT, NARROW, RIGHT, WIDE = 410, 360, 1000, 540  # the two columns of the cycle
TOPS, TALL, STEP = (112, 449, 786), 268, 36  # its three rows, and the lines inside a station
MODEL = (LEFT + NARROW / 2, TOPS[1] + TALL / 2)  # where M_t stands
ANSWERS = {
    "a": ("“Air scatters blue most.”", (5, 5, 4), BEST),
    "b": ("“Light bends in the air.”", (3, 4, 3), MUTED),
    "c": ("“It mirrors the sea.”", (2, 1, 3), WORST),
    "d": ("“Blue is a calm colour.”", None, FAINT),  # no score could be read
}
rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
fig = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
ax.axis("off")


def text(x, y, words, size=23, color=INK, ha="left", step=STEP, **style):
    """Each line of words, the first at height y."""
    style |= {"color": color, "ha": ha, "va": "center_baseline"}
    for i, line in enumerate(words.split("\n")):
        ax.text(x, y + step * i, line, size=size * 72 / DPI, **style)


def file(x, y, name):
    page = ((0, -10), (9, -10), (15, -4), (15, 10), (0, 10))
    folder = ((-1, -8), (6, -8), (8, -5), (17, -5), (17, 8), (-1, 8))
    icon = [(x + dx, y + dy) for dx, dy in (folder if name.endswith("/") else page)]
    ax.add_patch(Polygon(icon, facecolor="white", edgecolor=MUTED, lw=1.3))
    text(x + 24, y, name, 22, MUTED, family="DejaVu Sans Mono")


def box(x, y, w, h, face="white", edge=LINE, radius=14):
    shape = f"round,pad=0,rounding_size={radius}"
    ax.add_patch(FancyBboxPatch((x, y), w, h, shape, facecolor=face, edgecolor=edge, lw=1.5))


def arrow(start, end, color=RING, width=4.0):
    style = {"arrowstyle": "-|>,head_length=9,head_width=5.5", "joinstyle": "miter"}
    tight = {"shrinkA": 0, "shrinkB": 0, "capstyle": "butt"}
    ax.add_patch(FancyArrowPatch(start, end, color=color, lw=width, **style, **tight))


def disc(x, y, radius, words, size, face=INK, **style):
    ax.add_patch(Circle((x, y), radius, facecolor=face, edgecolor="none", zorder=3))
    text(x, y, words, size, "white", "center", **style)


def station(number, x, y, w, title, lead):
    """A station of the cycle, its four lines still empty; returns the height of the first."""
    box(x, y, w, TALL)
    disc(x + 36, y + 38, 18, str(number), 22, MUTED, weight="bold")
    text(x + 66, y + 38, title, 27, weight="bold")
    text(x + 22, y + 82, lead, color=MUTED)
    return y + 126


def draw_seed(top, _, bottom):
    box(30, 30, 320, HEIGHT - 60, PANEL, "none", 20)
    text(55, 72, "Once", 28, weight="bold")
    box(55, top, 270, TALL)
    text(77, top + 38, "Seed data", 27, weight="bold")
    text(77, top + 90, "IFT  instruction rows\nEFT  judge rows", 22, step=92)
    text(77, top + 124, "question → answer\nanswer → “Score: 4”", 22, MUTED, step=92)
    box(55, MODEL[1] - 79, 270, 158)
    text(190, MODEL[1] - 38, "SFT", 30, ha="center", weight="bold")
    text(190, MODEL[1] + 8, "supervised\nfine-tuning", 23, MUTED, "center", 32)
    arrow((190, top + TALL), (190, MODEL[1] - 79))
    arrow((190, bottom + 60), (190, MODEL[1] + 79))
    disc(190, bottom + 112, 64, "$M_0$", 38)
    text(190, bottom + 212, "pretrained model", 23, MUTED, "center")


def draw_stations(top, middle, bottom):
    y = station(1, LEFT, top, NARROW, "Prompts", "new ones each round")
    text(LEFT + 22, y, "“Why is the sky blue?”")
    text(LEFT + 22, y + STEP, "“Plan a week of meals.”\n“Explain recursion.”\n…", color=FAINT)
    y = station(2, RIGHT, top, WIDE, "Candidates", "$M_t$ writes 4 answers to each prompt")
    text(RIGHT + 24, y, "\n".join(ANSWERS), weight="bold")
    text(RIGHT + 60, y, "\n".join(answer for answer, _, _ in ANSWERS.values()))
    y = station(3, RIGHT, middle, WIDE, "Judgements", "the same $M_t$ scores each, 3 times")
    for i, (letter, (_, scores, color)) in enumerate(ANSWERS.items()):
        line, mean = y + STEP * i, sum(scores) / 3 if scores else None
        text(RIGHT + 24, line, letter, color=color, weight="bold")
        text(RIGHT + 68, line, " ".join(map(str, scores or "???")), 23, MUTED, family="monospace")
        for length, face in ((5, TRACK), (mean, color)) if scores else ():
            ax.add_patch(Rectangle((RIGHT + 190, line - 9), 52 * length, 18, facecolor=face, lw=0))
        text(RIGHT + 190, line, "" if scores else "unreadable", color=color)
        text(1516, line, f"{mean:.1f}" if scores else "—", 23, color, "right", weight="bold")
    y = station(4, RIGHT, bottom, WIDE, "Pairs", "best against worst") - 4
    for line, letter, verdict in ((y, "a", "chosen  4.7"), (y + 44, "c", "rejected  2.0")):
        answer, _, color = ANSWERS[letter]
        box(RIGHT + 14, line - 19, WIDE - 28, 38, (color, 0.13), "none", 8)
        text(RIGHT + 24, line, letter, color=color, weight="bold")
        text(RIGHT + 60, line, answer)
        text(1516, line, verdict, 23, color, "right", weight="bold")
    text(RIGHT + 22, y + 88, "dropped, counted:\nties, unreadable, unfinished", 22, MUTED, step=29)
    y = station(5, LEFT, bottom, NARROW, "DPO", "trains $M_t$ to make")
    text(LEFT + 22, y, "▲ chosen more likely", color=BEST)
    text(LEFT + 22, y + STEP, "▼ rejected less likely", color=WORST)
    text(LEFT + 22, y + 2 * STEP, "than in the reference:\n$M_t$ as it started", color=MUTED)


def draw_cycle(top, middle, bottom):
    (x, y), edge, down, fork = MODEL, LEFT + NARROW, RIGHT + WIDE / 2, 880
    text(440, y - 28, "$M_1$", 32, ha="center")
    text(x + 20, top + TALL + 65, "round $t$ starts", color=MUTED)
    text(edge + 120, bottom + 155, "+ reference.jsonl", 22, MUTED, "center", 28)
    text(x - 20, bottom - 79, "$M_{t+1}$\nreplaces $M_t$", 25, ha="right")
    text(x + 176, bottom - 28, "last", color=MUTED)
    files = ((edge + 11, top + 64, "prompts.jsonl"), (down + 22, middle - 36, "candidates.jsonl"))
    files += ((down + 22, bottom - 36, "judgements.jsonl"), (edge + 36, bottom + 99, "pairs.jsonl"))
    files += ((x + 22, bottom - 92, "metrics.jsonl"), (x + 22, bottom - 60, "model/"))
    for place in (*files, (x + 22, bottom - 28, "done.json")):
        file(*place)
    ring = (((325, y), (x - 78, y)), ((x, y), (x, top + TALL)), ((x, bottom), (x, y + 78)))
    ring += (((down, top + TALL), (down, middle)), ((down, middle + TALL), (down, bottom)))
    ring += (((edge, top + 90), (RIGHT, top + 90)), ((RIGHT, bottom + 125), (edge, bottom + 125)))
    for start, end in ring:
        arrow(start, end)
    disc(x, y, 78, "$M_t$", 46)
    ax.plot((x, fork, fork), (y, y, top + 215), color=INK, lw=2.5, solid_joinstyle="round")
    disc(fork, y, 6, "", 1)
    text((x + 78 + fork) / 2, y - 22, "the same model", ha="center")
    for height, verb in ((top + 215, "answers"), (y, "judges")):
        arrow((fork, height), (RIGHT, height), INK, 2.5)
        text(fork + 10, height - 22, verb)


if __name__ == "__main__":
    box(380, 30, 1190, HEIGHT - 60, PANEL, "none", 20)
    text(LEFT, 72, "Every round", 28, weight="bold")
    text(RIGHT + WIDE, 72, r"$M_1 \;→\; M_2 \;→\; M_3 \;$…", 28, ha="right")
    for draw in (draw_seed, draw_stations, draw_cycle):
        draw(*TOPS)
    fig.savefig(Path(__file__).parents[1] / "diagram.png")
