from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml

from cascade.errors import UserError
from cascade.evaluate.prompts import (
    Prompt,
    attributes_hash,
    draw,
    inline_prompts,
    prompts_hash,
    read_prompts,
    seed_of,
)
from cascade.evaluate.protocol import (
    VERSIONS,
    PromptSource,
    Protocol,
    Resolved,
    Yardstick,
    canonical,
    differences,
    load_protocol,
)

CLIP = Yardstick("clip", "demo CLIP")


def make(**changes: object) -> Protocol:
    values: dict[str, object] = {
        "name": "p",
        "prompts": PromptSource(inline=("a cat", "a dog")),
        "metrics": ("clip_score", "frechet"),
        "generated_size": 64,
        "size": 32,
        "clip": CLIP,
        "features": CLIP,
    }
    return Protocol(**{**values, **changes})  # type: ignore[arg-type]


def resolved(protocol: Protocol, **changes: object) -> Resolved:
    prompts = protocol.read_prompts(None)
    found = prompts_hash(prompts)
    whole = Resolved(protocol, found, None, len(prompts), "ref", 9, "f", "c", None)
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def test_the_hash_is_of_canonical_json_and_stays_what_it_was() -> None:
    assert canonical({"b": 1, "a": [0.5, "ä"]}) == '{"a":[0.5,"\\u00e4"],"b":1}'
    one = resolved(make())
    assert len(one.hash) == 12
    assert one.hash == resolved(make(name="another name")).hash
    # What went through a file is the same.
    content = json.loads(json.dumps(one.content()))
    assert canonical(content) == canonical(one.content())
    assert differences(content, one.content()) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"resize": "bilinear"}, "resize"),
        ({"size": 64}, "size"),
        ({"weights": "raw"}, "weights"),
        ({"picture_format": "jpeg"}, "picture_format"),
        ({"seed": 1}, "seed"),
        ({"sampling": "own"}, "sampling"),
        ({"prompts": PromptSource(inline=("a cat", "a dot"))}, "prompts.sha256"),
        ({"metrics": ("frechet",)}, "metrics"),
        ({"clip": Yardstick("clip", "L/14")}, "clip.name"),
    ],
)
def test_every_key_changes_the_hash_and_is_named(change: dict[str, object], key: str) -> None:
    first, second = resolved(make()), resolved(make(**change))
    assert first.hash != second.hash
    found = differences(first.content(), second.content())
    assert found[0].key == key
    assert json.dumps(found[0].first)[:20] in str(found[0])
    assert json.dumps(found[0].second)[:20] in str(found[0])


@pytest.mark.parametrize(
    "name", ["reference", "features_weights", "clip_weights", "attributes_sha256"]
)
def test_what_the_protocol_stands_for_is_in_the_hash(name: str) -> None:
    first, second = resolved(make()), resolved(make(), **{name: "other"})
    assert first.hash != second.hash


def test_a_new_version_of_a_metric_is_a_new_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resolved(make()).hash
    monkeypatch.setitem(VERSIONS, "psnr", 99)  # type: ignore[arg-type]
    assert resolved(make()).hash == before  # not among this protocol's metrics
    monkeypatch.setitem(VERSIONS, "frechet", 99)  # type: ignore[arg-type]
    assert resolved(make()).hash != before


def test_a_yaml_file_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    content = {
        "name": "p",
        "prompts": {"inline": ["a cat"]},
        "metrics": ["frechet"],
        "generated_size": 64,
        "size": 64,
        "clip": {"kind": "clip", "name": "x"},
        "features": {"kind": "clip", "name": "x"},
    }
    path.write_text(yaml.safe_dump(content))
    assert load_protocol(path).metrics == ("frechet",)
    for change, words in (
        ({"metrics": ["frechett"]}, "did you mean 'frechet'"),
        ({"metrics": []}, "metrics is empty"),
        ({"metrics": ["ssim"], "size": 8}, "size is 8; ssim needs 11 pixels"),
        ({"rezise": "bicubic"}, "did you mean 'resize'"),
        ({"metrics": ["attributes"]}, "attributes names none"),
        ({"size": 0}, "size is 0"),
    ):
        path.write_text(yaml.safe_dump(content | change))
        with pytest.raises(UserError, match=words):
            load_protocol(path)


def test_prompts_that_are_not_the_protocols_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# a list\na cat\n\na dog\n", encoding="utf-8")
    open_list = make(prompts=PromptSource())
    prompts = open_list.read_prompts(path)
    assert [p.text for p in prompts] == ["a cat", "a dog"]
    pinned = make(prompts=PromptSource(sha256=prompts_hash(prompts)))
    assert pinned.read_prompts(path) == prompts
    path.write_text("a cat\na dot\n")
    with pytest.raises(UserError, match="have the hash"):
        pinned.read_prompts(path)
    with pytest.raises(UserError, match="--prompts"):
        open_list.read_prompts(None)
    with pytest.raises(UserError, match="holds its prompts itself"):
        make().read_prompts(path)


def test_prompt_lists_are_read_as_they_are_published(tmp_path: Path) -> None:
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\tChallenge\tNote\na "B" cat\tAnimals\tBasic\t\n')
    assert read_prompts(parti)[0] == Prompt(
        "00000", 'a "B" cat', {"Category": "Animals", "Challenge": "Basic", "Note": ""}
    )
    geneval = tmp_path / "evaluation_metadata.jsonl"
    geneval.write_text('{"tag": "colors", "include": [{"class": "cat"}], "prompt": "a red cat"}\n')
    assert read_prompts(geneval) == [Prompt("00000", "a red cat", {"tag": "colors"})]
    coco = tmp_path / "captions_val2014.json"
    images = [{"id": 7, "file_name": "COCO_7.jpg"}, {"id": 8, "file_name": "COCO_8.jpg"}]
    captions = [
        {"id": 12, "image_id": 7, "caption": "later"},
        {"id": 11, "image_id": 7, "caption": "first "},
        {"id": 13, "image_id": 8, "caption": "eight"},
    ]
    coco.write_text(json.dumps({"images": images, "annotations": captions}))
    assert read_prompts(coco) == [Prompt("COCO_7", "first"), Prompt("COCO_8", "eight")]


def test_an_id_of_zero_is_an_id(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 0, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n')
    assert [prompt.key for prompt in read_prompts(path)] == ["0", "1"]


def test_a_shard_whose_metadata_is_no_object_is_one_line(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("one.json")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"[1]"))
    with pytest.raises(UserError, match=r"a\.tar: one\.json: not a JSON object"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "# nothing\n", "no prompts"),
        ("a.md", "x", "is one of"),
        ("a.jsonl", "{broken\n", "line 1 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n', "no prompt under"),
        ("a.jsonl", '{"key": "x", "prompt": "a"}\n{"key": "x", "prompt": "b"}\n', "two prompts"),
        ("a.jsonl", '{"key": "../x", "prompt": "a"}\n', "cannot name"),
        ("a.json", "[]", "not COCO's captions"),
        ("none.txt", None, "no such prompt list"),
    ],
)
def test_bad_prompt_lists_end_in_one_line(
    tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_draw_depends_on_the_keys_alone() -> None:
    prompts = inline_prompts([f"prompt {i}" for i in range(50)])
    drawn = draw(prompts, 10, 0, "x")
    assert len(drawn) == 10 and drawn == draw(prompts[::-1], 10, 0, "x")
    assert drawn != draw(prompts, 10, 1, "x")
    smaller = [p.key for p in draw(prompts, 5, 0, "x")]
    assert set(smaller) <= {p.key for p in drawn}  # a smaller count draws some of the same
    with pytest.raises(UserError, match="asks 51"):
        draw(prompts, 51, 0, "x")


def test_a_pictures_seed_is_of_its_key() -> None:
    assert seed_of("a", 0) == seed_of("a", 0) < 2**31
    assert len({seed_of(f"{i}", s) for i in range(100) for s in (0, 1)}) == 200


def test_weights_that_are_not_the_protocols_are_refused() -> None:
    pinned = Yardstick("inception", "Inception", "6726825d")
    pinned.check("6726825d0af5", "x.pth")
    with pytest.raises(UserError, match="have the hash abc"):
        pinned.check("abc", "x.pth")


def test_what_a_prompt_asks_for_has_a_hash_of_its_own() -> None:
    cat = Prompt("a", "a cat", {"name": "cat", "style": "3d"})
    dog = Prompt("a", "a cat", {"name": "dog", "style": "flat"})
    assert prompts_hash([cat]) == prompts_hash([dog])
    assert attributes_hash([cat]) != attributes_hash([dog])
