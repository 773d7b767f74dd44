from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cascade.config import from_dict
from cascade.errors import UserError
from train import report_demo
from train.assemble_unet import AssembleUNetConfig, assemble_unet
from train.data.write import WriteOptions, write_shards
from train.report_demo import (
    PARTS,
    SHEET_PROMPTS,
    fill_card,
    main,
    parse_parts,
    read_prompts,
)


def test_the_sheet_has_thirty_two_different_prompts():
    prompts = read_prompts(SHEET_PROMPTS)
    assert len(prompts) == len(set(prompts)) == 32
    assert {"a 3D render of a red apple", "a flat icon of a blue fish"} <= set(prompts)


def test_comments_and_blank_lines_are_no_prompts(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("# title\n\n a cat \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat"]
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="no prompts"):
        read_prompts(tmp_path / "none.txt")


def test_parts_are_made_in_their_order_whatever_the_order_asked():
    assert parse_parts("sheet, sizes") == ("sizes", "sheet")
    assert parse_parts(",".join(PARTS)) == PARTS


def test_an_unknown_part_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'retrieval'"):
        parse_parts("retrival")
    with pytest.raises(UserError, match="names nothing"):
        parse_parts(",")


def test_a_number_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="--prompts must be at least 2"):
        main(["--prompts", "1"])


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(UserError, match="did you mean --prompts"):
        main(["--promts", "3"])


def test_figures_on_pictures_need_shards(tiny_model: Path, tmp_path: Path):
    arguments = ["--model", str(tiny_model), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--shards is needed"):
        main([*arguments, "--parts", "retrieval"])


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny cascade, its CLIP ready to be a yardstick."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    preprocessing = {"image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "text" / "preprocessor.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Small shards of three splits: plain squares of different greys."""
    source = tmp_path / "source"
    source.mkdir()
    rows = []
    for number in range(24):
        name, split = f"thing {number}", ("train", "test_combo", "test_concept")[number % 3]
        Image.new("RGB", (32, 32), (10 * number,) * 3).save(source / f"p{number}.png")
        row = {"file": f"p{number}.png", "caption": f"a drawing of {name}", "name": name}
        rows.append({**row, "captions": [row["caption"]], "split": split, "style": "flat"})
    (source / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for split in ("train", "test_combo", "test_concept"):
        write_shards(WriteOptions(source=source, out=tmp_path / "shards" / split, split=split))
    return tmp_path / "shards"


def test_the_whole_report_is_made_and_made_again_from_its_pictures(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "prompts.txt").write_text("a red apple\na blue fish\n")
    out = tmp_path / "out"
    arguments = ["--model", str(model), "--shards", str(shards), "--out", str(out)]
    arguments += ["--prompts", "4", "--candidates", "6", "--batch-size", "2", "--device", "cpu"]
    arguments += ["--sheet-prompts", str(tmp_path / "prompts.txt")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert (out / "report.md").read_text() in printed
    assert {row["split"] for row in report["reconstruction"]} == {
        "test_combo",
        "test_concept",
        "all",
    }
    kinds = [(row["split"], row["pictures"]) for row in report["retrieval"]]
    assert len(kinds) == 12 and ("train", "generated") in kinds
    assert report["provenance"]["command"].startswith("python -m train.report_demo --model")
    assert str(tmp_path) not in json.dumps(report)
    assert report["sheet"] == ["a red apple", "a blue fish"]
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 2 * 128
    made = {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")}
    # 16 held-out pictures and 4 of training; 12 prompts and the sheet's 2.
    assert len(made) == 16 + 4 + 12 + 2

    assert main(arguments) == 0
    assert json.loads((out / "report.json").read_text()) == report
    assert {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")} == made


def test_figures_go_between_the_marks_of_a_card_and_replace_the_old_ones() -> None:
    card = "# Title\n\n<!-- figures -->\nold\n<!-- /figures -->\n\n## After\n"
    filled = fill_card(card, "new", "card")
    assert filled == "# Title\n\n<!-- figures -->\n\nnew\n<!-- /figures -->\n\n## After\n"
    assert fill_card(filled, "newer", "card").count("newer") == 1


@pytest.mark.parametrize("card", ["", "<!-- figures -->", "<!-- /figures --> <!-- figures -->"])
def test_a_card_without_both_marks_is_refused(card: str) -> None:
    with pytest.raises(UserError, match="card: needs the lines"):
        fill_card(card, "new", "card")


def test_what_was_written_into_the_card_meanwhile_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Title\n\n<!-- figures -->\n<!-- /figures -->\n\nold words\n")
    measure = report_demo.measure

    def measure_while_somebody_writes(*arguments: object) -> object:
        card.write_text(card.read_text().replace("old words", "new words"))
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(report_demo, "measure", measure_while_somebody_writes)
    out = str(tmp_path / "out")
    arguments = ["--model", str(model), "--parts", "sizes", "--out", out, "--card", str(card)]
    assert main(arguments) == 0
    assert "new words" in card.read_text() and "stage_c.safetensors" in card.read_text()


def test_a_u_net_is_measured_by_the_same_yardsticks(
    tiny_unet: Path, model: Path, shards: Path, tmp_path: Path
):
    spec = {"name": "tiny", "image_size": 32, "size_multiple": 4, "min_size": 16, "max_size": 64}
    config = {
        "spec": {**spec, "sampling": {"steps": 2}},
        "unet": str(tiny_unet / "unet.safetensors"),
        "autoencoder": str(tiny_unet / "autoencoder_kl.safetensors"),
        "text": str(model / "text"),
        "beside": {"teacher": str(tiny_unet / "unet.safetensors")},
    }
    unet, out = tmp_path / "unet", tmp_path / "report"
    assemble_unet(from_dict(AssembleUNetConfig, config, "config"), unet)
    arguments = ["--model", str(unet), "--yardstick", str(model / "text"), "--shards", str(shards)]
    arguments += ["--prompts", "4", "--candidates", "3", "--out", str(out)]
    assert main([*arguments, "--parts", "sizes,reconstruction,retrieval"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["reconstruction"][0]["stage_ab_psnr_db"] is None
    assert {row["pictures"] for row in report["retrieval"]} == {
        "real",
        "reconstructed",
        "generated",
        "shuffled",
    }
    text = (out / "report.md").read_text()
    assert "By the autoencoder" in text and "| split | pictures | PSNR dB | SSIM |" in text
    assert {"unet", "vae", "teacher.safetensors"} <= {
        Path(row["file"]).parts[0] for row in report["sizes"]
    }
    teacher = str(unet / "teacher.safetensors")
    assert main([*arguments, "--unet", teacher, "--parts", "retrieval"]) == 0
    assert len(list((out / "pictures").iterdir())) == 2
