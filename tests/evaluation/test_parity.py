"""Parity: the stored fixtures where they are present, and made-up geometries everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Reference
from safetensors.torch import save_file
from torch import Tensor

from echo_ray.errors import InvalidRequestError
from echo_ray.evaluation.parity import RUNNERS, Target, Verdict, run_case, run_folder

FIXTURES = Path(__file__).parents[3] / "shared" / "parity"

Case = dict[str, Any]

GEOMETRIES: dict[str, Case] = {
    "wide_batch": {"batch": 2, "chunks": 7},
    "long": {"chunks": 10, "switches": [(18, "keep")]},
    "one_head_odd_grid": {"dim": 24, "heads": 1, "grid": (6, 10), "chunks": 6},
    "head_of_six": {"dim": 24, "heads": 4, "chunks": 6},
    "short_window": {"window": 9, "pmax": 15, "memory": 2, "chunks": 7},
    "uneven_window": {"window": 8, "pmax": 16, "memory": 1, "chunks": 7},
    "two_frames": {"frames": 2, "window": 7, "sink": 1, "pmax": 12, "memory": 1, "chunks": 9},
    "one_step": {"steps": [1000], "chunks": 6},
    "three_steps_shift_3": {"steps": [1000, 600, 200], "shift": 3.0, "chunks": 6},
    "context_noise": {"context_noise": 40, "chunks": 6},
    "two_switches": {"chunks": 9, "switches": [12, 21], "recache": True},
    "switch_every_time": {"chunks": 8, "switches": [12, 15, 18, 21], "recache": True},
    "switch_in_chunk": {"chunks": 8, "switches": [14], "recache": True},
    "switch_at_start": {"chunks": 6, "switches": [0, 3], "recache": False},
    "early_switches": {"chunks": 7, "switches": [3, 6, 9], "recache": False},
    "fresh_sink": {"chunks": 9, "switches": [9, 18], "global_sink": False},
    "batch_switch": {"batch": 2, "chunks": 8, "switches": [15], "recache": True},
    "absolute": {"variant": "absolute", "chunks": 8, "normalize": True},
    "absolute_switches": {
        "variant": "absolute", "chunks": 9, "switches": [6, 18], "recache": True,
    },
    "absolute_fresh_sink": {
        "variant": "absolute", "chunks": 9, "switches": [18], "global_sink": False,
    },
    "window": {"variant": "window", "memory": 0, "chunks": 7},
    "window_switches": {"variant": "window", "memory": 0, "chunks": 8, "switches": [6, 15]},
    "window_fresh_sink": {
        "variant": "window", "memory": 0, "chunks": 8, "switches": [15], "global_sink": False,
    },
    "one_encoder_layer": {"encoder_layers": 1, "normalize": True, "chunks": 7},
}  # fmt: skip


def write_case(folder: Path, name: str, options: Case) -> Path:
    """A rollout case of the fixtures' format, its outputs made by the naive implementation."""
    o = {
        "batch": 1, "chunks": 6, "dim": 16, "heads": 2, "grid": (4, 4), "frames": 3, "window": 12,
        "sink": 3, "pmax": 21, "memory": 3, "variant": "relative", "steps": [1000, 500],
        "shift": 5.0, "context_noise": 0, "switches": [], "recache": False, "global_sink": True,
        "normalize": False, "encoder_layers": 2,
    } | options  # fmt: skip
    frames = [s[0] if isinstance(s, tuple) else s for s in o["switches"]]
    model = {
        "dim": o["dim"], "num_heads": o["heads"], "head_dim": o["dim"] // o["heads"],
        "ffn_dim": 24, "num_layers": 2, "in_channels": 4, "out_channels": 4, "text_dim": 10,
        "text_len": 5, "freq_dim": 16, "patch_size": [1, 2, 2], "eps": 1e-6, "qk_norm": True,
        "cross_attn_norm": True, "latent_height": o["grid"][0], "latent_width": o["grid"][1],
    }  # fmt: skip
    memory = o["memory"] and {
        "Q_frames": o["memory"], "n_encoder_layers": o["encoder_layers"],
        "normalize_memory_k": o["normalize"], "memory_recache": o["recache"],
    }  # fmt: skip
    policy = {
        "variant": o["variant"], "frames_per_block": o["frames"], "sink_frames": o["sink"],
        "window_frames_including_sink": o["window"], "pmax": o["pmax"], "memory": memory or None,
    }  # fmt: skip
    manifest: Case = {
        "format": "echo-parity/1", "kind": "rollout", "case": name, "model": model,
        "tensors_file": f"{name}.safetensors", "weights": f"{name}_weights.safetensors",
        "cache_policy": policy, "batch": o["batch"], "num_chunks": o["chunks"],
        "denoising_steps": o["steps"], "timestep_shift": o["shift"],
        "context_noise": o["context_noise"], "tolerance": {"atol": 1e-4, "rtol": 1e-4},
        "required_outputs": ["out.latents"] + (["out.query_state"] if memory else []),
    }  # fmt: skip
    if frames:
        manifest["switch"] = {
            "switch_frames": frames, "global_sink": o["global_sink"],
            "memory_recache": o["recache"],
        }  # fmt: skip
    weights = random_weights(model, memory, torch.Generator().manual_seed(3))
    tensors = rollout(manifest, weights, frames)
    save_file(weights, folder / manifest["weights"])
    save_file(tensors, folder / manifest["tensors_file"])
    file = folder / f"{name}.json"
    file.write_text(json.dumps(manifest))
    return file


def rollout(manifest: Case, weights: dict[str, Tensor], switches: list[int]) -> dict[str, Tensor]:
    m, policy, batch = manifest["model"], manifest["cache_policy"], manifest["batch"]
    count, chunks = policy["frames_per_block"], manifest["num_chunks"]
    g = torch.Generator().manual_seed(4)
    frame = (m["in_channels"], m["latent_height"], m["latent_width"])
    steps = len(manifest["denoising_steps"])
    noise = torch.randn(batch, chunks * count, *frame, generator=g)
    renoise = torch.randn(chunks, max(steps - 1, 1), batch, count, *frame, generator=g)
    prompts = torch.randn(len(switches) + 1, batch, m["text_len"], m["text_dim"], generator=g)
    switch = manifest.get("switch", {})
    truth = Reference(
        weights, m, policy, manifest["denoising_steps"], manifest["timestep_shift"],
        float(manifest["context_noise"]), switch.get("global_sink", True),
        switch.get("memory_recache", False),
    )  # fmt: skip
    truth.text = prompts[0]
    truth.reset_memory(batch)
    latents, queries, pending, segment = [], [], list(switches), 0
    for chunk in range(chunks):
        if pending and chunk * count >= pending[0]:
            del pending[0]
            segment += 1
            truth.switch(prompts[segment])
        latents.append(truth.chunk(noise[:, chunk * count : (chunk + 1) * count], renoise[chunk]))
        if truth.query is not None:
            queries.append(truth.query)
    out = {
        "in.noise": noise, "in.renoise": renoise, "out.latents": torch.cat(latents, 1).float(),
    }  # fmt: skip
    out |= {f"in.prompt_embeds.{i}": p.contiguous() for i, p in enumerate(prompts)}
    return out | ({"out.query_state": torch.stack(queries).float()} if queries else {})


def random_weights(model: Case, memory: Case | None, g: torch.Generator) -> dict[str, Tensor]:
    dim, out = model["dim"], {}

    def linear(key: str, inside: int, outside: int) -> None:
        out[f"model.{key}.weight"] = torch.randn(outside, inside, generator=g) / inside**0.5
        out[f"model.{key}.bias"] = 0.1 * torch.randn(outside, generator=g)

    def norm(key: str) -> None:
        out[f"model.{key}.weight"] = 1 + 0.2 * torch.randn(dim, generator=g)

    out["model.patch_embedding.weight"] = torch.randn(dim, 4, 1, 2, 2, generator=g) / 4
    out["model.patch_embedding.bias"] = 0.1 * torch.randn(dim, generator=g)
    linear("text_embedding.0", model["text_dim"], dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", model["freq_dim"], dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", dim, 6 * dim)
    for n in range(model["num_layers"]):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"blocks.{n}.{attention}.{part}", dim, dim)
            norm(f"blocks.{n}.{attention}.norm_q")
            norm(f"blocks.{n}.{attention}.norm_k")
        norm(f"blocks.{n}.norm3")
        out[f"model.blocks.{n}.norm3.bias"] = 0.1 * torch.randn(dim, generator=g)
        linear(f"blocks.{n}.ffn.0", dim, model["ffn_dim"])
        linear(f"blocks.{n}.ffn.2", model["ffn_dim"], dim)
        out[f"model.blocks.{n}.modulation"] = 0.3 * torch.randn(1, 6, dim, generator=g)
    out["model.head.modulation"] = 0.3 * torch.randn(1, 2, dim, generator=g)
    linear("head.head", dim, 4 * model["out_channels"])
    if not memory:
        return out
    tokens = memory["Q_frames"] * (model["latent_height"] // 2) * (model["latent_width"] // 2)
    e = "query_memory_encoder"
    out[f"model.{e}.query_init"] = torch.randn(1, tokens, dim, generator=g)
    for n in range(memory["n_encoder_layers"]):
        linear(f"{e}.layers.{n}.q", dim, dim)
        linear(f"{e}.layers.{n}.o", dim, dim)
        for part in ("norm1", "norm2", "norm_q"):
            norm(f"{e}.layers.{n}.{part}")
        linear(f"{e}.layers.{n}.ffn.0", dim, 4 * dim)
        linear(f"{e}.layers.{n}.ffn.2", 4 * dim, dim)
    linear(f"{e}.connector_proj.0", dim, dim)
    linear(f"{e}.connector_proj.2", dim, dim)
    norm(f"{e}.connector_proj.3")
    linear(f"{e}.gate_linear", 2 * dim, dim)
    linear(f"{e}.to_k", dim, dim)
    linear(f"{e}.to_v", dim, dim)
    norm(f"{e}.norm_k_out")
    return out


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference's fixtures are not beside this")
def test_the_reference_s_own_numbers() -> None:
    verdicts = list(run_folder(FIXTURES))
    assert [v.line() for v in verdicts if v.failed] == []
    assert {v.kind for v in verdicts if v.status == "pass"} == set(RUNNERS)
    assert sum(v.status == "pass" for v in verdicts) >= 19


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference's fixtures are not beside this")
def test_bfloat16_stays_within_its_own_tolerances() -> None:
    verdicts = list(run_folder(FIXTURES, Target(dtype=torch.bfloat16)))
    assert [v.line() for v in verdicts if v.failed] == []
    rounded = [v for v in verdicts if v.kind in ("rollout", "vae", "umt5_encoder")]
    assert all(v.largest > 1e-4 for v in rounded), "nothing was rounded"


@pytest.mark.gpu
@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference's fixtures are not beside this")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_s_numbers_on_a_gpu(dtype: torch.dtype) -> None:
    verdicts = list(run_folder(FIXTURES, Target(torch.device("cuda"), dtype)))
    assert [v.line() for v in verdicts if v.failed] == []


@pytest.mark.parametrize("name", GEOMETRIES)
def test_other_geometries_agree_with_the_naive_rollout(name: str, tmp_path: Path) -> None:
    verdict = run_case(write_case(tmp_path, name, GEOMETRIES[name]))
    assert verdict.status == "pass", verdict.line()


def broken(tmp_path: Path, change: dict[str, Any]) -> Verdict:
    file = write_case(tmp_path, "case", {"chunks": 8})
    manifest = json.loads(file.read_text())
    for path, value in change.items():
        *parents, last = path.split(".")
        node = manifest
        for parent in parents:
            node = node[parent]
        node[last] = value
    file.write_text(json.dumps(manifest))
    return run_case(file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cache_policy.pmax": 20}, "off by"),
        ({"denoising_steps": [1000, 501]}, "off by"),
        ({"timestep_shift": 5.1}, "off by"),
        ({"cache_policy.memory.normalize_memory_k": True}, "off by"),
        ({"model.dim": 32}, "misshapen"),
        ({"model.num_layers": 3}, "missing"),
        ({"cache_policy.variant": "other"}, "unknown"),
        ({"tensors_file": "none.safetensors"}, "none.safetensors"),
        ({"format": "echo-parity/9"}, "not a manifest"),
        ({"tolerance": {"atol": 0.0, "rtol": 0.0}}, "off by"),
    ],
)
def test_a_wrong_model_or_manifest_fails(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    verdict = broken(tmp_path, change)
    assert verdict.failed
    assert reason in verdict.line()


def test_kinds_that_are_not_known_fail(tmp_path: Path) -> None:
    verdict = broken(tmp_path, {"kind": "audio"})
    assert verdict.failed
    assert "unknown kind" in verdict.line()


def test_a_wrong_rollout_fails_in_bfloat16_too(tmp_path: Path) -> None:
    file = write_case(tmp_path, "case", {"chunks": 8})
    target = Target(dtype=torch.bfloat16)
    assert run_case(file, target).status == "pass", run_case(file, target).line()
    manifest = json.loads(file.read_text())
    manifest["timestep_shift"] = 4.0
    file.write_text(json.dumps(manifest))
    assert run_case(file, target).failed


def test_folders_without_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no manifest"):
        list(run_folder(tmp_path))
    with pytest.raises(InvalidRequestError, match="no such folder"):
        list(run_folder(tmp_path / "none"))


def test_a_damaged_tensor_file_fails_its_case_only(tmp_path: Path) -> None:
    write_case(tmp_path, "good", {"chunks": 5})
    bad = write_case(tmp_path, "bad", {"chunks": 5})
    bad.with_suffix(".safetensors").write_bytes(b"damaged")
    verdicts = {v.case: v.status for v in run_folder(tmp_path)}
    assert verdicts == {"bad": "FAIL", "good": "pass"}
