import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from customized_grpo.errors import UserError
from customized_grpo.report import paired_difference, write_report
from customized_grpo.report.page import FACTS, remarks
from customized_grpo.report.records import data_uri, read_run
from customized_grpo.tracking.metric_info import METRIC_INFOS, MetricInfo


class Page(HTMLParser):
    """Tags with their attributes, and the visible text in one line."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def report(run: Path) -> Page:
    return Page(write_report(run).read_text())


def rewrite(path: Path, change: Any) -> None:
    """Apply `change` to every JSON object of a .json or .jsonl file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_complete_run(run: Path) -> None:
    html = write_report(run).read_text()
    page = Page(html)
    assert page.open == []
    for heading in (
        "Before and after",
        "The course of training",
        "Health of the updates",
        "Where the time went",
        "Pictures",
        "Full configuration",
        "The prompt\u2013identity plane",
        "Time weights at the steps used",
    ):
        assert heading in page.text
    assert "WARNING" not in page.text and "customized-grpo evaluate" not in page.text and "nan" not in page.text.lower()
    assert not (run / "report.html.part").exists()


def test_it_opens_offline_and_every_drawing_is_well_formed(run: Path) -> None:
    html = write_report(run).read_text()
    assert not re.search(r"https?:|//\w+\.|@import|url\(|<script|<link|javascript:", html)
    sources = [attributes["src"] or "" for tag, attributes in Page(html).tags if tag == "img"]
    assert len(sources) == 9 and all(source.startswith("data:image/png;base64,") for source in sources)
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) >= 12
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).get("aria-label")
        assert "nan" not in drawing and "inf" not in drawing


def test_pictures_have_alternative_texts_and_tables_headers(run: Path) -> None:
    page = report(run)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")


def test_headline_is_the_paired_difference_of_the_records(run: Path) -> None:
    base, tuned = (json.loads((run / "evaluation" / f"{n}.json").read_text())["records"] for n in ("base", "tuned"))
    before, after = ([record["joint_success"] for record in side] for side in (base, tuned))
    _, low, high = paired_difference(before, after)
    rewrite(run / "evaluation" / "tuned.json", lambda content: content["records"].reverse())
    text = report(run).text
    shares = f"from {100 * sum(before) / 40:.1f} % to {100 * sum(after) / 40:.1f} %"
    assert f"Joint success on the test split rose {shares}" in text
    assert f"interval {100 * low:+.1f} to {100 * high:+.1f}" in text.replace("\u2212", "-")


def test_headline_does_not_claim_what_the_interval_does_not(run: Path) -> None:
    shutil.copy(run / "evaluation" / "base.json", run / "evaluation" / "tuned.json")
    assert "did not change measurably" in report(run).text


def test_without_final_evaluation_it_says_how_to_get_one(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    text = report(run).text
    assert "No final evaluation" in text and f"customized-grpo evaluate --run {run}" in text
    assert "The validation of iteration 24" in text


def test_validation_gallery_stands_in_for_missing_pictures(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    (run / "galleries").mkdir()
    for iteration in (8, 16):
        Image.new("RGB", (64, 32), (iteration, 0, 0)).save(run / "galleries" / f"{iteration:06d}.png")
    page = report(run)
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == ["Validation gallery of iteration 16"]


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_one_sided_evaluation(run: Path, side: str) -> None:
    (run / "evaluation" / f"{side}.json").unlink()
    text = report(run).text
    assert "Not yet compared" in text and f"The final evaluation of the {side} policy is missing" in text


def test_without_judge_the_rewards_speak(run: Path) -> None:
    def drop(row: dict[str, Any]) -> None:
        for name in ("prompt_satisfied", "identity_kept", "joint_success"):
            row.pop(name, None)

    def drop_all(content: dict[str, Any]) -> None:
        drop(content["summary"])
        for record in content["records"]:
            drop(record)

    rewrite(run / "evaluations.jsonl", drop)
    for side in ("base", "tuned"):
        rewrite(run / "evaluation" / f"{side}.json", drop_all)
    text = report(run).text
    assert "No judge looked at the pictures" in text and "No judge metrics" in text
    assert "Prompt reward rose" in text and "identity reward" in text and "Joint success on" not in text


def test_only_metrics_of_one_iteration(run: Path) -> None:
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    bare = run.parent / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text(first + "\n")
    text = report(bare).text
    assert "Not yet compared" in text and "There is no config.yaml" in text and "There is no weights.json" in text


@pytest.mark.parametrize("value", [1.00003, 0.99, float("inf")])
def test_first_pass_ratio_alarm(run: Path, value: float) -> None:
    def spoil(row: dict[str, Any]) -> None:
        if row["iteration"] == 7:
            row["first_ratio/max" if value > 1 else "first_ratio/min"] = value

    rewrite(run / "metrics.jsonl", spoil)
    text = report(run).text
    assert "WARNING" in text and "at iteration 7" in text and "in 1 of 24 iterations" in text


def test_nulls_and_nans_in_metrics(run: Path) -> None:
    def spoil(row: dict[str, Any]) -> None:
        if row["iteration"] in (3, 4, 24):
            row.update({key: None for key in row if key not in ("iteration", "steps")})
        if row["iteration"] == 9:
            row["loss"] = float("nan")

    rewrite(run / "metrics.jsonl", spoil)
    html = write_report(run).read_text()
    assert "loss in 4, grad_norm in 3" in Page(html).text
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert "nan" not in drawing


def test_metrics_that_are_null_throughout(run: Path) -> None:
    (run / "evaluations.jsonl").unlink()
    rewrite(
        run / "metrics.jsonl",
        lambda row: row.update({key: None for key in row if key not in ("iteration", "steps")}),
    )
    text = report(run).text
    assert "No finite reward was logged" in text and "No update statistics" in text and "No timing" in text


def test_user_text_is_escaped(run: Path) -> None:
    attack = "<script>alert('a')</script>\" onload=\"x"

    def spoil(content: dict[str, Any]) -> None:
        content["records"][0].update(prompt=attack, subject=attack)
        content["split"] = attack

    rewrite(run / "evaluation" / "tuned.json", spoil)
    (run / "config.yaml").write_text(f"policy:\n  kind: {json.dumps(attack)}\n")
    page = report(run)
    assert not any(tag == "script" or "onload" in attributes for tag, attributes in page.tags)
    assert "<script>alert('a')</script>" in page.text


def test_credentials_in_the_config_are_not_shown(run: Path) -> None:
    (run / "config.yaml").write_text("judge:\n  api_key: abc-123\n  max_tokens: 64\nhub_token: xyz\n")
    html = write_report(run).read_text()
    assert "abc-123" not in html and "xyz" not in html and "max_tokens: 64" in html


def test_pictures_come_from_the_image_folder_only(run: Path) -> None:
    outside = run / "evaluation" / "secret_base.png"
    Image.new("RGB", (4, 4)).save(outside)
    folder = run / "evaluation" / "images"
    assert data_uri(folder / "../secret_base.png", folder) == ""
    assert data_uri(outside, outside.parent).startswith("data:image/png;base64,")


def test_unreadable_picture_is_left_out(run: Path) -> None:
    (run / "evaluation" / "images" / "00001_tuned.png").write_bytes(b"not a picture")
    page = report(run)
    assert "no picture" in page.text and sum(tag == "img" for tag, _ in page.tags) == 8


def test_different_pairs_are_matched_by_id(run: Path) -> None:
    rewrite(run / "evaluation" / "tuned.json", lambda content: content.update(records=content["records"][:30]))
    text = report(run).text
    assert "differences use the 30 they share" in text and "Of 30 pairs" in text


def test_a_comparison_of_earlier_weights_is_told(run: Path) -> None:
    """A run went on, without data to compare on."""
    for iteration, told in ((24, False), (20, True)):
        rewrite(run / "evaluation" / "tuned.json", lambda content, at=iteration: content.update(iteration=at))
        assert ("are of iteration 20; training has gone on to 24 since" in report(run).text) == told


def test_an_unfinished_last_line_is_left_out_and_a_repeated_iteration_replaced(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1], '{"iteration": 25, "rew']) + "\n")
    assert "Iterations 24 Training time" in report(run).text


def test_broken_files_are_user_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: no training iteration"):
        write_report(tmp_path)
    path = run / "metrics.jsonl"
    text = path.read_text()
    path.write_text("{oops\n" + text)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: broken JSON"):
        write_report(run)
    path.write_text(text)
    (run / "weights.json").write_text('{"sigmas": [1, 0], "weights": [[0.5, 0.5], [0.5, 0.5]]}')
    with pytest.raises(UserError, match=r"expected weights \[T, R\]"):
        write_report(run)


def test_the_head_states_every_fact_of_the_configuration(run: Path) -> None:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    unset = ["advantages.sars.gamma_penalty"]
    assert [name for label, name in FACTS if label not in page.text] == unset


def add_brightness(run: Path) -> None:
    """Let the evaluations of a run hold a metric of one's own."""

    def change(content: Any) -> None:
        for number, record in enumerate(content["records"]):
            record["brightness"] = 0.25 + 0.5 * (number % 2)

    for side in ("base", "tuned"):
        rewrite(run / "evaluation" / f"{side}.json", change)
    rewrite(run / "evaluations.jsonl", lambda row: row.update(brightness=0.5))


def test_a_metric_without_a_row_is_shown_by_its_own_name(run: Path) -> None:
    add_brightness(run)
    text = report(run).text
    assert "Brightness 0.500 0.419 to 0.581 0.500 0.419 to 0.581 +0.000 +0.000 to +0.000" in text
    shutil.rmtree(run / "evaluation")
    assert "brightness 0.500" in report(run).text


def test_a_new_metric_needs_one_row(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_brightness(run)
    row = MetricInfo("brightness", "lit pictures", unit="share", higher_is_better=False)
    monkeypatch.setitem(METRIC_INFOS, "brightness", row)
    rewrite(run / "evaluation" / "tuned.json", lambda content: content["records"][0].update(brightness=0.75))
    text = report(run).text
    assert "Lit pictures 50.0 % 41.9 % to 58.1 % 51.2 %" in text and "0 better, 1 worse" in text
    shutil.rmtree(run / "evaluation")
    assert "lit pictures 50.0 %" in report(run).text


def test_a_third_reward_has_a_chart_of_its_own(run: Path) -> None:
    rewrite(run / "metrics.jsonl", lambda row: row.update({"reward/style/mean": 0.5, "reward/style/std": 0.1}))
    text = report(run).text
    assert all(f"{name} reward" in text for name in ("Prompt", "Identity", "Style"))


def test_rewards_without_a_row_keep_the_order_of_the_log(run: Path) -> None:
    more = {f"reward/{name}/mean": 0.5 for name in ("zeal", "art", "mood")}
    rewrite(run / "metrics.jsonl", lambda row: row.update(more))
    text = report(run).text
    assert text.index("Zeal reward") < text.index("Art reward") < text.index("Mood reward")


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FOUR = {
    "prompt": {"kind": "hpsv3", "schedule": "early", "weight": 1.0},
    "identity": {"kind": "dino", "schedule": "late", "weight": 1.0},
    "mine": {"kind": "python", "schedule": "constant", "weight": 0.2},
    "quality": {"kind": "pickscore", "role": "constraint", "at_least": 0.21, "schedule": "constant", "weight": 1.0},
}
PAIRS = (("prompt", "identity"), ("prompt", "mine"), ("identity", "mine"))


@pytest.fixture
def guarded(run: Path) -> Path:
    """A run of four rewards, of which one is a constraint, that was best half-way and over-optimized after it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {f"reward/{name}/{what}": 0.5 for name in FOUR for what in ("mean", "std")}
        row |= {"violated/quality": 0.1, "clip_fraction": 1.0}
        for pair in PAIRS:
            names = ("both_good", *(f"only_{name}" for name in pair), "both_bad")
            row |= {f"quadrant/{'-'.join(pair)}/{name}": 0.25 for name in names}
    write_lines(run / "metrics.jsonl", rows)
    checks = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    gains = [0.0, 0.1, 0.2, 0.3, 0.2, 0.1, 0.0, -0.1, -0.2]
    for number, row in enumerate(checks):
        gain = gains[number]
        row |= {
            "held_out_gain": gain, "reward_gain": 0.1 * number, "texture": 1 + 0.05 * number,
            "diversity": 0.4 - 0.03 * number,
            "intervals": {"held_out_gain": [gain - 0.1, gain + 0.1], "texture": [1.0, 1.1]}, "gains": [gain] * 4,
            "over_optimized": number > 5, "copied": 0.01 * number,
        }  # fmt: skip
    write_lines(run / "evaluations.jsonl", checks)
    weights = json.loads((run / "weights.json").read_text())
    table = [[0.8 * prompt, 0.8 * identity, 0.2] for prompt, identity in weights["weights"]]
    (run / "weights.json").write_text(json.dumps(weights | {"names": ["prompt", "identity", "mine"], "weights": table}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"rewards": FOUR}, sort_keys=False))
    tuned = json.loads((run / "evaluation" / "tuned.json").read_text()) | {"iteration": 24}
    (run / "evaluation" / "tuned.json").write_text(json.dumps(tuned))
    best = tuned | {"iteration": 9, "records": tuned["records"]}
    best["summary"] = tuned["summary"] | {"held_out_gain": {"mean": 0.4, "low": 0.3, "high": 0.5}}
    (run / "evaluation" / "best.json").write_text(json.dumps(best))
    return run


def test_the_page_leads_with_the_best_validation(guarded: Path) -> None:
    page = page_of(guarded)
    assert "Best at iteration 9: held-out gain +0.30 (0.20 to 0.40); training rewards went on rising after it." in page
    assert "Over-optimized from iteration 15 to 24: training rewards rose, and the held-out gain was" in page
    assert page.index("Best at iteration 9") < page.index("Joint success on the test split")
    assert "Gain over the base" in page and "over-optimized</span>" in page


def test_base_best_and_last_stand_side_by_side(guarded: Path) -> None:
    page = page_of(guarded)
    headings = re.findall(r'<th scope="col" class="number">([^<]*)</th>', page)
    assert headings[:3] == ["Base", "Best, iteration 9", "Last, iteration 24"]
    assert "Held-out gain" in page and "0.40" in page
    (guarded / "evaluation" / "best.json").write_text((guarded / "evaluation" / "tuned.json").read_text())
    assert re.findall(r'<th scope="col" class="number">([^<]*)</th>', page_of(guarded))[:2] == ["Base", "Best"]


def test_any_number_of_rewards_has_charts_and_colors_of_their_own(guarded: Path) -> None:
    page = page_of(guarded)
    for heading in ("Prompt reward", "Identity reward", "Mine reward", "Quality reward", "Constraints broken"):
        assert f"<h3>{heading}</h3>" in page
    assert page.count("<h3>Quadrants of the rollouts</h3>") == 3
    assert "prompt: hpsv3, early; identity: dino, late; mine: python, constant; quality: pickscore, constraint" in page
    run = read_run(guarded)
    hues = {name: run.info(f"reward/{name}").hue for name in FOUR}
    assert hues == {"prompt": "prompt", "identity": "identity", "mine": "other1", "quality": "other2"}
    assert run.objectives == ["prompt", "identity", "mine"]


def test_what_validations_show_is_remarked(guarded: Path) -> None:
    texts = " ".join(text for _, text in remarks(read_run(guarded)))
    assert "The last validation's images had 1.40 times the base's texture: dots, noise or ringing." in texts
    assert "Images of one prompt differ less than half as much as the base's: 0.160, and 0.400." in texts
    assert "The copy-paste rate of the last validation, 8.0" in texts
    assert "In 24 of 24 iterations every ratio was clipped" in texts


def test_a_run_that_holds_nothing_out_leads_with_nothing(run: Path) -> None:
    page = page_of(run)
    assert 'class="lead"' not in page and "Gain over the base" not in page
