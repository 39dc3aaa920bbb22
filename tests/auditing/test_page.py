"""The page of an audit, opened in a real browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser
from tiny_models import tiny_model, tiny_policy, tiny_tokenizer

from dspa import VectorPolicy, audit
from dspa.auditing.forward import Decoding
from dspa.auditing.report import PolicyAudit

PROMPTS = ["w10 w20 w30", "w11 w12", "w40 w41 w42 w43"]
EVIL = "</script><script>document.title = 'taken over'</script><b>bold</b> & \"quoted\""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> PolicyAudit:
    """With labels, one of which tries to be part of the page, and links."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    policy = tiny_policy(model)
    for which in ("input", "output"):
        sae = getattr(policy, f"{which}_sae")
        named = replace(sae, metadata=replace(sae.metadata, neuronpedia_id=f"tiny/{which}"))
        policy = replace(policy, **{f"{which}_sae": named})
    labels = tmp_path_factory.mktemp("labels") / "labels.json"
    described = [{"index": 3, "description": EVIL, "class": "content"}, {"index": 7, "description": "the seventh"}]
    labels.write_text(json.dumps(described))
    return audit(policy, model, tokenizer, prompts=PROMPTS, labels=labels, decoding=Decoding(max_new_tokens=8))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    find_browser()
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser: Browser, found: PolicyAudit, tmp_path: Path) -> Any:
    """The page at desktop width; afterwards, nothing went wrong and nothing was fetched."""
    file = tmp_path / "audit.html"
    file.write_text(found.to_html())
    browser.problems.clear()
    browser.requests.clear()
    browser.open(file, 1280, 900)
    yield browser
    assert browser.problems == []
    assert {address.partition(":")[0] for address in browser.requests} <= {"file", "data"}
    assert set(browser.requests) <= {file.as_uri(), "data:,"}


def column(page: Browser, table: str, index: int) -> list[str]:
    cells = f"[...document.querySelectorAll('#{table} tbody:not([hidden])')].map(b => b.rows[0].cells[{index}])"
    return page.run(f"{cells}.map(c => c.dataset.v ?? c.textContent.trim())")


def heads(page: Browser, table: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll('#{table} thead th')].map(h => h.textContent.trim())")


def click(page: Browser, selector: str, index: int = 0) -> None:
    page.run(f'document.querySelectorAll("{selector}")[{index}].click()')


def search(page: Browser, table: str, words: str) -> str:
    """Types words into a table's search; what the page says it shows."""
    field = f"document.querySelector('input[data-table={table}]')"
    page.run(f"{field}.value = {json.dumps(words)}; {field}.dispatchEvent(new Event('input'))")
    return page.run(f"document.getElementById('{table}-count').textContent")


@pytest.mark.long
def test_every_column_of_every_table_sorts(page: Browser, found: PolicyAudit) -> None:
    assert page.run("document.title") == "Audit of a SteeringPolicy"
    assert column(page, "latents", 0) == [str(latent.latent) for latent in found.latents]
    for table in ("latents", "prompts", "rows", "clusters"):
        for index, title in enumerate(heads(page, table)):
            if title in ("promotes", "", "latents that half of them list"):
                continue
            before = column(page, table, index)
            words = title in ("class", "label", "text")
            for falling in (False, True) if words else (True, False):
                click(page, f"#{table} thead th:nth-child({index + 1}) button")
                after = column(page, table, index)
                key: Any = str.lower if words else lambda text: float(text) if text else float("-inf")
                assert after == sorted(after, key=key, reverse=falling), (table, title)
                assert sorted(after) == sorted(before)
    told = page.run("document.querySelector('#rows thead th[aria-sort]').textContent.trim()")
    assert told == "gate open for"


def test_search(page: Browser, found: PolicyAudit) -> None:
    total = len(found.latents)
    assert search(page, "latents", "SEVENTH the") == f"1 of {total} shown"
    assert column(page, "latents", 0) == ["7"]
    assert search(page, "latents", "nothing of that kind") == f"0 of {total} shown"
    assert column(page, "latents", 0) == []
    assert search(page, "latents", "") == f"{total} of {total} shown"
    assert search(page, "prompts", "w41") in {f"{n} of 3 shown" for n in (1, 2)}
    assert "2" in column(page, "prompts", 0)


def test_details_open_and_show_shaded_examples(page: Browser, found: PolicyAudit) -> None:
    shown = "[...document.querySelectorAll('#latents tr.detail')].filter(r => r.offsetHeight > 0).length"
    assert page.run(shown) == 0
    click(page, "#latents button.more")
    assert page.run(shown) == 1
    scroller = "document.querySelector('#latents').parentElement"
    assert page.run(f"{scroller}.scrollWidth - {scroller}.clientWidth") == 0
    first = found.latents[0]
    example = page.run("document.querySelector('#latents .example').textContent")
    assert example.startswith("".join(token.text for token in first.examples[0].tokens))
    focus = page.run("getComputedStyle(document.querySelector('#latents .t.focus')).backgroundColor")
    faint = page.run(
        "getComputedStyle([...document.querySelectorAll('#latents .example .t')]"
        ".find(t => t.style.getPropertyValue('--a').trim() === '0')).backgroundColor"
    )
    assert focus != faint
    click(page, "#latents button.more")
    assert page.run(shown) == 0


def test_texts_are_texts(page: Browser) -> None:
    assert page.run("document.title") == "Audit of a SteeringPolicy"
    (row,) = (index for index, number in enumerate(column(page, "latents", 0)) if number == "3")
    label = heads(page, "latents").index("label")
    assert column(page, "latents", label)[row].startswith("</script><script>")
    assert page.run("document.querySelectorAll('script').length") == 1
    link = page.run(f"document.querySelectorAll('#latents tbody')[{row}].querySelector('a').href")
    assert link == "https://www.neuronpedia.org/tiny/output/3"


@pytest.mark.long
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, found: PolicyAudit, tmp_path: Path) -> None:
    file = tmp_path / "audit.html"
    file.write_text(found.to_html())
    ground = "getComputedStyle(document.body).backgroundColor"
    seen = []
    for dark in (False, True):
        browser.open(file, 390, 844, dark=dark)
        seen.append(browser.run(ground))
        assert browser.run("document.documentElement.scrollWidth") <= 390
        click(browser, "#latents button.more")
        wide = browser.run("document.querySelector('#latents .box').getBoundingClientRect().right")
        assert wide <= 390
        click(browser, "#theme")
        seen.append(browser.run(ground))
    assert seen == ["rgb(255, 255, 255)", "rgb(20, 24, 30)", "rgb(20, 24, 30)", "rgb(255, 255, 255)"]


@pytest.mark.long
def test_pages_of_less(browser: Browser, found: PolicyAudit, tmp_path: Path) -> None:
    """Without a model, without prompts, without latents: no part is missed, none is left empty."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    policy = tiny_policy(model)
    vector = VectorPolicy(policy.output_sae.W_enc[0], layer=2)
    decoding = Decoding(max_new_tokens=4)
    audits = {
        "alone": audit(policy),
        "lens": audit(policy, model, tokenizer),
        "vector": audit(vector, model, tokenizer, prompts=PROMPTS[:1], decoding=decoding),
    }
    titles = {}
    for name, each in audits.items():
        file = tmp_path / f"{name}.html"
        file.write_text(each.to_html())
        browser.problems.clear()
        browser.open(file, 1280, 900)
        assert browser.problems == []
        titles[name] = browser.run("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert titles["alone"] == titles["lens"] == ["Output latents", "The map"]
    assert titles["vector"] == ["How far steering moves the model", "Prompts"]


def test_the_page_names_no_other_place(found: PolicyAudit) -> None:
    """Beside links that a reader may follow."""
    html = found.to_html()
    assert not re.findall(r"(?:src|href)=\"(?!https://www\.neuronpedia\.org/|data:,\")", html)
    assert "@import" not in html
    assert "url(" not in html


def test_markdown(found: PolicyAudit) -> None:
    shown = replace(found, latents=(found.latent(3), *found.latents))
    markdown = shown.to_markdown()
    assert "| [3](https://www.neuronpedia.org/tiny/output/3) | &lt;/script&gt;&lt;script&gt;document.title" in markdown
    assert "<script>" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(tables) > 40
    assert all(line.endswith("|") for line in tables)
