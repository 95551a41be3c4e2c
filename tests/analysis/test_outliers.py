import pytest
import torch

from bdprune.analysis.outliers import for_few_labels, gamma_p_values, median, robust_z, why_no_outlier


def test_z_is_the_distance_to_the_median_in_robust_standard_deviations() -> None:
    z = robust_z(torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]))  # deviations 2, 1, 0, 1, 7; their median is 1
    torch.testing.assert_close(z, torch.tensor([-2.0, -1.0, 0.0, 1.0, 7.0]) / 1.4826)


def test_missing_values_count_neither_for_the_median_nor_as_outliers() -> None:
    z = robust_z(torch.tensor([1.0, 2.0, torch.nan, 3.0, 4.0, 10.0]))
    assert z[2].isnan() and z[5] == pytest.approx(7 / 1.4826)


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    """With the lower one, the spread of four values is the distance of two neighbours: 19.6 for the last value."""
    assert median(torch.tensor([4.0, 1.0, torch.nan, 2.0, 8.0])) == 3
    assert robust_z(torch.tensor([10.0, 10.1, 12.0, 13.0])).amax() == pytest.approx(1.95 / (1.4826 * 1.0), rel=0.05)


@pytest.mark.parametrize(("count", "most"), [(4, 0.04), (8, 0.02), (10, 0.015)])
def test_random_values_are_seldom_far_outliers(count: int, most: float) -> None:
    """With the lower median, the largest of four was above 7 in a quarter of all cases."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.stack([robust_z(torch.randn(count, generator=generator)).max() for _ in range(2000)])
    assert (largest > 7).float().mean() < most


def test_equal_values_are_no_outliers() -> None:
    assert torch.equal(robust_z(torch.full((5,), 3.0)), torch.zeros(5))


def test_a_spread_of_zero_makes_no_outliers() -> None:
    """Most outputs of the network are not in use and do not react at all."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, *[0.0] * 6])
    assert torch.equal(robust_z(values), torch.zeros(10))
    assert robust_z(values[:7]).amax() > 1


def test_three_labels_are_too_few_for_an_outlier() -> None:
    assert why_no_outlier(4) == ""
    assert why_no_outlier(3) == "With 3 labels there are too few for one of them to be an outlier."


@pytest.mark.parametrize(("classes", "threshold"), [(1, 4.0), (2, 4.0), (3, 2.706), (5, 2.059), (10, 1.7), (43, 1.7)])
def test_thresholds_are_higher_with_few_labels(classes: int, threshold: float) -> None:
    assert for_few_labels(classes, 1.7, 4.0) == pytest.approx(threshold, abs=1e-3)


def test_the_gamma_distribution_has_the_largest_likelihood_and_its_tail_is_the_p_value() -> None:
    values = torch.tensor([3.0, 4.0, 5.0, 6.0, 3.5, 4.2, 5.1, 3.9, 4.4, 7.0]).double()
    null, start = values[:-1], torch.tensor([20.0, 5.0]).double()
    found = start.clone().requires_grad_(True)  # shape and rate
    search = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        cost = -torch.distributions.Gamma(found[0], found[1]).log_prob(null).sum()
        cost.backward()
        return cost

    search.step(loss)  # type: ignore[no-untyped-call]
    best = torch.distributions.Gamma(*found.detach())
    torch.testing.assert_close(gamma_p_values(values), 1 - best.cdf(values) ** 10, rtol=1e-4, atol=1e-6)


def test_outputs_that_are_not_in_use_say_nothing_about_the_others() -> None:
    used = torch.tensor([3.0, 4.0, 5.0, 6.0, 20.0])
    p = gamma_p_values(torch.cat([used, torch.tensor([-1.0, 0.0, torch.nan])]))
    torch.testing.assert_close(p[:5], gamma_p_values(used))
    assert p[4] < 0.05 and p[5] == p[6] == 1 and p[7].isnan()
    assert gamma_p_values(torch.tensor([1.0, 1.1, 9.0, -1.0])).tolist() == [1, 1, 1, 1]


def test_a_far_tail_is_not_rounded_to_nothing() -> None:
    assert 0 < gamma_p_values(torch.tensor([3.0, 4.0, 5.0, 6.0, 60.0]))[4] < 1e-15


def test_the_published_test_of_ten_labels_flags_a_quarter_of_all_clean_networks() -> None:
    """The largest value is left out of the fit, so the others look as if they came from a narrower distribution."""
    torch.manual_seed(0)
    rows = torch.distributions.Gamma(5.0, 1.0).sample((1000, 10))
    flagged = torch.stack([gamma_p_values(row).min() < 0.05 for row in rows]).float().mean()
    assert 0.2 < flagged < 0.3
