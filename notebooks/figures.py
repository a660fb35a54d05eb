"""Drawn figures that explain. The last line of a notebook cell shows one: ``figures.lora()``.

Each docstring is what a reader who cannot see the figure is told.
"""

from drawing import BLUE, GREEN, INK, LINE, ORANGE, PALE, WHITE, YELLOW, figure

STEPS = {  # of the system: what it is, what comes out of it
    "pictures": ("pictures", "in doubt, good ones"),
    "features": ("ImageBind", "patch tokens"),
    "map": ("memory, words", "anomaly map"),
    "prompts": ("prompt learner", "prompt tokens"),
    "language": ("Vicuna + LoRA", "answers"),
    "diagnosis": ("diagnosis", "verdict, regions"),
}


@figure(150)
def pipeline(d, *here):
    """The steps of the system: pictures, ImageBind, memory and words, prompt learner, Vicuna with LoRA, diagnosis."""
    if unknown := set(here) - set(STEPS):
        raise ValueError(f"no step {', '.join(sorted(unknown))} in the pipeline: choose of {', '.join(STEPS)}")
    for number, (step, (name, result)) in enumerate(STEPS.items()):
        x, y = 4 + number % 3 * 144, 18 + number // 3 * 78
        d.labelled(x, y, 124, 50, name, result, ORANGE if step in here else PALE)
        d.text(x + 70, y - 4, "you are here" * (step in here), 11, fill=ORANGE)
        if number % 3 < 2:
            d.line((x + 126, y + 25), (x + 142, y + 25))
    d.line((354, 70), (354, 80), (20, 80), (20, 94))


@figure(290)
def system(d):
    """ImageBind cuts good pictures and the one in doubt into patches. The good patches are the memory. Each patch in
    doubt is compared with its nearest good one: that is the map. Score and threshold give the verdict; Vicuna reads map
    and question, and answers."""
    d.text(52, 16, "good pictures")
    for i in range(3):
        d.box(12 + 8 * i, 24 + 6 * i, 62, 46, WHITE, BLUE)
    d.text(59, 64, "kept", 12, fill=BLUE)
    d.text(52, 138, "in doubt")
    d.box(20, 146, 62, 46, WHITE, ORANGE)
    d.dot(62, 172, 6, ORANGE)
    d.labelled(104, 84, 88, 50, "ImageBind", "looks", GREEN)
    d.line((92, 62), (122, 82))
    d.line((84, 166), (124, 136))
    d.grid(222, 26, 60, 5, {(r, c): BLUE for r in range(5) for c in range(5)})
    d.text(252, 18, "memory")
    d.grid(222, 130, 60, 5, {(2, 3): ORANGE})
    d.text(252, 204, "patches")
    d.line((194, 98), (218, 72))
    d.line((194, 120), (218, 144))
    d.line((286, 62), (330, 92))
    d.line((286, 156), (330, 140))
    d.labelled(318, 94, 96, 46, "compare", "nearest patch")
    d.line((366, 142), (366, 162))
    d.labelled(318, 164, 96, 46, "map", "where", YELLOW)
    d.line((366, 212), (366, 234))
    d.labelled(318, 236, 96, 46, "verdict", "of the score")
    d.line((316, 200), (266, 240))
    d.labelled(172, 236, 92, 46, "Vicuna", "answers", GREEN)
    d.line((136, 259), (168, 259))
    d.text(130, 263, "your question", at="end")


@figure(212)
def leave_one_out(d):
    """Each of four good pictures is scored against the other three. The four scores lie on a line; the threshold
    stands right of them, in a band where the verdict is unsure."""
    for row, score in enumerate((60, 98, 78, 130)):
        for column in range(4):
            d.box(14 + 30 * column, 12 + 27 * row, 24, 20, ORANGE if row == column else BLUE, corner=3)
        d.line((138, 22 + 27 * row), (176, 22 + 27 * row))
        d.text(184, 27 + 27 * row, "score of one against the other three", at="start")
        d.dot(40 + score, 160)
    bands = (10, 190, BLUE, "normal"), (200, 80, YELLOW, "unsure"), (280, 130, ORANGE, "defective")
    for x, width, colour, verdict in bands:
        d.box(x, 168, width, 12, colour, corner=0)
        d.text(x + width / 2, 197, verdict, bold=True)
    d.line((240, 150), (240, 186), arrow=False, colour=INK)
    d.text(240, 145, "threshold")


@figure(132)
def sample(d):
    """A sample is a picture, the mask of its defects, facts measured on the mask, and a conversation made of these."""
    d.box(8, 22, 80, 80, PALE, LINE)
    d.dot(62, 48, 11, ORANGE)
    d.box(112, 22, 80, 80, INK)
    d.dot(166, 48, 11, WHITE)
    for x, words in ((48, "picture"), (152, "mask"), (256, "facts"), (362, "words")):
        d.text(x, 15, words, bold=True)
    for i, words in enumerate(("type: hole", "place: top right", "area: 1.4 %", "contrast: 0.3")):
        d.text(212, 38 + 18 * i, words, 11.5, "start")
    d.labelled(318, 24, 98, 32, "", "")
    d.text(367, 45, "Where is it?")
    d.box(318, 66, 98, 32, BLUE)
    d.text(367, 86, "At the top right.", fill=WHITE)
    for x in (92, 196, 302):
        d.line((x, 62), (x + 14, 62))
    for x, words in ((152, "visible change"), (256, "measured"), (367, "phrased")):
        d.text(x, 122, words, 11.5)


@figure(130)
def delta(d):
    """The word vectors of LLaMA and an empty row, plus the delta's with one row more, give those of Vicuna v0."""
    for x, fill, name in ((14, BLUE, "LLaMA"), (160, YELLOW, "delta"), (306, GREEN, "Vicuna v0")):
        empty = name == "LLaMA"
        d.box(x, 24, 100, 66, fill, corner=2)
        d.box(x, 92, 100, 12, WHITE if empty else fill, LINE if empty else fill, corner=2)
        d.text(x + 50, 16, name, 13, bold=True)
        d.text(x + 50, 62, "32,000 words", fill=INK if fill == YELLOW else WHITE)
        d.text(x + 50, 121, "a row of zeros" if empty else "one word more", 11.5)
    d.text(137, 66, "+", 24, bold=True)
    d.text(283, 66, "=", 24, bold=True)


@figure(206)
def nearest_patch(d):
    """Two patches in doubt and the nearest good patch of each. The good one and its nearest enclose a small angle,
    the defective one and its nearest a large one."""
    d.grid(10, 24, 84, 6, {(1, 1): BLUE, (3, 4): ORANGE})
    d.text(52, 16, "in doubt")
    for i, found in enumerate(({(2, 1): BLUE}, {}, {(4, 2): ORANGE})):
        d.grid(160 + 90 * i, 24, 78, 6, found)
        d.text(199 + 90 * i, 16, f"good {i + 1}")
    d.line((38, 46), (172, 58), colour=BLUE)
    d.line((80, 76), (364, 88), colour=ORANGE, dash=True)
    d.line((70, 182), (144, 146), colour=BLUE)
    d.line((70, 182), (148, 158), colour=BLUE, dash=True)
    d.line((270, 182), (344, 146), colour=ORANGE)
    d.line((270, 182), (294, 114), colour=ORANGE, dash=True)
    d.text(110, 201, "small angle: small distance")
    d.text(310, 201, "large angle: large distance")


@figure(176)
def anchors(d):
    """Three arrows from one point: the anchors of normal and of abnormal sentences, and a patch nearer to the
    abnormal one. A softmax makes a probability of the two similarities."""
    d.line((30, 150), (40, 30), colour=BLUE)
    d.line((30, 150), (160, 120), colour=ORANGE)
    d.line((30, 150), (134, 82), colour=INK)
    d.text(46, 26, "“a photo of a flawless cable”", at="start", fill=BLUE)
    d.text(166, 124, "“a photo of a damaged cable”", at="start", fill=ORANGE)
    d.text(140, 82, "a patch", at="start", bold=True)
    d.text(250, 56, "similarity to flawless 0.12", at="start")
    d.text(250, 74, "similarity to damaged 0.15", at="start")
    d.line((320, 80), (320, 98))
    d.box(236, 140, 9, 14, BLUE, corner=0)
    d.box(245, 140, 161, 14, ORANGE, corner=0)
    d.text(406, 171, "softmax of both, divided by 0.01: 95 % damaged", at="end")


@figure(148)
def scales(d):
    """At scale 1 an entry of the memory is one patch; at scale 3 the mean of the patch and its eight neighbours."""
    around = {(row, column): YELLOW for row in (2, 3, 4) for column in (2, 3, 4)}
    for x, cells, title, token, finds in (
        (20, {}, "scale 1: the patch", "token", "finds a scratch"),
        (230, around, "scale 3: the mean around it", "mean of 9", "finds a missing tooth"),
    ):
        d.grid(x, 26, 96, 7, cells | {(3, 3): ORANGE})
        d.text(x + 50, 17, title, bold=True)
        d.line((x + 98, 74), (x + 120, 74))
        d.box(x + 124, 48, 12, 52, INK, corner=2)
        d.text(x + 130, 116, token, 11.5)
        d.text(x + 48, 140, finds)


@figure(192)
def log_odds(d):
    """Evidence as bars left and right of zero: words -1.5, memory +4, their sum +2.5, a probability of 92 %."""
    d.line((200, 14), (200, 144), arrow=False)
    for i, (name, value, colour) in enumerate((("words", -1.5, BLUE), ("memory", 4.0, ORANGE), ("sum", 2.5, INK))):
        y, positive = 22 + 42 * i, value > 0
        d.text(10, y + 18, name, 13, "start", bold=True)
        d.box(200 + min(value, 0) * 44, y, abs(value) * 44, 24, colour, corner=2)
        x, at, fill = (206, "start", WHITE) if positive else (128, "end", INK)
        d.text(x, y + 17, f"{value:+.1f}", 13, at, fill)
    d.text(64, 164, "← speaks for good")
    d.text(330, 164, "speaks for damaged →")
    d.text(210, 186, "sigmoid(2.5) = 92 %", 13, bold=True)


@figure(170)
def tiles(d):
    """The picture is seen whole, and once more at twice the side, where its four quarters are tiles of as many
    patches as the whole. A scratch covers more patches there."""
    d.grid(30, 40, 84, 8, {(5, 5): ORANGE})
    d.text(72, 30, "whole: 1 view", bold=True)
    d.grid(210, 14, 132, 16, dict.fromkeys(((10, 10), (10, 11), (11, 10), (9, 11)), ORANGE))
    d.line((275, 10), (275, 150), arrow=False, colour=INK)
    d.line((206, 79), (348, 79), arrow=False, colour=INK)
    d.text(276, 165, "nearer: 4 joint tiles", bold=True)
    d.text(72, 142, "counts once")
    d.text(384, 76, "count")
    d.text(384, 92, "four times")
    d.line((120, 82), (200, 82))


@figure(160)
def map_to_tokens(d):
    """An anomaly map passes five convolutions, each of which halves it, and a last one that leaves 3 x 3 cells. Each
    cell is a token; nine learned tokens stand before them."""
    d.grid(8, 36, 88, 8, {(1, 5): ORANGE, (1, 6): ORANGE, (2, 5): ORANGE, (2, 6): YELLOW})
    d.text(54, 28, "map, 224 x 224")
    for x, side in ((108, 62), (134, 46), (156, 34), (174, 24), (189, 16)):
        d.box(x, 80 - side / 2, 14, side, BLUE, corner=2)
    d.text(158, 134, "5 convolutions,", 11.5)
    d.text(158, 148, "each halves it", 11.5)
    d.grid(228, 44, 72, 3, {(0, 2): ORANGE})
    d.text(264, 28, "3 x 3 cells")
    d.line((212, 80), (224, 80))
    d.line((302, 80), (316, 80))
    for y, colour, words, below in ((46, INK, "9 learned", 40), (86, GREEN, "9 of the cells", 126)):
        for i in range(9):
            d.box(320 + 10.5 * i, y, 8.5, 24, ORANGE if (colour, i) == (GREEN, 2) else colour, corner=2)
        d.text(368, below, words, 11.5)


def prompt(parts):
    """What the language model reads, one square for a token.

    ``parts``: (name, number of tokens, kind) in reading order; kinds are "text", "image", "map", "focus" and "memory".
    """
    colours = {"text": "#c9d1da", "image": BLUE, "map": ORANGE, "focus": YELLOW, "memory": GREEN}
    order = [kind for _, count, kind in parts for _ in range(count)]
    top = 24 + 20 * -(-len(order) // 24)

    def squares(d):
        for number, kind in enumerate(order):
            d.box(8 + number % 24 * 17, 8 + number // 24 * 20, 14.5, 16, colours[kind], corner=2)
        for row, (name, count, kind) in enumerate(parts):
            d.box(8, top + 18 * row, 13, 13, colours[kind], corner=2)
            d.text(48, top + 11 + 18 * row, str(count), at="end", bold=True)
            d.text(56, top + 11 + 18 * row, name, at="start")

    named = ", ".join(f"{count} {name}" for name, count, _ in parts)
    squares.__doc__ = f"{len(order)} tokens in reading order: {named}."
    return figure(top + 18 * len(parts))(squares)()


@figure(194)
def lora(d):
    """The input x goes two ways: through the large frozen matrix W, and through the thin matrices A and B with r
    numbers between them. Both results are added."""
    d.labelled(8, 76, 44, 40, "x")
    d.labelled(130, 14, 150, 74, "W, frozen", "width x width", BLUE)
    d.labelled(112, 128, 70, 44, "A", "r x width", ORANGE)
    d.labelled(236, 128, 70, 44, "B", "width x r", ORANGE)
    d.labelled(340, 76, 30, 40, "+", "", YELLOW)
    d.labelled(386, 76, 30, 40, "h")
    d.line((52, 90), (126, 52))
    d.line((52, 102), (108, 146))
    d.line((184, 150), (232, 150))
    d.text(208, 142, "r", 12.5, bold=True)
    d.line((282, 52), (338, 88))
    d.line((308, 146), (338, 106))
    d.line((372, 96), (384, 96))
    d.text(210, 190, "A and B learn, and B starts as zeros")


@figure(186)
def k_shot(d):
    """Of a row of good pictures, k are drawn by a seed and remembered. The same pictures in doubt are diagnosed with
    them; other seeds draw others, and what is reported is mean and spread."""
    d.text(96, 16, "good pictures to draw from")
    d.text(284, 16, "the same in doubt")
    for row, (chosen, area) in enumerate((((1, 4), 91), ((0, 6), 94), ((3, 5), 90))):
        y = 26 + 44 * row
        for i in range(7):
            d.box(12 + 25 * i, y, 20, 26, BLUE if i in chosen else PALE, corner=3)
        d.text(96, y + 39, f"seed {row}, k = 2", 11)
        d.line((192, y + 13), (222, y + 13))
        for i in range(6):
            d.box(228 + 19 * i, y, 15, 26, WHITE, BLUE if i < 3 else ORANGE, corner=3)
        d.line((346, y + 13), (362, y + 13))
        d.text(368, y + 18, f"{area} %", 13, "start", bold=True)
    d.text(210, 178, "reported: 91.7 ± 2.1 %", 13, bold=True)


@figure(128)
def auroc(d):
    """Four good and three bad scores on a line. Of their twelve pairs ten stand in the right order: AUROC is 83 %."""
    d.line((12, 62), (408, 62), arrow=False)
    for x in (50, 90, 116, 210):
        d.dot(x, 62, 8)
    for x in (104, 250, 360):
        d.box(x - 8, 54, 16, 16, ORANGE, WHITE, 1)
    d.text(70, 34, "good", 13, fill=BLUE, bold=True)
    d.text(330, 34, "bad", 13, fill=ORANGE, bold=True)
    d.text(204, 92, "score →")
    d.text(210, 120, "in 10 of 12 pairs the bad one is higher: 83 %", 13, bold=True)


@figure(150)
def whole_file(d):
    """Bytes arrive in FILE.part, which a broken line leaves as it is for the next try. Its hash is compared: if it is
    the published one the file gets its name, else it is thrown away and the next mirror is asked."""
    d.labelled(8, 30, 78, 46, "mirrors", "one by one")
    d.line((88, 53), (116, 53))
    d.labelled(120, 30, 92, 46, "FILE.part", "grows", BLUE)
    d.line((150, 78), (150, 98), (182, 98), (182, 78))
    d.text(166, 114, "line breaks: go on")
    d.line((214, 53), (242, 53))
    d.labelled(246, 30, 66, 46, "hash", "right?", YELLOW)
    d.line((314, 53), (342, 53))
    d.text(329, 26, "yes", bold=True)
    d.labelled(346, 30, 66, 46, "FILE", "whole", GREEN)
    d.line((279, 78), (279, 132), (47, 132), (47, 80), dash=True)
    d.text(288, 112, "no: throw away,", at="start", bold=True)
    d.text(288, 128, "ask the next", at="start", bold=True)


@figure(196)
def folder(d):
    """A folder in MVTec's layout: for each product train/good with good pictures, test with a folder of good ones and
    one for each type of defect, and ground_truth with a mask for each defective picture."""
    rows = (
        (10, "bottle/", "a product", INK),
        (34, "train/good/000.png ...", "remembered, or trained on: all that is needed to begin", BLUE),
        (34, "test/good/000.png ...", "in doubt, and good", BLUE),
        (34, "test/crack/000.png ...", "in doubt, and defective", ORANGE),
        (34, "ground_truth/crack/000_mask.png ...", "where: white on black", INK),
    )
    for number, (x, path, says, colour) in enumerate(rows):
        y = 14 + 36 * number
        d.box(x, y, 20, 18, colour, corner=3)
        d.text(x + 28, y + 13, path, 12.5, "start", bold=True)
        d.text(x + 28, y + 28, says, 11.5, "start")


@figure(150)
def cut_and_paste(d):
    """A piece of one good picture is resized and blended into another. Where the result visibly differs from the
    picture before is the label."""
    d.box(8, 30, 84, 84, GREEN)
    d.box(22, 46, 40, 30, YELLOW, INK, 0)
    d.text(50, 20, "a good picture")
    d.line((94, 72), (128, 72))
    d.text(111, 64, "cut,", 11.5)
    d.text(111, 90, "resize", 11.5)
    d.box(132, 30, 84, 84, BLUE)
    d.box(166, 62, 34, 26, YELLOW, INK, 0)
    d.text(174, 20, "another one")
    d.line((218, 72), (242, 72))
    d.text(230, 132, "blend", 11.5)
    d.box(246, 30, 74, 84, BLUE)
    d.box(276, 62, 32, 26, GREEN, corner=8)
    d.text(283, 20, "defective")
    d.line((322, 72), (338, 72))
    d.box(342, 30, 72, 84, INK)
    d.box(372, 62, 30, 24, WHITE, corner=8)
    d.text(378, 20, "label")
    d.text(378, 132, "what changed", 11.5)


@figure(176)
def photograph(d):
    """The product's seed gives a surface with colour and height; with the photo's seed it is placed, lit and
    photographed. With a defect the same is done again, and where both pictures visibly differ is the mask."""
    d.labelled(8, 20, 88, 44, "product", "seed", BLUE)
    d.labelled(8, 104, 88, 44, "photo", "seed", BLUE)
    d.line((98, 42), (122, 42))
    d.labelled(126, 20, 92, 44, "surface", "colour, height")
    d.line((98, 126), (122, 126))
    d.labelled(126, 104, 92, 44, "defect", "shape, effects", ORANGE)
    d.line((172, 102), (172, 66))
    d.line((98, 108), (248, 76), dash=True)
    d.line((220, 42), (246, 42))
    d.labelled(250, 20, 74, 64, "camera", "pose, light", GREEN)
    d.line((326, 36), (350, 36))
    d.line((326, 66), (350, 66))
    d.box(354, 16, 58, 34, PALE, LINE)
    d.text(383, 38, "without", 11.5)
    d.box(354, 56, 58, 34, PALE, LINE)
    d.text(383, 78, "with", 11.5)
    d.line((383, 92), (383, 108))
    d.text(374, 106, "differ?", 11.5, "end")
    d.box(354, 112, 58, 40, INK)
    d.dot(392, 128, 7, WHITE)
    d.text(383, 168, "mask", 12, bold=True)
