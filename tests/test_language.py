"""The language branch against PandaGPT's and AnomalyGPT's own numbers at a tiny size."""

import json
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import spgdd.language.vicuna
from conftest import FIXTURES, check
from spgdd.errors import DataError, SpgddError, WeightsError
from spgdd.language import LlamaTokenizer, LoraSettings, Vicuna, decoding, encode_turns, fold_history
from spgdd.language.decoding import joined, with_lora
from spgdd.loading import load_model
from spgdd.tensors import read_tensors
from spgdd.weights.delta import apply_delta

PANDA = FIXTURES / "pandagpt"
CONFIG = json.loads((PANDA / "config.json").read_text())
CASES = {case["name"]: case for case in json.loads((PANDA / "generation.json").read_text())}
JOINT = CONFIG["visual_hidden_size"]
LORA = LoraSettings(r=CONFIG["lora"]["r"], alpha=CONFIG["lora"]["alpha"])
ATOL = CONFIG["suggested_atol"]
BATCHES = ("batch", "single0", "single1", "truncated")


@pytest.fixture(scope="module")
def reference():
    return load_file(PANDA / "outputs.safetensors")


def panda(**options) -> Vicuna:
    vicuna = Vicuna.load(PANDA / "llama", joint=JOINT, lora=LORA, **options)
    apply_delta(vicuna, read_tensors(PANDA / "delta" / "delta.safetensors"))
    return vicuna


@pytest.fixture(scope="module")
def vicuna():
    return panda()


@pytest.fixture(scope="module")
def images(reference, vicuna):
    """Embeddings behind each generation case. The thermal one is recovered from the projected sum."""
    first, second = reference["batch.vision_embedding"]
    with torch.no_grad():
        rest = reference["gen.image_plus_thermal.feature_embeds"].flatten() - vicuna._project(first)[0]
        rest = (rest - vicuna.llama_proj.bias)[:, None]
        thermal = torch.linalg.lstsq(vicuna.llama_proj.weight, rest).solution
    return {"plain": first, "history": first, "stop": first, "two_images": torch.stack([first, second]),
            "image_plus_thermal": torch.stack([first, thermal[:, 0]])}


def spy(monkeypatch, owner, method) -> dict:
    """The keyword arguments that `owner.method` receives, filled in when it is called."""
    seen, original = {}, getattr(owner, method)

    def watched(**inputs):
        seen.update(inputs)
        return original(**inputs)

    monkeypatch.setattr(owner, method, watched)
    return seen


@pytest.fixture
def tokenizer():
    return LlamaTokenizer(PANDA / "llama" / "tokenizer.model")


# Tokenizer and format


TEXTS = json.loads((PANDA / "tokenization.json").read_text())


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: repr(case["text"]))
def test_token_ids(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]


def test_special_ids_and_stop_piece_come_from_the_vocabulary(tokenizer):
    assert (tokenizer.bos, tokenizer.eos) == (CONFIG["bos_token_id"], CONFIG["eos_token_id"])
    assert tokenizer.piece_id("##") == CONFIG["analog_of_stop_id_2277"]["id"]
    with pytest.raises(WeightsError, match="it lacks"):
        tokenizer.piece_id("no such piece")


def test_decode_skips_vicunas_padding_id(tokenizer):
    ids = tokenizer.encode("It shows a bottle.")
    assert tokenizer.decode([tokenizer.bos, *ids, len(tokenizer), tokenizer.eos]) == "It shows a bottle."


def test_encoded_turns(tokenizer, reference):
    for row, turns in enumerate(CONFIG["batch"]["conversations"]):
        ids, targets = encode_turns(tokenizer, turns, 1024)
        assert ids == reference["batch.input_ids"][row, :len(ids)].tolist()
        assert targets == reference["batch.target_ids"][row, :len(ids)].tolist()
        assert (reference["batch.target_ids"][row, len(ids):] == -100).all()


def test_turns_must_alternate(tokenizer):
    with pytest.raises(DataError, match="Turn 0"):
        encode_turns(tokenizer, [{"from": "gpt", "value": "Yes."}], 10)
    with pytest.raises(DataError, match="Turn 1"):
        encode_turns(tokenizer, [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], 10)


def test_history_is_folded_into_the_question():
    folded = fold_history([("Describe the photo.", "It shows a bottle.")], "What colour is it?")
    assert folded == CASES["history"]["prompt"]
    with pytest.raises(SpgddError, match="empty"):
        fold_history([("a", "b")], "  ")


# Training


@pytest.mark.parametrize("name", BATCHES)
def test_forward(vicuna, reference, name, monkeypatch):
    seen = spy(monkeypatch, vicuna.llama_model.get_base_model().model, "forward")
    length = CONFIG["truncated_max_tgt_len" if name == "truncated" else "max_tgt_len"]
    with torch.no_grad():
        output = vicuna.forward_loss(
            reference[f"{name}.vision_embedding"], CONFIG[name]["conversations"], max_length=length)
        mask = reference[f"{name}.attention_mask"]
        logits = vicuna.llama_model(inputs_embeds=seen["inputs_embeds"], attention_mask=mask).logits
    check(f"pandagpt {name} inputs_embeds", seen["inputs_embeds"], reference[f"{name}.inputs_embeds"], 1e-5)
    complete = f"{name}.logits" in reference
    expected = reference[f"{name}.logits" if complete else f"{name}.logits_last8"]
    check(f"pandagpt {name} logits", logits[:, -expected.shape[1]:], expected, ATOL["logits"])
    check(f"pandagpt {name} loss", output.loss, reference[f"{name}.loss"][0], ATOL["loss"])
    check(f"pandagpt {name} token accuracy", output.token_accuracy, reference[f"{name}.token_acc"][0], 1e-6)


def test_padding_and_logits_in_parts_change_neither_loss_nor_gradients(vicuna, reference, monkeypatch):
    seen = spy(monkeypatch, vicuna.llama_model.get_base_model().model, "forward")

    def run():
        vicuna.zero_grad()
        output = vicuna.forward_loss(reference["batch.vision_embedding"], CONFIG["batch"]["conversations"])
        output.loss.backward()
        return output, vicuna.llama_proj.weight.grad.clone()

    (output, gradient), length = run(), seen["inputs_embeds"].shape[1]
    monkeypatch.setattr(vicuna, "pad_to", 64)
    monkeypatch.setattr(vicuna, "scored", 7)
    again, same = run()
    assert seen["inputs_embeds"].shape[1] % 64 == 0 != length % 64
    check("loss in parts", again.loss, output.loss, 1e-6)
    check("gradient in parts", same, gradient, 1e-7)
    assert again.token_accuracy == output.token_accuracy
    vicuna.zero_grad()


def test_gradients_reach_lora_and_projection_only(vicuna, reference):
    vicuna.zero_grad()
    vicuna.forward_loss(reference["batch.vision_embedding"], CONFIG["batch"]["conversations"]).loss.backward()
    gradients = {name: p.grad for name, p in vicuna.named_parameters() if p.requires_grad}
    assert set(gradients) == set(CONFIG["delta_keys"])
    for name, gradient in gradients.items():
        check(f"pandagpt gradients {'lora' if 'lora' in name else name}", gradient, reference[f"grad.{name}"],
              atol=ATOL["grad"])
    assert all(p.grad is None for p in vicuna.parameters() if not p.requires_grad)
    vicuna.zero_grad()


def test_gradient_reaches_prompt_tokens(vicuna, reference):
    prompts = torch.randn(2, 3, vicuna.hidden, requires_grad=True)
    conversations = CONFIG["batch"]["conversations"]
    vicuna.forward_loss(reference["batch.vision_embedding"], conversations, prompts).loss.backward()
    assert prompts.grad.abs().sum(-1).min() > 0
    vicuna.zero_grad()


def test_nothing_left_to_learn(vicuna):
    with pytest.raises(SpgddError, match="max_length"):
        vicuna.forward_loss(torch.zeros(1, JOINT), CONFIG["single0"]["conversations"], max_length=5)


# Generation


@pytest.mark.parametrize("name", CASES)
def test_generated_ids(vicuna, reference, images, name, monkeypatch):
    case = CASES[name]
    if case["stop_id"] is not None:  # the random model never says ##, so the case stops at another id
        monkeypatch.setattr(vicuna, "stop_id", case["stop_id"])
    history = [("Describe the photo.", "It shows a bottle.")] if name == "history" else ()
    question = "What colour is it?" if name == "history" else case["prompt"]
    prompt = vicuna._prompt

    def watched(*inputs):
        seen["prompt"] = prompt(*inputs)
        return seen["prompt"]

    seen = {}
    monkeypatch.setattr(vicuna, "_prompt", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = vicuna.generate(images[name], question, history, max_new_tokens=case["max_new_tokens"])
    check(f"pandagpt {name} prompt", seen["prompt"], reference[f"gen.{name}.inputs_embeds"], atol=1e-5)
    assert answer.ids == case["new_tokens"]
    assert answer.stopped == ("marker" if name == "stop" else "length")
    if name == "stop":  # only the marker goes; the published code drops one more token
        assert answer.text == vicuna.tokenizer.decode(case["new_tokens"][:-1]) != case["text"]
    else:  # nothing is lost at the length limit; the published code drops two tokens
        assert answer.text == vicuna.tokenizer.decode(case["new_tokens"])
    assert vicuna.tokenizer.decode(case["tokens_kept_after_strip2"]) == case["text"]


def test_first_steps_logits(vicuna, reference):
    with torch.no_grad():
        for name, case in CASES.items():
            prompt = reference[f"gen.{name}.inputs_embeds"]
            continued = torch.cat([prompt, vicuna._embed(case["new_tokens"][:2])], dim=1)
            logits = vicuna.llama_model(inputs_embeds=continued, logits_to_keep=3).logits[0]
            expected = reference[f"gen.{name}.step_logits_first3"]
            check(f"pandagpt {name} first logits", logits, expected, ATOL["logits"])


def test_stop_marker_is_removed_and_nothing_else(vicuna):
    text = vicuna.tokenizer.encode("No defect.\n")
    answer = vicuna._answer([*text, vicuna.stop_id, 5, 5], yes=0.25)
    assert answer == ("No defect.", [*text, vicuna.stop_id], "marker", 0.25)
    assert vicuna._answer(text, 0.0) == ("No defect.\n", text, "length", 0.0)
    assert vicuna._answer([*text[:-1], vicuna.tokenizer.eos, 7], 0.0).stopped == "eos"
    assert vicuna._answer([*text[:-1], vicuna.tokenizer.eos, 7], 0.0).text == "No defect."


@pytest.mark.parametrize("prompted", [False, True])
def test_batch_equals_one_by_one(vicuna, reference, prompted, monkeypatch):
    monkeypatch.setattr(vicuna, "stop_id", CASES["stop"]["stop_id"])  # rows end at different lengths
    embeddings = reference["batch.vision_embedding"][[0, 1, 0, 1]]
    questions = [CASES["plain"]["prompt"], "Hi?", CASES["history"]["prompt"], CASES["plain"]["prompt"]]
    random = torch.Generator().manual_seed(0)
    prompts = torch.randn(4, 5, vicuna.hidden, generator=random) if prompted else None
    batch = vicuna.generate_batch(embeddings, questions, prompts, max_new_tokens=24)
    single = [vicuna.generate(embeddings[i], questions[i], max_new_tokens=24,
                              prompt_tokens=None if prompts is None else prompts[i:i + 1]) for i in range(4)]
    assert [answer[:3] for answer in batch] == [answer[:3] for answer in single]
    check("yes in a batch", [answer.yes for answer in batch], [answer.yes for answer in single], atol=1e-5)
    assert prompted or len({len(answer.ids) for answer in batch}) > 1


def test_anomalygpt_prompt_and_answers(vicuna):
    reference = load_file(FIXTURES / "anomalygpt" / "outputs.safetensors")
    for case in json.loads((FIXTURES / "anomalygpt" / "generation.json").read_text()):
        name = case["name"]
        image, prompts = reference[f"{name}.image_feature"][:, 0], reference[f"{name}.prompts"]
        with torch.no_grad():
            prompt = vicuna._prompt(image, case["prompt"], prompts)
        check(f"anomalygpt {name} prompt", prompt, reference[f"{name}.inputs_embeds"], atol=1e-5)
        assert vicuna._answers([prompt], case["max_new_tokens"])[0].ids == case["new_tokens"]


def transformers_ids(vicuna, prompts, max_new_tokens):
    """What transformers' own `generate` continues prompts (1, S_i, H) with, up to the end of each answer."""
    ends, longest = [vicuna.tokenizer.eos, vicuna.stop_id], max(prompt.shape[1] for prompt in prompts)
    embeds = torch.cat([F.pad(prompt, (0, 0, longest - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - prompt.shape[1] for prompt in prompts]).long()
    rows = vicuna.llama_model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=ends, pad_token_id=vicuna.tokenizer.eos)
    return [vicuna._answer(row, 0.0).ids for row in rows.tolist()]


def test_200_answers_of_mini_are_those_of_transformers():
    vicuna = load_model("mini", device="cpu").language
    random, words = torch.Generator().manual_seed(0), ("metal nut", "part", "piece of woven cloth", "board")
    asked = ("Is there any anomaly in the image?", "What is in the image?", "Where is the defect?",
             "Describe the image.", "What kind of defect is it?")
    images = F.normalize(torch.randn(200, vicuna.llama_proj.in_features, generator=random), dim=-1)
    told = torch.randn(200, 28, vicuna.hidden, generator=random) * 0.05
    questions = [f"This is a {words[i % 4]}. " * (i % 3) + asked[i % 5] for i in range(200)]
    answers = [answer.ids for answer in vicuna.generate_batch(images, questions, told, max_new_tokens=32)]
    with torch.no_grad():
        prompts = [vicuna._prompt(vicuna._project(image), question, tokens) for image, question, tokens
                   in zip(images, questions, told.split(1), strict=True)]
    assert answers == sum((transformers_ids(vicuna, prompts[i:i + 40], 32) for i in range(0, 200, 40)), [])
    assert len({len(ids) for ids in answers}) > 10 and len(set(map(tuple, answers))) > 50


@pytest.mark.parametrize("rows", [2, 3])
def test_an_answer_that_ends_makes_room_for_the_next(vicuna, reference, rows, monkeypatch):
    monkeypatch.setattr(spgdd.language.vicuna, "ROWS", rows)
    monkeypatch.setattr(vicuna, "stop_id", CASES["stop"]["stop_id"])
    questions = [word * n for n in (1, 9, 4) for word in ("Hi? ", "What colour is it? ", "Is it broken? ")]
    embeddings = reference["batch.vision_embedding"][[0, 1, 0, 1, 1, 0, 1, 0, 0]]
    batch = vicuna.generate_batch(embeddings, questions, max_new_tokens=20)
    single = [vicuna.generate(*asked, max_new_tokens=20) for asked in zip(embeddings, questions, strict=True)]
    assert [answer[:3] for answer in batch] == [answer[:3] for answer in single]
    assert len({len(answer.ids) for answer in batch}) > 1


def test_a_quantised_or_spread_base_speaks_the_same_through_transformers(vicuna, reference, monkeypatch):
    embeddings, questions = reference["batch.vision_embedding"], ["Hi?", CASES["plain"]["prompt"]]
    expected = vicuna.generate_batch(embeddings, questions, max_new_tokens=20)
    monkeypatch.setattr(vicuna.llama_model.get_base_model(), "hf_device_map", {"a": 0, "b": 1}, raising=False)
    for found in (vicuna.generate_batch(embeddings, questions, max_new_tokens=20),
                  [vicuna.generate(*asked, max_new_tokens=20) for asked in zip(embeddings, questions, strict=True)]):
        assert [answer[:3] for answer in found] == [answer[:3] for answer in expected]
        check("yes by transformers", [a.yes for a in found], [a.yes for a in expected], atol=1e-5)


def test_a_stream_grows_to_the_answer_and_can_be_left(vicuna, images):
    question = CASES["plain"]["prompt"]
    whole = vicuna.generate(images["plain"], question, max_new_tokens=24)
    parts = list(vicuna.stream(images["plain"], question, max_new_tokens=24))
    assert [part.ids for part in parts] == [whole.ids[:n + 1] for n in range(24)] and parts[-1] == whole
    stream = vicuna.stream(images["plain"], question, max_new_tokens=24)
    assert next(stream).ids == whole.ids[:1]
    assert vicuna.generate(images["plain"], "Hi?", max_new_tokens=3)  # while the stream waits
    assert next(stream).ids == whole.ids[:2]
    stream.close()
    assert vicuna.generate(images["plain"], question, max_new_tokens=24) == whole


def test_answers_follow_the_weights_and_leave_them_as_they_are(reference):
    vicuna = panda()
    image, question = reference["batch.vision_embedding"][0], CASES["plain"]["prompt"]

    def said():
        with torch.no_grad():
            prompt = vicuna._prompt(vicuna._project(image), question, None)
        answer = vicuna.generate(image, question, max_new_tokens=12)
        assert [answer.ids] == transformers_ids(vicuna, [prompt], 12)
        return answer.ids

    before, state = said(), {name: value.clone() for name, value in vicuna.state_dict().items()}
    assert said() == before and all(torch.equal(state[name], value) for name, value in vicuna.state_dict().items())
    with vicuna.llama_model.disable_adapter():
        assert said() != before
    with torch.no_grad():
        for name, value in vicuna.named_parameters():
            if "lora_B" in name:
                value.mul_(-3)
    assert said() != before
    vicuna.load_state_dict(state)
    vicuna.double()  # all weights move
    assert said() == before


def test_what_is_drawn_has_the_chances_of_transformers(monkeypatch):
    logits = torch.randn(1, 80, generator=torch.Generator().manual_seed(1)) * 2
    warped = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(decoding.LIKELIEST), TopPLogitsWarper(0.8)):
        warped = warper(None, warped)
    torch.manual_seed(0)
    drawn = decoding.choose(logits.expand(50_000, -1), temperature=0.7, top_p=0.8)
    chances = torch.bincount(drawn, minlength=80) / len(drawn)
    check("chances", chances, warped.softmax(-1)[0], atol=0.01)
    assert ((chances > 0) == (warped[0] > -torch.inf)).all()
    assert decoding.choose(logits, 0.0, 1.0) == logits.argmax()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_says_what_the_same_step_says_without_one(reference):
    image, question = reference["batch.vision_embedding"][0].cuda(), CASES["plain"]["prompt"]
    vicuna = panda().cuda()
    captured = [vicuna.generate(image, question, max_new_tokens=24).ids for _ in range(2)]
    assert vicuna._decoder.graph is not None
    assert captured == [panda().generate(image.cpu(), question, max_new_tokens=24).ids] * 2


def test_sampling_depends_on_the_seed(vicuna, images):
    question, answers = CASES["plain"]["prompt"], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(vicuna.generate(images["plain"], question, max_new_tokens=12, temperature=1.0).ids)
    assert answers[0] == answers[1] != answers[2]
    narrow = vicuna.generate(images["plain"], question, max_new_tokens=24, temperature=1.0, top_p=0.01)
    assert narrow.ids == CASES["plain"]["new_tokens"]  # the published demo's setting is as good as greedy


def test_wrong_inputs_are_named(vicuna, images):
    with pytest.raises(SpgddError, match="empty"):
        vicuna.generate(images["plain"], " ")
    with pytest.raises(SpgddError, match="holds 256"):
        vicuna.generate(images["plain"], "why? " * 200)
    with pytest.raises(SpgddError, match="one profile"):
        vicuna.generate(torch.zeros(JOINT + 1), "What is it?")
    filled = vicuna.generate(images["plain"], "why? " * 40, max_new_tokens=512)
    assert filled.stopped == "length" and len(filled.ids) < 256


def test_yes_is_the_share_of_the_first_piece(vicuna, images):
    pieces = [vicuna.tokenizer.encode(word)[0] for word in ("Yes", "No")]
    questions = ["Is it?", "Is there any anomaly in the image?"]
    found = vicuna.generate_batch(images["plain"].expand(2, -1), questions, max_new_tokens=4)
    for question, answer in zip(questions, found, strict=True):
        with torch.no_grad():
            prompt = vicuna._prompt(vicuna._project(images["plain"]), question, None)
            p = vicuna.llama_model(inputs_embeds=prompt).logits[0, -1].softmax(-1)[pieces]
        check("share of yes", answer.yes, p[0] / p.sum(), atol=1e-5)
        warm = vicuna.generate(images["plain"], question, max_new_tokens=1, temperature=0.5)
        check("share of yes, sampled", warm.yes, answer.yes, atol=1e-5)


# Loading and precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_base_keeps_trainable_weights_in_float32(reference, dtype):
    half = panda(dtype=dtype)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {dtype}
    inputs = reference["batch.vision_embedding"], CONFIG["batch"]["conversations"]
    half.forward_loss(*inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)
    assert len(half.generate(inputs[0][0], "What is it?", max_new_tokens=3).ids) == 3
    check(f"loss, base {dtype}", half.forward_loss(*inputs).loss, reference["batch.loss"][0], rtol=0.01)
    for base, model in {dtype: half, torch.float32: panda()}.items():
        with torch.autocast("cpu", dtype=dtype):
            loss = model.forward_loss(*inputs).loss
        check(f"loss, base {base}, autocast {dtype}", loss, reference["batch.loss"][0], rtol=0.01)


def test_half_precision_file_runs_in_float32(tmp_path):
    folder = shutil.copytree(PANDA / "llama", tmp_path / "llama")
    LlamaForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    loaded = Vicuna.load(folder, joint=JOINT, lora=LORA)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not loaded.training


def test_tokenizer_model_is_the_only_tokenizer_file_needed(tmp_path):
    folder = shutil.copytree(PANDA / "llama", tmp_path / "llama")
    (folder / "tokenizer_config.json").unlink()
    (folder / "added_tokens.json").write_text('{"[PAD]": 32000}')
    assert Vicuna.load(folder, joint=JOINT, lora=LORA).tokenizer.eos == 2


def test_loading_something_small_shows_no_progress_bar(capfd):
    Vicuna.load(PANDA / "llama", joint=JOINT, lora=LORA)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.model", "model.safetensors"])
def test_missing_file(tmp_path, missing):
    folder = shutil.copytree(PANDA / "llama", tmp_path / "llama")
    (folder / missing).unlink()
    with pytest.raises(WeightsError, match=r"llama.*weights download"):
        Vicuna.load(folder, joint=JOINT)


@pytest.mark.parametrize("damaged", ["config.json", "tokenizer.model", "model.safetensors"])
def test_damaged_file(tmp_path, damaged):
    folder = shutil.copytree(PANDA / "llama", tmp_path / "llama")
    content = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(content[:len(content) // 2])
    with pytest.raises(WeightsError, match="weights download"):
        Vicuna.load(folder, joint=JOINT)


def test_absent_tensor(tmp_path):
    folder = shutil.copytree(PANDA / "llama", tmp_path / "llama")
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="model.norm.weight"):
        Vicuna.load(folder, joint=JOINT)


@pytest.mark.parametrize("config,guess", [
    ({"vocab_size": 32000, "max_position_embeddings": 4096}, "Llama-2 or Vicuna v1.5"),
    ({"vocab_size": 32000}, "v1.1 or v1.3"),
    ({"vocab_size": 32016, "hidden_size": 5120, "max_position_embeddings": 16384}, "CodeLlama"),
    ({"vocab_size": 32000, "model_type": "mistral"}, "'mistral'"),
])
def test_wrong_base_is_recognised_before_its_weights(tmp_path, config, guess):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4096} | config))
    shutil.copy(PANDA / "llama" / "tokenizer.model", tmp_path)
    with pytest.raises(WeightsError, match=guess) as raised:
        Vicuna.load(tmp_path, joint=JOINT)
    assert "Vicuna v0" in str(raised.value)


def test_vicuna_v0_passes_the_check_of_the_base(tmp_path):
    config = {"model_type": "llama", "hidden_size": 4096, "vocab_size": 32001, "bos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(PANDA / "llama" / "tokenizer.model", tmp_path)
    with pytest.raises(WeightsError, match="unreadable.*model.safetensors"):  # it got as far as the weights
        Vicuna.load(tmp_path, joint=JOINT)


def test_too_little_memory_names_the_way_out(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", full)
    with pytest.raises(SpgddError, match="quantize='8bit'"):
        Vicuna.load(PANDA / "llama", joint=JOINT)


def test_quantisation_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpgddError, match=r"spgdd\[gpu\]"):
        Vicuna.load(PANDA / "llama", joint=JOINT, quantize="4bit")
    with pytest.raises(SpgddError, match="'2bit'"):
        Vicuna.load(PANDA / "llama", joint=JOINT, quantize="2bit")


@pytest.mark.parametrize("prefix", ["llama_model.", "llama_proj."])
def test_7b_names_and_shapes_are_the_published_ones(tokenizer, prefix):
    published = json.loads((FIXTURES / "pandagpt_7b_delta_keys.json").read_text())["keys"]
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=32001))  # the other defaults are LLaMA-7B's
        large = Vicuna(base, tokenizer, joint=1024)
    own = {name: list(p.shape) for name, p in large.named_parameters() if p.requires_grad}
    assert all(p.is_meta for p in large.parameters())
    assert {n: s for n, s in own.items() if n.startswith(prefix)} == {
        n: entry["shape"] for n, entry in published.items() if n.startswith(prefix)}


def test_a_model_that_was_converted_needs_no_joining():
    was, now = (panda(dtype=dtype).llama_model.get_base_model() for dtype in (torch.float32, torch.bfloat16))
    assert now.dtype == now.config.dtype == torch.bfloat16 and now.model.rotary_emb.inv_freq.dtype == torch.float32
    state = now.state_dict()
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in was.state_dict().items()
               if "lora_" not in name)  # fmt: skip
    for layer in now.model.layers:
        mlp, projections = layer.mlp, [projection.base_layer for projection in with_lora(layer)[:3]]
        for parts in (projections, [mlp.gate_proj, mlp.up_proj]):
            first = parts[0].weight.data_ptr()
            assert joined(*parts).data_ptr() == first == parts[0].weight.data_ptr()


def test_weights_are_joined_once_and_anew_where_they_were_replaced():
    layers = [nn.Linear(6, rows, bias=False) for rows in (4, 2, 3)]
    before = [layer.weight.detach().clone() for layer in layers]
    whole = joined(*layers)
    assert torch.equal(whole, torch.cat(before)) and not whole.is_inference()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    again = joined(*layers)
    assert again.data_ptr() == whole.data_ptr() == layers[0].weight.data_ptr() and torch.equal(again, whole)
    layers[1].weight.data = before[1] + 1
    assert torch.equal(joined(*layers)[4:6], before[1] + 1)


def test_the_files_tell_their_precision_and_not_the_config(tmp_path):
    shutil.copytree(PANDA / "llama", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, expected = (Vicuna.load(folder, joint=JOINT).state_dict() for folder in (tmp_path, PANDA / "llama"))
    name = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert found[name].dtype == torch.float32 and torch.equal(found[name], expected[name])
