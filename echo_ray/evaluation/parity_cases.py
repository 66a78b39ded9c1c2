"""How each kind of parity case runs on our classes: manifest and inputs in, `out.` tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from echo_kernels.rotate import rotate
from echo_ray.engine.arena import Arena
from echo_ray.engine.cache import Window
from echo_ray.engine.generator import Generator
from echo_ray.errors import InvalidRequestError
from echo_ray.model import sampler as sampling
from echo_ray.model.dit import DiT
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.policies.choose import choose_policy
from echo_ray.model.policies.echo import EchoPolicy
from echo_ray.model.policies.policy import CallFrames, Layout
from echo_ray.model.rope import FrameRope, rope_table
from echo_ray.model.state_dict import load_strict
from echo_ray.preset import CacheShape, DiTShape, MemoryShape, SamplerShape

Tensors = dict[str, Tensor]
Manifest = dict[str, Any]

POLICY_OF_VARIANT = {"relative": "echo", "absolute": "absolute", "window": "window"}
ENCODER = "query_memory_encoder."


def scheduler(manifest: Manifest, tensors: Tensors, _weights: Tensors) -> Tensors:
    shift = float(manifest["config"]["shift"])
    timesteps = [float(t) for t in tensors["in.timestep"]]
    sigmas = [sampling.sigma_at(t, shift) for t in timesteps]
    x0, noise, flow = (tensors[f"in.{n}"] for n in ("x0", "noise", "flow"))
    noisy = torch.stack([sampling.renoise(x0[i], noise[i], s) for i, s in enumerate(sigmas)])
    clean = [sampling.clean_from_flow(noisy[i], flow[i], s) for i, s in enumerate(sigmas)]
    warped = [sampling.warped_timestep(int(k), shift) for k in manifest["denoising_steps"]]
    return {
        "out.sigmas": sampling.sigma_table(shift),
        "out.timesteps": sampling.timestep_table(shift),
        "out.warped_timesteps": torch.tensor(warped),
        "out.lookup_index": torch.tensor([sampling.lookup_index(t, shift) for t in timesteps]),
        "out.lookup_sigma": torch.tensor(sigmas),
        "out.add_noise": noisy,
        "out.x0_from_flow": torch.stack(clean),
    }


def memory_encoder(manifest: Manifest, tensors: Tensors, _weights: Tensors) -> Tensors:
    c, own = manifest["config"], under(tensors, manifest["weights_prefix"])
    shape = MemoryShape(
        frames=c["Q_frames"],
        encoder_layers=c["n_encoder_layers"],
        ffn_dim=c["ffn_dim"],
        normalize_keys="norm_k_out.weight" in own,
    )
    dit = DiTShape(
        dim=c["hidden_dim"],
        num_heads=c["num_heads"],
        ffn_dim=c["ffn_dim"],
        num_layers=1,
        latent_height=1,
        latent_width=c["tokens_per_frame"],
        patch_size=(1, 1, 1),
        text_dim=1,
        text_len=1,
        eps=c["eps"],
        qk_norm=c["qk_norm"],
    )
    encoder = MemoryEncoder(dit, shape)
    load_strict(encoder, own, "memory encoder")
    norm = encoder.norm_k_out
    state = encoder.initial(int(c["batch"]))
    out = {"out.state.init": state}
    for i in range(len(c["evicted_tokens"])):
        state = encoder.update(state, tensors[f"in.k.{i}"], tensors[f"in.v.{i}"])
        encoder.norm_k_out = norm
        normalized, values = encoder.read_out(state)
        encoder.norm_k_out = None
        plain, _ = encoder.read_out(state)
        out |= {
            f"out.state.{i}": state,
            f"out.mem_k_normalized.{i}": normalized,
            f"out.mem_k_plain.{i}": plain,
            f"out.mem_v.{i}": values,
        }
    return out


def relative_positions(manifest: Manifest, tensors: Tensors, _weights: Tensors) -> Tensors:
    wrong = sum(_wrong_rows(table) for table in manifest["tables"])
    r = manifest["rotation"]
    device = str(tensors["in.q"].device)
    rope = FrameRope(r["grid_height"], r["grid_width"], r["head_dim"], device)
    out: Tensors = {"mismatch": torch.tensor(wrong)}
    c, t = r["config"], r["tokens_per_frame"]
    for scenario in r["scenarios"]:
        held = c["sink_frames"] + scenario["local_frames_held"]
        memory = c["Q_frames"] if scenario["memory_used"] else 0
        layout = _layout_at(c, scenario["chunk"], held, memory)
        keys = [_rotated(rope, tensors["in.cache_k"][:, : held * t], layout.sink + layout.local)]
        if memory:
            sink = len(layout.sink) * t
            extra = _rotated(rope, tensors["in.memory_k"], layout.memory)
            keys = [keys[0][:, :sink], extra, keys[0][:, sink:]]
        out[f"out.keys.{scenario['name']}"] = torch.cat(keys, dim=1)
        out[f"out.query.{scenario['name']}"] = _rotated(rope, tensors["in.q"], layout.query)
    count = tensors["out.rope_cos"].shape[0]
    same = [rope_table((p,), p + 1, p + 1, r["head_dim"], "cpu")[-1] for p in range(count)]
    table = torch.stack(same)
    return out | {"out.rope_cos": table.real.float(), "out.rope_sin": table.imag.float()}


def _rotated(rope: FrameRope, x: Tensor, positions: tuple[int, ...]) -> Tensor:
    return rotate(x, rope.table(positions))


def _layout_at(config: dict[str, int], chunk: int, held: int, memory: int) -> Layout:
    count, sink = config["frames_per_block"], config["sink_frames"]
    end = (chunk + 1) * count
    slots = (*range(sink), *range(end - (held - sink), end))
    call = CallFrames(chunk * count, count, slots, sink)
    return EchoPolicy(config["pmax"]).layout(call, memory)


def _wrong_rows(table: dict[str, Any]) -> int:
    """Rows of an uninterrupted rollout's position table that our policy does not reproduce."""
    c = table["config"]
    updated, wrong = False, 0
    for row in table["table"]:
        end = row["frames"][1] + 1
        held = min(end, c["window_frames_including_sink"])
        evicts = end > c["window_frames_including_sink"]
        visible = updated if row["call"] == "first_call" else (updated or evicts)
        updated = visible
        layout = _layout_at(c, row["chunk"], held, c["Q_frames"] if visible else 0)
        ours = [layout.sink, layout.memory, layout.local, layout.query]
        theirs = [tuple(row[k]) for k in ("sink", "memory", "local", "query")]
        wrong += ours != theirs
    return wrong


def dit_forward(manifest: Manifest, tensors: Tensors, weights: Tensors) -> Tensors:
    own = {k: v for k, v in bare(weights).items() if not k.startswith(ENCODER)}
    dit = load_dit(manifest, own)
    cache = _cache_shape(manifest)
    x, t = tensors["in.x"], tensors["in.timestep"]
    frames = int(manifest["frames"])
    arena = Arena(dit.shape, cache, batch=x.shape[0], device=x.device, dtype=x.dtype)
    window = Window(dit.shape, cache, choose_policy(cache), arena)
    window.advance(0, frames)
    call = window.call(0, frames, see_memory=False)
    prompt = dit.encode_prompt(tensors["in.prompt_embeds"])
    flow = dit(x, dit.modulations(dit.condition(t)), prompt, call)
    shift = float(manifest.get("timestep_shift", 5.0))
    sigma = torch.tensor([[sampling.sigma_at(float(v), shift) for v in row] for row in t])
    clean = x.double() - sigma.double()[..., None, None, None] * flow.double()
    return {"out.flow": flow, "out.x0": clean.to(flow.dtype)}


def rollout(manifest: Manifest, tensors: Tensors, weights: Tensors) -> Tensors:
    own = bare(weights)
    dit = {k: v for k, v in own.items() if not k.startswith(ENCODER)}
    return roll(manifest, tensors, dit, under(own, ENCODER))


def roll(manifest: Manifest, tensors: Tensors, dit: Tensors, encoder: Tensors) -> Tensors:
    """A rollout with these weights of the transformer and of the memory encoder."""
    generator = _generator(manifest, dit, encoder)
    noise = _fixture_noise(manifest, tensors)
    switch = manifest.get("switch") or {}
    pending = [int(f) for f in switch.get("switch_frames", [])]
    count = generator.cache.frames_per_chunk
    state = generator.start(tensors["in.prompt_embeds.0"])
    latents, queries, segment = [], [], 0
    for chunk in range(int(manifest["num_chunks"])):
        if pending and chunk * count >= pending[0]:
            del pending[0]
            segment += 1
            generator.switch(state, tensors[f"in.prompt_embeds.{segment}"])
        latents.append(generator.generate(state, noise))
        if state.query_BMC is not None:
            queries.append(state.query_BMC)
    out = {"out.latents": torch.cat(latents, dim=1)}
    return out | {"out.query_state": torch.stack(queries)} if queries else out


def _fixture_noise(manifest: Manifest, tensors: Tensors) -> Any:
    count = int(manifest["cache_policy"]["frames_per_block"])

    def noise(chunk: int, step: int) -> Tensor:
        if step == 0:
            return tensors["in.noise"][:, chunk * count : (chunk + 1) * count]
        return tensors["in.renoise"][chunk, step - 1]

    return noise


def _generator(manifest: Manifest, weights: Tensors, encoder: Tensors) -> Generator:
    cache = _cache_shape(manifest)
    dit = load_dit(manifest, weights)
    memory = None
    if cache.memory is not None:
        memory = MemoryEncoder(dit.shape, cache.memory)
        if not cache.memory.normalize_keys:
            encoder = {k: v for k, v in encoder.items() if k != "norm_k_out.weight"}
        load_strict(memory, encoder, "memory encoder")
    sampler = SamplerShape(
        steps=tuple(int(s) for s in manifest["denoising_steps"]),
        shift=float(manifest.get("timestep_shift", 5.0)),
        context_noise=float(manifest.get("context_noise", 0)),
    )
    return Generator(dit.eval(), memory, cache, sampler)


def load_dit(manifest: Manifest, weights: Tensors) -> DiT:
    """The transformer of a manifest with weights of exactly its keys."""
    m = manifest["model"]
    fields = {k: m[k] for k in DiTShape.__dataclass_fields__ if k in m}
    fields["patch_size"] = tuple(m["patch_size"])
    dit = DiT(DiTShape(**fields))
    load_strict(dit, weights, "transformer")
    return dit


def _cache_shape(manifest: Manifest) -> CacheShape:
    p = manifest["cache_policy"]
    variant = p["variant"]
    if variant not in POLICY_OF_VARIANT:
        raise InvalidRequestError(f"cache policy variant {variant!r} is unknown")
    switch, m = manifest.get("switch") or {}, p.get("memory")
    memory = m and MemoryShape(
        frames=m["Q_frames"],
        encoder_layers=m["n_encoder_layers"],
        normalize_keys=m["normalize_memory_k"],
        recache=switch.get("memory_recache", m.get("memory_recache", False)),
    )
    return CacheShape(
        policy=POLICY_OF_VARIANT[variant],
        frames_per_chunk=p["frames_per_block"],
        window_frames=p["window_frames_including_sink"],
        sink_frames=p["sink_frames"],
        position_limit=p.get("pmax", 21),
        memory=memory,
        global_sink=switch.get("global_sink", True),
        point_every=0,
    )


def bare(weights: Tensors) -> Tensors:
    """Keys without the wrapper's prefix."""
    return {k.removeprefix("model."): v for k, v in weights.items()}


def under(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
