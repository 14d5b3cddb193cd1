"""Random features in place of encoders, and clips of moving digits."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ditkit.codecs import Pixels
from ditkit.conditioners import RandomSpeech, RandomText
from ditkit.conditioning import Given, cat
from ditkit.config import DitkitError, from_json, to_json
from ditkit.data import Captions, Digits, InMemory, MovingDigits, points
from ditkit.rng import Rng
from ditkit.sheet import rendered, suffix

TEXT = RandomText(classes=tuple("abcdefgh"), drop=0.5, width=5, pooled=3, shortest=2, longest=4)


def test_each_class_is_a_text_of_its_own_and_the_same_in_any_batch() -> None:
    cond = TEXT(Given(torch.tensor([0, 1, 2, 3, 1])))
    assert cond.text is not None
    assert cond.pooled is not None
    assert cond.label is None
    assert cond.text.mask.sum(1).tolist() == [2, 3, 4, 2, 3]
    assert torch.equal(cond.text.mask, torch.arange(4) < cond.text.mask.sum(1, keepdim=True))
    assert not cond.text.values[~cond.text.mask].any()
    alone = TEXT(Given(torch.tensor([1])))
    assert alone.text is not None
    for row in (1, 4):
        assert torch.equal(alone.text.values[0], cond.text.values[row])
        assert torch.equal(alone.pooled[0], cond.pooled[row])  # type: ignore[index]
    distances = torch.cdist(cond.text.values[:4].flatten(1), cond.text.values[:4].flatten(1))
    assert float(distances[~torch.eye(4, dtype=torch.bool)].min()) > 1


def test_the_null_text_is_one_token_and_training_sees_it_as_often_as_said() -> None:
    null = TEXT.null(2)
    assert null.text is not None
    assert null.pooled is not None
    assert null.text.mask.sum(1).tolist() == [1, 1]
    assert not null.pooled.any()
    assert bool(null.text.values[:, 0].any())
    given = Given(torch.arange(400) % 8)
    dropped = TEXT(given, Rng(0).at(3, torch.arange(400)))
    assert dropped.text is not None
    gone = (dropped.text.values == null.text.values[:1]).all(2).all(1)
    assert 150 < int(gone.sum()) < 250
    kept, full = dropped.rows(~gone), TEXT(given).rows(~gone)
    assert torch.equal(kept.text.values, full.text.values)  # type: ignore[union-attr]
    cat((dropped, TEXT.null(400)))  # as guidance joins them


def test_texts_of_what_has_no_classes_are_refused() -> None:
    with pytest.raises(DitkitError, match="makes texts of classes, and the data has none"):
        RandomText()(Given(torch.tensor([0])))
    with pytest.raises(DitkitError, match=r"label 9 is out of range"):
        TEXT(Given(torch.tensor([9])))
    wrong: dict[str, Any]
    for wrong in ({"width": 0}, {"shortest": 0}, {"shortest": 7}, {"pooled": -1}, {"drop": 2.0}):
        with pytest.raises(DitkitError):
            RandomText(**wrong)
    for wrong in ({"width": 0}, {"frames": 0}, {"noise": -1.0}, {"drop": 2.0}):
        with pytest.raises(DitkitError):
            RandomSpeech(**wrong)
    with pytest.raises(DitkitError, match="speaks texts, and none is given"):
        RandomSpeech()(Given())


def test_speech_is_its_characters_one_after_the_other() -> None:
    speak = RandomSpeech(width=3, frames=2)
    audio = speak(Given(text=points(["ab", "b", ""], 4))).audio
    assert audio is not None
    assert audio.mask.sum(1).tolist() == [4, 2, 1]
    assert torch.equal(audio.values[0, 2:4], audio.values[1, :2])  # the b in both
    assert not torch.equal(audio.values[0, :2], audio.values[0, 2:4])
    assert not audio.values[~audio.mask].any()
    assert torch.equal(speak.null(1).audio.values, torch.zeros(1, 1, 3))  # type: ignore[union-attr]


def test_spoken_noise_and_dropping_belong_to_the_sample_and_not_to_its_batch() -> None:
    speak = RandomSpeech(width=3, frames=2, noise=0.5, drop=0.3)
    text, ids = points(["abc"] * 300, 4), torch.arange(300)
    all_at_once = speak(Given(text=text), Rng(1).at(2, ids)).audio
    some = speak(Given(text=text[[7, 20]]), Rng(1).at(2, torch.tensor([7, 20]))).audio
    assert all_at_once is not None
    assert some is not None
    assert torch.equal(all_at_once.values[[7, 20]], some.values)
    silent = all_at_once.mask.sum(1) == 1
    assert 60 < int(silent.sum()) < 120
    clean = speak(Given(text=text)).audio
    noise = (all_at_once.values - clean.values)[~silent][:, :6]  # type: ignore[union-attr]
    assert_close(noise.std(), torch.tensor(0.5), rtol=0.05, atol=0)


def test_captions_speak_for_themselves() -> None:
    data = Captions(length=16).open()
    batch = data.train.batch(torch.tensor([0, 5]))
    assert batch.given.text is not None
    assert torch.equal(batch.given.text, batch.data)
    assert Digits(resolution=8).open().train.batch(torch.tensor([0])).given.text is None


def test_clips_are_their_digit_moved_and_nothing_else() -> None:
    data, digits = MovingDigits(frames=6, resolution=24, digit=10), Digits(resolution=10).open()
    opened = data.open()
    assert opened.shape == (1, 6, 24, 24)
    assert opened.classes == digits.classes
    assert len(opened.train) == 4000
    assert len(opened.heldout) == 1000
    index = torch.tensor([3, 100, 3999])
    clips, still = opened.train.batch(index), digits.train.batch(index)
    assert clips.label is not None
    assert still.label is not None
    assert torch.equal(clips.label, still.label)
    assert isinstance(digits.train, InMemory)
    places = data.places(5000)[digits.train.rows[index]]
    for clip, digit, place in zip(clips.data, still.data, places, strict=True):
        for frame, (row, column) in zip(clip[0], place.tolist(), strict=True):
            assert torch.equal(frame[row : row + 10, column : column + 10], digit[0])
            assert int(frame.long().sum()) == int(digit.long().sum())


def test_digits_move_straight_and_bounce_off_the_edges() -> None:
    data = MovingDigits(frames=40, resolution=20, digit=12, slowest=2.0, fastest=2.0)
    places = data.places(200)
    assert int(places.min()) == 0
    assert int(places.max()) == 8
    steps = places.diff(dim=1).double()
    assert float(steps.abs().max()) <= 3  # two pixels, rounded at both ends
    rng = Rng(0).at(0, torch.arange(200))
    far = (rng("start", "uniform", (2,)) * 8 + 0.0).round().long()
    assert torch.equal(places[:, 0], far)
    quick = MovingDigits(frames=3, resolution=20, digit=12, slowest=0.0, fastest=0.0).places(10)
    assert torch.equal(quick[:, 0], quick[:, 2])


def test_wrong_clips_are_refused() -> None:
    wrong: dict[str, Any]
    for wrong in ({"frames": 0}, {"digit": 32}, {"digit": 3}, {"slowest": 4.0}, {"slowest": -1.0}):
        with pytest.raises(DitkitError, match="moving_digits"):
            MovingDigits(**wrong)
    config = MovingDigits(frames=3)
    assert from_json(to_json(config), "here") == config
    assert replace(config, frames=4) != config


def test_videos_go_through_pixels_and_are_shown_frame_by_frame_or_moving() -> None:
    clips = torch.randint(0, 256, (2, 1, 4, 24, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codec = Pixels()
    assert codec.shape((1, 4, 24, 30)) == (1, 4, 24, 30)
    assert torch.equal(codec.decode(codec.encode(clips)), clips)
    assert suffix(clips) == ".png"
    picture = Image.open(io.BytesIO(rendered(clips, ".png")))
    assert picture.size == (4 * 31 + 1, 2 * 25 + 1)
    assert picture.getpixel((1 + 31 * 2 + 5, 1 + 25 + 7)) == int(clips[1, 0, 2, 7, 5])
    moving = Image.open(io.BytesIO(rendered(clips, ".gif", 2)))
    assert getattr(moving, "n_frames", 1) == 4
    with pytest.raises(DitkitError, match=r"cannot be shown as \.gif"):
        rendered(clips[:, :, 0], ".gif")
