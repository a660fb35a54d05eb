"""Maps, memory, losses and prompt learner against AnomalyGPT's published code, and the memory alone."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from conftest import FIXTURES, check
from spgdd.errors import WeightsError
from spgdd.imagebind import ImageBindConfig, TextTokenizer, TowerConfig, load_imagebind, preprocess
from spgdd.selfprompt import Focus, Memory, PatchDecoder, PromptLearner, rotations, subsample
from spgdd.selfprompt.focuser import STATES, dice_loss, enlarge, focal_loss, text_prompts, text_vectors, zero_shot_map
from spgdd.selfprompt.memory import k_centre, nearest, on_grid

TINY = ImageBindConfig(TowerConfig(64, 4, 4), TowerConfig(48, 2, 4), joint=32, vocab_size=256, taps=(0, 1, 2, 3))
TINY_IMAGEBIND = FIXTURES / "tiny_imagebind/state_dict.safetensors"
FOLDER = FIXTURES / "anomalygpt"
CONFIG = json.loads((FOLDER / "config.json").read_text())
OUTPUTS = load_file(FOLDER / "outputs.safetensors")
TRAIN = load_file(FOLDER / "train_and_modules.safetensors")



def memory_map(memory, patches, bank):
    """The map (B, 1, 224, 224) of the memory alone."""
    memory.require_fit(bank)
    return enlarge(on_grid(memory.fuse(memory.compare(patches, bank.tokens[None])[0]))[:, None])

def prompt_learner_weights(recipe: str) -> dict[str, torch.Tensor]:
    """The reference weights, made from the integer recipe and checked by hash."""
    state = {}
    for name, entry in json.loads((FOLDER / f"{recipe}_recipe.json").read_text())["tensors"].items():
        size = int(np.prod(entry["shape"]))
        values = np.random.RandomState(entry["seed"]).randint(-127, 128, size=size, dtype=np.int8)
        assert hashlib.sha256(values.tobytes()).hexdigest() == entry["sha256_int8"], name
        tensor = torch.from_numpy(values.astype(np.float32) * np.float32(entry["scale"])).view(entry["shape"])
        state[name.removeprefix("prompt_learner.")] = tensor
    return state


def taps(tensors, pattern):
    return torch.stack([tensors[pattern.format(tap)] for tap in range(4)], dim=1)  # (B, L, N, D)


@pytest.fixture(scope="module")
def decoder():
    module = PatchDecoder(64, 32, taps=4)
    weights = load_file(FOLDER / "image_decoder.safetensors")
    module.load_state_dict({name.removeprefix("image_decoder."): value for name, value in weights.items()})
    return module


@pytest.fixture
def query():
    return taps(OUTPUTS, "B.query_layer{}")


@pytest.fixture
def normal():
    return taps(OUTPUTS, "B.normal_layer{}")


# Text-driven focuser


def test_the_state_ensemble_is_the_published_one_sentence_by_sentence():
    tokenizer = TextTokenizer()
    for product, sides in json.loads((FOLDER / "ensemble_text.json").read_text()).items():
        prompts = text_prompts(product)
        assert list(prompts) == ["normal", "abnormal"]
        for side, sentences in sides.items():
            assert prompts[side] == [sentence["text"] for sentence in sentences]
            for ids, sentence in zip(tokenizer(prompts[side]).tolist(), sentences, strict=True):
                assert ids == sentence["ids"] + [0] * (77 - len(sentence["ids"]))


def test_anchors_are_the_published_ones_and_unit_vectors():
    text_tower = load_imagebind(TINY_IMAGEBIND, TINY)
    for row, product in enumerate(CONFIG["A"]["classes"]):
        sides = {len(OUTPUTS[f"A.tokens_{side}"][row]): OUTPUTS[f"A.tokens_{side}"][row] for side in STATES}
        with torch.no_grad():
            vectors = text_vectors(text_tower.encode_text, lambda texts: sides[len(texts)], product)  # noqa: B023
        anchors = torch.stack([F.normalize(side.mean(0), dim=0) for side in vectors])
        check(f"A.text_features {product}", anchors, OUTPUTS["A.text_features"][row], atol=1e-5)
        check(f"A.text_features {product} length", anchors.norm(dim=-1), torch.ones(2), atol=1e-6)


def test_decoded_patches_equal_the_published_ones(decoder):
    raw = load_file(FIXTURES / "tiny_imagebind/anomalygpt_patch_tokens.safetensors")
    patches = torch.stack([raw[f"layer{tap}.raw_LBD"][1:].transpose(0, 1) for tap in range(4)], dim=1)
    decoded = decoder(patches)
    for tap in range(4):
        check(f"A.decoded_layer{tap}", decoded[:, tap], OUTPUTS[f"A.decoded_layer{tap}"], atol=1e-5)


def test_zero_shot_map_follows_its_definition_pixel_by_pixel():
    decoded = taps(OUTPUTS, "A.decoded_layer{}")
    anchors = OUTPUTS["A.text_features"]  # another product for each image
    expected = torch.zeros(2, 224, 224)
    for image in range(2):
        for tap in range(4):
            cosine = F.cosine_similarity(decoded[image, tap][:, None], anchors[image][None], dim=-1)  # (N, 2)
            maps = (100 * cosine).T.view(1, 2, 16, 16)
            big = F.interpolate(maps, size=224, mode="bilinear", align_corners=True)[0]
            expected[image] += big.softmax(0)[1] / 4
    check("zero-shot map", zero_shot_map(decoded, anchors)[:, 0], expected, atol=1e-5)
    one_product = zero_shot_map(decoded, anchors[0])
    assert torch.equal(one_product[0], zero_shot_map(decoded, anchors)[0])
    assert not torch.allclose(one_product[1], zero_shot_map(decoded, anchors)[1], atol=1e-2)


def test_losses_equal_the_published_ones():
    probabilities, truth = TRAIN["C.loss_probs"], TRAIN["C.loss_gt"]
    check("C.loss_focal", focal_loss(probabilities, truth)[None], TRAIN["C.loss_focal"], atol=1e-6)
    check("C.loss_dice", dice_loss(probabilities[:, 1], truth)[None], TRAIN["C.loss_dice"], atol=1e-6)


def test_losses_of_several_taps_are_the_means_of_each():
    probabilities, truth = TRAIN["C.loss_probs"], TRAIN["C.loss_gt"]
    taps = probabilities, probabilities.flip(1)
    together, every = torch.stack(taps, dim=1), truth[:, None]
    focal, dice = ([loss(tap, truth) for tap in given] for loss, given in
                   ((focal_loss, taps), (dice_loss, [tap[:, 1] for tap in taps])))  # fmt: skip
    assert focal[0] != focal[1] and dice[0] != dice[1]
    check("focal loss", focal_loss(together, every), sum(focal) / 2, atol=1e-6)
    check("dice loss", dice_loss(together[:, :, 1], every), sum(dice) / 2, atol=1e-6)


# Prompt learner


@pytest.mark.parametrize("hidden, recipe", [(64, "prompt_learner"), (4096, "prompt_learner_4096")])
def test_prompt_tokens_equal_the_published_ones(hidden, recipe):
    learner = PromptLearner(hidden)
    learner.load_state_dict(prompt_learner_weights(recipe))
    maps = F.interpolate(TRAIN["C.pl_in_14x14"], size=224, mode="bilinear", align_corners=True)
    with torch.no_grad():
        if hidden == 64:
            check("C.pl_out", learner(maps), TRAIN["C.pl_out"], atol=1e-4)
            check("C.pl_conv_out_3x3", learner.meta_net(maps), TRAIN["C.pl_conv_out_3x3"], atol=1e-4)
        else:
            check("D.full4096_out", learner(maps[:1]), TRAIN["D.full4096_out"], atol=1e-4)


# Memory


def test_rotations_equal_the_published_ones():
    turned = rotations(OUTPUTS["B.rot_in"])
    check("B.rot_out", turned, OUTPUTS["B.rot_out"], atol=1e-5)
    pair = rotations(torch.cat([OUTPUTS["B.rot_in"], OUTPUTS["B.rot_in"] + 1]))
    assert torch.equal(pair[4:], turned + 1)  # image by image, so that one can be left out


def test_one_scale_with_initial_weights_is_the_published_few_shot_map(query, normal):
    memory = Memory(taps=4, width=64)
    bank = memory.build(normal)
    assert torch.equal(bank.tokens[:, 0], normal[0])
    for tap in range(4):
        _, index = nearest(F.normalize(query[None, :1, tap], dim=-1), F.normalize(bank.tokens[None, tap, 0], dim=-1))
        similarity = F.cosine_similarity(query[0, tap], normal[0, tap][index[0, 0]], dim=-1)
        check(f"B.sim_noaug layer {tap}", similarity, OUTPUTS["B.sim_noaug_per_layer"][tap], atol=1e-5)
    with torch.no_grad():
        anomaly_map = memory_map(memory, query, bank)
    check("B few-shot map", anomaly_map, OUTPUTS["few_shot_k1.map"], atol=1e-5)


def test_rotated_memory_equals_the_published_one(query):
    imagebind = load_imagebind(TINY_IMAGEBIND, TINY)
    image = preprocess([Image.open(FIXTURES / "preprocess/images/07_exif6_200x120.jpg")])
    with torch.no_grad():
        turned = imagebind.encode_image(rotations(image)).patches
        bank = Memory(4, 64).build(turned, rotate=True)
        anomaly_map = memory_map(Memory(4, 64), query, bank)
    assert bank.normals == 1 and bank.rotate
    every8 = bank.tokens[3, :, ::8]
    check("B.normal_aug_layer3_every8", every8, OUTPUTS["B.normal_aug_layer3_every8"], atol=1e-3)
    expected = 1 - F.interpolate(OUTPUTS["B.sim_aug_16x16"], size=224, mode="bilinear", align_corners=True)
    check("B.sim_aug map", anomaly_map, expected, atol=1e-4)


def brute_force_map(memory, patches, normals):
    """The definition in loops: neighbourhood by neighbourhood, float64."""
    images, _, _, width = patches.shape

    def pooled(tokens, scale):
        grid = tokens.double().view(-1, 16, 16, width)
        out, reach = torch.empty_like(grid), scale // 2
        for y in range(16):
            for x in range(16):
                rows, columns = (
                    slice(max(0, y - reach), y + reach + 1),
                    slice(max(0, x - reach), x + reach + 1),
                )
                out[:, y, x] = grid[:, rows, columns].mean((1, 2))
        return out.view(-1, 256, width)

    weights = memory.fusion.double().flatten().softmax(0).view_as(memory.fusion)
    fused = torch.zeros(images, 256, dtype=torch.float64)
    for tap in range(patches.shape[1]):
        for index, scale in enumerate(memory.scales):
            gate = memory.gates[tap, index].double()
            a = F.normalize(pooled(patches[:, tap], scale) * gate, dim=-1)
            b = F.normalize(pooled(normals[:, tap], scale).flatten(0, 1) * gate, dim=-1)
            fused += weights[tap, index] * (1 - (a @ b.T).amax(-1))
    return enlarge(fused.view(images, 1, 16, 16))


@pytest.fixture
def trained():
    """A memory of three scales whose gates and fusion weights are no longer the initial ones."""
    torch.manual_seed(5)
    memory = Memory(taps=2, width=6, scales=(1, 3, 5))
    with torch.no_grad():
        memory.gates.mul_(torch.rand_like(memory.gates) * 2 - 0.5)
        memory.fusion.normal_()
    return memory, torch.randn(2, 2, 256, 6), torch.randn(3, 2, 256, 6)


@pytest.mark.parametrize("chunk", [1, 2000, 2**24])
def test_scales_gates_and_fusion_follow_their_definition(trained, chunk, monkeypatch):
    memory, patches, normals = trained
    monkeypatch.setattr("spgdd.selfprompt.memory.CHUNK", chunk * 512)  # rows of entries at a time
    bank = memory.build(normals)
    assert bank.tokens.shape == (2, 3, 3 * 256, 6) and bank.normals == 3 and bank.scales == (1, 3, 5)
    with torch.no_grad():
        expected = brute_force_map(memory, patches, normals)
        check(f"multi-scale map, chunk {chunk}", memory_map(memory, patches, bank), expected, atol=1e-5)


def test_gates_and_fusion_learn_with_the_gradient_of_the_definition(trained):
    memory, patches, normals = trained
    weight = torch.randn(2, 1, 224, 224)
    gradients = []
    for maps in (
        memory_map(memory, patches, memory.build(normals)),
        brute_force_map(memory, patches, normals),
    ):
        memory.zero_grad()
        (maps * weight).sum().backward()
        gradients.append((memory.gates.grad.clone(), memory.fusion.grad.clone()))
    check("gradient of gates", gradients[0][0], gradients[1][0], rtol=1e-4)
    check("gradient of fusion", gradients[0][1], gradients[1][1], rtol=1e-4)


def test_a_normal_image_against_itself_gives_zero(normal):
    memory = Memory(4, 64, scales=(1, 3, 5))
    with torch.no_grad():
        assert memory_map(memory, normal, memory.build(normal)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_half_precision_tokens_give_nearly_the_same_map(query, normal, dtype, atol):
    memory = Memory(4, 64, scales=(1, 3, 5))
    bank = memory.build(normal.to(dtype))
    assert bank.tokens.dtype == torch.float32  # means of neighbours are not rounded
    with torch.no_grad():
        exact = memory_map(memory, query, memory.build(normal))
        check(f"{dtype} map", memory_map(memory, query.to(dtype), bank), exact, atol=atol)


def test_k_centre_covers_all_with_few():
    torch.manual_seed(2)
    centres = F.normalize(torch.randn(12, 32), dim=-1)
    tokens = centres.repeat_interleave(torch.arange(12) * 9 + 1, dim=0)  # clusters of 1 to 100 entries
    tokens = (tokens + 0.01 * torch.randn_like(tokens)) * torch.rand(len(tokens), 1) * 5
    chosen = k_centre(tokens, 12)
    cluster = (F.normalize(tokens[chosen], dim=-1) @ centres.T).argmax(1)
    assert sorted(cluster.tolist()) == list(range(12))  # even the cluster of one entry is kept
    assert torch.equal(k_centre(tokens, 12), chosen) and torch.equal(k_centre(tokens, 5), chosen[:5])
    assert sorted(k_centre(tokens[:20], 20).tolist()) == list(range(20))
    assert len(set(k_centre(torch.ones(9, 4), 6).tolist())) == 6  # equal entries are not taken twice


def test_a_budget_counts_entries_per_tap_and_scale(trained):
    memory, patches, normals = trained
    small = memory.build(normals, budget=50)
    assert small.tokens.shape == (2, 3, 50, 6) and small.normals == 3
    full = memory.build(normals)
    assert torch.equal(subsample(full, 50).tokens, small.tokens)
    assert memory.build(normals, budget=10**6).tokens.shape == full.tokens.shape
    with torch.no_grad():
        exact, coarse = memory_map(memory, patches, full), memory_map(memory, patches, small)
    assert (coarse >= exact - 1e-5).all()  # fewer entries can only be farther away
    assert (coarse - exact).mean() < 0.25


def test_what_is_barred_is_as_if_it_were_not_in_the_bank(trained):
    memory, patches, normals = trained
    several = torch.cat([normals, normals.flip(2) + 0.1, patches])
    bank = memory.build(several, origin=torch.arange(len(several)) // 2)
    without = torch.arange(len(patches)) % bank.normals
    barred = bank.origin == without[:, None, None, None]
    distances, indices = memory.compare(patches, bank.tokens[None], barred)
    for row, number in enumerate(without):
        rest = memory.build(several[torch.arange(len(several)) // 2 != number])
        expected, _ = memory.compare(patches[row : row + 1], rest.tokens[None])
        check(f"distances without picture {number}", distances[row : row + 1], expected, atol=1e-6)
    assert not barred.gather(3, indices).any()


def test_a_bank_of_other_scales_and_rows_that_are_no_rotations_are_refused(trained):
    memory, patches, normals = trained
    with pytest.raises(WeightsError, match="scales"):
        memory_map(Memory(2, 6), patches, memory.build(normals))
    with pytest.raises(ValueError, match="rotations"):
        memory.build(normals, rotate=True)


def test_focus_tokens_are_the_projected_mean_of_the_patches_that_the_map_points_at():
    torch.manual_seed(0)
    focus, patches = Focus(width=6, hidden=5, taps=2), torch.randn(3, 2, 256, 6)
    flat, pointed = torch.full((3, 1, 224, 224), 0.3), torch.zeros(3, 1, 224, 224)
    pointed[:, :, 14 * 4 : 14 * 5, 14 * 7 : 14 * 8] = 10.0  # the patch in row 4, column 7
    for anomaly_map, wanted in ((flat, patches.mean(2)), (pointed, patches[:, :, 4 * 16 + 7])):
        tokens = focus(patches, anomaly_map)
        assert tokens.shape == (3, 2, 5)
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        by_hand = torch.stack([wanted[:, tap] @ focus.fc[tap].weight.T + focus.fc[tap].bias for tap in (0, 1)], 1)
        torch.testing.assert_close(tokens, by_hand, rtol=1e-4, atol=1e-5)
