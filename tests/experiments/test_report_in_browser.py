"""The report in a real browser: it draws, moves, fits a phone, and asks the network for nothing."""

import pathlib
import shutil

import pytest
import report_data as made

from experiments import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Plots are there when their data have become curves.
DRAWN = "[...document.querySelectorAll('.area')].every(a => a.querySelector('.scatterlayer path'))"
MANY = {(f"rather_long-name_of-cell_{k}", 0): ("done", k + 1, 0.5) for k in range(9)}
DARK, LIGHT = "rgb(18, 21, 27)", "rgb(246, 247, 249)"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None and not pathlib.Path(playwright.chromium.executable_path).exists():
            pytest.skip("no chromium here")
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("reports")
    run = made.full_run(root / "a run").path
    sweep = made.make_sweep(root / "sweep", made.SWEEP_RUNS | MANY)
    assert report.main([f"--run={run}"]) == report.main([f"--sweep={sweep}"]) == 0
    below = made.make_run(root / "below")  # A bound with nothing above 0, on a logarithmic axis.
    made.add_bound(below, sign=-1)
    assert report.main([f"--run={below.path}"]) == 0
    paths = {"run": run, "sweep": sweep, "below": below.path}
    return {name: path / "report.html" for name, path in paths.items()}


@pytest.fixture(scope="module")
def noise():
    """What any page complained of or asked the network for."""
    return []


@pytest.fixture(autouse=True)
def quiet(noise):
    """Fails a test during which there was any noise."""
    noise.clear()
    yield
    assert noise == []


@pytest.fixture(scope="module")
def visit(browser, pages, noise):
    """A page of the report by its name, or the same again; loading it takes longest."""
    found = {}

    def at(name, width=1200, scheme="light", **more):
        key = (name, width, scheme)
        if key not in found:
            viewport = {"width": width, "height": 800}
            context = browser.new_context(viewport=viewport, color_scheme=scheme, **more)
            found[key] = opened(context, pages[name].as_uri(), noise)
        return found[key]

    return at


def opened(context, url, noise):
    page = context.new_page()
    page.set_default_timeout(120_000)  # However busy the machine is.
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))

    def routed(route):
        if route.request.url == url:
            return route.continue_()
        noise.append(f"asked for {route.request.url[:80]}")
        return route.abort()

    context.route(lambda asked: not asked.startswith("data:"), routed)
    page.goto(url)
    page.wait_for_selector(".area .scatterlayer path")
    assert page.evaluate(DRAWN)
    return page


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def system(page, scheme):
    """Changes the system's theme; the page hears of it with the next frame."""
    page.emulate_media(color_scheme=scheme)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_every_picture_loads_and_no_name_becomes_markup(visit, name):
    page = visit(name)
    widths = page.eval_on_selector_all("img", "all => all.map(i => i.complete && i.naturalWidth)")
    assert len(widths) > 2
    assert all(widths)
    assert page.title() not in ("", "1")


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_phone_shows_it_without_scrolling_sideways(visit, name):
    page = visit(name, width=360, has_touch=True, is_mobile=True)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("innerWidth") == 360
    plot = page.locator(".area").first.bounding_box()
    assert plot["width"] > 280
    assert plot["height"] > 250
    heights = "all => all.map(e => e.getBoundingClientRect().height)"  # Without legend and axes.
    assert min(page.eval_on_selector_all(".area .nsewdrag", heights)) > 180
    assert max(page.eval_on_selector_all(".legend .scrollbar", heights), default=0) == 0


def test_the_slider_changes_the_picture_by_mouse_and_by_keys(visit):
    page = visit("run")
    image, output = page.locator("#x0-path img"), page.locator("#x0-path output")
    slider = page.locator("#x0-path input")
    seen = [image.get_attribute("src")]
    assert output.text_content() == "t = 10"
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    seen.append(image.get_attribute("src"))
    assert (output.text_content(), slider.get_attribute("aria-valuetext")) == ("t = 0", "t = 0")
    page.keyboard.press("ArrowLeft")
    seen.append(image.get_attribute("src"))
    assert output.text_content() == "t = 5"
    assert image.get_attribute("alt").endswith("t = 5")
    assert len(set(seen)) == 3
    page.locator("#x0-path .play").click()
    page.wait_for_selector("#x0-path img[alt$='t = 0']")
    assert image.get_attribute("src") == seen[1]


def test_tab_alone_reaches_everything_that_can_be_set(visit):
    page = visit("run", scheme="dark")  # Where nothing has the focus yet.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    wanted = {"training-samples-range", "x0-path-range", "config-filter", "config-differs"}
    for _ in range(120):
        page.keyboard.press("Tab")
        focus = "document.activeElement"
        wanted.discard(page.evaluate(f"{focus}.id"))
        style = page.evaluate(f"getComputedStyle({focus}).outlineStyle")
        assert style != "none" or page.evaluate(f"{focus} === document.body")
        if not wanted:
            return
    raise AssertionError(f"never reached: {wanted}")


def test_names_of_cells_stand_in_short_lines(visit):
    page = visit("sweep")
    ticks = page.locator("#by-cell .ytick text").all()[::-1]  # From below.
    assert [tick.text_content() for tick in ticks] == [*made.CELLS, *(cell for cell, _ in MANY)]
    lines = [tick.locator("tspan").all_text_contents() for tick in ticks]
    assert lines[1] == ["mu-vlb-learned_", "range"]
    assert max(len(line) for name in lines for line in name) <= 16


def test_a_point_without_an_error_is_hollow(visit):
    page = visit("run")
    marker = "document.querySelector('#bits-per-t .area').data[0].marker.symbol"
    assert page.evaluate(marker) == ["circle"] * 4 + ["circle-open"] + ["circle"] * 4


def test_nothing_above_0_on_a_logarithmic_axis_stops_nothing(visit):
    page = visit("below")
    assert page.evaluate("document.querySelector('#bits-per-t .area').layout.yaxis.type") != "log"
    assert page.locator("#config-count").text_content().startswith("3 of")


def test_a_plot_that_cannot_be_drawn_says_so_and_stops_nothing(browser, pages, tmp_path):
    text = pages["run"].read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace('"choices":[{', '"choices":[3,{', 1))
    page = browser.new_page()
    page.goto(broken.as_uri())
    page.wait_for_selector("#bits-per-t .scatterlayer path")
    assert page.locator("#loss .area").text_content().startswith("This plot cannot be drawn")
    assert page.locator("#config-count").text_content().startswith("3 of")
    page.close()


def test_plots_zoom_and_change_axes_by_keys(visit):
    page = visit("run")
    area = "document.querySelector('#loss .area').layout"
    tools = page.locator("#loss .tools button")
    whole = page.evaluate(f"{area}.xaxis.range")
    tools.first.focus()
    page.keyboard.press("Enter")
    near = page.evaluate(f"{area}.xaxis.range")
    assert near[1] - near[0] == pytest.approx((whole[1] - whole[0]) / 2)
    assert page.locator("#live").text_content().startswith("From")
    for _ in range(10):  # One stop of Tab: arrows go on from button to button.
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "log y"
    assert page.evaluate(f"{area}.yaxis.type") == "log"
    page.keyboard.press("Space")
    assert page.evaluate(f"{area}.yaxis.type") != "log"
    assert tools.last.get_attribute("aria-pressed") == "false"


def test_the_theme_is_the_systems_until_chosen_and_plots_follow(visit):
    page = visit("run", scheme="dark")
    color = "document.querySelector('#loss .area').layout.font.color"
    assert background(page) == DARK
    dark = page.evaluate(color)
    page.locator("#theme").click()
    assert background(page) == LIGHT
    assert page.evaluate(color) != dark
    page.reload()
    assert background(page) == LIGHT
    for scheme in ("light", "dark"):
        system(page, scheme)
        assert background(page) == LIGHT  # The reader has chosen.
    page.locator("#theme").click()
    assert (background(page), page.evaluate(color)) == (DARK, dark)
    page.evaluate("localStorage.clear()")
    for scheme, expected in (("light", LIGHT), ("dark", DARK)):
        system(page, scheme)
        assert background(page) == expected


def test_another_result_is_chosen_and_the_config_filtered(visit):
    sweep = visit("sweep")
    title = "document.querySelector('#by-cell .area').layout.xaxis.title.text"
    assert sweep.evaluate(title) == "rate_test"
    sweep.locator("#by-cell-choice").select_option("outside")
    assert sweep.evaluate(title) == "outside"
    run = visit("run")
    shown = run.locator("#config-table tbody tr:visible")
    assert shown.count() == 3
    run.locator("#config-differs").uncheck()
    assert shown.count() > 50
    run.locator("#config-filter").fill("learning rate RISES")
    assert [text.split()[0] for text in shown.all_inner_texts()] == ["train.warmup_steps"]
