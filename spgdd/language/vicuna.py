"""Vicuna with LoRA that reads a projected image vector, after PandaGPT (Su et al. 2023, arXiv:2305.16355)."""

import importlib.util
import logging
import pickle
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaForCausalLM

from spgdd.errors import SpgddError, WeightsError
from spgdd.language.conversation import ASSISTANT, IGNORE, IMAGE_END, PROMPT_START, Answer, encode_turns, fold_history
from spgdd.language.decoding import ROWS, Decoder, can_decode, choose, decode, generated, move
from spgdd.language.tokenizer import LlamaTokenizer
from spgdd.tensors import late_progress, to_device
from spgdd.weights.llama import Shards, read_config, require_v0

DOWNLOAD = "Get it with `spgdd weights download PROFILE` or notebook 01."


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on q, k, v and o of every layer; the defaults are those of the published deltas."""

    r: int = 32  # rank
    alpha: int = 32  # the update is scaled by alpha / r
    dropout: float = 0.1


PUBLISHED = LoraSettings()


class LanguageOutput(NamedTuple):
    loss: Tensor  # scalar float32, nats per target token of the batch
    token_accuracy: Tensor  # scalar float32 in [0, 1]


class Vicuna(nn.Module):
    """A LLaMA language model with LoRA, and the projection of image vectors into its embedding space.

    J is the width of an image vector, H that of the model, P the number of prompt tokens. The base may have any
    precision or be quantised; LoRA and `llama_proj` are float32. Parameter names are those of PandaGPT's checkpoints.
    """

    def __init__(self, llama_model: LlamaForCausalLM, tokenizer: LlamaTokenizer, joint: int,
                 lora: LoraSettings = PUBLISHED):
        super().__init__()
        # Old conversions come with sampling settings and wrong token ids that would warn at every call.
        llama_model.generation_config = GenerationConfig()
        with warnings.catch_warnings():  # peft still asks transformers under an older name
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            self.llama_model = get_peft_model(llama_model, LoraConfig(
                task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
        self.llama_proj = nn.Linear(joint, self.hidden, device=self._embeddings.weight.device)
        self.tokenizer = tokenizer
        self.stop_id = tokenizer.piece_id("##")  # of the "\n###" that ends an answer
        self.verdict_ids = [tokenizer.encode(word)[0] for word in ("Yes", "No")]
        self.pad_to = 1  # training sequences get a multiple of so many tokens: a compiled model wants few lengths
        self._decoder: Decoder | None = None  # of the last answer, for the next one
        self.scored = 2048  # answer tokens whose logits are held at once: 0.6 GB with 32,000 pieces and gradients

    @classmethod
    def load(cls, folder: str | Path, joint: int, dtype: torch.dtype = torch.float32,
             device: str | torch.device = "cpu", device_map: str | dict | None = None,
             quantize: Literal["8bit", "4bit"] | None = None, lora: LoraSettings = PUBLISHED) -> "Vicuna":
        """Read a merged base model (config.json, weights, tokenizer.model), in evaluation mode.

        `dtype` is that of the base whatever the file holds. Its weights go to the device one by one, and on a CPU stay
        mapped to the file where they need no conversion; `device_map` ("auto", or as in transformers) spreads them.
        LoRA starts without effect and `llama_proj` random: load a delta next. Raises WeightsError for a missing or
        damaged file and for a 7B or 13B base other than Vicuna v0, SpgddError where the device's memory is too small.
        """
        folder = Path(folder)
        quantization = _quantization(quantize, dtype)
        for name in ("config.json", "tokenizer.model"):
            if not (folder / name).is_file():
                raise WeightsError(f"No base model in {folder}: {name} is missing. {DOWNLOAD}")
        require_v0(folder)
        mapped = device_map is None and quantize is None and "quantization_config" not in read_config(folder)
        llama, held = None, dtype
        try:
            if mapped:  # as the files have it, whatever the config says
                held = reduce(torch.promote_types, {spec[0] for spec in Shards(folder).specs.values()}, torch.uint8)
            with late_progress():
                llama, report = LlamaForCausalLM.from_pretrained(
                    folder, dtype=held, quantization_config=quantization,
                    device_map=None if mapped else device_map or {"": device}, attn_implementation="sdpa",
                    local_files_only=True, output_loading_info=True)
                if mapped:
                    move(llama, torch.device(device), dtype)
        except torch.OutOfMemoryError as error:
            llama = None
            traceback.clear_frames(error.__traceback__)  # else the message would keep what was loaded in memory
            raise SpgddError(f"The base model in {folder} does not fit the device in {dtype}. Load it with "
                             "quantize='8bit' or '4bit', or free the device's memory.") from error
        except pickle.UnpicklingError:  # torch's own message advises to switch the protection off
            raise WeightsError(f"The base model in {folder} was not opened: it holds objects that could run code. "
                               f"{DOWNLOAD}") from None
        except Exception as error:  # what a damaged file raises, nobody knows
            raise WeightsError(f"The base model in {folder} is unreadable: {error}. {DOWNLOAD}") from error
        if missing := sorted(report["missing_keys"]):
            found = f"{len(missing)} tensors, the first is {missing[0]}"
            raise WeightsError(f"The base model in {folder} lacks {found}. {DOWNLOAD}")
        return cls(llama, LlamaTokenizer(folder / "tokenizer.model"), joint, lora).eval()

    @property
    def hidden(self) -> int:
        """H, the width of the language model."""
        return self.llama_model.config.hidden_size

    @property
    def _embeddings(self) -> nn.Embedding:
        return self.llama_model.get_input_embeddings()

    def forward_loss(self, image_embedding: Tensor, conversations: Sequence[Sequence[dict]],
                     prompt_tokens: Tensor | None = None, max_length: int = 1024) -> LanguageOutput:
        """Next-token loss on the answers, averaged over all target tokens of the batch.

        `image_embedding` (B, J) unit vectors, `conversations` one list of turns per image (see `encode_turns`),
        `prompt_tokens` (B, P, H) or None. Without prompt tokens the layout is PandaGPT's. With them it is AnomalyGPT's:
        `</Img> ` is tokenised on its own and they follow it. `max_length` cuts the text after image and prompt tokens.
        A base in half precision computes in it, LoRA too. Raises SpgddError when nothing is left to learn or the model
        is too short.
        """
        opening = IMAGE_END if prompt_tokens is None else ""
        rows = [encode_turns(self.tokenizer, turns, max_length, opening) for turns in conversations]
        prefix = self._prefix(self._project(image_embedding), prompt_tokens)  # (B, F, H)
        first = prefix.shape[1]
        length = first + max(len(ids) for ids, _ in rows)
        self._check_length(length)
        length += -length % self.pad_to  # S
        # Position i predicts i + 1. Logits are computed only there: of a long prompt they would be most of the memory.
        learned = [(row * length + first + i - 1, target) for row, (_, targets) in enumerate(rows)
                   for i, target in enumerate(targets) if target != IGNORE]
        if not learned:
            raise SpgddError(f"No answer is left in this batch after the cut to {max_length} tokens. Raise max_length "
                             "or shorten the questions.")
        ids = self._pad([ids for ids, _ in rows], self.tokenizer.eos, length - first)  # (B, T)
        places, wanted = to_device(torch.tensor(learned), ids.device).unbind(1)  # (n,), (n,)
        embeds = torch.cat([prefix, self._embeddings(ids)], dim=1)  # (B, S, H)
        half = embeds.dtype != torch.float32
        with torch.autocast(embeds.device.type, embeds.dtype, half):
            # What stands left of the padding does not see it, so that no mask but the causal one is needed.
            llama = self.llama_model.get_base_model()
            hidden = llama.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            hidden = hidden.flatten(0, 1).index_select(0, places)  # (B, S, H) -> (n, H)
            parts = list(zip(hidden.split(self.scored), wanted.split(self.scored), strict=True))
            again = {"use_reentrant": False, "preserve_rng_state": False}  # backward makes the logits once more
            nats, right = zip(*(checkpoint(self._score, *part, **again) if len(parts) > 1 else self._score(*part)
                                for part in parts), strict=True)
        return LanguageOutput(sum(nats) / len(learned), sum(right) / len(learned))

    def _score(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of nats, and how many tokens are predicted right, of hidden states (n, H) and targets (n,)."""
        logits = self.llama_model.get_base_model().lm_head(hidden).float()  # (n, V)
        return F.cross_entropy(logits, wanted, reduction="sum"), (logits.detach().argmax(-1) == wanted).sum()

    def generate(self, image_embedding: Tensor, question: str, *arguments, **options) -> Answer:
        """Answer one question: what `stream`, which takes the same, ends with."""
        *_, answer = self.stream(image_embedding, question, *arguments, **options)
        return answer

    @torch.no_grad()
    def stream(self, image_embedding: Tensor, question: str, history: Sequence[tuple[str, str]] = (),
               prompt_tokens: Tensor | None = None, max_new_tokens: int = 128, temperature: float = 0.0,
               top_p: float = 1.0) -> Iterator[Answer]:
        """Answer one question, piece by piece: the answer so far after each token. Who stops listening stops it.

        `image_embedding` (J,) or (n, J): several inputs (images, thermal, audio) are projected each and summed.
        `history` holds earlier (question, answer) pairs, `prompt_tokens` is (1, P, H) or None as in `forward_loss`.
        Temperature 0 takes the likeliest token. The text comes without the marker that ends an answer. Raises
        SpgddError for an empty question and for one that the model has no room for.
        """
        vector = self._project(image_embedding).sum(dim=0, keepdim=True)  # (1, H)
        prompt = self._prompt(vector, fold_history(history, question), prompt_tokens)
        for _, ids, yes in self._spoken([prompt], max_new_tokens, temperature, top_p):
            yield self._answer(ids, yes)

    @torch.no_grad()
    def generate_batch(self, image_embedding: Tensor, questions: Sequence[str],
                       prompt_tokens: Tensor | None = None, max_new_tokens: int = 128) -> list[Answer]:
        """Answer one question per image with the likeliest tokens: as one by one, in less time.

        `image_embedding` (B, J), `questions` B texts, `prompt_tokens` (B, P, H) or None. Any number of images: one
        that is answered makes room for the next.
        """
        tokens = [None] * len(questions) if prompt_tokens is None else prompt_tokens.split(1)
        prompts = [self._prompt(vector, fold_history((), question), token) for vector, question, token
                   in zip(self._project(image_embedding).split(1), questions, tokens, strict=True)]
        return self._answers(prompts, max_new_tokens)

    def _project(self, image_embedding: Tensor) -> Tensor:
        """(J,) or (B, J) to (B, H), in the precision of the token embeddings."""
        vectors, weight = torch.atleast_2d(image_embedding), self.llama_proj.weight
        if vectors.dim() != 2 or vectors.shape[1] != weight.shape[1]:
            raise SpgddError(f"Expected image embeddings (B, {weight.shape[1]}), received "
                             f"{tuple(image_embedding.shape)}: are vision model and delta of one profile?")
        return self.llama_proj(vectors.to(weight)).to(self._embeddings.weight.dtype)

    def _pad(self, rows: list[list[int]], value: int, length: int = 0) -> Tensor:
        """Rows of ids to (B, T), padded on the right, T at least `length`."""
        padded = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value)
        padded = F.pad(padded, (0, max(0, length - padded.shape[1])), value=value)
        return to_device(padded, self._embeddings.weight.device)

    def _embed(self, text_or_ids: str | list[int], batch: int = 1) -> Tensor:
        """Embeddings (batch, T, H) of the same text or ids in each row."""
        ids = self.tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
        return self._embeddings(self._pad([ids], 0)).expand(batch, -1, -1)

    def _prefix(self, image_vector: Tensor, prompt_tokens: Tensor | None) -> Tensor:
        """All before the text: BOS, prompt start, image (B, H) and, if any, `</Img> ` and prompt tokens."""
        batch, bos = len(image_vector), self.tokenizer.bos
        parts = [self._embed([bos], batch), self._embed(PROMPT_START, batch), image_vector[:, None]]
        if prompt_tokens is not None:
            parts += [self._embed(IMAGE_END, batch), prompt_tokens.to(image_vector)]
        return torch.cat(parts, dim=1)  # (B, S, H)

    def _prompt(self, image_vector: Tensor, text: str, prompt_tokens: Tensor | None) -> Tensor:
        """Embeddings (1, S, H) of everything before the answer; `text` is the question with its history."""
        text = (IMAGE_END if prompt_tokens is None else "") + text + ASSISTANT
        prompt = torch.cat([self._prefix(image_vector, prompt_tokens), self._embed(text)], dim=1)
        self._check_length(prompt.shape[1] + 1)
        return prompt

    def _check_length(self, length: int) -> None:
        limit = self.llama_model.config.max_position_embeddings
        if length > limit:
            raise SpgddError(f"The conversation takes {length} tokens with the image, this language model "
                             f"holds {limit}. Shorten the question or drop the oldest turns.")

    def _answers(self, prompts: list[Tensor], max_new_tokens: int) -> list[Answer]:
        """The likeliest answers to prompts (1, S_i, H)."""
        last = {number: (ids, yes) for number, ids, yes in self._spoken(prompts, max_new_tokens)}
        return [self._answer(*last[number]) for number in range(len(prompts))]

    def _spoken(self, prompts: list[Tensor], max_new_tokens: int, temperature: float = 0.0,
                top_p: float = 1.0) -> Iterator[tuple[int, list[int], float]]:
        """After each token the number of its prompt (1, S_i, H), the ids so far, and how likely Yes was."""
        llama, room = self.llama_model.get_base_model(), self.llama_model.config.max_position_embeddings
        limits = [min(max_new_tokens, room - prompt.shape[1]) for prompt in prompts]
        asked = [prompt[0] for prompt in prompts], limits, {self.tokenizer.eos, self.stop_id}
        rows, yes, decoder = min(len(prompts), ROWS), {}, None
        if can_decode(llama):
            length = max(prompt.shape[1] + limit for prompt, limit in zip(prompts, limits, strict=True))
            decoder, self._decoder = self._decoder, None  # another thread that asks meanwhile makes its own
            if decoder and not decoder.fits(rows, length):
                decoder = None  # its memory is free before the next one takes more
            decoder = decoder or Decoder(llama, len(self.tokenizer), rows, length)
            tokens = decode(decoder, *asked, partial(choose, temperature=temperature, top_p=top_p))
        else:
            tokens = generated(self.llama_model, *asked, temperature, top_p)
        for number, ids, logits in tokens:
            if logits is not None:
                yes[number] = logits[self.verdict_ids].float().softmax(-1)[0].item()
            yield number, ids, yes[number]
        if rows == 1:  # a batch gives its memory back
            self._decoder = decoder

    def _answer(self, ids: list[int], yes: float) -> Answer:
        """Generated ids up to the first end; only the end marker, a newline and ##, is cut from the text."""
        for position, token in enumerate(ids):
            if token == self.stop_id:
                text = self.tokenizer.decode(ids[:position]).removesuffix("\n")
                return Answer(text, ids[:position + 1], "marker", yes)
            if token == self.tokenizer.eos:
                return Answer(self.tokenizer.decode(ids[:position]), ids[:position + 1], "eos", yes)
        return Answer(self.tokenizer.decode(ids), ids[:], "length", yes)


def _quantization(quantize: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantize not in (None, "8bit", "4bit"):
        raise SpgddError(f"quantize must be '8bit', '4bit' or None, received {quantize!r}.")
    if quantize is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SpgddError(f"Loading in {quantize} needs bitsandbytes: `pip install 'spgdd[gpu]'`.")
    if quantize == "8bit":
        # Its 8-bit product takes float16 and says so for every layer of every token.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
