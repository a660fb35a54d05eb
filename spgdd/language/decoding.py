"""Answers at the speed of the memory: LLaMA with LoRA token by token, over a cache of fixed size.

A token needs every weight once, so it takes at least the time of reading them. transformers' `generate` takes over ten
times that on a fast GPU: Python, peft, and many small kernels. Here a token is the same arithmetic in a third of the
kernels, which a CUDA device replays as one captured graph. LoRA stays apart from the frozen weights: nothing is rounded
into them, nothing has to be taken out again before training, and it costs a hundredth of the time.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

ROWS = 20  # answers at a time: their keys and values take 2.3 GB at 7B with 224 tokens each
LIKELIEST = 50  # pieces that are drawn from, as in transformers


def can_decode(llama) -> bool:
    """Whether the weights of a LlamaForCausalLM can be used as they are: on one device, and not quantised."""
    devices = getattr(llama, "hf_device_map", {}).values()
    return len(set(devices)) <= 1 and not getattr(llama, "is_quantized", False)


class Decoder:
    """Up to `rows` answers at once, of at most `length` tokens with the prompt, that begin and end when they like.

    `llama` is a LlamaForCausalLM with LoRA, V its vocabulary, of which the first `pieces` can be said, H its width, D
    that of a head.
    """

    @torch.inference_mode()
    def __init__(self, llama, pieces: int, rows: int, length: int):
        length += -length % (256 if rows == 1 else 32)  # a single answer's cache may hold the next one's question too
        config, like = llama.config, {"dtype": llama.dtype, "device": llama.device}
        self.llama, self.rows, self.length = llama, rows, length
        self.embed, self.norm, self.eps = llama.model.embed_tokens, llama.model.norm.weight, config.rms_norm_eps
        self.head = llama.lm_head.weight[:pieces].T
        self.weights = []
        for layer in llama.model.layers:
            *projections, out = (projection.base_layer for projection in with_lora(layer))
            mlp, norms = layer.mlp, (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
            widen, narrow = joined(mlp.gate_proj, mlp.up_proj), mlp.down_proj.weight
            self.weights.append((joined(*projections), out.weight, widen, narrow, *norms))
        heads, layers, width = config.num_attention_heads, len(self.weights), config.hidden_size
        self.shape = heads, width // heads
        self.cache = torch.zeros(layers, 2, rows, length, *self.shape, **like)  # keys and values
        rank = with_lora(llama.model.layers[0])[0].r["default"]
        self.down, self.out = torch.zeros(layers, 4, rank, width, **like), torch.zeros(layers, rank, width, **like)
        self.up = torch.zeros(layers, 3, rank, 3, width, **like)  # of q, k and v together; zero from one to another
        self.lora = [
            (down[:3].flatten(0, 1).T, up.flatten(2).flatten(0, 1), down[3].T, out)
            for down, up, out in zip(self.down, self.up, self.out, strict=True)
        ]
        self.slots, self.columns = (torch.arange(n, device=llama.device) for n in (rows, length))
        self.tokens, self.positions = torch.zeros_like(self.slots), torch.zeros_like(self.slots)  # read next, and where
        cos, sin = llama.model.rotary_emb(self.cache, self.columns[None])  # (1, length, D)
        first, second = sin.chunk(2, dim=-1)
        sin = torch.cat([-first, second], dim=-1)
        self.cos, self.sin = cos[0, :, None, None], sin[0, :, None, None]  # (length, 1, 1, D)
        self.graph, self.warm = None, False

    def fits(self, rows: int, length: int) -> bool:
        """Whether it can serve again: a captured graph reads the weights where they were."""
        moved = self.head.data_ptr() != self.llama.lm_head.weight.data_ptr()
        return self.rows == rows and self.length >= length and not moved

    def refresh(self) -> None:
        """Take LoRA as it is now, in the precision of the base."""
        adapters = [projection for layer in self.llama.model.layers for projection in with_lora(layer)]
        off = adapters[0].disable_adapters or adapters[0].merged
        down = torch.stack([adapter.lora_A["default"].weight for adapter in adapters])  # (4 per layer, r, H)
        self.down.copy_(down.view_as(self.down))
        del down  # before as much is taken again
        up = torch.stack([adapter.lora_B["default"].weight for adapter in adapters]).mT.unflatten(0, (-1, 4))
        up *= 0 if off else adapters[0].scaling["default"]  # (layers, 4, r, H)
        self.up.diagonal(dim1=1, dim2=3).copy_(up[:, :3].movedim(1, -1))
        self.out.copy_(up[:, 3])

    def fill(self, slots: Sequence[int], prompts: Sequence[Tensor]) -> Tensor:
        """Begin answers to prompts (S_i, H) in free slots; logits (n, V) of their first tokens."""
        slots, lengths = torch.tensor([slots, list(map(len, prompts))], device=self.slots.device)
        embeds = pad_sequence(list(prompts), batch_first=True)  # (n, S, H), on the right
        hidden = self._layers(embeds, slots, self.columns[: embeds.shape[1]].expand(len(prompts), -1))
        self.positions[slots] = lengths
        return self._logits(hidden[self.slots[: len(prompts)], lengths - 1])

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token (rows,) of every answer; logits (rows, V) of the next ones, valid until the next step."""
        self.tokens.copy_(tokens)
        if tokens.device.type != "cuda":
            return self._step(int(self.positions.max()) + 1)
        if not self.warm:  # what is set up at the first use cannot be captured
            self.warm = True
            return self._step(self.length)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = self._step(self.length)
        self.graph.replay()
        return self.logits

    def _step(self, length: int) -> Tensor:
        positions = self.positions[:, None]  # (rows, 1)
        seen = self.columns[:length] <= positions
        hidden = self._layers(self.embed(self.tokens)[:, None], self.slots, positions, seen)
        self.positions.add_(1).clamp_(max=self.length - 1)  # rows without an answer run on
        return self._logits(hidden[:, 0])

    def _layers(self, x: Tensor, slots: Tensor, positions: Tensor, seen: Tensor | None = None) -> Tensor:
        """Hidden states (n, S, H) of embeddings; their keys and values go to the cache, at positions (n, S).

        They attend to what is `seen` (n, T) of the cache's first T tokens. None: each row begins, and sees itself.
        """
        (n, s, width), (heads, dim) = x.shape, self.shape
        places, cos, sin = (slice(None), slots[:, None], positions), self.cos[positions], self.sin[positions]
        if seen is not None:
            seen = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, -torch.inf)[:, None, None]  # (n, 1, 1, T)
        x = x.reshape(n * s, width).clone()
        for weights, lora, cache in zip(self.weights, self.lora, self.cache, strict=True):
            inward, outward, widen, narrow, before, between = weights  # inward: q, k, v
            down, up, down_out, up_out = lora
            h = F.rms_norm(x, (width,), before, self.eps)
            qkv = (h @ down @ up).addmm_(h, inward.T).view(n, s, 3, heads, dim)
            qk = qkv[:, :, :2]
            torch.addcmul(qk * cos, qk.roll(dim // 2, -1), sin, out=qk)  # rotated by their positions
            q, k, v = qkv.movedim(2, 0)  # (n, S, heads, D)
            cache[places] = torch.stack((k, v))
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (n, heads, S, D)
            if seen is not None:
                k, v = cache[:, :, : seen.shape[-1]].transpose(2, 3)  # (n, heads, T, D)
            h = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None)
            h = h.transpose(1, 2).reshape(n * s, width)
            x.addmm_(h @ down_out, up_out).addmm_(h, outward.T)
            h = F.rms_norm(x, (width,), between, self.eps)
            gate, h = F.linear(h, widen).chunk(2, dim=-1)
            x.addmm_(F.silu(gate).mul_(h), narrow.T)
        return x.view(n, s, width)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.eps) @ self.head


@torch.inference_mode(False)
@torch.no_grad()
def joined(*layers: nn.Linear) -> Tensor:
    """One matrix of the weights of layers that read the same; theirs become parts of it, so it takes no memory."""
    weights = [layer.weight for layer in layers]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(storages) == 1 and ends[:-1] == [weight.data_ptr() for weight in weights[1:]]:  # joined before
        return weights[0].data.as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())
    return laid_together(weights, weights[0].device, weights[0].dtype)


def laid_together(weights: Sequence[nn.Parameter], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values of weights one behind the other in one memory, on a device and in a precision; they become its parts.

    A GPU converts them: it is faster, and half precision is half as many bytes on the way.
    """
    whole = torch.empty(sum(map(len, weights)), *weights[0].shape[1:], dtype=dtype, device=device)
    for weight, place in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        place.copy_(weight.data.to(device))
        weight.data = place
    return whole


def move(llama, device: torch.device, dtype: torch.dtype) -> None:
    """Take a LlamaForCausalLM without LoRA, whose weights are mapped to its files, to a device.

    Those that a `Decoder` wants `joined` are laid together. What is as it should be stays.
    """
    alike = [parts for layer in llama.model.layers
             for parts in (with_lora(layer)[:3], (layer.mlp.gate_proj, layer.mlp.up_proj))]  # fmt: skip
    groups = [[part.weight for part in parts] for parts in alike]
    grouped = {id(weight) for group in groups for weight in group}
    groups += [[weight] for weight in llama.parameters() if id(weight) not in grouped]

    groups = [group for group in groups if (group[0].device.type, group[0].dtype) != (device.type, dtype)]
    with ThreadPoolExecutor(4) as pool:  # a disk likes to be asked for several at once
        laid = pool.map(lambda group: laid_together(group, device, dtype), groups)
        for _ in tqdm(laid, desc="language model", total=len(groups), delay=3, leave=False):
            pass
    llama.to(device)  # what is no weight
    llama.config.dtype = dtype
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the weights as they came


def with_lora(layer) -> list:
    """The projections of a layer that LoRA is on."""
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]


def choose(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The next tokens (n,) from logits (n, V): the likeliest, or with a temperature drawn from the likeliest ones.

    Of those as many as have `top_p` of the probability together (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    chances, pieces = logits.float().topk(min(LIKELIEST, logits.shape[-1]))
    chances = (chances / temperature).softmax(-1)
    chances = chances.masked_fill(chances.cumsum(-1) - chances >= top_p, 0)
    return pieces.gather(1, chances.multinomial(1))[:, 0]


@torch.inference_mode()
def decode(
    decoder: Decoder, prompts: Sequence[Tensor], limits: Sequence[int], ends: set[int], choose: Callable
) -> Iterator[tuple[int, list[int], Tensor | None]]:
    """Continue prompts (S_i, H), each up to a token of `ends` or its limit, as many at a time as there are rows.

    An answer that ends makes room for the next prompt, so that none waits for a long one. Yields after each token the
    prompt's number, its ids so far, and with the first of them the logits (V,) that it was chosen from.
    """
    decoder.refresh()
    waiting = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # alike ones begin together
    running, ids, tokens = {}, [[] for _ in prompts], torch.zeros_like(decoder.tokens)
    while waiting or running:
        free = [slot for slot in range(decoder.rows) if slot not in running]
        if waiting and len(free) >= min(len(waiting), -(-decoder.rows // 4)):
            said = dict(zip(free, waiting, strict=False))
            del waiting[: len(said)]
            running |= said
            logits = decoder.fill(list(said), [prompts[number] for number in said.values()])
            tokens[list(said)] = choose(logits)
        else:
            said, logits = dict(running), None
            tokens = choose(decoder.step(tokens))
        new = tokens.tolist()
        for row, (slot, number) in enumerate(said.items()):
            ids[number].append(new[slot])
            if new[slot] in ends or len(ids[number]) == limits[number]:
                del running[slot]
            yield number, ids[number], None if logits is None else logits[row]


def generated(
    llama, prompts: Sequence[Tensor], limits: Sequence[int], ends: set[int], temperature: float, top_p: float
) -> Iterator[tuple[int, list[int], Tensor]]:
    """The same by transformers, for other weights: each answer once, whole, and maybe with padding at its end."""
    embeds = pad_sequence(list(prompts), batch_first=True, padding_side="left")  # all answers start in one column
    mask = [torch.ones_like(prompt[:, 0], dtype=torch.long) for prompt in prompts]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    first = []

    def listen(ids: Tensor, logits: Tensor) -> Tensor:
        first.append(logits if not first else None)
        return logits

    rows = llama.generate(
        inputs_embeds=embeds, attention_mask=pad_sequence(mask, batch_first=True, padding_side="left"),
        max_new_tokens=min(limits), eos_token_id=[*ends], pad_token_id=min(ends), logits_processor=[listen], **sampling)
    yield from zip(range(len(prompts)), rows.tolist(), first[0], strict=True)
