"""What people see of a metric stands in one table."""

from customized_grpo.tracking.metric_info import (
    METRIC_INFOS,
    MetricInfo,
    headline_first,
    in_order,
    is_metric,
    metric_info,
    overview,
)


def names(infos: list[MetricInfo]) -> list[str]:
    return [info.name for info in infos]


def test_every_row_stands_under_its_own_name() -> None:
    assert {name: info.name for name, info in METRIC_INFOS.items()} == {name: name for name in METRIC_INFOS}
    assert all(info.is_share for info in METRIC_INFOS.values() if info.verdict)


def test_a_heading_keeps_capitals() -> None:
    assert metric_info("joint_success").heading == "Joint success" and metric_info("dinov2").heading == "DINOv2"


def test_a_metric_without_a_row_is_a_plain_number_by_its_own_name() -> None:
    assert metric_info("brightness") == MetricInfo("brightness", "brightness")
    assert metric_info("reward/style") == MetricInfo("reward/style", "style reward")
    assert is_metric("reward/style") and is_metric("dino") and not is_metric("brightness")


def test_metrics_stand_in_the_order_of_the_table_and_others_follow() -> None:
    given = ["own", "reward/style", "copy_score", "joint_success", "prompt_satisfied", "own"]
    assert names(in_order(given)) == ["prompt_satisfied", "joint_success", "copy_score", "own", "reward/style"]
    assert names(overview(given)) == ["prompt_satisfied", "joint_success", "own", "reward/style"]
    assert names(headline_first(overview(given)))[:2] == ["joint_success", "prompt_satisfied"]


def test_gains_have_a_sign_and_more_of_them_is_better() -> None:
    gains = [info for info in METRIC_INFOS.values() if info.signed]
    assert names(gains) == ["held_out_gain", "reward_gain"] and all(info.higher_is_better for info in gains)
