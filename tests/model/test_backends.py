"""Which library computes attention, what each is asked for, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from small import small_engine
from torch import Tensor
from torch.nn.attention import SDPBackend

from echo_ray.config import ModelSection
from echo_ray.config_model import ATTENTIONS
from echo_ray.engine.build import build_engine
from echo_ray.engine.fingerprint import numerics_of
from echo_ray.errors import BackendMissing, ConfigError, DeviceMissing, DeviceTooOld
from echo_ray.model import backends
from echo_ray.model.attention import CrossAttention, SelfAttention, attention
from echo_ray.model.attention8 import Scales
from echo_ray.model.backends import EXACT_CUDNN, PLAIN, Machine, choose
from echo_ray.model.computing import Computing, use
from echo_ray.model.memory import EncoderLayer
from echo_ray.weights.modules import build_modules

CPU = Machine("cpu")
H100 = Machine("cuda", "an H100", (9, 0))
A100 = Machine("cuda", "an A100", (8, 0))
T4 = Machine("cuda", "a T4", (7, 5))
BF16 = torch.bfloat16


class Library(ModuleType):
    """Stands for FlashAttention; notes how it is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[dict[str, Any]] = []

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        self.calls.append(settings)
        return attention(q, k, v).view(q.shape)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Library]:
    """Make a module importable and its distribution have version 1.2.3."""
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")

    def installed(name: str) -> Library:
        library = Library(name)
        library.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, library)
        return library

    return installed


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cudnn_version", lambda: EXACT_CUDNN)


@pytest.fixture(autouse=True)
def no_cudnn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cudnn" not in request.fixturenames:
        monkeypatch.setattr(backends, "cudnn_version", lambda: 91002)


def qkv(tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 3, 8, generator=source).to(BF16) for n in (4, tokens, tokens))
    return q, k, v


def test_a_cpu_computes_as_it_did() -> None:
    for name in ("auto", "plain"):
        assert choose(name, CPU, torch.float32, 32) is PLAIN
    assert PLAIN.attend is attention
    assert str(Computing()) == str(use(build_small().dit, None, PLAIN)) == ""
    assert small_engine().fingerprint.rsplit("/", 1)[1] == numerics_of(
        torch.device("cpu"), torch.device("cpu"), 1, Computing()
    )


def build_small() -> Any:
    from small import small_preset

    return build_modules(small_preset())


@pytest.mark.parametrize("name", ["fa3", "fa2", "cudnn", "flash"])
def test_a_cpu_has_no_other(name: str) -> None:
    told = rf"model\.attention: {name} needs a CUDA device, model\.device is cpu; take auto or pl"
    with pytest.raises(DeviceMissing, match=told):
        build_engine(ModelSection(attention=name))


def test_a_name_that_nobody_knows_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention: 'fa4' .*: auto, fa3, .* or plain"):
        ModelSection(attention="fa4")


@pytest.mark.parametrize(
    ("name", "machine", "least"),
    [("fa3", A100, "9.0"), ("fa2", T4, "8.0"), ("cudnn", T4, "8.0"), ("flash", T4, "8.0")],
)
def test_a_device_that_is_too_old_is_refused(name: str, machine: Machine, least: str) -> None:
    with pytest.raises(DeviceTooOld, match=rf"needs compute capability {least}, {machine.name} h"):
        choose(name, machine, BF16, 128)
    assert DeviceTooOld.code == "device_too_old"
    assert DeviceMissing.code == "device_missing"


def test_fa3_has_no_kernels_for_what_came_after() -> None:
    with pytest.raises(BackendMissing, match=r"capability 9 only, a B200 has 10\.0; take auto"):
        choose("fa3", Machine("cuda", "a B200", (10, 0)), BF16, 128)


@pytest.mark.parametrize("name", ["fa3", "fa2"])
def test_a_library_that_is_not_installed_is_named(name: str) -> None:
    with pytest.raises(BackendMissing, match=rf"{name} is not installed; install .* or take auto"):
        choose(name, H100, BF16, 128)
    assert BackendMissing.code == "backend_missing"


def test_a_library_that_does_not_load_says_why(
    install: Callable[[str], Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("flash_attn")

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(backends, "import_module", broken)
    with pytest.raises(BackendMissing, match="fa2 does not load: undefined symbol: _ZN3c10"):
        choose("fa2", H100, BF16, 128)


def test_an_old_cudnn_is_refused() -> None:
    with pytest.raises(BackendMissing, match=f"cudnn 91002 does not always .* {EXACT_CUDNN} or"):
        choose("cudnn", H100, BF16, 128)


@pytest.mark.parametrize(("dtype", "head"), [(torch.float32, 128), (BF16, 12), (BF16, 320)])
def test_models_that_the_libraries_cannot_do(dtype: torch.dtype, head: int) -> None:
    for name in ("fa3", "fa2", "cudnn", "flash"):
        with pytest.raises(ConfigError, match=rf"this model has (float32|bfloat16) and {head}"):
            choose(name, H100, dtype, head)
    assert choose("auto", H100, dtype, head).label == "plain"


def test_auto_takes_the_best_that_is_there(
    install: Callable[[str], Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for machine in (T4, A100, H100):
        found.append(choose("auto", machine, BF16, 128).label)
    install("flash_attn")
    found.append(choose("auto", A100, BF16, 128).label)
    monkeypatch.setattr(backends, "cudnn_version", lambda: EXACT_CUDNN)
    found.append(choose("auto", A100, BF16, 128).label)
    install("fa3_fwd_interface")
    found += [choose("auto", machine, BF16, 128).label for machine in (A100, H100)]
    cudnn = f"cudnn {EXACT_CUDNN}"
    fa3 = "fa3 1.2.3 splits=1"
    assert found == ["plain", "flash", "flash", "fa2 1.2.3", cudnn, cudnn, fa3]


def test_libraries_are_called_so_that_they_repeat_their_bits(
    install: Callable[[str], Library],
) -> None:
    fa3, fa2 = install("flash_attn_interface"), install("flash_attn")
    for name in ("fa3", "fa2"):
        out = choose(name, H100, BF16, 8).attend(*qkv())
        assert torch.equal(out, attention(*qkv()))
    assert fa3.calls == [{"num_splits": 1}]
    assert fa2.calls == [{"deterministic": True}]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("plain", SDPBackend.MATH),
    ],
)
@pytest.mark.usefixtures("cudnn")
def test_torch_is_let_take_one_kernel_only(
    name: str, backend: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = []

    def noted(*args: Tensor) -> Tensor:
        allowed.append(torch.nn.attention._cur_sdpa_kernel_backends())
        return attention(*args)

    monkeypatch.setattr(backends, "attention", noted)
    monkeypatch.setattr(backends, "sdpa_kernel", torch.nn.attention.sdpa_kernel)
    attend = choose(name, H100, BF16, 8).attend
    if name == "cudnn":
        # There is none for a CPU, so this is refused and not given to another kernel.
        with pytest.raises(RuntimeError, match=r"No (available kernel|viable backend)"):
            attend(*qkv())
    else:
        assert attend(*qkv()).shape == (2, 4, 24)
    assert allowed == [[backend]]


def test_every_attention_of_a_model_is_the_one_chosen() -> None:
    modules = build_small()

    def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)

    computing = use(modules.dit, modules.memory, backends.Attention("other 1", other))
    found = [
        m.attend
        for part in (modules.dit, modules.memory)
        for m in part.modules()
        if isinstance(m, SelfAttention | CrossAttention | EncoderLayer)
    ]
    assert found == [other] * 5
    assert str(computing) == "other 1 exact"


def test_the_choice_is_part_of_the_fingerprint() -> None:
    cpu = torch.device("cpu")
    labels = ("plain", "fa3 1.2.3 splits=1", "fa3 1.2.4 splits=1", "flash")
    found = {numerics_of(cpu, cpu, 1, Computing(label)) for label in labels}
    assert len(found) == len(labels)


def test_every_name_has_a_builder() -> None:
    assert set(ATTENTIONS) - {"auto", "plain"} == set(backends._BUILDERS)


def test_nothing_is_imported_unless_it_is_chosen(
    install: Callable[[str], Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flash_attn", "flash_attn_interface", "fa3_fwd_interface"):
        install(name)
    touched: list[str] = []

    def noted(name: str) -> ModuleType:
        touched.append(name)
        return sys.modules[name]

    monkeypatch.setattr(backends, "import_module", noted)
    for name in ("plain", "flash"):
        choose(name, H100, BF16, 128)
    choose("auto", CPU, BF16, 128)
    assert touched == []
    choose("auto", H100, BF16, 128)
    assert touched == ["flash_attn_interface"]


def test_an_older_fa3_gives_more_than_the_result(
    install: Callable[[str], Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = install("flash_attn_interface")
    whole = library.flash_attn_func
    monkeypatch.setattr(library, "flash_attn_func", lambda *a, **s: (whole(*a, **s), torch.ones(1)))
    found = backends.choose8("fa3", H100, BF16, 8)
    assert found.attend8 is not None
    assert torch.equal(found.attend(*qkv()), attention(*qkv()))
    scales = Scales(*(torch.ones(3) for _ in range(3)))
    assert torch.equal(found.attend8(*qkv(), scales, torch.float32), attention(*qkv()))


def test_fa3_is_given_8_bits_with_a_scale_for_each_head(install: Callable[[str], Library]) -> None:
    library = install("flash_attn_interface")
    found = backends.choose8("auto", H100, BF16, 8)
    assert found.attend8 is not None
    scales = Scales(*(torch.tensor([1.0, 2.0, 4.0]) * n for n in (1, 2, 4)))
    q, k, v = qkv()
    out = found.attend8(q, k, v, scales, BF16)
    assert (out.shape, out.dtype) == ((2, 4, 24), BF16)
    (given,) = library.calls
    assert given.pop("num_splits") == 1
    for name, expected in zip(("q", "k", "v"), scales, strict=True):
        assert torch.equal(given.pop(f"{name}_descale"), torch.stack([expected] * 2))
    assert given == {}
