"""Pictures in, figures out: from folders, shards and memory, with the demonstration's CLIP."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.errors import UserError
from cascade.evaluate.attributes import answers, make_questions, replaced
from cascade.evaluate.measure import Judge, evaluate
from cascade.evaluate.picture_sets import in_memory, open_set
from cascade.evaluate.prompts import Prompt, inline_prompts, read_prompts
from cascade.evaluate.protocol import Attribute, PromptSource, Protocol, Yardstick
from cascade.evaluate.results import Results, append_rows, comparison, read_rows, table
from cascade.evaluate.yardsticks import Yardsticks, load_yardsticks
from cascade.images import pixels_to_images

CLIP = "weights/demo/text"
COLOURS = ("red", "blue", "green", "white")
THINGS = ("apple", "house", "fish")
PROMPTS = [
    Prompt(f"{n:02d}", f"a flat icon of a {c} {t}", {"color": c, "name": t, "style": "flat"})
    for n, (c, t) in enumerate((c, t) for c in COLOURS for t in THINGS)
]
PROTOCOL = Protocol(
    name="test",
    prompts=PromptSource(),
    metrics=(
        "frechet",
        "kernel",
        "precision_recall",
        "mmd",
        "clip_score",
        "retrieval",
        "attributes",
        "psnr",
        "ssim",
        "lpips",
    ),
    generated_size=32,
    size=32,
    clip=Yardstick("clip", "demo CLIP"),
    features=Yardstick("clip", "demo CLIP"),
    kernel_subsets=4,
    kernel_subset_size=8,
    candidates=3,
    resamples=3,
    attributes=(Attribute("color"), Attribute("name")),
)


@pytest.fixture(scope="module")
def yards() -> Yardsticks:
    return load_yardsticks(PROTOCOL, features=CLIP, clip=CLIP)


def levels(count: int = 12, side: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (smooth * 255).round().byte()


def save(folder: Path, pixels: Tensor, keys: list[str], suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for key, image in zip(keys, pixels_to_images(pixels.float() / 255), strict=True):
        image.save(folder / f"{key}.{suffix}")
    return folder


KEYS = [prompt.key for prompt in PROMPTS]


def measured(yards: Yardsticks, made: Tensor, batch_size: int = 32, **changes: object) -> Results:
    return evaluate(
        made,
        levels(seed=1),
        PROTOCOL,
        yardsticks=yards,
        prompts=PROMPTS,
        real_keys=KEYS,
        batch_size=batch_size,
        **changes,  # type: ignore[arg-type]
    )


def values(results: Results) -> dict[str, float]:
    return {figure.metric: figure.value for figure in results.figures}


@pytest.fixture(scope="module")
def reference(yards: Yardsticks) -> Results:
    return measured(yards, levels())


def test_every_metric_of_the_protocol_is_there_with_its_yardstick(reference: Results) -> None:
    found = values(reference)
    assert list(found) == [
        "frechet",
        "kernel",
        "precision",
        "recall",
        "mmd",
        "clip_score",
        "retrieval_top_1",
        "retrieval_top_5",
        "attribute_color",
        "attribute_name",
        "psnr",
        "ssim",
        "lpips",
    ]
    for figure in reference.figures:
        assert "FID" not in figure.label and "KID" not in figure.label
        if figure.metric not in ("psnr", "ssim"):
            assert "demo CLIP" in figure.label and figure.yardstick == "demo CLIP"
            assert figure.yardstick_weights and len(figure.yardstick_weights) == 12
        assert figure.uncertainty != "none"
    assert "no LPIPS" in reference.figure("lpips").label
    assert "more than 192 are needed" in reference.figure("frechet").notes[0]
    assert reference.figure("clip_score").real is not None
    assert "note: Frechet distance (demo CLIP): 12 pictures" in table(reference)


def test_a_set_and_itself_are_at_zero_and_cover_each_other(yards: Yardsticks) -> None:
    found = measured(yards, levels(seed=1))
    same = values(found)
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    assert same["mmd"] == pytest.approx(0, abs=1e-6)
    assert same["lpips"] == 0 and same["ssim"] == pytest.approx(1) and same["psnr"] == 100
    assert same["precision"] == same["recall"] == 1
    for metric in ("clip_score", "retrieval_top_1", "attribute_color"):
        assert same[metric] == pytest.approx(found.figure(metric).real)


def close(found: Results, wanted: Results) -> None:
    assert found.protocol_hash == wanted.protocol_hash
    for metric, value in values(wanted).items():
        assert values(found)[metric] == pytest.approx(value, rel=2e-4, abs=1e-6), metric


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_batch_size_does_not_matter(
    yards: Yardsticks, reference: Results, batch_size: int
) -> None:
    close(measured(yards, levels(), batch_size), reference)


def test_uint8_and_float_are_the_same_pictures(yards: Yardsticks, reference: Results) -> None:
    found = measured(yards, levels().float() / 255)
    assert found.figures == reference.figures and found.pictures == reference.pictures


def test_the_order_of_the_pictures_does_not_matter(yards: Yardsticks, reference: Results) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    found = measured(yards, levels()[order], keys=[KEYS[i] for i in order])
    assert found.figures == reference.figures and found.pictures == reference.pictures


def test_folders_and_shards_are_measured_as_memory_is(
    tmp_path: Path, yards: Yardsticks, reference: Results
) -> None:
    made = save(tmp_path / "made", levels(), KEYS)
    (tmp_path / "real").mkdir()
    with tarfile.open(tmp_path / "real" / "0.tar", "w") as archive:
        for prompt, image in zip(PROMPTS, pixels_to_images(levels(seed=1) / 255), strict=True):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            row = {"caption": prompt.text, **prompt.attributes, "keywords": ["x"]}
            for suffix, data in (("png", buffer.getvalue()), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{prompt.key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    prompts = read_prompts(tmp_path / "real")
    assert prompts == PROMPTS
    sets = [open_set(folder, 32, "bicubic", "png", 32) for folder in (made, tmp_path / "real")]
    found = evaluate(*sets, PROTOCOL, yardsticks=yards, prompts=prompts)  # type: ignore[misc]
    assert found.figures == reference.figures
    assert found.protocol_hash == reference.protocol_hash


def test_a_judge_measures_many_sets_against_one_reference(
    yards: Yardsticks, reference: Results
) -> None:
    judge = Judge(PROTOCOL, yards, PROMPTS, levels(seed=1), real_keys=KEYS)
    assert judge(levels()).figures == reference.figures
    other = judge(levels(seed=5), model="another")
    assert other.model == "another" and other.figures != reference.figures
    assert other.protocol_hash == reference.protocol_hash


def test_pictures_are_brought_to_the_protocols_size(yards: Yardsticks) -> None:
    large = levels(side=64)
    protocol = dataclasses.replace(PROTOCOL, metrics=("psnr",), generated_size=64)
    small = in_memory(large, 32, "bicubic")
    assert next(iter(small.batches(12))).shape == (12, 3, 32, 32)
    found = evaluate(large, large, protocol, yardsticks=yards)
    assert values(found) == {"psnr": 100.0}


def test_without_prompts_the_keys_say_what_is_measured(yards: Yardsticks) -> None:
    protocol = dataclasses.replace(PROTOCOL, metrics=("psnr",))

    def hash_of(count: int) -> str:
        made = levels()[:count]
        of = {"yardsticks": yards, "keys": KEYS[:count], "real_keys": KEYS}
        found = evaluate(made, levels(), protocol, **of)  # type: ignore[arg-type]
        assert found.protocol["prompts"]["count"] == count  # type: ignore[index]
        return found.protocol_hash

    assert hash_of(5) == hash_of(5) != hash_of(6)


@pytest.mark.parametrize(
    ("made", "keys", "words"),
    [
        (levels(11), KEYS[:11], "1 of 12 pictures are missing, the first is '11'"),
        (levels(13), [*KEYS, "stray"], "belong to no prompt of the protocol, the first is 'stray'"),
        (levels(side=16), KEYS, "is 16x16 pixels, but the protocol measures pictures of 32x32"),
        (levels().float(), KEYS, "float lies in"),
        (levels().int(), KEYS, "uint8, or float"),
        (levels(), ["00"] * 12, "1 of them different"),
        (levels()[0], None, "is needed"),
    ],
)
def test_pictures_that_do_not_fit_end_in_one_line(
    yards: Yardsticks, made: Tensor, keys: list[str] | None, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        measured(yards, made, keys=keys)
    assert "\n" not in str(caught.value)


def test_folders_that_do_not_fit_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_set(tmp_path / "none", 32, "bicubic")
    with pytest.raises(UserError, match="no pictures"):
        open_set(tmp_path, 32, "bicubic")
    folder = save(tmp_path / "a", levels(2), ["x", "y"])
    save(folder, levels(1), ["z"], "jpg")
    with pytest.raises(UserError, match=r"z\.jpg is jpeg, but the protocol measures png"):
        open_set(folder, 32, "bicubic", "png")
    assert open_set(folder, 32, "bicubic").keys == ["x", "y", "z"]
    save(folder, levels(1), ["x"], "jpg")
    with pytest.raises(UserError, match="two pictures have the key 'x'"):
        open_set(folder, 32, "bicubic")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "k.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not a readable picture"):
        list(open_set(tmp_path / "b", 32, "bicubic").batches(1))


def test_pictures_that_are_not_square_lose_their_edges_and_keep_their_sides(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (10, 0, 30, 20))
    image.save(tmp_path / "wide.png")
    batch = next(iter(open_set(tmp_path, 20, "bicubic").batches(1)))
    assert batch.shape == (1, 3, 20, 20)
    assert batch[0, :, 0, 0].tolist() == [255, 0, 0]


def test_too_few_pictures_and_missing_parts_are_told(yards: Yardsticks) -> None:
    one = dataclasses.replace(PROTOCOL, metrics=("frechet",))
    with pytest.raises(UserError, match="1 picture has no covariance"):
        evaluate(levels(1), levels(2), one, yardsticks=yards)
    near = dataclasses.replace(PROTOCOL, metrics=("precision_recall",))
    with pytest.raises(UserError, match="need more than 3"):
        evaluate(levels(3), levels(9), near, yardsticks=yards)
    with pytest.raises(UserError, match="which need reference pictures"):
        evaluate(levels(3), None, one, yardsticks=yards)
    asks = dataclasses.replace(PROTOCOL, metrics=("clip_score",))
    with pytest.raises(UserError, match="which need the prompts"):
        evaluate(levels(3), None, asks, yardsticks=yards)
    with pytest.raises(UserError, match="--features"):
        load_yardsticks(one)
    with pytest.raises(UserError, match="--clip"):
        load_yardsticks(asks)
    with pytest.raises(UserError, match="nowhere"):
        load_yardsticks(asks, clip=Path("nowhere"))
    pinned = dataclasses.replace(asks, clip=Yardstick("clip", "demo CLIP", "abcdef"))
    with pytest.raises(UserError, match="but the protocol measures with demo CLIP, abcdef"):
        load_yardsticks(pinned, clip=CLIP)


def test_results_are_read_back_and_stand_side_by_side(tmp_path: Path, reference: Results) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    append_rows(first, reference.rows())
    append_rows(second, dataclasses.replace(reference, model="other").rows())
    rows = read_rows(first)
    assert rows == json.loads(json.dumps(reference.rows()))
    both = [*rows, *read_rows(second)]
    names = ["a.jsonl"] * len(rows) + ["b.jsonl"] * len(rows)
    text = comparison(both, names)
    assert reference.protocol_hash in text.splitlines()[0]
    assert "pictures" in text and "other" in text
    append_rows(first, rows)
    assert len(read_rows(first)) == 2 * len(rows)


def test_results_of_unlike_protocols_are_refused_with_the_key_and_both_values(
    tmp_path: Path, yards: Yardsticks
) -> None:
    rows, names = [], []
    for name in ("bicubic", "bilinear"):
        protocol = dataclasses.replace(PROTOCOL, metrics=("psnr",), resize=name)
        found = evaluate(levels(), levels(seed=1), protocol, yardsticks=yards)
        rows += found.rows()
        names.append(f"{name}.jsonl")
    with pytest.raises(UserError) as caught:
        comparison(rows, names)
    message = str(caught.value)
    assert 'resize is "bicubic" and "bilinear"' in message
    assert "bicubic.jsonl and bilinear.jsonl" in message


def test_a_protocol_that_was_changed_in_the_results_is_found(
    tmp_path: Path, reference: Results
) -> None:
    path = tmp_path / "r.jsonl"
    row = json.loads(json.dumps(reference.rows()[0]))
    row["protocol"]["resize"] = "bilinear"
    append_rows(path, [row])
    with pytest.raises(UserError, match="hash does not fit"):
        read_rows(path)
    path.write_text('{"metric": "x"\n')
    with pytest.raises(UserError, match="line 1: not JSON"):
        read_rows(path)
    with pytest.raises(ValueError, match="Out of range"):
        append_rows(path, [{"value": float("nan")}])


def test_values_are_replaced_in_the_prompt_with_the_right_article() -> None:
    assert replaced("a photo of a red hat", "red", "orange") == "a photo of an orange hat"
    assert replaced("An orange hat", "orange", "blue") == "A blue hat"
    assert replaced("red hats", "red", "blue") == "blue hats"


def test_a_judge_that_knows_is_always_right_and_a_blind_one_never() -> None:
    questions = make_questions(Attribute("color"), PROMPTS)
    assert len(questions) == 12 and all(len(q.wordings) == 4 for q in questions)

    def knows(texts: object) -> Tensor:
        return torch.stack(
            [torch.eye(4)[[c in text for c in COLOURS].index(True)] for text in texts]  # type: ignore[attr-defined]
        )

    pictures = knows([prompt.text for prompt in PROMPTS])
    assert bool(answers(questions, pictures, knows).all())
    assert not bool(answers(questions, pictures.roll(3, 0), knows).any())
    assert not bool(answers(questions, torch.zeros(12, 4), knows).any())  # a tie is wrong


def test_phrases_take_the_prompts_own_words() -> None:
    styles = {"flat": ("a flat icon of {a_name}",), "3d": ("a 3D render of {a_name}",)}
    questions = make_questions(Attribute("style", styles), PROMPTS)
    assert questions[0].wordings == (("a flat icon of an apple",), ("a 3D render of an apple",))
    with pytest.raises(UserError, match="'mood'"):
        make_questions(Attribute("mood"), PROMPTS)
    with pytest.raises(UserError, match="asks for 'mood'"):
        make_questions(Attribute("style", {**styles, "flat": ("{mood}",)}), PROMPTS)
    with pytest.raises(UserError, match="two are needed"):
        make_questions(Attribute("color"), inline_prompts(["a red hat"]))


def test_a_line_that_was_cut_off_costs_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_rows(path, [{"one": 1}])
    with open(path, "a") as file:
        file.write('{"metr')
    append_rows(path, [{"two": 2}])
    assert path.read_text() == '{"one": 1}\n{"metr\n{"two": 2}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "is no text"),
        (b'{"metric": "a", "label": "a", "value": "x", "model": "m", "protocol": {}, '
         b'"protocol_hash": "h"}\n', "line 1: value is 'x'; a figure is a finite number"),
        (b'{"metric": "a", "label": "a", "value": NaN, "model": "m", "protocol": {}, '
         b'"protocol_hash": "h"}\n', "line 1: value is nan"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(path)
