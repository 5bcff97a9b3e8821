"""What the scripts of golden values share: sizes, weights, and the forward pass of HF transformers with its inside.

Each `make_*.py` beside this file is run by hand, in an environment with the `parity` extra, and writes for each of its
models a directory with `config.json` and `model.safetensors` as transformers saves them, and `expected.safetensors`,
of transformers' own forward pass in float32:

- `tokens` [B, T], `attn_out` [L, B, T, D], `resid` [L + 1, B, T, D], `logits` [B, T, V]; with experts also `experts`
  [Lm, B, T, k], int32: those that the blocks with experts chose for a token, by number.
- `packed_tokens`, `packed_positions`, `packed_segment_ids` [1, T]: a row of several documents with padding at its end;
  `packed_attn_out` and the others as above: what each of them has when the model sees it alone, one after the other and
  without the padding.

The sizes are odd on purpose: no two axes are equal, so a swapped axis cannot pass. Weights are much larger than at a
usual initialisation, so that attention is far from uniform and a wrong rotation shows. They are stored in bfloat16
where that keeps the repository small; the forward pass is float32 all the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

HERE = Path(__file__).parent
BATCH, TOKENS = 2, 24
DOCUMENTS = (13, 8)  # lengths of the packed row's documents, each more than the windows of the models
SIZES = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
# `eager` in both: other kernels want sizes that are multiples of 16, or sum in other orders.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

Values = dict[str, torch.Tensor]
# Hooks a decoder layer to hand what its attention adds to the stream, [B, T, D], to the function.
HookAdded = Callable[[torch.nn.Module, Callable[[torch.Tensor], None]], Any]
# Hooks a decoder layer, if it has experts, to hand the experts that it chooses, [B T, k] or [B, T, k], to the function.
HookExperts = Callable[[torch.nn.Module, Callable[[torch.Tensor], None]], Any]


def hook_attention(layer: torch.nn.Module, record: Callable[[torch.Tensor], None]) -> Any:
    """In most families the attention's output is added as it is; some mixers of that name return it alone."""
    return layer.self_attn.register_forward_hook(lambda _, __, out: record(out[0] if isinstance(out, tuple) else out))


def hook_mixer(layer: torch.nn.Module, record: Callable[[torch.Tensor], None]) -> Any:
    """Of hybrids some blocks have attention, others a recurrence or a convolution, which returns its output alone."""
    other = next((getattr(layer, name) for name in ("linear_attn", "conv") if hasattr(layer, name)), None)
    if other is None:
        return hook_attention(layer, record)
    return other.register_forward_hook(lambda _, __, out: record(out))


def hook_norm(name: str) -> HookAdded:
    """In others a norm of this name comes between."""
    return lambda layer, record: getattr(layer, name).register_forward_hook(lambda _, __, out: record(out))


def hook_scaled(layer: torch.nn.Module, record: Callable[[torch.Tensor], None]) -> Any:
    """Granite multiplies what it adds."""
    return layer.self_attn.register_forward_hook(lambda _, __, out: record(out[0] * layer.residual_multiplier))


def hook_experts(layer: torch.nn.Module, record: Callable[[torch.Tensor], None]) -> Any:
    """Most families' experts are called with (stream, chosen experts, their weights)."""
    sublayers = (getattr(layer, name, None) for name in ("mlp", "block_sparse_moe", "feed_forward"))
    experts = next((sublayer.experts for sublayer in sublayers if hasattr(sublayer, "experts")), None)
    return experts and experts.register_forward_pre_hook(lambda _, args: record(args[1]))


def randomize(model: torch.nn.Module) -> None:
    """Norm weights around 1, biases of 0.3, matrices that keep the scale of what goes through them."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif parameter.ndim == 1:
            value = 0.3 * noise
        else:
            value = noise * (1.0 if "embed" in name else 1.3 * parameter.shape[-1] ** -0.5)
        parameter.data.copy_(value)


def fill_biases(model: torch.nn.Module) -> None:
    """Biases of the choice are buffers, float32 in every file; 0.2 changes it for more than half of the tokens."""
    for layer in getattr(model, "model", model).layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            gate.e_score_correction_bias = 0.2 * torch.randn(gate.num_experts)


def forward(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    hook_experts: HookExperts = hook_experts,
    hook_added: HookAdded = hook_attention,
) -> Values:
    """The logits, and what goes through the blocks, by hooks on the layers."""
    attn_out, resid, experts = [], [], []
    layers = model.model.layers
    hooks = [hook_experts(layer, experts.append) for layer in layers]
    for layer in layers:
        hooks.append(hook_added(layer, attn_out.append))
        hooks.append(layer.register_forward_pre_hook(lambda _, args: resid.append(args[0])))
    hooks.append(
        layers[-1].register_forward_hook(lambda _, __, out: resid.append(out[0] if isinstance(out, tuple) else out))
    )
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    for hook in filter(None, hooks):
        hook.remove()
    found = {"tokens": tokens, "attn_out": torch.stack(attn_out), "resid": torch.stack(resid), "logits": logits}
    if experts:
        chosen = torch.stack(experts).sort(-1).values
        found["experts"] = chosen.reshape(len(experts), *tokens.shape, -1).int()
    return found


def packed_forward(
    model: torch.nn.Module,
    vocab_size: int,
    hook_experts: HookExperts = hook_experts,
    hook_added: HookAdded = hook_attention,
) -> Values:
    """A row of several documents, and what each is alone, under names that begin with `packed_`."""
    padding = TOKENS - sum(DOCUMENTS)
    documents = [torch.randint(0, vocab_size, (1, length)) for length in DOCUMENTS]
    alone = [forward(model, document, hook_experts, hook_added) for document in documents]
    together = {
        key: torch.cat([values[key] for values in alone], 1 if key == "logits" else 2)
        for key in alone[0]
        if key != "tokens"
    }
    row = {
        "tokens": torch.cat([*documents, torch.randint(0, vocab_size, (1, padding))], 1),
        "positions": torch.cat([*map(torch.arange, DOCUMENTS), torch.zeros(padding).long()])[None],
        "segment_ids": torch.repeat_interleave(
            torch.tensor([*range(1, len(DOCUMENTS) + 1), 0]), torch.tensor([*DOCUMENTS, padding])
        )[None],
    }
    return {f"packed_{key}": value for key, value in (row | together).items()}


def make_model(
    name: str,
    config: PreTrainedConfig,
    seed: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    packed: bool = True,
    hook_experts: HookExperts = hook_experts,
    hook_added: HookAdded = hook_attention,
    folder: Path = HERE,
    finish: Callable[[torch.nn.Module], Any] = lambda _: None,
    tokens: int = TOKENS,
    kind: Any = AutoModelForCausalLM,
) -> None:
    """One directory: checkpoint and expected values. finish: what is done to the model before it is saved. tokens: of a
    row. kind: the model's class, where the config does not tell transformers."""
    torch.manual_seed(seed)
    target = folder / name
    auto = kind is AutoModelForCausalLM
    model = kind.from_config(config, **EAGER) if auto else kind._from_config(config, **EAGER)
    randomize(model)
    finish(model.to(dtype))
    model.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    # From the files, so that the frequencies, which `to` would round as well, are computed anew in float32.
    loaded = kind.from_pretrained(target, dtype=torch.float32, **EAGER).eval()
    expected = forward(loaded, torch.randint(0, config.vocab_size, (BATCH, tokens)), hook_experts, hook_added)
    if packed:
        expected |= packed_forward(loaded, config.vocab_size, hook_experts, hook_added)
    save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


logging.set_verbosity_error()
logging.disable_progress_bar()
