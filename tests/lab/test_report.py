"""The report is drawn from a comparison's files alone, whatever state they are in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from lab_files import arm, comparison, failed
from our_scripts import without_our_scripts

from spannorm.errors import InputError
from spannorm.lab.report.page import draw_report
from spannorm.lab.results.files import read_results

ROOT = Path(__file__).parents[2]

FIGURES = {"loss", "gradient_norm", "gradient_by_layer", "signal_by_layer", "similarity"}

THREE = [arm("pre", "1/sqrt(2L)"), arm("span", "1/sqrt(L):forward", val_loss=1.8), failed("post", "none", "non-finite")]


class Page(HTMLParser):
    """The parts of a page that a test asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.whole = path.read_text(encoding="utf-8")
        self.source = without_our_scripts(self.whole)
        self.feed(self.source)
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def draw(folder: Path, arms: list[dict[str, Any]], **given: Any) -> Page:
    return Page(draw_report(comparison(folder, arms, **given)))


def rows(page: Page) -> list[str]:
    """The rows of the first table, as text."""
    table = page.source[page.source.index("<tbody>") : page.source.index("</tbody>")]
    plain = re.sub(r"<[^>]*>", " ", table.replace("</tr>", "\n---\n"))
    return [" ".join(unescape(row).split()) for row in plain.split("---") if row.strip()]


def test_the_page_needs_nothing_beside_it(tmp_path):
    page = draw(tmp_path, THREE)
    assert page.links and all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "http" not in page.source
    assert "url(" not in re.sub(r"url\(#", "", page.source) and "@import" not in page.source
    assert not {"script", "link", "iframe", "img"} & set(page.tags)


def test_every_reference_in_the_page_meets_one_target(tmp_path):
    page = draw(tmp_path, THREE)
    assert len(page.ids) == len(set(page.ids))
    used = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert used <= set(page.ids)


def test_figures_lie_beside_the_page_and_nothing_half_written_stays(tmp_path):
    draw(tmp_path, THREE)
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        f"{n}.{k}" for n in FIGURES for k in ("png", "svg", "csv")
    }
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "jobs", "report.html", "figures"}


def test_arms_stand_by_loss_and_failures_last_with_their_reasons_spelled_out(tmp_path):
    page = draw(tmp_path, [failed("post", "1/sqrt(L)", "unigram"), failed("keel", "none", "spike"), *THREE])
    lines = rows(page)
    assert [line.split()[0] for line in lines[:2]] == ["span", "pre"]
    assert all(line.startswith(("post", "keel", "failed")) for line in lines[2:])
    for reason in (
        "the loss became non-finite, at step 30",
        "0.2 nats per token below a unigram model",
        "after the last spike, the mean",
    ):
        assert sum(reason in line for line in lines) == 1
    for label in ("post none ✕ non-finite", "post 1/sqrt(L) ✕ unigram", "keel none ✕ spike"):
        assert label in page.words  # beside the lines, too
    for criterion in ("0.2 nats per token below", "mean of the last 32 losses", "became non-finite"):
        assert criterion in page.words


@pytest.mark.parametrize(
    ("first", "fresh", "losses"),
    [("choice", "confirmation", {1e-3: 1.7, 2e-3: 1.8}), ("rate", "rung", {1e-3: 1.7, 2e-3: 1.8}),
     ("check", "rung", {1e-3: 1.8, 2e-3: 1.7})],
)  # fmt: skip
def test_an_arm_stands_at_the_rate_that_it_was_measured_at(first, fresh, losses, tmp_path):
    # fresh seeds came out worse, so that another rate's one seed is lower; a carried rate need not be the best
    runs = [arm("pre", stage=first, learning_rate=rate, val_loss=loss) for rate, loss in losses.items()]
    runs += [arm("pre", stage=fresh, learning_rate=1e-3, seed=seed, val_loss=1.9) for seed in (1, 2, 3)]
    page = draw(tmp_path, runs)
    (line,) = rows(page)[:1]
    assert "0.001" in line and "1, 2, 3" in line and "1.9000" in line
    assert "2 learning rates on one seed" in page.words and "measured on 3 fresh seeds" in page.words


def test_nothing_unknown_is_shown_as_a_number(tmp_path):
    waiting = arm("peri", status="waiting", steps_done=0, **dict.fromkeys(("val_loss", "max_grad_norm", "seed")))
    page = draw(tmp_path, [*THREE, waiting])
    assert not re.search(r"\b(nan|inf|none%|undefined)\b", page.source, re.IGNORECASE)
    assert "None" not in page.words


def test_it_says_how_little_stands_behind_it(tmp_path):
    page = draw(tmp_path / "one", THREE)
    assert "Each arm has 1 seed and 1 learning rate: a look, not a claim" in page.words
    assert "Of 3 jobs, 2 finished, 1 failed." in page.words
    five = [arm(p, seed=seed) for p in ("pre", "span") for seed in range(5)]
    assert "5 seeds and 1 learning rate: as many seeds as a claim takes." in draw(tmp_path / "five", five).words
    uneven = draw(tmp_path / "uneven", five[:8]).words
    assert "3 to 5 seeds" in uneven and "not a matched comparison" in uneven


def test_seeds_join_in_one_row_at_the_best_rate_at_which_none_failed(tmp_path):
    arms = [arm("span", seed=s, learning_rate=3e-3, val_loss=1.80 + 0.03 * s) for s in range(3)]
    arms += [arm("span", seed=s, learning_rate=6e-3, val_loss=1.70) for s in range(2)]
    arms += [failed("span", "none", "spike", seed=2, learning_rate=6e-3)]
    arms += [arm("span", seed=s, learning_rate=1e-3, val_loss=2.0) for s in range(3)]
    page = draw(tmp_path, arms)
    first, note = rows(page)
    assert "1.8300 1.8000–1.8600" in first and "0.003 0, 1, 2" in first
    assert note == "also failed at learning rate 0.006"
    assert (tmp_path / "figures" / "learning_rate.svg").is_file()
    assert "Every learning rate (3 rows)" in page.words
    assert "failed (seed 2): after the last spike" in page.words
    assert "edge of the grid" not in page.words  # the failure at 6e-3 brackets it


def test_a_best_rate_on_the_edge_of_the_grid_is_named(tmp_path):
    arms = [arm("span", learning_rate=rate, val_loss=1.9 - 10 * rate) for rate in (1e-3, 3e-3, 6e-3)]
    assert "edge of the grid, which should be extended, for span none" in draw(tmp_path, arms).words


def test_what_else_an_arm_overrides_keeps_it_apart(tmp_path):
    deep = arm("span", job="deep", overrides={"model.num_hidden_layers": 96, "train.steps": 60}, depth=96)
    flat = arm("span", job="flat", overrides={"model.num_hidden_layers": 32, "train.steps": 60}, depth=32)
    page = draw(tmp_path, [deep, flat])
    assert "none num_hidden_layers=96" in page.words and "none num_hidden_layers=32" in page.words
    assert "steps=60" not in page.words  # alike in both
    assert "32 and 96 blocks" in page.words


def test_running_jobs_are_drawn_as_far_as_they_are(tmp_path):
    running = arm("span", status="running", steps_done=20, val_loss=None)
    waiting = arm("peri", status="waiting", steps_done=0, val_loss=None)
    comparison(tmp_path, [*THREE, running, waiting])
    shutil.rmtree(tmp_path / "jobs" / waiting["job"])
    records = tmp_path / "jobs" / running["job"] / "records.jsonl"
    with open(records, "a") as file:
        file.write('{"step": 21, "lo')  # caught in the middle of writing
    page = Page(draw_report(tmp_path))
    assert "running, 33% done" in page.words and "span none (running)" in page.words
    assert "could not be read" not in page.words
    with open(records, "a") as file:
        file.write('\n{"step": 21, "loss": 2.0, "grad_norm": 1.0}\n')  # a crash left half a line behind
    assert "records.jsonl: 1" in Page(draw_report(tmp_path)).words


def test_without_probes_the_other_figures_stand(tmp_path):
    comparison(tmp_path, THREE)
    for path in tmp_path.glob("jobs/*/probes.jsonl"):
        path.unlink()
    page = Page(draw_report(tmp_path))
    assert "no probes yet" in page.words
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {"loss", "gradient_norm"}


def test_before_the_first_step_there_is_a_table_only(tmp_path):
    waiting = arm("span", status="waiting", steps_done=0, val_loss=None)
    page = draw(tmp_path, [waiting])
    assert len(rows(page)) == 2 and "figcaption" not in page.tags


def test_a_comparison_in_which_everything_failed_is_drawn(tmp_path):
    page = draw(tmp_path, [failed("post", "none", "non-finite"), failed("span", "none", "unigram")])
    assert page.tags.count("figure") == len(FIGURES)


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e999", "1e300"])
def test_numbers_that_are_none_leave_the_rest_alone(tmp_path, written):
    comparison(tmp_path, THREE)
    for name in ("results.json", *(p.relative_to(tmp_path) for p in tmp_path.glob("jobs/post*/*.jsonl"))):
        path = tmp_path / name
        path.write_text(path.read_text().replace("null", written))
    page = Page(draw_report(tmp_path))
    assert "post none ✕ non-finite" in page.words and "nan" not in page.words.lower().split()


def test_moved_files_give_the_same_page(tmp_path):
    before = draw(tmp_path / "here", THREE).whole
    shutil.move(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there" / "report.html").unlink()
    shutil.rmtree(tmp_path / "there" / "figures")
    assert draw_report(tmp_path / "there").read_text() == before


def test_hostile_words_stay_words(tmp_path):
    evil = '<script>alert(1)</script>"><img src=x onerror=y> $\\frac{ {{ 7*7 }} 漢'
    row = arm("pre", job="x", status="failed", reason=evil, overrides={"model.note": evil, "train.steps": 1})
    page = draw(tmp_path, [row, arm("span", evil, job="y"), arm(evil, job="z")], name=evil)
    assert not {"script", "img"} & set(page.tags)
    assert evil in page.text and "49" not in page.words.split()


def test_mixtures_of_experts_have_their_routers_drawn_and_dense_arms_none(tmp_path):
    names = ("router_aux_loss", "router_z_loss", "router_entropy", "router_logit_rms", "max_violation", "dead_experts")
    added = {"records": dict.fromkeys(names, 1.0), "probes": {"routing": {"load": [[0.5, 0.5]] * 3}}}
    comparison(tmp_path, [*THREE, arm("span", "none", val_loss=1.85, active_parameters=900_000)])
    for job in (tmp_path / "jobs").iterdir():
        if job.name.startswith(("span-none", "post")):
            for file, more in added.items():
                path = job / f"{file}.jsonl"
                lines = [{**json.loads(line), **more} for line in path.read_text().splitlines()]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(draw_report(tmp_path))
    figures = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert figures == FIGURES | {"router_health", "expert_load"}
    for figure in ("router_health", "expert_load"):
        svg = (tmp_path / "figures" / f"{figure}.svg").read_text()
        assert "post" in svg and "1/sqrt(L):forward" not in svg, "PreNorm and one SpanNorm are dense"
    assert "900 k active" in page.words


def test_the_report_verb_needs_neither_torch_nor_transformers_nor_a_display(tmp_path):
    comparison(tmp_path, THREE)
    code = (
        "import sys; from spannorm.cli import main\n"
        f"sys.argv = ['spannorm', 'report', {str(tmp_path)!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "found = {'torch', 'transformers', 'accelerate', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "report.html").is_file()


def old_format(folder: Path) -> None:
    """Turn a comparison's `results.json` into format 1."""
    results = json.loads((folder / "results.json").read_text())
    assert results.pop("format") == 2
    results["arms"] = results.pop("jobs")
    for job in results["arms"]:
        job["cell"] = job.pop("condition")
    (folder / "results.json").write_text(json.dumps(results))


def test_a_folder_of_the_older_format_gives_the_same_report(tmp_path):
    depths = [{"model.num_hidden_layers": depth} for depth in (4, 8)]
    comparison(tmp_path, [arm(p, condition=at, job=f"{p}{i}") for p in ("span", "pre") for i, at in enumerate(depths)])
    page = draw_report(tmp_path).read_text()
    assert "8 blocks" in page
    old_format(tmp_path)
    assert draw_report(tmp_path).read_text() == page


def test_every_results_file_of_the_docs_is_read_and_so_is_no_newer_format(tmp_path):
    files = [path for path in (ROOT / "docs" / "results").glob("*.json") if '"arms"' in path.read_text()]
    assert len(files) > 5
    for path in files:
        results = read_results(path)
        assert results["jobs"] and all(isinstance(job["condition"], dict) for job in results["jobs"])
    (tmp_path / "results.json").write_text(json.dumps({"format": 3, "jobs": []}))
    with pytest.raises(InputError, match="has format 3, and this version of spannorm reads up to 2"):
        draw_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is none at"),
        ("{", "must be JSON"),
        ("[]", "non-empty list `arms`"),
        ('{"arms": []}', "non-empty list `arms`"),
        ('{"arms": [3]}', "non-empty list `arms`"),
        ('{"arms": [{"job": "a", "placement": "pre", "depth_rule": null}]}', "`arms[0].depth_rule`"),
        ('{"arms": [{"job": "../x", "placement": "a", "depth_rule": "b", "status": "ok"}]}', "a folder's name"),
    ],
)
def test_a_bad_results_file_is_named_with_what_to_do(tmp_path, text, says):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json") as caught:
        draw_report(tmp_path)
    assert says in str(caught.value) and "spannorm compare" in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_five_hundred_jobs(tmp_path):
    rates = [1e-3 * 2**i for i in range(5)]
    arms = [
        arm(f"p{i % 10}", f"rule{i // 10}", seed=seed, learning_rate=rate, val_loss=1.8 + i / 100 + rate)
        for i in range(20)
        for rate in rates
        for seed in range(5)
    ]
    page = draw(tmp_path, arms)
    assert "Of 500 jobs, 500 finished." in page.words and len(rows(page)) == 20
    assert "Every learning rate (100 rows)" in page.words


def test_more_arms_than_can_be_told_apart_stay_in_the_table(tmp_path):
    page = draw(tmp_path, [arm("span", f"rule{i:02d}", val_loss=1.8 + i / 100) for i in range(50)])
    assert len(rows(page)) == 50 and "2 more are in the table only" in page.words


def test_two_tables_each_have_their_arms_and_figures_and_may_share_a_run(tmp_path):
    both = ["common body", "own recipe"]
    arms = [arm("span", tables=both), arm("pre", tables=["common body"], val_loss=1.8), arm("keel", tables=both[1:])]
    page = draw(tmp_path, arms)
    common, own = page.words.split("Common body")[1].split("Own recipe")
    assert "span none" in common and "pre none" in common and "keel none" not in common
    assert "span none" in own and "keel none" in own and "pre none" not in own
    assert {p.stem for p in (tmp_path / "figures").glob("*.svg")} == {
        f"{table}_{figure}" for table in ("common_body", "own_recipe") for figure in FIGURES
    }
    assert len(page.ids) == len(set(page.ids)), "what one figure calls its own is not another's"


def evaluation(value: float, questions: int = 200, sha256: str = "same") -> dict[str, Any]:
    acc = {"value": value, "stderr": 0.03, "higher_is_better": True}
    bits = {"value": 1.25, "stderr": None, "higher_is_better": False}
    return {
        "bracket_matching": {"metrics": {"acc": acc}, "questions": questions, "chance": 1 / 3, "cut": 0,
                             "version": 1.0, "questions_sha256": sha256},
        "wikitext": {"metrics": {"word_perplexity": bits, "bits_per_byte": bits}, "questions": 62, "chance": None,
                     "cut": 0, "version": 2.0},
    }  # fmt: skip


def answered(page: Page) -> dict[str, str]:
    table = page.source.split("Questions answered after training</h2>")[1].split("<tbody>")[1].split("</tbody>")[0]
    lines = [" ".join(unescape(re.sub(r"<[^>]*>", " ", row)).split()) for row in table.split("</tr>") if row.strip()]
    return {line.split()[0]: line for line in lines}


def test_answers_stand_by_arm_with_intervals_over_seeds_or_over_questions(tmp_path):
    arms = [arm("span", seed=s, evaluation=evaluation(v)) for s, v in enumerate((0.5, 0.6, 0.7))]
    arms += [arm("pre", evaluation=evaluation(0.38)), failed("post", "none", "non-finite"), arm("keel")]
    page = draw(tmp_path, arms)
    rows = answered(page)
    assert set(rows) == {"guessing", "pre", "span"}
    assert rows["guessing"] == "guessing 0.333 –"
    # Student's 97.5 % quantile with 2 degrees of freedom is 4.3027; the spread of 0.5, 0.6, 0.7 is 0.1
    assert rows["span"] == f"span none 0.600 ± {4.3027 * 0.1 / 3**0.5:.3f} 3 seeds 1.250 ± 0.000 3 seeds"
    assert rows["pre"] == "pre none 0.380 ± 0.059 200 questions, as by chance 1.250 62 questions"
    assert "bracket_matching, acc" in page.words and "word_perplexity" not in page.words
    assert "Not all arms answered the same questions" not in page.words


def test_other_questions_are_pointed_out_and_without_answers_there_is_no_table(tmp_path):
    arms = [arm("span", evaluation=evaluation(0.5)), arm("pre", evaluation=evaluation(0.5, sha256="another"))]
    assert "Not all arms answered the same questions" in draw(tmp_path / "other", arms).words
    assert "Questions answered" not in draw(tmp_path / "none", THREE).words
