"""What is judged that should not be, and what is not that should: blank frames, other light, other products.

    python benchmarks/judging.py data/TADD            # a folder of data sets; about five minutes for seven of them
    python benchmarks/judging.py miniworld

Of good pictures of each product: the share called defective, unsure, and unlike the normal ones as a whole. Of what
shows no part of it in its light: the share called normal, which should be none. By numbers of normal pictures.
"""

import argparse
import random
from collections import defaultdict
from statistics import mean

import numpy as np
import torch
from PIL import Image, ImageFilter

import spgdd
from miniworld.tasks import miniworld_tasks
from spgdd.diagnosis import judge
from spgdd.evaluation.protocol import folder_tasks
from spgdd.images import read_image
from spgdd.views import Views
from spgdd.whole import Whole

CHANGED = 8  # good pictures of a product that are changed, and as many of other products


def changes(picture: Image.Image) -> dict[str, Image.Image]:
    pixels = np.asarray(picture).astype(np.float32)
    flat = {name: np.full_like(pixels, level) for name, level in (("black", 0), ("white", 255), ("grey", 128))}
    lights = {"light / 8": pixels / 8, "light x 4": pixels * 4}
    made = {name: Image.fromarray(values.clip(0, 255).astype(np.uint8)) for name, values in (flat | lights).items()}
    return made | {"blurred": picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 40))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder of data sets, or miniworld")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--sets", type=int, default=3, help="choices of normal pictures")
    parser.add_argument("--limit", type=int, default=24, help="good and defective pictures of a product")
    options = parser.parse_args()
    diagnoser = spgdd.load(options.profile, language=False)
    model = diagnoser.model
    generated, few = options.data == "miniworld", options.limit
    tasks = miniworld_tasks(products=2, limit=few) if generated else folder_tasks(options.data, limit=few)

    def look(pictures):
        views = [Views.of(picture, model.profile) for picture in pictures]
        pixels = [one.pixels(picture) for one, picture in zip(views, pictures, strict=True)]
        found = model.look(pixels)
        return [(view, one, Whole.of(p[0], one)) for view, one, p in zip(views, found, pixels, strict=True)]

    seen = {}
    for task in tasks:
        kinds = defaultdict(list)
        for query in task.queries:
            kinds["good" if query.kind == "good" else "defective"].append(read_image(query.source))
        for picture in kinds["good"][:CHANGED]:
            for name, changed in changes(picture).items():
                kinds[name].append(changed)
        seen[task.product] = {name: look(pictures) for name, pictures in kinds.items() if pictures}
    for shots in options.shots:
        shares = defaultdict(dict)
        for task in tasks:
            others = [row for name, kinds in seen.items() if name != task.product for row in kinds["good"]]
            others = random.Random(0).sample(others, min(len(others), 3 * CHANGED))
            kinds = seen[task.product] | {"other product": others}
            found = defaultdict(list)
            for number in range(options.sets):
                normals = random.Random(number).sample(task.normals, shots)
                reference = diagnoser.reference([normal.source for normal in normals], task.name)
                limits = reference.calibration.limits(0.05)
                for kind, rows in kinds.items():
                    patches = torch.stack([row[1].patches[0, 0] for row in rows])
                    evidence = model.evidence(patches, task.name, reference.bank)
                    for i, (views, _, whole) in enumerate(rows):
                        joined = views.join(evidence[i : i + 1], model.profile.score_share)
                        like = not whole.unlike(reference.whole)
                        verdict = judge(joined.score, joined.square_map.cpu().numpy(), limits, views, like)["verdict"]
                        found[kind].append((verdict, like))
            for kind, verdicts in found.items():
                counts = {v: mean(one == v for one, _ in verdicts) for v in ("normal", "unsure", "defective")}
                shares[kind][task.product] = counts | {"unlike": mean(not like for _, like in verdicts)}
        print(f"\n{shots} normal picture(s), {options.sets} choices of them: percent, mean over products (highest)")
        for kind, products in shares.items():
            cells = []
            for what in ("normal", "unsure", "defective", "unlike"):
                values = [100 * row[what] for row in products.values()]
                cells.append(f"{what} {mean(values):5.1f} ({max(values):5.1f})")
            print(f"{kind:<14}{'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
