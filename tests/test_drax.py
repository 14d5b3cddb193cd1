"""Drax: sizes, what it hears, what it is told, its middle distribution and the objective that learns it, its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Known, Tokens, cat
from ditkit.config import DitkitError
from ditkit.diffusion import DraxLoss, DraxPath, Jumps, Mixture, TokenMeaning, integrate, keep, marginal
from ditkit.exporting import export_run
from ditkit.importing import import_file
from ditkit.interop import DRAX, FORMATS, read
from ditkit.models import DDiTConfig, Drax, DraxConfig, create_model, model_config
from ditkit.models.drax import DraxMiddle
from ditkit.pipeline import load
from ditkit.plan import cost
from ditkit.rng import Rng

TINY = DraxConfig(
    length=7, vocab=11, hidden_size=24, depth=3, num_heads=3, cond_dim=16, audio_dim=10, audio_length=9, drop=0.2
)


def randomise(model: nn.Module) -> Any:
    """Weights under which nothing is zero."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return model.eval()


def build(**changes: Any) -> Drax:
    return randomise(replace(TINY, **changes).build())


def inputs(b: int = 2, length: int = 7, known: bool = True) -> tuple[Tensor, Tensor, Conditioning]:
    """Audio of 9, 5, 9, 5, ... frames; the first two tokens are given."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 11, (b, length), generator=generator)
    t = torch.rand(b, generator=generator)
    frames = torch.tensor([9, 5])[torch.arange(b) % 2]
    audio = Tokens(torch.randn(b, 9, 10, generator=generator), torch.arange(9) < frames[:, None])
    mask = torch.arange(length).expand(b, -1) < 2
    return x, t, Conditioning(audio=audio, known=Known(x, mask) if known else None)


@pytest.mark.parametrize(("name", "parameters"), [("drax", 579_883_674), ("drax_flash", 247_339_674)])
def test_the_published_sizes(name: str, parameters: int) -> None:
    """580M and 250M in the paper's table 1, encoder aside."""
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_middle_is_about_as_large_as_published() -> None:
    """28M in the paper, whose network is not described in full."""
    with torch.device("meta"):
        middle = DraxMiddle(DraxConfig(), DraxLoss().width, DraxLoss().heads)
    assert sum(p.numel() for p in middle.parameters()) == 27_313_114


def test_the_output_are_logits_and_starts_at_zero() -> None:
    given = inputs(3)
    assert build()(*given).shape == (3, 7, 11)
    assert not bool(TINY.build()(*given).any())


def test_every_parameter_gets_a_finite_gradient() -> None:
    model = build()
    model(*inputs(40)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
        assert bool(p.grad.any()), name


def test_one_hot_tokens_are_tokens_and_gradients_reach_probabilities() -> None:
    model, (x, t, cond) = build(), inputs()
    soft = F.one_hot(x, 11).float().requires_grad_()
    out = model(soft, t, cond)
    assert_close(out, model(x, t, cond), rtol=1e-5, atol=1e-5)
    for place in (0, 6):
        (gradient,) = torch.autograd.grad(out[0, place, 0], soft, retain_graph=True)
        assert bool((gradient[0] != 0).all())
        assert not bool(gradient[1].any())


@pytest.mark.parametrize("prepared", [False, True])
def test_padding_of_the_audio_changes_neither_output_nor_gradient(prepared: bool) -> None:
    model, (x, t, cond) = build(), inputs(2)
    assert cond.audio is not None

    def run(given: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(x, t, model.prepare(given, x.shape) if prepared else given)
        out.square().sum().backward()
        return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, gradients = run(cond)
    longer = cond.audio.padded(14)
    noise = torch.where(longer.mask[..., None], longer.values, 7.0)  # what is masked may be anything
    out, others = run(replace(cond, audio=Tokens(noise, longer.mask)))
    assert_close(out, whole, rtol=1e-5, atol=1e-5)
    for name, value in others.items():
        assert_close(value, gradients[name], rtol=1e-4, atol=1e-5)
    # alone, the second sample has 5 frames and no padding
    values = cond.audio.values[1:, :5]
    alone = replace(cond.rows(slice(1, 2)), audio=Tokens(values, torch.ones(1, 5, dtype=torch.bool)))
    assert_close(model(x[1:], t[1:], alone), whole[1:], rtol=1e-5, atol=1e-5)
    # and the frames that are not masked matter, each of them
    frames = cond.audio.values.clone().requires_grad_()
    model(x, t, replace(cond, audio=Tokens(frames, cond.audio.mask))).sum().backward()
    assert frames.grad is not None
    assert torch.equal(frames.grad.abs().sum(-1) > 0, cond.audio.mask)


def test_the_model_is_told_which_tokens_are_known_and_not_what_they_are() -> None:
    model, (x, t, cond) = build(), inputs()
    out = model(x, t, cond)
    assert cond.known is not None
    other = replace(cond, known=Known(cond.known.values, ~cond.known.mask))
    assert bool((model(x, t, other) != out).all())
    values = replace(cond, known=Known(cond.known.values + 1, cond.known.mask))
    assert torch.equal(model(x, t, values), out)
    # nothing said is not the same as nothing known
    nothing = replace(cond, known=Known(x, torch.zeros_like(cond.known.mask)))
    assert bool((model(x, t, replace(cond, known=None)) != model(x, t, nothing)).all())


@pytest.mark.parametrize("known", [True, False])
def test_a_sample_does_not_see_its_batch_and_prepared_work_changes_nothing(known: bool) -> None:
    model, (x, t, cond) = build(), inputs(5, known=known)
    whole = model(x, t, cond)
    index = torch.tensor([4, 1])
    assert_close(model(x[index], t[index], cond.rows(index)), whole[index], rtol=1e-5, atol=1e-5)
    ready = model.prepare(cond, x.shape, (1.0, 0.5))
    assert_close(model(x, t, ready), whole, rtol=1e-5, atol=1e-5)
    assert_close(model(x, t / 2, ready), model(x, t / 2, cond), rtol=1e-5, atol=1e-5)
    assert_close(model(x[index], t[index], ready.rows(index)), whole[index], rtol=1e-5, atol=1e-5)
    halves = cat((cond.rows(slice(0, 3)), cond.rows(slice(3, 5))))
    assert_close(model(x, t, halves), whole, rtol=1e-5, atol=1e-5)


def test_in_a_trajectory_the_audio_is_projected_once() -> None:
    model, (x, t, cond) = build(), inputs()
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("cross.k", "cross.v", "audio_embedder.0", "cross.q")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    ready = model.prepare(cond, x.shape)
    assert sorted({name.split(".")[-1] for name in calls}) == ["0", "k", "v"]
    assert len(calls) == 2 * 3 + 1
    calls.clear()
    for _ in range(2):
        model(x, t, ready)
    assert set(calls) == {f"blocks.{i}.cross.q" for i in range(3)}


def test_any_length_is_taken_and_positions_are_relative() -> None:
    model, (_, t, cond) = build(), inputs(1, known=False)
    out = model(torch.tensor([[3, 3, 3, 5]]), t, cond)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert not torch.allclose(out[:, i], out[:, j], atol=1e-5)
    ready = model.prepare(cond, (1, 4))
    plain = ready.static["rope"].clone()
    plain[:, 0], plain[:, 1] = 1, 0
    unturned = model(torch.tensor([[3, 3, 3, 5]]), t, ready.with_static(rope=plain))
    assert_close(unturned[:, 0], unturned[:, 1], rtol=1e-5, atol=1e-5)


def test_the_door_opens_at_every_block_which_can_look_at_each_token_alone() -> None:
    model, seen, given = build(), [], inputs()

    def edit(site: str, block: nn.Module, x: Any, *args: Any) -> Any:
        seen.append(site)
        assert model.get_submodule(site) is block
        return block(x, *args)

    plain = model(*given)
    assert torch.equal(model(*given, edit=edit), plain)
    assert seen == ["blocks.0", "blocks.1", "blocks.2"]
    rows = torch.tensor([True, False])
    out = model(*given, edit=lambda site, block, x, *args: block(x, *args, identity=rows))
    assert torch.equal(out[1], plain[1])
    assert not torch.allclose(out[0], plain[0], rtol=1e-2)


def test_dropout_is_behind_each_branch_and_only_in_training() -> None:
    model, given = build(drop=0.5), inputs()
    assert torch.equal(model(*given), model(*given))
    model.train()
    assert not torch.equal(model(*given), model(*given))
    for name in ("attn", "cross", "mlp"):
        block = build(depth=1).get_submodule("blocks.0")
        rates = [m.p for m in block.get_submodule(name).modules() if isinstance(m, nn.Dropout)]
        assert rates == [0.2], name


def test_the_same_seed_builds_the_same_model_and_files_keep_it(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    one, two, other = TINY.build(3), TINY.build(3), TINY.build(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert bool(p.isfinite().all()), name
    assert not torch.equal(one.x_embedder.weight, other.x_embedder.weight)
    wide = replace(TINY, hidden_size=120, vocab=200).build()
    assert float(wide.x_embedder.weight.detach().std()) == pytest.approx(1, abs=0.02)
    for name, p in one.named_parameters():
        if "adaLN" in name or name.startswith("final_layer.linear"):
            assert not bool(p.any()), name
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other.x_embedder.weight, one.x_embedder.weight)


def test_bf16_and_autocast_run() -> None:
    model, (x, t, cond) = build(), inputs()
    exact = model(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, cond)
    assert float((low.float() - exact).detach().norm() / exact.detach().norm()) < 0.1
    out = build().bfloat16()(x, t, cond.to("cpu", torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert float((out.float() - exact).detach().norm() / exact.detach().norm()) < 0.1


def test_what_does_not_fit_is_refused() -> None:
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=r"tokens \[b l\] or probabilities \[b l 11\]"):
        build()(torch.rand(2, 7, 12), t, cond)
    with pytest.raises(DitkitError, match=r"listens to audio: give cond\.audio, Tokens of \[b m 10\]"):
        build()(x, t, Conditioning())
    with pytest.raises(DitkitError, match=r"\[b m 12\], not \[2, 9, 10\]: change audio_dim"):
        build(audio_dim=12)(x, t, cond)
    with pytest.raises(DitkitError, match="even"):
        replace(TINY, hidden_size=9).build()
    with pytest.raises(DitkitError, match="drax is for tokens"):
        TINY.fitted((3, 8, 8), 0, 0)
    with pytest.raises(DitkitError, match="takes no classes, and the data has 4"):
        TINY.fitted((7,), 4, 11)
    assert TINY.fitted((9,), 0, 12) == replace(TINY, length=9, vocab=12)
    with pytest.raises(DitkitError, match=r"model\.audio_dim must be at least 1"):
        DraxConfig(audio_dim=0)


def test_its_cost_can_be_planned() -> None:
    small = cost(model_config("drax_tiny"))
    assert small.parameters < 3_000_000
    assert small.training > small.sampling > 0


# the middle distribution and the objective


def denoiser(model: Any) -> Any:
    return TokenMeaning(Mixture("uniform", vocab=11)).of(model)


def learned(model: Drax, **options: Any) -> Any:
    return DraxLoss(width=12, heads=2, **options).learn(denoiser(model), Rng(0))


def test_the_middle_starts_uniform_and_listens_to_the_audio_alone() -> None:
    _, _, cond = inputs()
    assert cond.audio is not None
    fresh = learned(build()).middle
    assert not bool(fresh(cond, 7).any())
    middle = randomise(fresh)
    out = middle(cond, 7)
    assert out.shape == (2, 7, 11)
    assert torch.equal(middle(replace(cond, known=None), 7), out)
    assert bool((middle(replace(cond, audio=Tokens(cond.audio.values + 1, cond.audio.mask)), 7) != out).all())
    longer = cond.audio.padded(12)
    assert_close(middle(replace(cond, audio=longer), 7), out, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[:, 0], out[:, 1], atol=1e-3)
    with pytest.raises(DitkitError, match=r"7 places and 8 tokens.*change model\.length"):
        middle(cond, 8)


class Given:
    """A network of x alone, with a middle distribution that does not listen."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        self.seen.append(x)
        return x @ self.weight

    def middle(self, width: int, heads: int, rng: Rng) -> nn.Module:
        class Fixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.logits = nn.Parameter(torch.arange(11.0) / 5)

            def forward(self, cond: Conditioning, length: int) -> Tensor:
                return self.logits.expand(2, length, -1)

        return Fixed()


@pytest.mark.parametrize("hard", [False, True])
def test_the_loss_is_two_cross_entropies_on_the_three_way_path(hard: bool) -> None:
    x0, _, cond = inputs()
    weight = torch.randn(11, 11, generator=torch.Generator().manual_seed(2))
    model = Given(weight)
    objective: Any = DraxLoss(hard=hard, temperature=0.7).learn(denoiser(model), Rng(0))
    rng = Rng(5).at(3, torch.arange(2))
    loss = objective.loss(denoiser(model), x0, cond, rng)
    logs = torch.log_softmax(objective.middle.logits, dim=-1)
    law = marginal(DraxPath().fitted(11), x0, loss.t, logs.exp().expand(2, 7, -1))
    gumbel = -torch.log(-torch.log(rng("noise", "uniform", (7, 11))))
    x = torch.softmax((law.double().log() + gumbel) / 0.7, dim=-1).float()
    if hard:
        x = F.one_hot(x.argmax(-1), 11).float()
    x = torch.where((torch.arange(7) < 2)[:, None], F.one_hot(x0, 11).float(), x)
    assert_close(model.seen[-1], x, rtol=1e-4, atol=1e-5)
    picked = torch.log_softmax(x @ weight, dim=-1).gather(-1, x0[..., None])[..., 0]
    assert set(loss.terms) == {"cross_entropy", "middle"}
    assert_close(loss.terms["cross_entropy"], -picked.mean(1), rtol=1e-4, atol=1e-4)
    assert_close(loss.terms["middle"], -logs[x0].mean(1), rtol=1e-5, atol=1e-5)
    # the denoiser's term teaches the middle, too
    (gradient,) = torch.autograd.grad(loss.terms["cross_entropy"].sum(), objective.middle.logits)
    assert bool(gradient.any())


def test_both_networks_learn_and_the_middle_s_weights_follow_from_the_seed() -> None:
    model, (x0, _, cond) = build(), inputs()
    objective = learned(model)
    randomise(objective)
    objective.loss(denoiser(model), x0, cond, Rng(0).at(0, torch.arange(2))).total.mean().backward()
    for name, p in (*model.named_parameters(), *objective.named_parameters()):
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
    same, other = learned(model), DraxLoss(width=12, heads=2).learn(denoiser(model), Rng(1))
    assert torch.equal(same.middle.places.weight, learned(model).middle.places.weight)
    assert not torch.equal(same.middle.places.weight, other.middle.places.weight)  # type: ignore[union-attr]
    assert not any("middle" in name for name in model.state_dict())


def test_an_objective_that_cannot_work_is_refused() -> None:
    model, (x0, _, cond) = build(), inputs()
    DraxLoss().check(denoiser(model))
    with pytest.raises(DitkitError, match="source is uniform, and the denoiser's is the mask"):
        DraxLoss().check(TokenMeaning(Mixture("mask", vocab=11)).of(model))
    with pytest.raises(DitkitError, match="which a DDiT does not have"):
        DraxLoss().check(denoiser(DDiTConfig(length=7, vocab=11, hidden_size=24, depth=1, num_heads=3).build()))
    with pytest.raises(DitkitError, match=r"take the loss of objective\.learn"):
        DraxLoss().loss(denoiser(model), x0, cond, Rng(0))
    wrong: list[dict[str, Any]] = [{"temperature": 0.0}, {"width": 10, "heads": 3}, {"p": 0.0}]
    for options in wrong:
        with pytest.raises(DitkitError):
            DraxLoss(**options)


@torch.no_grad()
def test_it_samples_with_its_prompt_kept() -> None:
    model, (x, _, cond) = build(), inputs()
    assert cond.known is not None
    kept = keep(denoiser(model), cond.known)
    rng = Rng(0).at(0, torch.arange(2))
    times = (1.0, 0.75, 0.5, 0.25, 0.0)
    out = integrate(kept, Jumps(0.01), times, denoiser(model).prior(rng, (7,)), cond, rng)
    assert torch.equal(out[:, :2], x[:, :2])
    assert int(out.max()) < 11


# published files


def published(folder: Path, config: DraxConfig = TINY, **said: Any) -> Drax:
    """A folder as the authors' `save_pretrained` writes it, encoder aside."""
    model = randomise(config.build())
    folder.mkdir()
    save_file(DRAX.write(model, model.state_dict()), folder / "decoder.safetensors")
    decoder = {"vocab_size": config.vocab, "n_heads": config.num_heads, "dropout": config.drop, **said}
    (folder / "config.json").write_text(json.dumps({"model_type": "drax", "decoder_config": decoder}))
    return model


def test_a_folder_is_recognised_and_written_back_bit_for_bit(tmp_path: Path) -> None:
    model = published(tmp_path / "drax")
    found = read(tmp_path / "drax", FORMATS)
    assert found.format is DRAX
    assert found.config == replace(TINY, length=144, audio_length=1500)
    assert found.denoiser == TokenMeaning(Mixture("uniform", vocab=11))
    for name, value in model.state_dict().items():
        assert torch.equal(found.weights[name], value), name
    run, lines = import_file(tmp_path / "drax", tmp_path / "run")
    assert "Drax (Navon et al. 2025): no published size" in lines[0]
    assert "144 tokens of 11 kinds" in lines[1]
    assert load(run.folder, device="cpu").recipe.objective == DraxLoss()
    export_run(run.folder, "official", tmp_path / "back")
    for name, value in load_file(tmp_path / "drax" / "decoder.safetensors").items():
        assert torch.equal(load_file(tmp_path / "back" / "decoder.safetensors")[name], value), name
    said = json.loads((tmp_path / "back" / "config.json").read_text())["decoder_config"]
    assert said == {
        "vocab_size": 11, "hidden_size": 24, "n_heads": 3, "cond_dim": 16, "n_blocks": 3, "dropout": 0.2,
        "whisper_dim": 10,
    }  # fmt: skip


def test_the_file_alone_asks_for_the_heads_unless_the_size_is_published(tmp_path: Path) -> None:
    published(tmp_path / "drax")
    with pytest.raises(DitkitError, match=r"how many heads its attention has: give --model\.num-heads"):
        read(tmp_path / "drax" / "decoder.safetensors", FORMATS)
    found = read(tmp_path / "drax" / "decoder.safetensors", FORMATS, options={"num_heads": 3})
    assert found.config.num_heads == 3


def test_files_that_are_not_what_they_seem_are_refused(tmp_path: Path) -> None:
    published(tmp_path / "drax", n_heads="three")
    with pytest.raises(DitkitError, match="n_heads 'three'"):
        read(tmp_path / "drax", FORMATS)
    (tmp_path / "drax" / "config.json").unlink()
    weights = load_file(tmp_path / "drax" / "decoder.safetensors")
    weights["rotary_emb.inv_freq"] = weights["rotary_emb.inv_freq"] * 2
    save_file(weights, tmp_path / "drax" / "decoder.safetensors")
    with pytest.raises(DitkitError, match=r"rotary_emb\.inv_freq is not what this model computes"):
        read(tmp_path / "drax", FORMATS, options={"num_heads": 3})
    del weights["rotary_emb.inv_freq"]
    save_file(weights, tmp_path / "drax" / "decoder.safetensors")
    assert read(tmp_path / "drax", FORMATS, options={"num_heads": 3}).config.num_heads == 3
    del weights["blocks.1.kw.weight"]
    save_file(weights, tmp_path / "drax" / "decoder.safetensors")
    with pytest.raises(DitkitError, match=r"lacks blocks\.1\.kw\.weight"):
        read(tmp_path / "drax", FORMATS, options={"num_heads": 3})


def test_what_the_layout_cannot_say_is_refused() -> None:
    uniform = TokenMeaning(Mixture("uniform", vocab=11))
    assert DRAX.refusal(TINY, uniform) is None
    assert "uniform source" in str(DRAX.refusal(TINY, TokenMeaning(Mixture("mask", vocab=11))))
    assert "mlp_ratio of 4, not 2" in str(DRAX.refusal(replace(TINY, mlp_ratio=2.0), uniform))
