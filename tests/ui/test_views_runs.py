"""Where a run's page leads."""

from compress.ui.views.runs import links


def test_only_a_finished_run_leads_to_a_comparison():
    working, finished = links("abc", finished=False), links("abc", finished=True)
    assert 'href="?compare=abc"' in finished and "compare" not in working
    for page in (working, finished):
        assert 'href="?again=abc"' in page and 'href="./"' in page
