"""A warm mini diagnosis, four normal pictures and an answer of 60 tokens, against the bare networks doing that work.

    python benchmarks/diagnose.py            # a minute on two CPU cores

Prints the median over repeated diagnoses, the same with the normal pictures encoded beforehand, and the baseline of the
same run: the vision tower on the five pictures and 60 greedy tokens of the language model, nothing else.
"""

import argparse
import statistics
import time

import torch

import spgdd
from miniworld.world import TYPES, photograph
from spgdd.imagebind.preprocess import preprocess


def seconds(job, repeats: int) -> float:
    """Median duration of ``job()``, after two calls that warm up."""
    laps = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        job()
        laps.append(time.perf_counter() - started)
    return statistics.median(laps[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    kinds = torch.tensor([-1, -1, -1, -1, TYPES.index("hole")])
    shots = photograph("nut", torch.full((5,), 11), torch.arange(5), kinds)
    *normals, query = [picture.permute(1, 2, 0).numpy() for picture in shots.images]
    diagnoser = spgdd.load(args.profile)
    language = diagnoser.model.language
    language.stop_id = language.tokenizer.bos  # never said: every answer runs to the last token

    def diagnose(reference):
        found = diagnoser.diagnose(query, reference, "metal nut", max_new_tokens=args.tokens)
        assert found.text

    def bare():
        images = [spgdd.read_image(picture) for picture in (*normals, query)]
        features = diagnoser.model.imagebind.encode_image(preprocess(images, diagnoser.model.profile.fit))
        language.generate(features.embedding[-1], "Describe the image.", max_new_tokens=args.tokens)

    known = diagnoser.reference(normals, "metal nut")
    jobs = (lambda: diagnose(normals), lambda: diagnose(known), bare)
    whole, warm, base = (seconds(job, args.repeats) for job in jobs)
    print(f"profile {args.profile}, {args.tokens} tokens, {args.threads} threads, median of {args.repeats}")
    print(f"diagnosis with four normal pictures   {whole:.3f} s   {whole / base:.2f} x the bare networks")
    print(f"the same, normal pictures encoded     {warm:.3f} s   {warm / base:.2f} x")
    print(f"bare networks                         {base:.3f} s")


if __name__ == "__main__":
    main()
