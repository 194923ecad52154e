"""The paper's benchmarks in the report."""

from dataclasses import replace

from keepsight.report import build
from tests.report.sample import sample_run

FACTS = {
    "configuration": "CLIP* + Vicuna-7B",
    "lines": [
        {"benchmark": "GQA", "here": 61.53, "low": 60.7, "high": 62.4, "paper": 62.0, "note": ""},
        {"benchmark": "MMVP", "here": None, "low": None, "high": None, "paper": 20.0, "note": "original <labels>"},
        {"benchmark": "OCRBench", "here": 312.0, "low": None, "high": None, "paper": 318, "note": ""},
    ],
    "about": ["where the figures come from"],
}


def test_benchmarks_stand_beside_the_paper_s_figures(tmp_path):
    runs = [replace(run, info={**run.info, "paper": facts}) for run, facts in zip(
        (sample_run(0), sample_run(1)), (FACTS, None), strict=True)]  # fmt: skip
    page = build(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="benchmarks">') :].partition("</section>")[0]
    assert "the paper's figures: CLIP* + Vicuna-7B" in section
    assert (
        '<td>GQA</td><td class="num">61.5 <span class="interval">[60.7, 62.4]</span></td><td class="num">62</td>'
        in section
    )
    assert "original &lt;labels&gt;" in section
    assert '<td class="num">312.0 <span class="interval"></span></td><td class="num">318</td>' in section
    assert section.count("<table>") == 1
    assert "where the figures come from" in section


def test_no_benchmarks_no_section(tmp_path):
    page = build([sample_run(0)], tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="benchmarks"' not in page
