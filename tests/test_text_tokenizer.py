"""CLIP ids as published, and the mini tokenizer learned by the same conventions."""

import gzip
import hashlib
import json
import random
from itertools import pairwise

import pytest
import torch

from conftest import FIXTURES, ROOT
from spgdd.errors import WeightsError
from spgdd.imagebind import MINI, TextTokenizer
from spgdd.imagebind.text_tokenizer import clean

REFERENCE = json.loads((FIXTURES / "tokenizer" / "text_tokens.json").read_text())
WORDS = "scratch crack dent stain hole missing part photo of the a metal nut screw top left right".split()


@pytest.fixture
def train_text_tokenizer(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "mini")
    from texts import train_text_tokenizer

    return train_text_tokenizer


@pytest.fixture(scope="module")
def clip():
    return TextTokenizer()


def sentences(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=6)) + "." for _ in range(count)]


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["text"][:20])
@pytest.mark.parametrize("legacy", [False, True], ids=["official", "legacy"])
def test_ids_match_published(case, legacy, clip):
    expected = (case["ids_legacy"] if legacy else None) or case["ids"]
    ids = clip([case["text"]], legacy=legacy)
    assert ids.dtype == torch.int64 and ids.shape == (1, REFERENCE["context_length"])
    assert ids[0, : len(expected)].tolist() == expected
    assert not ids[0, len(expected) :].any()


def test_batch_equals_one_by_one(clip):
    texts = [case["text"] for case in REFERENCE["cases"]]
    assert torch.equal(clip(texts), torch.cat([clip([text]) for text in texts]))
    assert torch.equal(clip("one text"), clip(["one text"]))
    assert clip([]).shape == (0, 77)


def test_cleaning():
    assert clean("Ã¼berlackierung â€“ kratzer") == "überlackierung – kratzer", "mojibake is mended"
    assert clean("1 < 2 &amp;amp; 3") == "1 < 2 & 3", "entities are resolved twice"


def test_shipped_merges_are_clips(clip):
    assert (clip.start, clip.end, clip.vocab_size) == (REFERENCE["sot"], REFERENCE["eot"], 49408)
    packed = (ROOT / "spgdd" / "imagebind" / "clip_merges.txt.gz").read_bytes()
    assert packed[4:8] == bytes(4), "the gzip header holds a time stamp"
    # merges.txt of openai/clip-vit-large-patch14, whose SHA-256 this is, has a version in its first line.
    digest = hashlib.sha256(b"#version: 0.2\n" + gzip.decompress(packed)).hexdigest()
    assert digest == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def test_learned_tokenizer_keeps_the_conventions(tmp_path, train_text_tokenizer):
    trained = train_text_tokenizer(sentences(200), 560, tmp_path / "mini")
    loaded = TextTokenizer.load(tmp_path / "mini")
    texts = [*sentences(20, seed=1), "An unseen word: Überlackierung &amp; 3.5 mm", "", "crack " * 100]
    ids = loaded(texts)
    assert torch.equal(ids, trained(texts))
    assert (loaded.start, loaded.end, loaded.vocab_size) == (558, 559, 560)
    assert (ids[:, 0] == loaded.start).all()
    assert (ids.max(dim=1).values == loaded.end).all(), "the pooled position is that of the end of text"
    assert (loaded(["crack " * 100], legacy=True) != loaded.end).all()


def test_learned_ids_follow_the_merges(tmp_path, train_text_tokenizer):
    """Encode by hand: merge the pair of lowest rank until none is left."""
    tokenizer = train_text_tokenizer(sentences(200), 570, tmp_path)
    merges = [tuple(line.split()) for line in (tmp_path / "merges.txt").read_text().splitlines()]
    vocab = {"".join(pair): 512 + rank for rank, pair in enumerate(merges)}
    vocab |= {chr(33 + i): i for i in range(94)} | {chr(33 + i) + "</w>": 256 + i for i in range(94)}
    for text in sentences(20, seed=2):
        expected = []
        for word in text.replace(".", " .").split():
            symbols = [*word[:-1], word[-1] + "</w>"]
            while known := [pair for pair in pairwise(symbols) if pair in merges]:
                at = list(pairwise(symbols)).index(min(known, key=merges.index))
                symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
            expected += [vocab[symbol] for symbol in symbols]
        ids = tokenizer([text])[0]
        assert ids[1 : 1 + len(expected)].tolist() == expected and ids[1 + len(expected)] == tokenizer.end


def test_learning_does_not_depend_on_the_order_of_texts(tmp_path, train_text_tokenizer):
    texts = sentences(300)
    train_text_tokenizer(texts, 600, tmp_path / "a")
    train_text_tokenizer(reversed(texts), 600, tmp_path / "b")
    assert (tmp_path / "a" / "merges.txt").read_bytes() == (tmp_path / "b" / "merges.txt").read_bytes()


def test_few_texts_give_a_smaller_vocabulary(tmp_path, train_text_tokenizer):
    tokenizer = train_text_tokenizer(["crack", "a dent"], MINI.vocab_size, tmp_path)
    assert tokenizer.vocab_size == 514 + 7  # crack: 4 merges, dent: 3
    assert tokenizer(["a crack"])[0, :5].tolist()[-2:] == [tokenizer.end, 0]


def test_damaged_merges_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="no text tokenizer .*merges.txt.*spgdd weights"):
        TextTokenizer.load(tmp_path)
    for content in ("<html>404 not found</html>\n", "version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "merges.txt").write_text(content)
        with pytest.raises(WeightsError, match="is not a BPE merge"):
            TextTokenizer.load(tmp_path)
