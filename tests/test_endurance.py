"""One Diagnoser for many: threads at once, and many diagnoses in a row."""

import gc
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image

from miniworld import draw_product
from spgdd.diagnosis import load


@pytest.fixture(scope="module")
def mini():
    return load("mini", device="cpu")


@pytest.fixture(scope="module")
def pictures():
    kinds = ["good"] * 4 + ["stain", "good", "stain", "good"]
    return [Image.fromarray(sample.image) for sample in draw_product("gear", 3, kinds)]


def test_eight_threads_on_one_diagnoser_get_the_answers_of_one(mini, pictures):
    reference, queries = mini.reference(pictures[:4], "gear"), pictures[4:] * 4

    def answers(query):
        return mini.diagnose(query, reference, max_new_tokens=16).to_json()

    alone = [answers(query) for query in pictures[4:]] * 4
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answers, queries)) == alone


def test_memory_does_not_grow_with_the_number_of_diagnoses(mini, pictures):
    """After the first ones, which fill caches."""
    reference, process = mini.reference(pictures[:4], "gear"), psutil.Process()

    def run(count):
        for number in range(count):
            mini.diagnose(pictures[number % 8], reference, max_new_tokens=4)._repr_html_()
        gc.collect()
        return process.memory_info().rss

    start = run(20)
    assert run(40) < 1.05 * start
