"""The report: what is in its chunks, and how a real browser shows them."""

import base64
import gzip
import json
import re
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, LlamaConfig

import mxdsurgery
from mxdsurgery.catalogue.files import CATALOGUE_FILE, CONTEXTS_FILE, SCHEMA, layer_path, open_catalogue
from mxdsurgery.catalogue.report import _preferred_class, report
from mxdsurgery.errors import CatalogueError, NotConvertedError, OutputError
from mxdsurgery.text.sources import token_strings

CHROMIUM, CHROMEDRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
HOSTILE = ["</script><script>window.owned = 1</script>", '<img src=x onerror="window.owned = 1">', "‮{{chunks}}-->"]
CLASSES = ["code <b>bold</b>", "prose", "rare"]
BINS = [0.0, *(0.01 * 2**power for power in range(14))]
BEFORE, AFTER, CONTEXT, SCALE = 8, 4, 32, 2.0
DEAD, TYPICAL = 5, 6  # an expert that never fires; one that fires on one token only


def write_catalogue(folder, tokenizer, layers, contexts=60, labelled=True, seed=0):
    """What `experts` writes, of random places in a text: each expert fires on some tokens of the vocabulary."""
    generator = np.random.default_rng(seed)
    text = "".join(f"def name_{i}(self, value):\n\treturn [value + {i}] # {HOSTILE[i % 3]}\n" for i in range(400))
    ids = np.array(tokenizer.encode(text)[: contexts * CONTEXT]).reshape(contexts, CONTEXT)
    counted = contexts * (CONTEXT - 1)
    folder.mkdir()
    values = {
        "format_version": 1, "model": "demo", "fingerprint": "0123456789abcdef", "tokens": counted, "bins": BINS,
        "data": "texts/held <out>.txt", "contexts": contexts, "context": CONTEXT, "before": BEFORE, "after": AFTER,
        "classes": CLASSES if labelled else [], "layers": {str(layer): n_experts for layer, n_experts in layers.items()},
        "class_tokens": [counted // 2, counted // 2 - 60, 60] if labelled else [],
    }  # fmt: skip
    (folder / CATALOGUE_FILE).write_text(json.dumps(values))
    pq.write_table(pa.table({"input_ids": pa.array(ids.tolist(), pa.list_(pa.int32()))}), folder / CONTEXTS_FILE)
    vocabulary = np.unique(ids)
    for layer, n_experts in layers.items():
        rows = [_row(expert, n_experts, ids, vocabulary, generator) for expert in range(n_experts)]
        rows = rows if labelled else [row | {"class_fired": []} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), layer_path(folder, layer))


def _row(expert, n_experts, ids, vocabulary, generator):
    a = np.where(np.isin(ids, generator.choice(vocabulary, 1 + expert % 6)), generator.gamma(2, SCALE / 2, ids.shape), 0)
    a[:, 0] = 0
    if expert == DEAD:
        a[:] = 0
    if expert == TYPICAL:
        a = np.where(ids == vocabulary[-1], 1.0 + np.arange(ids.size).reshape(ids.shape) / ids.size, 0)
    places = sorted(((a[at], *map(int, at)) for at in zip(*a.nonzero(), strict=True)), reverse=True)
    best = {place[1]: place for place in reversed(places)}  # one a context
    drawn = [places[at] for at in sorted(generator.permutation(len(places))[:8])]
    padded = np.pad(a, ((0, 0), (BEFORE, AFTER)))

    def written(chosen):
        names = ("coefficient", "context", "position", "window")
        return [dict(zip(names, (v, c, p, padded[c, p : p + BEFORE + 1 + AFTER].tolist()), strict=True)) for v, c, p in chosen]

    values = [value for value, _, _ in places]
    minority = len(values) // 4
    some = generator.choice(vocabulary, 6, replace=False).tolist()
    return {
        "expert": expert, "fired": len(values), "frequency": len(values) / (len(ids) * (CONTEXT - 1)),
        "mean": float(np.mean(values)) if values else 0.0, "maximum": max(values, default=0.0),
        "histogram": np.histogram(values, [*BINS, np.inf])[0].tolist(),
        "top": written(sorted(best.values(), reverse=True)[:6]), "sample": written(drawn),
        "scales_up": [{"dimension": d, "value": 0.5 - d / 10} for d in range(4)],
        "scales_down": [{"dimension": d, "value": d / 10 - 2} for d in range(4)],
        "promotes": [{"token": token, "value": 2.0 - at} for at, token in enumerate(some[:3])],
        "demotes": [{"token": token, "value": at - 2.0} for at, token in enumerate(some[3:])],
        "class_fired": [[len(values) - minority, minority, 0], [minority, len(values) - minority, 0]][expert % 2],
        "similar": [{"expert": (expert + step) % n_experts, "cosine": 0.9 - step / 10} for step in (1, 2, 3)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(converted, tmp_path_factory):
    """A converted folder without weights, which the report does not read, whose tokenizer and edits are hostile."""
    folder = tmp_path_factory.mktemp("report") / "demo <i>model"
    shutil.copytree(converted.out, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = mxdsurgery.load(converted.out).tokenizer()
    tokenizer.add_tokens(HOSTILE)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    step = {"edits": ["layer 1: ablate 3 <b>"], "tokens": 100, "ce_before": 3.0, "ce_after": 3.1, "kl": 0.01}
    step["samples"] = [{"prompt": "def", "before": " f(", "after": HOSTILE[0]}]
    config["mxd"]["edits"] = [step, {"edits": ["layer 2: drop 4"]}]
    path.write_text(json.dumps(config))
    write_catalogue(folder / "experts", tokenizer, {1: 256, 2: 256})
    return folder


@pytest.fixture(scope="module")
def page(model):
    return Path(report(model)["page"])


def chunks_of(page):
    """All chunks in a page, unpacked, by name."""
    found = re.findall(r'<script type="application/octet-stream" data-chunk="([^"]+)">([^<]*)</script>', page.read_text())
    return {name: unpacked(packed) for name, packed in found}


def unpacked(packed):
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_the_page_is_one_file_that_loads_nothing(model, page):
    text = page.read_text(encoding="utf-8")
    assert page == model / "report.html" and not (model / "report-data").exists()
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert re.findall(r"<(?:link|script|img|iframe)[^>]*(?:href|src)=[^>]*>", text) == ['<link rel="icon" href="data:,">']
    assert "<title>demo &lt;i&gt;model: experts</title>" in text and "{{" not in text
    assert not any(name in text for name in ("onerror=", "owned", "</b>"))


def test_the_chunks_hold_what_the_catalogue_holds(model, page):
    chunks, catalogue = chunks_of(page), open_catalogue(model)
    header, index = chunks["model"], chunks["1-index"]
    assert header["layers"] == [[1, 256], [2, 256]] and header["tokens"] == catalogue.tokens and header["beside"] is None
    strings = dict(zip(chunks["vocabulary"]["ids"], chunks["vocabulary"]["strings"], strict=True))
    for expert in (0, 127, 128, 255):
        row, detail = catalogue.row(1, expert), chunks[f"1-{expert // 128}"][expert % 128]
        assert index["fired"][expert] == row["fired"] and detail["histogram"] == row["histogram"]
        assert index["maximum"][expert] == pytest.approx(row["maximum"], rel=1e-3)
        assert len(detail["top"]) == len(row["top"]) > 0 and len(detail["sample"]) == len(row["sample"]) > 0
        for (context, position, coefficient, window), place in zip(detail["top"], row["top"], strict=True):
            assert (context, position) == (place["context"], place["position"])
            assert coefficient == pytest.approx(place["coefficient"], rel=1e-3)
            assert window == pytest.approx(place["window"], rel=1e-3)
            ids = catalogue.input_ids[context].as_py()
            assert chunks["text-0"][context] == ids and strings.keys() >= set(ids)
    assert index["token"][DEAD] is None and index["fired"][DEAD] == 0
    assert index["token"][TYPICAL] == max(id_ for ids in catalogue.input_ids.to_pylist() for id_ in ids)
    assert header["figures"]["rows"][-1][0] == "all" and header["edits"][0]["cost"].startswith("cross-entropy 3.0000 before")
    assert header["figures"]["rests_on"].endswith("nats per token; before the last edit")


def test_a_preferred_class_is_not_won_by_one_firing():
    assert _preferred_class([0, 0], [10, 10]) == (-1, 0.0)
    assert _preferred_class([60, 39, 1], [500, 498, 2]) == (0, pytest.approx(1.2))
    assert _preferred_class([1, 0, 9], [500, 498, 2]) == (2, pytest.approx(450.0))


def test_tokens_keep_their_spaces_and_bytes(converted):
    tokenizer = mxdsurgery.load(converted.out).tokenizer()
    ids = tokenizer.encode("a def\n\té€")
    strings = token_strings(tokenizer, ids)
    assert " def" in strings and strings == token_strings(tokenizer, ids)
    back = "".join(strings).encode("latin-1", "backslashreplace").decode("unicode_escape").encode("latin-1").decode()
    assert back == "a def\n\té€"
    assert token_strings(tokenizer, [10**6]) == ["<1000000>"]


def test_a_page_is_named_as_one(model, tmp_path):
    for name in ("page.pdf", "page", "page.html.txt"):
        with pytest.raises(OutputError, match="ends in .html"):
            report(model, out=tmp_path / "inner" / name)
    assert list(tmp_path.iterdir()) == []


def test_much_data_goes_into_files_beside_the_page_and_back(model, tmp_path):
    page, beside = tmp_path / "all of it#.html", tmp_path / "all of it#-data"
    inside = report(model, out=page)
    everything = chunks_of(page)
    found = report(model, out=page, limit_mib=0)
    assert found["data"] == str(beside) and inside["data"] is None
    assert found["bytes"] == page.stat().st_size + sum(file.stat().st_size for file in beside.iterdir())
    (header,) = chunks_of(page).values()
    assert header.pop("beside") == beside.name and everything.pop("model") == header | {"beside": None}
    calls = [re.fullmatch(r'mxdChunk\("([^"]+)","([^"]+)"\);\n', file.read_text()) for file in beside.iterdir()]
    assert {call[1]: unpacked(call[2]) for call in calls} == everything
    report(model, out=page)
    assert sorted(tmp_path.iterdir()) == [page] and chunks_of(page).keys() == {"model", *everything}


def test_mistakes_are_named_and_nothing_is_left(model, converted, tmp_path, monkeypatch):
    with pytest.raises(CatalogueError, match=f"mxdsurgery experts {re.escape(str(converted.out))} --data TEXT first"):
        report(converted.out, out=tmp_path / "page.html")
    for name in ("notes.html", "page-data"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(OutputError, match="is no report"):
            report(model, out=tmp_path / (name if name.endswith("html") else "page.html"))
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    report(model, out=tmp_path / "page.html")
    before = (tmp_path / "page.html").read_bytes()
    monkeypatch.setattr(
        "mxdsurgery.catalogue.report._element",
        Mock(side_effect=OSError(28, "No space left on device")),
    )
    with pytest.raises(OutputError, match="No space left"):
        report(model, out=tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and (tmp_path / "page.html").read_bytes() == before


def test_a_catalogue_of_another_model_and_missing_figures_are_named(model, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("report*"))
    (folder / "evaluation.json").unlink()
    with pytest.raises(NotConvertedError, match="mxdsurgery evaluate"):
        report(folder)
    shutil.copy(model / "evaluation.json", folder)
    path = folder / "experts" / CATALOGUE_FILE
    path.write_text(path.read_text().replace('"1": 256', '"1": 255'))
    with pytest.raises(CatalogueError, match="layer 1 has 255 experts there(.|\n)*256, as config.json says"):
        report(folder)
    assert not (folder / "report.html").exists()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium that reads from the disk only."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("no chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in f"{flags} disable-component-update disable-sync window-size=1280,940".split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield made
    made.quit()


class Page:
    """A page in the browser: what it shows, and what a user does with it."""

    def __init__(self, browser, path, where=""):
        self.browser = browser
        browser.get("about:blank")  # otherwise a change of the hash alone would not load the page anew
        browser.get(path.as_uri() + where)
        self.until("return document.querySelector('#detail h2, [role=alert]')")

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, script, *arguments):
        """What a script returns, once that is something."""
        deadline = time.monotonic() + 10
        while not (found := self.js(script, *arguments)):
            assert time.monotonic() < deadline, f"never: {script}; the page says {self.text('#detail')}"
            time.sleep(0.02)
        return found

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0])?.textContent", selector)

    def texts(self, selector):
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def press(self, *keys):
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)

    def listed(self):
        """Numbers of the experts in the list, as far as they are in sight."""
        return [int(text) for text in self.texts("#rows [role=row] > :first-child")]

    def active(self):
        return int(self.text("#rows .active > :first-child"))

    def search(self, text, scope="all"):
        script = "const [text, scope] = arguments, box = document.getElementById('search'); box.value = text;"
        self.js(script + "document.getElementById('scope').value = scope; box.dispatchEvent(new Event('input'))", text, scope)
        self.until("return state.scores !== null && !/reading/.test(document.getElementById('status').textContent)")
        time.sleep(0.2)
        return self.listed()


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser")]


def requested(browser):
    """Addresses that the browser asked for since the last time."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    sent = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
    return [url for url in sent if not url.startswith(("data:", "about:", "chrome"))]


def test_it_opens_from_the_disk_without_a_network(browser, page):
    requested(browser), complaints(browser)
    shown = Page(browser, page)
    assert shown.text("#detail h2") == "Layer 1" and shown.text("h1") == "demo <i>model"
    assert "1,860 tokens of texts/held <out>.txt" in shown.text("#about")
    assert shown.texts("#detail tr.here th, #detail tr.here td")[0] == "1" and "layer 1: ablate 3 <b>" in shown.text("#detail")
    assert len(shown.listed()) < 60 and "256 of 256" in shown.text("#status")
    shown.press("?")
    assert shown.js("return document.getElementById('keys').open")
    shown.js("document.querySelector('#keys button').click()")
    assert not shown.js("return document.getElementById('keys').open")
    assert complaints(browser) == [] and requested(browser) == [page.as_uri()]
    assert shown.js("return performance.getEntriesByType('resource').length") == 0


def test_the_list_is_sorted_and_filtered(browser, page):
    shown = Page(browser, page, "#layer=2")
    index = chunks_of(page)["2-index"]
    often = sorted(range(256), key=lambda expert: -index["fired"][expert])
    assert shown.listed()[:20] == often[:20]
    shown.js("[...document.querySelectorAll('#head button')].find((b) => b.textContent === 'max').click()")
    assert shown.listed()[:20] == sorted(range(256), key=lambda expert: -index["maximum"][expert])[:20]
    assert shown.texts("#head [aria-sort=descending]") == ["max ▾"]
    shown.js("document.querySelector('#show [value=dead]').click()")
    assert shown.listed() == [expert for expert in range(256) if not index["fired"][expert]] and DEAD in shown.listed()
    shown.js("document.querySelector('#show [value=all]').click(); document.getElementById('list').scrollTop = 1e6")
    shown.until(f"return document.getElementById('row-{DEAD}')")  # the last row, now that it is in sight


def test_search_finds_experts_by_what_they_fire_on_promote_and_are(browser, page):
    shown, chunks = Page(browser, page, "#layer=1"), chunks_of(page)
    strings = dict(zip(chunks["vocabulary"]["ids"], chunks["vocabulary"]["strings"], strict=True))
    assert shown.search("137")[0] == 137 and "best matches first" in shown.text("#status")
    peaks = shown.search(HOSTILE[0].upper(), "fires")
    text = chunks["text-0"]
    details = chunks["1-0"] + chunks["1-1"]
    fires = [[strings[text[context][at]] for context, at, *_ in row["top"] + row["sample"]] for row in details]
    assert sorted(peaks) == [expert for expert, tokens in enumerate(fires) if HOSTILE[0] in tokens] != []
    counts = [fires[expert].count(HOSTILE[0]) for expert in peaks]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    promoted = strings[chunks["1-1"][3]["promotes"][0][0]]
    assert 131 in shown.search(promoted, "promotes")
    counted = sum(0 <= class_ < 2 and CLASSES[class_] == CLASSES[0] for class_ in chunks["1-index"]["class"])
    shown.search("bold", "class")
    assert shown.text("#status").startswith(f"{counted} of 256")
    before = shown.listed()
    shown.press("/", "\ue00c")  # Esc
    shown.until("return state.scores === null")
    assert shown.text("#status") == "256 of 256 experts" and shown.listed() != before


def test_the_keyboard_walks_the_list_and_the_layers(browser, page):
    shown = Page(browser, page, "#layer=1")
    order = shown.listed()
    shown.press("j", "j", "k", "\ue015")  # the last is the arrow down
    assert shown.active() == order[2]
    shown.press("\ue007")  # Enter
    shown.until("return document.querySelector('#detail h2').textContent === arguments[0]", f"Expert {order[2]}")
    assert shown.js("return location.hash") == f"#layer=1&expert={order[2]}"
    assert shown.js("return document.activeElement.getAttribute('aria-activedescendant')") == f"row-{order[2]}"
    assert shown.js("return document.querySelector('#rows [aria-selected=true]').id") == f"row-{order[2]}"
    for key, layer in (("]", 2), ("]", 2), ("[", 1), ("\ue014", 2), ("\ue012", 1)):
        shown.press(key)
        shown.until("return document.querySelector('#detail h2').textContent === arguments[0]", f"Layer {layer}")
        assert shown.texts("nav [aria-current=page]") == [str(layer)]
    shown.press("/")
    assert shown.js("return document.activeElement.id") == "search"
    shown.press("2", "0", "0", "\ue007")
    shown.until("return document.querySelector('#detail h2').textContent === 'Expert 200'")


def visible(text):
    return text.replace("\n", "↵").replace("\t", "⇥").replace("‮", "\\u{202e}")


def test_an_expert_shows_its_contexts_as_the_catalogue_has_them(browser, page, model):
    expert, catalogue = 17, open_catalogue(model)
    row = catalogue.row(2, expert)
    assert any(place["position"] < BEFORE for place in row["top"] + row["sample"])
    shown = Page(browser, page, f"#layer=2&expert={expert}")
    strings = dict(zip(*chunks_of(page)["vocabulary"].values(), strict=True))
    script = "return [...document.querySelectorAll('.contexts li .token')].map((line) => [line.textContent,"
    lines = shown.js(script + "line.querySelector('.own').textContent, line.querySelectorAll('[title]').length])")
    places = row["top"] + row["sample"]
    assert len(lines) == len(places) > 10
    for (text, own, marked), place in zip(lines, places, strict=True):
        ids, values, at = catalogue.window(place)
        wanted = "".join(visible(strings[token]) for token in ids)
        assert wanted.endswith(text) and len(wanted) - len(text) < 12  # spaces at its beginning are left out
        assert marked == sum(value > 0 for value in values)
        assert own == visible(strings[ids[at]])
    style = "const style = getComputedStyle(document.querySelector('.own')); return "
    assert shown.js(style + "[style.fontWeight, style.textDecorationLine]") == ["700", "underline"]
    colours = shown.js("return [...document.querySelectorAll('.own')].map((e) => getComputedStyle(e).backgroundColor)")
    assert colours[0] != colours[-1]
    assert f"({row['fired']} of 1,860)" in shown.text("#detail p")
    assert shown.texts(".line code")[0] == "with model.mxd.ablate({2: [17]}): ..."
    assert f"--steer 2:17={row['maximum']:.3g}" in shown.texts(".line code")[3]
    shown.js("document.querySelector('.chips a').click()")
    shown.until("return document.querySelector('#detail h2').textContent === 'Expert 18'")


def test_without_labels_there_are_no_classes(browser, model, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("report*", "experts"))
    write_catalogue(folder / "experts", AutoTokenizer.from_pretrained(folder, config=LlamaConfig()), {1: 256}, labelled=False)
    shown = Page(browser, Path(report(folder)["page"]), "#expert=0")
    assert shown.texts("#head button") == ["expert", "token", "frequency ▾", "mean", "max"]
    assert shown.js("return [...document.querySelectorAll('#rows [role=row]')].every((row) => row.childNodes.length === 5)")
    assert shown.text("#detail h2") == "Expert 0" and "Classes" not in shown.texts("h3")
    assert "class" not in shown.js("return [...document.getElementById('scope').options].map((option) => option.value)")


def test_a_dead_expert_and_a_wrong_address_are_said(browser, page):
    shown = Page(browser, page, f"#layer=1&expert={DEAD}")
    assert "Never fired on these 1,860 tokens." in shown.text("#detail") and shown.active() == DEAD
    shown = Page(browser, page, "#layer=1&expert=256")
    assert shown.text("[role=alert]") == "Layer 1 has experts 0 to 255, none 256." and shown.listed()
    shown = Page(browser, page, "#layer=<b>7")
    assert shown.text("[role=alert]") == "There is no layer <b>7; there are 1, 2." and shown.listed()


def test_hostile_strings_are_shown_as_text(browser, page):
    complaints(browser)
    shown = Page(browser, page, "#layer=1")
    shown.js("document.querySelector('details').open = true")
    assert HOSTILE[0] in shown.text("#detail details")
    for hostile in HOSTILE[:2]:
        expert = shown.search(hostile, "fires")[0]
        shown = Page(browser, page, f"#layer=1&expert={expert}")
        assert hostile in "".join(shown.texts(".contexts .token"))
        assert CLASSES[0] in shown.texts("[aria-label=Classes] td:first-child")
    assert shown.js("return window.owned ?? null") is None and shown.js("return document.images.length") == 0
    assert shown.js("return document.querySelectorAll('#detail b, #list b, #detail script, header i').length") == 0
    assert complaints(browser) == []


def test_the_files_beside_the_page_serve_as_well(browser, model, tmp_path):
    page = tmp_path / "all of it#.html"
    report(model, out=page, limit_mib=0)
    requested(browser), complaints(browser)
    shown = Page(browser, page, "#layer=2&expert=200")
    assert shown.text("#detail h2") == "Expert 200" and shown.texts(".contexts .own")
    names = {url.rpartition("/")[2] for url in requested(browser)}
    assert names == {"all%20of%20it%23.html", *(f"{name}.js" for name in ("vocabulary", "2-index", "2-1", "text-0"))}
    assert 17 in shown.search("17") and complaints(browser) == []
    (tmp_path / "all of it#-data" / "1-index.js").unlink()
    shown.press("\ue00c", "[")
    alert = shown.until("return document.querySelector('[role=alert]')?.textContent")
    assert alert == "all of it#-data/1-index.js cannot be read: it belongs beside this page."


def test_it_is_dark_where_the_system_is(browser, page):
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (int(n) / 255 for n in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    shown = Page(browser, page, "#layer=1&expert=17")
    probe = (
        "const probe = document.body.appendChild(document.createElement('i')); probe.style.color = `var(--${arguments[0]})`;"
    )
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        names = ("page", "panel", "chosen", "mark", "text", "quiet", "link")
        colours = [shown.js(probe + "return getComputedStyle(probe).color", name) for name in names]
        page_, panel, chosen, mark, text, quiet, link = (luminance(re.findall(r"\d+", colour)) for colour in colours)
        assert (page_ < 0.03) == (scheme == "dark") and (page_ > 0.9) == (scheme == "light")
        ratios = [(max(a, b) + 0.05) / (min(a, b) + 0.05) for b in (page_, panel, chosen) for a in (text, quiet, link)]
        ratios.append((max(mark, text) + 0.05) / (min(mark, text) + 0.05))
        assert min(ratios) >= 4.5, (scheme, ratios)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_controls_have_names_and_roles(browser, page):
    for where in ("#layer=1", "#layer=1&expert=17"):
        Page(browser, page, where)
        tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        nodes = [(node["role"]["value"], node.get("name", {}).get("value")) for node in tree if not node["ignored"]]
        asked = {"button", "link", "searchbox", "combobox", "grid", "region", "img", "table", "columnheader"}
        assert [role for role, name in nodes if role in asked and not name] == []
        assert {("grid", "Experts of layer 1"), ("searchbox", "Search experts"), ("button", "Sort by frequency")} <= set(nodes)
        assert {("navigation", "Layers"), ("link", "Layer 2"), ("combobox", "Where to search")} <= set(nodes)
    focus = "document.getElementById('list').focus(); return getComputedStyle(document.getElementById('list')).outlineStyle"
    Page(browser, page).press("j")
    assert browser.execute_script(focus) == "solid"
