"""How the cases of published parts run: the Wan VAE, the umT5 encoder, LoRA over a base."""

from __future__ import annotations

import torch

from echo_ray.evaluation.parity_cases import ENCODER, Manifest, Tensors, bare, roll, under
from echo_ray.model.state_dict import load_strict
from echo_ray.model.umt5 import UMT5Encoder
from echo_ray.model.wan_vae import WanVae
from echo_ray.preset import UMT5Shape, WanVaeShape
from echo_ray.weights.lora import apply_lora


def vae(manifest: Manifest, tensors: Tensors, _weights: Tensors) -> Tensors:
    """Encoding whole, decoding in one call; `mismatch` counts streamed decodings that differ."""
    c = manifest["config"]
    shape = WanVaeShape(
        mean=tuple(tensors["in.mean"].tolist()),
        std=tuple(tensors["in.std"].tolist()),
        dim=c["dim"],
        dim_mult=tuple(c["dim_mult"]),
        num_res_blocks=c["num_res_blocks"],
        temporal_downsample=tuple(c["temperal_downsample"]),
    )
    codec = WanVae(shape, c["z_dim"])
    load_strict(codec, under(tensors, manifest["weights_prefix"]), "vae")
    latents = tensors["in.latent"].transpose(1, 2)
    state, pixels = codec.initial_state(), []
    for latent in latents.unbind(1):
        part, state = codec.decode_raw(latent, state)
        pixels.append(part)
    decoded = torch.cat(pixels, dim=1)
    whole, _ = codec.decode(latents, codec.initial_state())
    wrong = 0
    for sizes in ([3, 2], [1, 2, 2], [2, 2, 1]):
        state, pieces = codec.initial_state(), []
        for part in torch.split(latents, sizes, dim=1):
            frames, state = codec.decode(part, state)
            pieces.append(frames)
        wrong += not torch.equal(torch.cat(pieces, dim=1), whole)
    encoded = codec.encode_raw(tensors["in.pixels"].transpose(1, 2))
    return {
        "out.decoded": decoded.transpose(1, 2),
        "out.encoded": encoded.transpose(1, 2),
        "mismatch": torch.tensor(wrong),
    }


def umt5_encoder(manifest: Manifest, tensors: Tensors, _weights: Tensors) -> Tensors:
    """Prompt rows of token ids, those of padding zero."""
    c = manifest["config"]
    shape = UMT5Shape(**{k: c[k] for k in UMT5Shape.__dataclass_fields__ if k in c})
    encoder = UMT5Encoder(shape, c["dim"])
    load_strict(encoder, under(tensors, manifest["weights_prefix"]), "text encoder")
    return {"out.prompt_embeds": encoder(tensors["in.ids"], tensors["in.mask"])}


def lora_rollout(manifest: Manifest, tensors: Tensors, weights: Tensors) -> Tensors:
    """A rollout with the adapter merged, and its memory encoder in place of the base's."""
    base = {k: v for k, v in bare(weights).items() if not k.startswith(ENCODER)}
    merged = apply_lora(base, under(tensors, "lora."), float(manifest["lora"]["alpha"]))
    return roll(manifest, tensors, merged, under(tensors, "mem."))
