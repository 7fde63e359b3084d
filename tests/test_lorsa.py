"""Lorsa against the attention layer of the real model, and against its own definition, dense."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from saesub.activations.collect import measure_spectra
from saesub.activations.spectrum import Spectrum
from saesub.activations.tokens import kept_positions, pack_contexts
from saesub.errors import SaesubError
from saesub.extras.lorsa import (
    AttentionSequences,
    Lorsa,
    LorsaConfig,
    attention_sequences,
    calibrate_lorsa,
    dense_lorsa,
    evaluate_lorsa,
    initialize_lorsa,
    train_lorsa,
)
from saesub.init.subspace import choose_d_init
from saesub.loading.models import load_model

LAYER = 12
Z, OUT = f"blocks.{LAYER}.attn.hook_z", f"blocks.{LAYER}.hook_attn_out"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 200,
}


@pytest.fixture(scope="module")
def tokens(model, corpus) -> torch.Tensor:
    return pack_contexts(model, corpus, n_contexts=20, context_size=64)


@pytest.fixture(scope="module")
def data(model, tokens) -> AttentionSequences:
    return attention_sequences(model, tokens, LAYER, progress=False)


@pytest.fixture(scope="module")
def spectra(model, corpus) -> dict[str, Spectrum]:
    settings = {"n_tokens": 2000, "context_size": 64, "progress": False}
    return measure_spectra(model, corpus, [Z, OUT], **settings)


@pytest.fixture
def lorsa(model) -> Lorsa:
    return Lorsa.from_attention(model, LAYER, n_heads=144, k=8)


def _cached(model, tokens, *names):
    _, cache = model.run_with_cache(tokens, names_filter=list(names))
    return [cache[name] for name in names]


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def _tiny(kind: Any, cfg: Any, model) -> Any:
    """A bridge around a random model of another family."""
    torch.manual_seed(0)
    hf_model = kind._from_config(cfg, attn_implementation="eager").eval()
    for parameter in hf_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return load_model((hf_model, model.tokenizer))


@pytest.mark.parametrize("layer", [0, LAYER, 29])
def test_the_models_own_heads_give_its_attention_exactly(model, corpus, layer):
    tokens = pack_contexts(model, corpus, n_contexts=2, context_size=200)
    names = ("attn.hook_in", "attn.hook_z", "hook_attn_out")
    x, z, y = _cached(model, tokens, *(f"blocks.{layer}.{name}" for name in names))
    dense = dense_lorsa(model, layer)
    own = dense.pre_activations(x)
    assert _relative(own, z.flatten(2)) < 2e-6
    assert _relative(own @ dense.W_O + dense.b_O, y) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_and_the_default_dtype_leave_lorsa_as_it_is(model, dtype):
    """The model is read in eval mode, and Lorsa is in float32 whatever the default is."""
    settings = {"attention_dropout": 0.5, "attn_implementation": "eager"}
    bridge = _tiny(LlamaForCausalLM, LlamaConfig(**SMALL, **settings), model)
    bridge.original_model.to(dtype)
    tokens = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    still = dense_lorsa(bridge, 1), attention_sequences(bridge, tokens, 1, progress=False)
    bridge.train()
    torch.set_default_dtype(torch.float16)
    try:
        dense, data = dense_lorsa(bridge, 1), attention_sequences(bridge, tokens.int(), 1.0)
        z, expected = (lorsa.pre_activations(data.x) for lorsa in (dense, still[0]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in dense.parameters()} == {torch.float32} == {z.dtype}
    assert torch.equal(z, expected)
    assert torch.equal(data.y, still[1].y)
    assert bridge.training
    assert all(module.training for module in bridge.blocks[1].modules())


def test_a_layer_in_float64_is_checked_as_in_float32(model):
    """A layer whose scores are scaled a little otherwise is within what bfloat16 would leave."""
    bridge = _tiny(LlamaForCausalLM, LlamaConfig(**SMALL), model)
    bridge.original_model.to(torch.float64)
    dense_lorsa(bridge, 1)
    bridge.original_model.model.layers[1].self_attn.original_component.scaling *= 1.01
    with pytest.raises(SaesubError, match=r"is 0\.\d% off"):
        dense_lorsa(bridge, 1)


def test_exactness_would_show_a_wrong_rotary_base(model, data):
    dense = dense_lorsa(model, LAYER)
    base = model.original_model.config.rope_parameters["rope_theta"]
    plain = [base ** (-2 * i / dense.cfg.d_qk) for i in range(dense.cfg.d_qk // 2)]
    torch.testing.assert_close(dense.cfg.frequencies, tuple(plain), rtol=1e-5, atol=0)
    slower = tuple(f * 0.9 for f in dense.cfg.frequencies)
    other = Lorsa(replace(dense.cfg, frequencies=slower))
    other.load_state_dict(dense.state_dict())
    assert _relative(other.pre_activations(data.x[:1]), dense.pre_activations(data.x[:1])) > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_bias": True, "num_key_value_heads": 2},
        {"num_key_value_heads": 1},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ],
    ids=["biases", "one key head", "llama3 frequencies"],
)
def test_other_llamas_are_exact_too(model, settings):
    bridge = _tiny(LlamaForCausalLM, LlamaConfig(**SMALL, **settings), model)
    tokens = torch.randint(0, 200, (2, 50), generator=torch.Generator().manual_seed(0))
    x, y = _cached(bridge, tokens, "blocks.1.attn.hook_in", "blocks.1.hook_attn_out")
    dense = dense_lorsa(bridge, 1)
    assert _relative(dense.pre_activations(x) @ dense.W_O + dense.b_O, y) < 2e-6
    assert bool(dense.b_V.any()) == settings.get("attention_bias", False)


def test_z_does_not_see_the_future(lorsa, data):
    x = data.x[:1].float()
    changed = x.clone()
    changed[:, 40:] = 1.0
    before, after = lorsa.pre_activations(x), lorsa.pre_activations(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_circuits_are_the_models_and_directions_are_random_unit_vectors(model, lorsa):
    dense = dense_lorsa(model, LAYER)
    assert lorsa.cfg.n_qk == model.cfg.n_heads
    assert torch.equal(lorsa.W_Q, dense.W_Q)
    assert torch.equal(lorsa.W_K, dense.W_K)
    for rows in (lorsa.W_V, lorsa.W_O):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(144))
    again = Lorsa.from_attention(model, LAYER, n_heads=144, k=8)
    other = Lorsa.from_attention(model, LAYER, n_heads=144, k=8, seed=1)
    assert torch.equal(lorsa.W_O, again.W_O)
    assert not torch.equal(lorsa.W_O, other.W_O)


def test_repeated_circuits_serve_smaller_groups(model, lorsa, data):
    repeated = Lorsa.from_attention(model, LAYER, n_heads=144, k=8, n_qk=18)
    assert torch.equal(repeated.W_Q[0], repeated.W_Q[1])
    expected = lorsa.pre_activations(data.x[:1])
    torch.testing.assert_close(repeated.pre_activations(data.x[:1]), expected)


def test_forward_is_the_dense_definition_with_its_gradients(lorsa, data):
    with torch.no_grad():
        lorsa.W_O.mul_(torch.linspace(0.1, 3, 144)[:, None])  # so that norms matter to the choice
        lorsa.b_V.uniform_(-1, -0.2, generator=torch.Generator().manual_seed(0))  # few positive z
    x, y = data.x[:2].float(), data.y[:2].float()
    output, active = lorsa(x)
    (output - y).square().sum().backward()
    found = {name: p.grad.clone() for name, p in lorsa.named_parameters()}
    lorsa.zero_grad()

    z = lorsa.pre_activations(x)
    best = (z * lorsa.W_O.norm(dim=-1)).topk(8, dim=-1).indices
    mask = torch.zeros_like(z).scatter(-1, best, 1.0)
    sparse = z.relu() * mask
    dense = sparse @ lorsa.W_O + lorsa.b_O
    (dense - y).square().sum().backward()
    torch.testing.assert_close(output, dense, rtol=1e-5, atol=1e-5)
    scattered = torch.zeros_like(z).scatter(-1, active.heads, active.z)
    torch.testing.assert_close(scattered, sparse)
    assert 0 < (active.z > 0).float().mean() < 1
    for name, p in lorsa.named_parameters():
        assert _relative(found[name], p.grad) < 1e-4, name


def test_per_head_start_lies_in_each_heads_own_active_subspace(model, lorsa, spectra):
    ranks = initialize_lorsa(lorsa, model, spectra[Z], d_init=5, per_head=True)
    assert ranks == (5,) * 9
    W_O = dense_lorsa(model, LAYER).W_O.unflatten(0, (9, -1))
    for head, rows in enumerate(lorsa.W_O.detach().split(16)):
        z = slice(64 * head, 64 * head + 64)
        covariance = W_O[head].T.double() @ spectra[Z].covariance[z, z] @ W_O[head].double()
        basis = torch.linalg.eigh(covariance).eigenvectors[:, -5:].float()
        assert (rows - rows @ basis @ basis.T).norm() / rows.norm() < 1e-3
        assert torch.linalg.matrix_rank(rows, rtol=1e-3) == 5
    torch.testing.assert_close(lorsa.W_O.norm(dim=-1), torch.ones(144))


def test_joint_start_lies_in_the_measured_subspace_of_the_output(model, lorsa, spectra):
    ranks = initialize_lorsa(lorsa, model, spectra[Z], d_init=20, per_head=False)
    assert ranks == (20,) * 9
    basis = spectra[OUT].basis(20)
    rows = lorsa.W_O.detach()
    assert (rows - rows @ basis @ basis.T).norm() / rows.norm() < 1e-2
    auto = initialize_lorsa(lorsa, model, spectra[Z], per_head=False)
    assert abs(auto[0] - choose_d_init(spectra[OUT], "auto")) <= 1


@pytest.mark.parametrize("per_head", [True, False])
def test_tied_z_is_the_models_head_output_along_w_o(model, lorsa, spectra, tokens, per_head):
    initialize_lorsa(lorsa, model, spectra[Z], per_head=per_head)
    x, z = _cached(model, tokens[:2], f"blocks.{LAYER}.attn.hook_in", Z)
    W_O = dense_lorsa(model, LAYER).W_O.unflatten(0, (9, -1))
    written = torch.einsum("bphe,hed->bphd", z, W_O)
    along = torch.einsum("bphd,hgd->bphg", written, lorsa.W_O.unflatten(0, (9, -1)))
    assert _relative(lorsa.pre_activations(x), along.flatten(2)) < 1e-5


def test_calibration_centres_z_and_matches_the_variance(model, lorsa, data):
    directions = torch.nn.functional.normalize(lorsa.W_V.detach(), dim=-1)
    calibrate_lorsa(lorsa, data)
    first = data.x[:16], data.y[:16], data.kept[:16]
    z = lorsa.pre_activations(first[0])[first[2]]
    assert z.mean(0).abs().max() < 1e-4 * z.std()
    target = data.y[data.kept].double()
    torch.testing.assert_close(lorsa.b_O.double(), target.mean(0), rtol=1e-4, atol=1e-4)
    written = lorsa(first[0])[0][first[2]] - lorsa.b_O
    variance = (target - target.mean(0)).square().sum(-1).mean().item()
    assert written.square().sum(-1).mean().item() == pytest.approx(variance, rel=1e-3)
    lengths = [w.norm(dim=-1).mean().item() for w in (lorsa.W_V, lorsa.W_O)]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    torch.testing.assert_close(torch.nn.functional.normalize(lorsa.W_V, dim=-1), directions)


def test_sequences_are_the_layers_input_and_output(model, tokens, data):
    x, y = _cached(model, tokens[8:10], f"blocks.{LAYER}.attn.hook_in", OUT)
    torch.testing.assert_close(data.x[8:10].float(), x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(data.y[8:10].float(), y, rtol=1e-3, atol=1e-2)
    assert torch.equal(data.kept, kept_positions(model, tokens, 1))
    assert not data.kept[:, 0].any()
    assert data.n_tokens == int(data.kept.sum())
    last = attention_sequences(model, tokens[:1], 29, progress=False)
    (y,) = _cached(model, tokens[:1], "blocks.29.hook_attn_out")
    torch.testing.assert_close(last.y.float(), y, rtol=1e-3, atol=0.1)


def test_training_lowers_the_error_and_repeats_bit_for_bit(model, data, spectra):
    results = []
    for _ in range(2):
        lorsa = Lorsa.from_attention(model, LAYER, n_heads=144, k=8)
        initialize_lorsa(lorsa, model, spectra[Z])
        calibrate_lorsa(lorsa, data)
        before = evaluate_lorsa(lorsa, data).fvu
        history = train_lorsa(lorsa, data, epochs=3, lr=3e-3, progress=False)
        results.append((lorsa.W_O.detach(), history))
    assert evaluate_lorsa(lorsa, data).fvu < 0.8 * before
    assert history[-1]["tokens"] == 3 * data.n_tokens
    assert history[-1]["fvu"] < history[0]["fvu"]
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def _small_case() -> tuple[Lorsa, AttentionSequences]:
    """A calibrated Lorsa and ten contexts that a linear attention wrote."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 9, 12, generator=generator)
    mixed = x.cumsum(1) / torch.arange(1, 10)[:, None]
    y = mixed @ torch.randn(12, 12, generator=generator)
    y += 0.1 * torch.randn(10, 9, 12, generator=generator)
    kept = torch.ones(10, 9, dtype=torch.bool)
    kept[:, 0] = kept[3, 4:] = False
    data = AttentionSequences(x.half(), y.half(), kept)
    lorsa = Lorsa(LorsaConfig(12, 24, 3, 4, (1.0, 0.1), layer=0, model="none", seed=1))
    calibrate_lorsa(lorsa, data)
    return lorsa, data


@pytest.mark.parametrize(
    ("optimizer", "fvu", "norms"),
    [
        (
            "sparse_adam",
            {0: 1.941371, 9: 1.516336, 29: 0.778350, 59: 0.537253, None: 0.514200},
            {"W_V": 6.703294, "W_O": 6.920293, "W_Q": 3.454713, "b_K": 0.398621, "b_V": 1.154482},
        ),
        (
            "adam",
            {0: 1.941371, 9: 1.481370, 29: 0.737346, 59: 0.403226, None: 0.432801},
            {"W_V": 6.712691, "W_O": 6.954502, "W_Q": 3.431060, "b_K": 0.412431, "b_V": 1.120789},
        ),
    ],
)
def test_training_gives_the_numbers_of_a_loop_of_its_own(optimizer, fvu, norms):
    """The numbers are those of a plain loop of autograd, clipping, Adam and schedule, which Lorsa
    had before `SubspaceSAETrainer` trained it; None is the evaluation."""
    lorsa, data = _small_case()
    settings = {"epochs": 20, "batch_size": 3, "lr": 1e-2, "seed": 5, "progress": False}
    history = train_lorsa(lorsa, data, optimizer=optimizer, **settings)
    assert [history[i]["tokens"] for i in (0, 9, 29, 59)] == [24, 220, 670, 1345]
    found = {i: evaluate_lorsa(lorsa, data).fvu if i is None else history[i]["fvu"] for i in fvu}
    assert found == pytest.approx(fvu, rel=1e-4)
    lengths = {name: lorsa.get_parameter(name).norm().item() for name in norms}
    assert lengths == pytest.approx(norms, rel=1e-4)


def test_a_point_of_the_history_averages_the_steps_since_the_last():
    """Of 90 steps every second is recorded; at so small a rate the weights stay as they are."""
    lorsa, data = _small_case()
    settings = {"epochs": 30, "batch_size": 3, "lr": 1e-12, "seed": 5, "progress": False}
    history = train_lorsa(lorsa, data, **settings)
    assert len(history) == 45
    order, again = torch.Generator().manual_seed(5), []
    for _ in range(30):
        again += torch.randperm(10, generator=order)[:9].split(3)
    variance, tokens = data.mean_and_variance()[1], 0
    for point, pair in zip(history, zip(again[::2], again[1::2], strict=True), strict=True):
        parts = [AttentionSequences(data.x[i], data.y[i], data.kept[i]) for i in pair]
        errors = [evaluate_lorsa(lorsa, p).fvu * p.mean_and_variance()[1] / variance for p in parts]
        assert point["fvu"] == pytest.approx(sum(errors) / 2, rel=1e-4)
        tokens += sum(part.n_tokens for part in parts)
        assert point["tokens"] == tokens


def test_a_full_gpu_is_named(monkeypatch):
    lorsa, data = _small_case()
    gpu = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lorsa, "encode", full)
    with pytest.raises(SaesubError, match=r"memory with d_sae=24.*smaller batches"):
        train_lorsa(lorsa, data, progress=False)


@pytest.mark.parametrize(("optimizer", "stays"), [("sparse_adam", True), ("adam", False)])
def test_a_head_that_falls_silent_stays_put_only_under_sparse_adam(lorsa, data, optimizer, stays):
    calibrate_lorsa(lorsa, data)
    first, second = (AttentionSequences(data.x[i], data.y[i], data.kept[i]) for i in ([0], [1]))
    both = AttentionSequences(data.x[:2], data.y[:2], data.kept[:2])
    twin = Lorsa(lorsa.cfg)
    twin.load_state_dict(lorsa.state_dict())
    orders = {s: torch.randperm(2, generator=torch.Generator().manual_seed(s)) for s in range(20)}
    seed = next(s for s, order in orders.items() if order[0] == 0)  # the first context comes first
    settings = {"batch_size": 1, "seed": seed, "optimizer": optimizer, "progress": False}

    active = ~evaluate_lorsa(lorsa, first).dead
    train_lorsa(lorsa, first, **settings)
    fell_silent = active & evaluate_lorsa(lorsa, second).dead
    train_lorsa(twin, both, **settings)
    assert fell_silent.any()
    for name in ("W_V", "W_O", "b_V"):
        after_one, after_two = getattr(lorsa, name)[fell_silent], getattr(twin, name)[fell_silent]
        # Up to rounding: the two runs divide their loss by another variance.
        assert torch.allclose(after_one, after_two, rtol=0, atol=1e-6) == stays


def test_evaluation_by_hand(lorsa, data):
    calibrate_lorsa(lorsa, data)
    with torch.no_grad():
        lorsa.b_V[:140] = -1000.0  # only the last four heads can be active
        report = evaluate_lorsa(lorsa, data, batch_size=3)
        z = lorsa.pre_activations(data.x)[data.kept].relu()
        output = lorsa(data.x)[0][data.kept].double()
    y = data.y[data.kept].double()
    residual, spread = (y - output).square().sum(), (y - y.mean(0)).square().sum()
    assert report.fvu == pytest.approx((residual / spread).item(), rel=1e-4)
    assert report.l0 == pytest.approx((z > 0).float().sum(-1).mean().item())
    assert torch.equal(report.dead, ~(z > 0).any(0))
    assert report.dead[:140].all()
    assert report.dead_share == pytest.approx(int(report.dead.sum()) / 144)
    assert report.n_tokens == data.n_tokens


def test_positions_left_out_count_neither_in_training_nor_in_judging(lorsa, data):
    spoilt = data.y.clone()
    spoilt[~data.kept] = 1000.0
    other = AttentionSequences(data.x, spoilt, data.kept)
    calibrate_lorsa(lorsa, other)
    twin = Lorsa(lorsa.cfg)
    twin.load_state_dict(lorsa.state_dict())
    train_lorsa(lorsa, other, progress=False)
    train_lorsa(twin, data, progress=False)
    assert torch.equal(lorsa.W_O, twin.W_O)
    assert evaluate_lorsa(lorsa, other).fvu == evaluate_lorsa(twin, data).fvu


def test_saved_and_loaded_alike_and_refused_when_damaged(lorsa, data, tmp_path):
    path = tmp_path / "folder" / "lorsa.safetensors"
    lorsa.save(path)
    loaded = Lorsa.load(path)
    assert loaded.cfg == lorsa.cfg
    assert torch.equal(loaded(data.x[:1])[0], lorsa(data.x[:1])[0])
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"not a file" * 9):
        path.write_bytes(damaged)
        with pytest.raises(SaesubError, match="is damaged"):
            Lorsa.load(path)
    with pytest.raises(SaesubError, match="no Lorsa at"):
        Lorsa.load(tmp_path / "absent")


def test_a_spectrum_file_is_no_lorsa(spectra, tmp_path):
    spectra[Z].save(tmp_path / "spectrum")
    with pytest.raises(SaesubError, match="not a saesub Lorsa"):
        Lorsa.load(tmp_path / "spectrum")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_heads": 144, "k": 0}, "k must lie in 1..144"),
        ({"n_heads": 144, "k": 145}, "k must lie in 1..144"),
        ({"n_heads": 100, "k": 8}, "n_heads=100 must be a multiple of n_qk=9"),
        ({"n_heads": 144, "k": 8, "n_qk": 12}, "n_qk=12 must be a multiple of the 9 query heads"),
    ],
)
def test_bad_shapes_are_refused(model, settings, message):
    with pytest.raises(SaesubError, match=message):
        Lorsa.from_attention(model, LAYER, **settings)


@pytest.mark.parametrize("layer", [30, -1, 0.5, "12"])
def test_a_layer_that_is_not_there(model, tokens, layer):
    message = r"layers 0\.\.29, not 30|layer must be a whole number of at least 0"
    with pytest.raises(SaesubError, match=message):
        Lorsa.from_attention(model, layer, n_heads=144, k=8)
    with pytest.raises(SaesubError, match=message):
        attention_sequences(model, tokens, layer, progress=False)


@pytest.mark.parametrize(
    ("kind", "cfg", "message"),
    [
        (
            GPT2LMHeadModel,
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=200),
            "no rotary embedding",
        ),
        (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, rotary_pct=0.5), "rotates 4 of the 8"),
        (
            MistralForCausalLM,
            MistralConfig(**SMALL, sliding_window=99, num_key_value_heads=4),
            "within a sliding window",
        ),
        (
            Qwen3ForCausalLM,
            Qwen3Config(**SMALL, head_dim=8, num_key_value_heads=4),
            "is no plain rotary attention",
        ),
    ],
)
def test_other_kinds_of_attention_are_refused(model, kind, cfg, message):
    bridge = _tiny(kind, cfg, model)
    with pytest.raises(SaesubError, match=message):
        Lorsa.from_attention(bridge, 1, n_heads=8, k=2)


def test_widths_and_spectra_that_do_not_fit(model, lorsa, data, spectra):
    with pytest.raises(SaesubError, match=r"whole contexts \(batch, pos, 576\)"):
        lorsa(data.x[0])
    narrow = AttentionSequences(data.x[..., :9], data.y[..., :9], data.kept)
    for use in (calibrate_lorsa, train_lorsa, evaluate_lorsa):
        with pytest.raises(SaesubError, match="reads and writes 576 dimensions"):
            use(lorsa, narrow)
    foreign = Lorsa(LorsaConfig(576, 12, 4, 2, (1.0,), LAYER, "none"))
    with (
        pytest.raises(SaesubError, match=r"4 circuits .* 9 heads .*: make it by from_attention"),
        pytest.warns(UserWarning, match="this Lorsa says that it is of the model none"),
    ):
        initialize_lorsa(foreign, model, spectra[Z])
    elsewhere = replace(spectra[Z], metadata={"hook_name": Z.replace("12", "11")})
    with pytest.raises(SaesubError, match=r"z_spectrum is of blocks.11.attn.hook_z, not of"):
        initialize_lorsa(lorsa, model, elsewhere)
    for wrong in (torch.zeros(5, dtype=torch.int64), torch.zeros(2, 5), torch.full((2, 5), 10**6)):
        with pytest.raises(
            SaesubError, match=r"shape \(5,\) cannot be read|integer ids|vocabulary"
        ):
            attention_sequences(model, wrong, LAYER)
    for setting in ({"batch_size": 0}, {"batch_size": 1.5}, {"skip_first": -1}):
        with pytest.raises(SaesubError, match="must be a whole number"):
            attention_sequences(model, torch.arange(100, 110).view(2, 5), LAYER, **setting)
    with pytest.raises(SaesubError, match=r"measure it at blocks.12.attn.hook_z"):
        initialize_lorsa(lorsa, model, Spectrum.from_activations(torch.randn(50, 7)))
    with pytest.raises(SaesubError, match="from 1 to 64"):
        initialize_lorsa(lorsa, model, spectra[Z], d_init=65)
    initialize_lorsa(lorsa, model, spectra[Z], d_init=65, per_head=False)


def test_training_settings_that_cannot_be(lorsa, data):
    with pytest.raises(SaesubError, match=r"batch_size in 1\.\.20"):
        train_lorsa(lorsa, data, batch_size=21)
    with pytest.raises(SaesubError, match="epochs must be a whole number of at least 1"):
        train_lorsa(lorsa, data, epochs=0)
    with pytest.raises(SaesubError, match="Unknown optimizer 'sgd': pass 'adam' or"):
        train_lorsa(lorsa, data, optimizer=cast(Any, "sgd"))
    broken = AttentionSequences(data.x * float("nan"), data.y, data.kept)
    before = {name: kept.clone() for name, kept in lorsa.state_dict().items()}
    with pytest.raises(SaesubError, match=r"activations of batch 0 .* first nan in row 0"):
        train_lorsa(lorsa, broken, progress=False)
    assert all(torch.equal(kept, before[name]) for name, kept in lorsa.state_dict().items())
    with torch.no_grad():
        lorsa.W_O[0] = float("inf")
    with pytest.raises(SaesubError, match=r"W_O holds NaN or infinite"):
        train_lorsa(lorsa, data, progress=False)
    with torch.no_grad():
        lorsa.W_O[0] = 1e30
    with pytest.raises(SaesubError, match=r"the loss is \w+ at step 1: pass a smaller lr"):
        train_lorsa(lorsa, data, progress=False)
    still = AttentionSequences(data.x, torch.zeros_like(data.y), data.kept)
    with pytest.raises(SaesubError, match="that vary"):
        evaluate_lorsa(lorsa, still)
    for use in (calibrate_lorsa, train_lorsa):
        with pytest.raises(SaesubError, match="do not vary"):
            use(lorsa, still)
    with pytest.raises(SaesubError, match="batch_size must be a whole number of at least 1"):
        evaluate_lorsa(lorsa, data, batch_size=0)


@pytest.mark.parametrize(
    "settings", [{"epochs": 1.5}, {"batch_size": 0}, {"batch_size": "4"}, {"seed": -1}, {"lr": 0}]
)
def test_numbers_that_cannot_be_are_refused_in_training(lorsa, data, settings):
    with pytest.raises(SaesubError, match="must be a"):
        train_lorsa(lorsa, data, progress=False, **settings)


def test_what_has_no_error_or_scale_is_refused(lorsa, data):
    before = {name: kept.clone() for name, kept in lorsa.state_dict().items()}
    kept = data.kept.clone()
    kept[:8] = False
    with pytest.raises(SaesubError, match="no position is kept"):
        train_lorsa(lorsa, AttentionSequences(data.x, data.y, kept), batch_size=1, progress=False)
    lorsa.load_state_dict(before)
    with torch.no_grad():
        lorsa.W_O.zero_()
    with pytest.raises(SaesubError, match="write nothing"):
        calibrate_lorsa(lorsa, data)
    assert torch.equal(lorsa.b_O, before["b_O"])
    assert torch.equal(lorsa.b_V, before["b_V"])
    lorsa.load_state_dict(before)
    with pytest.raises(SaesubError, match="dtype='float32'"):
        train_lorsa(lorsa.bfloat16(), data, progress=False)


def test_config_alone_makes_a_lorsa():
    cfg = LorsaConfig(16, 12, 3, 2, frequencies=(1.0, 0.1), layer=0, model="none")
    assert cfg.d_qk == 4
    output, active = Lorsa(cfg)(torch.randn(2, 5, 16))
    assert output.shape == (2, 5, 16)
    assert active.z.shape == active.heads.shape == (2, 5, 2)


def test_a_model_handed_over_is_as_it_was_after_a_failure_too(model, tokens, monkeypatch):
    seen: list[str] = []
    point = model.hook_dict[Z]
    point.add_hook(lambda value, hook: seen.append(hook.name))
    weight = next(model.parameters())
    weight.requires_grad_(True)
    model.blocks[0].train()

    def state():
        hooks = {name: len(p.fwd_hooks) for name, p in model.hook_dict.items() if p.fwd_hooks}
        flags = [module.training for module in model.modules()]
        return hooks, flags, [p.requires_grad for p in model.parameters()]

    try:
        before = state()
        attention_sequences(model, tokens[:1], LAYER, progress=False)
        assert seen
        assert state() == before
        point.add_hook(lambda value, hook: 1 / 0)
        before = state()
        with pytest.raises(ZeroDivisionError):
            dense_lorsa(model, LAYER)
        assert state() == before
    finally:
        point.remove_hooks()
        weight.requires_grad_(False)
        model.blocks[0].eval()
